"""What a model is worth: metrics, search, fidelity to its teacher, cost, and whether a gain is luck."""

from distill.evaluation.cost import queries_per_second, size_in_mb
from distill.evaluation.evaluate import Evaluation, check_measurable, evaluate_model, tells_classes
from distill.evaluation.fidelity import fidelity
from distill.evaluation.metrics import (
    Qrels,
    RankingResult,
    Run,
    classified,
    fit_threshold,
    higher_is_better,
    pairs,
    parse_metric,
    ranking,
)
from distill.evaluation.scoring import PairScorer, score_listed
from distill.evaluation.search import search, top
from distill.evaluation.significance import Comparison, compare

__all__ = [
    "Comparison",
    "Evaluation",
    "PairScorer",
    "Qrels",
    "RankingResult",
    "Run",
    "check_measurable",
    "classified",
    "compare",
    "evaluate_model",
    "fidelity",
    "fit_threshold",
    "higher_is_better",
    "pairs",
    "parse_metric",
    "queries_per_second",
    "ranking",
    "score_listed",
    "search",
    "size_in_mb",
    "tells_classes",
    "top",
]
