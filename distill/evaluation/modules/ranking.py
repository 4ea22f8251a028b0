"""``distill.evaluation.ranking`` as an `evaluate` module; ``evaluate.load`` takes this file too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate

from distill.evaluation.metrics import Catalogue, Qrels, Run, ranking

_INPUTS = """
Args:
    predictions: One per query: {"candidates": ids, "scores": floats}, in any order.
    references: One per query: {"candidates": ids, "labels": whole numbers}; above 0 means relevant.
    metrics: Names as ir_measures prints them, or its other names: nDCG@10, MRR@10, Recall@100, MAP; or of
        the catalogue: Coverage@10, AveragePopularity@10, Recall(cold=5)@10.
    popularity: For these, how often each candidate of the catalogue was chosen in training, by id.

Returns:
    The mean of each metric over the queries that have a relevant candidate.

Example:
    >>> Ranking().compute(
    ...     predictions=[{"candidates": ["a", "b"], "scores": [0.2, 0.7]}],
    ...     references=[{"candidates": ["a"], "labels": [1]}],
    ...     metrics=["MRR@10"],
    ... )
    {'MRR@10': 0.5}
"""


class Ranking(evaluate.Metric):
    __doc__ = "Metrics of ranked candidates; each example is one query.\n" + _INPUTS

    def _info(self) -> evaluate.MetricInfo:
        ids, numbers = datasets.List(datasets.Value("string")), datasets.List(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="Metrics of ranked candidates: nDCG, MRR, Recall, MAP and others of ir_measures.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                predictions={"candidates": ids, "scores": numbers},
                references={"candidates": ids, "labels": numbers},
            ),
            reference_urls=["https://ir-measur.es"],
        )

    def _compute(
        self,
        predictions: Sequence[dict[str, Any]],
        references: Sequence[dict[str, Any]],
        metrics: Sequence[str] = ("nDCG@10",),
        popularity: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        run, qrels = _columns(predictions, "scores"), _columns(references, "labels")
        catalogue = None if popularity is None else Catalogue(list(popularity), list(popularity.values()))
        return ranking(Run(*run), Qrels(*qrels), metrics, catalogue).means


def _columns(rows: Sequence[dict[str, Any]], values: str) -> tuple[list[int], list[str], list[float]]:
    """Queries (by position), candidates and values, end to end."""
    entries = [
        (query, *entry)
        for query, row in enumerate(rows)
        for entry in zip(row["candidates"], row[values], strict=True)
    ]
    queries, candidates, numbers = zip(*entries, strict=True) if entries else ((), (), ())
    return list(queries), list(candidates), list(numbers)
