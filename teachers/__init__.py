"""Models that teach: accurate, and too slow to serve."""

from teachers.colbert import ColBERT
from teachers.cross_encoder import CrossEncoder
from teachers.gradient_boosting import GradientBoosting
from teachers.privileged_ranker import PrivilegedRanker
from teachers.recorded import Recorded

__all__ = ["ColBERT", "CrossEncoder", "GradientBoosting", "PrivilegedRanker", "Recorded"]
