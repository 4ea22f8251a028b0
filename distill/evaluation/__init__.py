"""What a model is worth: metrics, search, fidelity to its teacher, cost, and whether a gain is luck."""

from distill.evaluation.cost import latency, queries_per_second, size_in_mb
from distill.evaluation.evaluate import Evaluation, check_measurable, evaluate_model, tells_classes
from distill.evaluation.fidelity import fidelity
from distill.evaluation.metrics import (
    Catalogue,
    Qrels,
    RankingResult,
    Run,
    higher_is_better,
    merit,
    parse_metric,
    ranking,
)
from distill.evaluation.pair_metrics import classified, fit_threshold, pairs
from distill.evaluation.references import REFERENCES, evaluate_reference
from distill.evaluation.scoring import PairScorer, score_listed
from distill.evaluation.search import search, top
from distill.evaluation.significance import Comparison, compare, detectable, holm, power

__all__ = [
    "REFERENCES",
    "Catalogue",
    "Comparison",
    "Evaluation",
    "PairScorer",
    "Qrels",
    "RankingResult",
    "Run",
    "check_measurable",
    "classified",
    "compare",
    "detectable",
    "evaluate_model",
    "evaluate_reference",
    "fidelity",
    "fit_threshold",
    "higher_is_better",
    "holm",
    "merit",
    "pairs",
    "parse_metric",
    "power",
    "latency",
    "queries_per_second",
    "ranking",
    "score_listed",
    "search",
    "size_in_mb",
    "tells_classes",
    "top",
]
