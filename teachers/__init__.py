"""Models that teach: accurate, and too slow to serve."""

from teachers.colbert import ColBERT
from teachers.cross_encoder import CrossEncoder
from teachers.recorded import Recorded

__all__ = ["ColBERT", "CrossEncoder", "Recorded"]
