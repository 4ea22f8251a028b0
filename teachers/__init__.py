"""Models that teach: accurate, and too slow to serve."""

from teachers.colbert import ColBERT
from teachers.concatenation import Concatenation
from teachers.cross_embedding import CrossEmbedding
from teachers.cross_encoder import CrossEncoder
from teachers.ensemble import Ensemble
from teachers.gradient_boosting import GradientBoosting
from teachers.privileged_ranker import PrivilegedRanker
from teachers.recorded import Recorded

__all__ = [
    "ColBERT",
    "Concatenation",
    "CrossEmbedding",
    "CrossEncoder",
    "Ensemble",
    "GradientBoosting",
    "PrivilegedRanker",
    "Recorded",
]
