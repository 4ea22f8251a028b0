"""What an arrow computes: one file per method, all of them under the contract in ``base.py``."""

from distill.objectives.base import Loss as Loss
from distill.objectives.base import Objective as Objective
from distill.objectives.binary_cross_entropy import BinaryCrossEntropy
from distill.objectives.cross_entropy import CrossEntropy
from distill.objectives.embedding_match import EmbeddingMatch
from distill.objectives.geometry_alignment import GeometryAlignment
from distill.objectives.margin_mse import MarginMSE
from distill.objectives.pointwise_score import PointwiseScore
from distill.objectives.ranknet import RankNet
from distill.objectives.sampled_softmax import SampledSoftmax
from distill.objectives.score_kl import ScoreKL

__all__ = [
    "BinaryCrossEntropy",
    "CrossEntropy",
    "EmbeddingMatch",
    "GeometryAlignment",
    "MarginMSE",
    "PointwiseScore",
    "RankNet",
    "SampledSoftmax",
    "ScoreKL",
]
