"""``distill.evaluation.pairs`` as an `evaluate` module; ``evaluate.load`` takes this file too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from distill.evaluation.pair_metrics import pairs

_INPUTS = """
Args:
    predictions: One score per pair.
    references: One label per pair: graded for Spearman and Pearson, 0 or 1 for the others.
    metrics: Of Spearman, Pearson, AUC, GAUC, Accuracy, F1, Logloss, ECE and Calibration.
    threshold: Where Accuracy and F1 begin to say yes; see ``distill.evaluation.fit_threshold``.
    groups: Which user each pair belongs to, for GAUC.

Returns:
    The value of each metric.

Example:
    >>> Pairs().compute(predictions=[0.9, 0.8, 0.1], references=[1, 0, 0], metrics=["AUC"])
    {'AUC': 1.0}
"""


class Pairs(evaluate.Metric):
    __doc__ = "Metrics of scored pairs; each example is one pair.\n" + _INPUTS

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Metrics of scored pairs: correlations, AUC, GAUC, Accuracy, F1, Logloss, ECE.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                predictions=datasets.Value("float32"), references=datasets.Value("float32")
            ),
        )

    def _compute(
        self,
        predictions: Sequence[float],
        references: Sequence[float],
        metrics: Sequence[str] = ("Spearman",),
        threshold: float | None = None,
        groups: Sequence[Any] | None = None,
    ) -> dict[str, float]:
        return pairs(predictions, references, metrics, threshold, groups)
