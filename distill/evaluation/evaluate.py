"""Measure a model on a judged split: search, re-ranking or pairs. Next: ``scoring.py``, ``metrics.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from distill.data.judged import Judged
from distill.errors import DataError, RecipeError
from distill.evaluation import metrics as plain
from distill.evaluation.scoring import (
    PairScorer,
    can_search,
    encodes_apart,
    first_of_bm25,
    id_rank,
    query_of,
    score,
    score_listed,
    searched,
)
from distill.model import Encoder


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on how many queries (or pairs), and what was left out and why."""

    name: str  # of the split
    task: str
    method: str  # how candidates were found and scored, in words
    means: dict[str, float]
    per_query: (
        pd.DataFrame
    )  # query, a column per metric; pairs: query, candidate, score (or class), label, Accuracy if asked
    queries: int  # how many the means are over
    left_out: Mapping[str, int] = field(default_factory=dict)  # reason -> how many
    threshold: float | None = None  # of Accuracy and F1

    def to_json(self) -> dict[str, Any]:
        """Everything but the values per query, as plain types; an undefined mean (nan) is None."""
        means = {name: None if np.isnan(value) else value for name, value in self.means.items()}
        plain_fields = {
            name: getattr(self, name) for name in ("name", "task", "method", "queries", "threshold")
        }
        return plain_fields | {"metrics": means, "left_out": dict(self.left_out)}


