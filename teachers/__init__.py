"""Models that teach: accurate, and too slow to serve."""

from teachers.concatenation import Concatenation
from teachers.cross_encoder import CrossEncoder
from teachers.ensemble import Ensemble
from teachers.recorded import Recorded

__all__ = ["Concatenation", "CrossEncoder", "Ensemble", "Recorded"]
