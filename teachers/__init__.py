"""Models that teach: accurate, and too slow to serve."""

from teachers.cross_encoder import CrossEncoder

__all__ = ["CrossEncoder"]
