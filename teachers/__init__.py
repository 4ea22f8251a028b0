"""Models that teach: accurate, and too slow to serve."""

from teachers.cross_embedding import CrossEmbedding
from teachers.cross_encoder import CrossEncoder
from teachers.recorded import Recorded

__all__ = ["CrossEmbedding", "CrossEncoder", "Recorded"]