def evaluate_model(
    model: Encoder | PairScorer,
    judged: Judged,
    metrics: Sequence[str],
    *,
    top_k: int = 1000,
    rerank: int = 100,
    rerank_from: Encoder | None = None,
    threshold_from: Judged | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure a model as the task of ``judged`` asks for.

    retrieval: an Encoder searches all candidates; another model re-ranks the best of a first stage.
    rerank: the listed candidates are put in order. pairs: each listed pair gets a score. Equal scores
    are ordered by candidate id. Each distinct text is encoded once, each distinct pair scored once.
    Queries without a relevant candidate are left out, and counted in the result.

    Args:
        model: An Encoder of one vector per text, or anything with ``score_pairs``. Pairs whose labels are
            more than two classes need one that gives logits of them.
        judged: The split; its labels are what is measured against.
        metrics: Names; see ``parse_metric`` for rankings and ``PAIR_METRICS`` for pairs.
        top_k: How deep to search for metrics without a cutoff, as MAP.
        rerank: How many candidates of the first stage a model re-ranks that cannot search.
        rerank_from: The first stage of such a model; None: BM25.
        threshold_from: The development split on which the threshold of Accuracy and F1 is fitted.
        progress: Show bars.
    """
    check_measurable(judged, metrics, threshold_from)
    if not encodes_apart(model) and not hasattr(model, "score_pairs"):
        raise TypeError(f"{type(model).__name__} can neither encode texts for a search nor score pairs.")
    if judged.task == "pairs":
        return _evaluate_pairs(model, judged, metrics, threshold_from, progress)
    kept, left_out = _with_positive(judged)
    if judged.task == "rerank":
        entries = torch.isin(query_of(judged.listed), kept)
        query, candidate = query_of(judged.listed)[entries], judged.listed.values[entries]
        query, candidate = _distinct(query, candidate, len(judged.candidates))
        method = "listed candidates in order of score"
        scores = score(model, judged, query, candidate, progress)
    elif can_search(model):
        method = "exact search over all candidates"
        depth = plain.cutoff(metrics, default=top_k)
        query, candidate, scores = searched(model, judged, kept, depth, progress)
    else:
        first = type(rerank_from).__name__ if rerank_from is not None else "BM25"
        method = f"first {min(rerank, len(judged.candidates))} of {first}, re-ranked"
        if rerank_from is not None:
            query, candidate, _ = searched(rerank_from, judged, kept, rerank, progress)
        else:
            query, candidate = first_of_bm25(judged, kept, rerank)
        scores = score(model, judged, query, candidate, progress)
    result = plain.ranking(
        plain.Run(query.numpy(), id_rank(judged.candidates)[candidate].numpy(), scores.numpy()),
        _qrels(judged, kept),
        metrics,
    )
    per_query = result.per_query.assign(query=[judged.queries.ids[row] for row in result.per_query["query"]])
    return Evaluation(judged.name, judged.task, method, result.means, per_query, len(per_query), left_out)


def check_measurable(judged: Judged, metrics: Sequence[str], threshold_from: Judged | None = None) -> None:
    """Refuse, before any work, a split or metrics that ``evaluate_model`` could not measure."""
    if judged.task == "texts":
        raise DataError(f"{judged.name or 'the split'} has texts only: there is nothing to measure on it.")
    labels = _labels(judged)
    if judged.task == "pairs":
        plain.check_pair_metrics(metrics)
        if tells_classes(judged, metrics):
            plain.check_class_metrics(metrics)
            return
        if plain.needs_threshold(metrics):
            if threshold_from is None:
                raise RecipeError(
                    "Accuracy and F1 need a threshold, fitted on another split: give threshold_from a "
                    "labelled development split, or take these metrics out."
                )
            known = _labels(threshold_from).numpy()
            plain.fit_threshold(known, known)
        plain.pairs(
            labels.numpy(), labels.numpy(), metrics, 0.5
        )  # refuses labels that these metrics cannot read
        return
    for name in metrics:
        plain.parse_metric(name)
    _with_positive(judged)
    if len(fractions := (labels != labels.round()).nonzero()[:, 0]):
        row = int(fractions[0])
        query = judged.queries.ids[int(query_of(judged.listed)[row])]
        raise DataError(
            f"{judged.name or 'the split'}: the label of query '{query}' and candidate "
            f"'{judged.candidates.ids[int(judged.listed.values[row])]}' is {labels[row]:g}; ranking metrics "
            f"need whole numbers: 0 for not relevant, 1 or more for relevant."
        )


def tells_classes(judged: Judged, metrics: Sequence[str]) -> bool:
    """Whether classes are measured, and the labels are of more than two: logits must tell them."""
    several = judged.task == "pairs" and plain.several_classes(_labels(judged).numpy())
    return several and not set(plain.CLASS_METRICS).isdisjoint(metrics)


def _evaluate_pairs(
    model: Encoder | PairScorer, judged: Judged, metrics: Sequence[str], dev: Judged | None, progress: bool
) -> Evaluation:
    scores, labels = score_listed(model, judged, progress).numpy(), _labels(judged).numpy()
    threshold = None
    if several := scores.ndim == 2:  # logits of a classifier, which decides by the largest
        means = plain.classified(scores, labels, metrics)
        scores = scores.argmax(axis=1)
    else:
        if dev is not None and plain.needs_threshold(metrics):
            threshold = plain.fit_threshold(score_listed(model, dev, progress).numpy(), _labels(dev).numpy())
        means = plain.pairs(scores, labels, metrics, threshold)
    per_query = pd.DataFrame(
        {
            "query": [judged.queries.ids[row] for row in query_of(judged.listed).tolist()],
            "candidate": [judged.candidates.ids[row] for row in judged.listed.values.tolist()],
            "score": scores,
            "label": labels,
        }
    )
    if "Accuracy" in metrics and several:
        per_query["Accuracy"] = (scores == labels).astype(float)
    elif "Accuracy" in metrics and threshold is not None:
        per_query["Accuracy"] = ((scores.astype(np.float64) >= threshold) == (labels > 0)).astype(float)
    method = "the likeliest class per pair" if several else "a score per pair"
    return Evaluation(judged.name, "pairs", method, means, per_query, len(scores), {}, threshold)


def _labels(judged: Judged) -> Tensor:
    if judged.labels is None:
        raise DataError(f"{judged.name or 'the split'} has no labels: there is nothing to measure against.")
    return judged.labels


def _with_positive(judged: Judged) -> tuple[Tensor, dict[str, int]]:
    """Rows of the queries with a relevant candidate, and how many others there are, by reason."""
    positives = torch.zeros(len(judged.queries), dtype=torch.int64)
    positives.index_add_(0, query_of(judged.listed), (_labels(judged) > 0).long())
    judgements = judged.listed.lengths
    kept = (positives > 0).nonzero()[:, 0]
    if not len(kept):
        raise DataError(f"{judged.name or 'the split'}: no query has a relevant candidate (a label above 0).")
    no_judgement = int((judgements == 0).sum())
    return kept, {
        "no judgement": no_judgement,
        "no relevant candidate": len(judged.queries) - len(kept) - no_judgement,
    }


def _distinct(query: Tensor, candidate: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Each pair once: a candidate that a query lists twice is still ranked once."""
    pair = torch.unique(query * candidates + candidate)
    return pair // candidates, pair % candidates


def _qrels(judged: Judged, kept: Tensor) -> plain.Qrels:
    query = query_of(judged.listed)
    entries = torch.isin(query, kept)
    candidate = id_rank(judged.candidates)[judged.listed.values[entries]]
    return plain.Qrels(query[entries].numpy(), candidate.numpy(), _labels(judged)[entries].numpy())
