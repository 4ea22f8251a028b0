"""What an arrow computes: one file per method, all of them under the contract in ``base.py``."""

from distill.objectives.attention_kl import AttentionKL
from distill.objectives.attention_mse import AttentionMSE
from distill.objectives.base import Loss as Loss
from distill.objectives.base import Objective as Objective
from distill.objectives.binary_cross_entropy import BinaryCrossEntropy
from distill.objectives.bpr import BPR
from distill.objectives.calibrated_list import CalibratedList
from distill.objectives.cross_entropy import CrossEntropy
from distill.objectives.embedding_match import EmbeddingMatch
from distill.objectives.geometry_alignment import GeometryAlignment
from distill.objectives.guided_softmax import GuidedSoftmax
from distill.objectives.hinge import Hinge
from distill.objectives.lambda_mrr import LambdaMRR
from distill.objectives.layer_score_kl import LayerScoreKL
from distill.objectives.margin_mse import MarginMSE
from distill.objectives.pointwise_score import PointwiseScore
from distill.objectives.ranknet import RankNet
from distill.objectives.relative_order import RelativeOrder
from distill.objectives.sampled_softmax import SampledSoftmax
from distill.objectives.score_kl import ScoreKL
from distill.objectives.similarity_match import SimilarityMatch

__all__ = [
    "AttentionKL",
    "AttentionMSE",
    "BPR",
    "BinaryCrossEntropy",
    "CalibratedList",
    "CrossEntropy",
    "EmbeddingMatch",
    "GeometryAlignment",
    "GuidedSoftmax",
    "Hinge",
    "LambdaMRR",
    "LayerScoreKL",
    "MarginMSE",
    "PointwiseScore",
    "RankNet",
    "RelativeOrder",
    "SampledSoftmax",
    "ScoreKL",
    "SimilarityMatch",
]
