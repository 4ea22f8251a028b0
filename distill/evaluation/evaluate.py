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
from distill.evaluation import pair_metrics
from distill.evaluation.scoring import (
    Measured,
    VectorScorer,
    can_search,
    encodes_apart,
    first_of_bm25,
    id_rank,
    placed,
    query_of,
    score,
    score_listed,
    searched,
    searches_tokens,
)


@dataclass(frozen=True)
class Evaluation:
    """What was measured, on how many queries (or pairs), and what was left out and why."""

    name: str  # of the split
    task: str
    method: str  # how candidates were found and scored, in words
    means: dict[str, float]
    per_query: pd.DataFrame  # query, a column per metric; see evaluate_model for pairs
    queries: int  # how many queries, or pairs, the means are over
    left_out: Mapping[str, int] = field(default_factory=dict)  # reason -> how many
    threshold: float | None = None  # of Accuracy and F1
    asked: int | None = None  # about how many texts and pairs; the others were in the store. None: about all

    def to_json(self) -> dict[str, Any]:
        """Everything but the values per query, as plain types; an undefined mean (nan) is None."""
        means = {name: None if np.isnan(value) else value for name, value in self.means.items()}
        plain_fields = {
            name: getattr(self, name) for name in ("name", "task", "method", "queries", "threshold", "asked")
        }
        return plain_fields | {"metrics": means, "left_out": dict(self.left_out)}


def evaluate_model(
    model: Measured,
    judged: Judged,
    metrics: Sequence[str],
    *,
    top_k: int = 1000,
    rerank: int = 100,
    rerank_from: VectorScorer | None = None,
    threshold_from: Judged | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure a model as the task of ``judged`` asks for.

    retrieval: an Encoder searches all candidates but those that a query has seen; another model re-ranks
    the best of a first stage. rerank: the listed candidates are put in order. pairs: each listed pair gets a
    score. Equal scores are ordered by candidate id. Each distinct content is encoded once, each distinct pair
    scored once. Queries without a relevant candidate are left out, and counted in the result.

    Of pairs, ``per_query`` has a row per pair (query, candidate, score, label, Accuracy if asked), or, where
    the split says which user a query belongs to or GAUC is asked, a row per user (query, weight, and what of
    the metrics is a weighted mean over users).

    Args:
        model: An Encoder whose vectors are compared by dot product, or by its own ``score_encoded``, or
            anything with ``score_pairs``; if it has a vector per token, it searches by them. Pairs whose
            labels are more than two classes need one that gives logits of them.
        judged: The split; its labels are what is measured against.
        metrics: Names; see ``parse_metric`` for rankings and ``PAIR_METRICS`` for pairs.
        top_k: How deep to search for metrics without a cutoff, as MAP.
        rerank: How many candidates of the first stage a model re-ranks that cannot search.
        rerank_from: The first stage of such a model; None: BM25.
        threshold_from: The development split on which the threshold of Accuracy and F1 is fitted.
        progress: Show bars.
    """
    check_measurable(judged, metrics, threshold_from)
    if not can_search(model) and not encodes_apart(model) and not hasattr(model, "score_pairs"):
        raise TypeError(f"{type(model).__name__} can neither encode rows for a search nor score pairs.")
    if judged.task == "pairs":
        return _evaluate_pairs(model, judged, metrics, threshold_from, progress)
    kept, left_out = _with_positive(judged)
    places = None
    if judged.task == "rerank":
        entries = _distinct_of(judged, torch.isin(query_of(judged.listed), kept))
        query, candidate = query_of(judged.listed)[entries], judged.listed.values[entries]
        method = "listed candidates in order of score"
        pair = {name: column[entries] for name, column in judged.pair.items()}
        scores = score(model, judged, query, candidate, progress, pair)
    elif can_search(model) or searches_tokens(model):
        method = "exact search over all candidates" + (", seen left out" if judged.seen is not None else "")
        depth = plain.cutoff(metrics, default=top_k)
        query, candidate, scores, places = _found(model, judged, kept, metrics, depth, progress)
    else:
        first = type(rerank_from).__name__ if rerank_from is not None else "BM25"
        method = f"first {min(rerank, len(judged.candidates))} of {first}, re-ranked"
        if rerank_from is not None:
            query, candidate, _ = searched(rerank_from, judged, kept, rerank, progress)
        else:
            query, candidate = first_of_bm25(judged, kept, rerank)
        scores = score(model, judged, query, candidate, progress)
    place_of = id_rank(judged.candidates)  # ties are decided by it
    entries = torch.isin(query_of(judged.listed), kept)
    result = plain.ranking(
        plain.Run(query.numpy(), place_of[candidate].numpy(), scores.numpy(), places),
        plain.Qrels(
            query_of(judged.listed)[entries].numpy(),
            place_of[judged.listed.values[entries]].numpy(),
            _labels(judged)[entries].numpy(),
        ),
        metrics,
        _catalogue(judged, place_of),
    )
    per_query = result.per_query.assign(query=[judged.queries.ids[row] for row in result.per_query["query"]])
    return Evaluation(judged.name, judged.task, method, result.means, per_query, len(per_query), left_out)


def check_measurable(judged: Judged, metrics: Sequence[str], threshold_from: Judged | None = None) -> None:
    """Refuse, before any work, a split or metrics that ``evaluate_model`` could not measure."""
    where = judged.name or "the split"
    if judged.task == "texts":
        raise DataError(f"{where} has texts only: there is nothing to measure on it.")
    labels = _labels(judged)
    if judged.task == "pairs":
        pair_metrics.check_pair_metrics(metrics)
        if tells_classes(judged, metrics):
            pair_metrics.check_class_metrics(metrics)
            return
        if pair_metrics.needs_threshold(metrics):
            if threshold_from is None:
                raise RecipeError(
                    "Accuracy and F1 need a threshold, fitted on another split: give threshold_from a "
                    "labelled development split, or take these metrics out."
                )
            known = _labels(threshold_from).numpy()
            pair_metrics.fit_threshold(known, known)
        # refuses labels that these metrics cannot read
        pair_metrics.pairs(labels.numpy(), labels.numpy(), metrics, 0.5, _users(judged).numpy())
        return
    known_as = {metric: plain.ranking_metric(metric) for metric in metrics}
    plain.check_catalogue(known_as, _catalogue(judged, torch.empty(0)))
    _with_positive(judged)
    if len(fractions := (labels != labels.round()).nonzero()[:, 0]):
        row = int(fractions[0])
        query = judged.queries.ids[int(query_of(judged.listed)[row])]
        raise DataError(
            f"{where}: the label of query '{query}' and candidate "
            f"'{judged.candidates.ids[int(judged.listed.values[row])]}' is {labels[row]:g}; ranking metrics "
            f"need whole numbers: 0 for not relevant, 1 or more for relevant."
        )
    if judged.task == "retrieval" and judged.seen is not None:
        n = len(judged.candidates)
        wanted = (query_of(judged.listed) * n + judged.listed.values)[labels > 0].sort().values
        seen = query_of(judged.seen) * n + judged.seen.values
        place = torch.searchsorted(wanted, seen).clamp(max=len(wanted) - 1)
        if len(lost := seen[wanted[place] == seen]):
            user, item = int(lost[0]) // n, int(lost[0]) % n
            raise DataError(
                f"{where}: query '{judged.queries.ids[user]}' has seen candidate "
                f"'{judged.candidates.ids[item]}', which is relevant to it, so a search that leaves out "
                f"what was seen cannot find it; take it out of `seen`."
            )


def tells_classes(judged: Judged, metrics: Sequence[str]) -> bool:
    """Whether classes are measured, and the labels are of more than two: logits must tell them."""
    several = judged.task == "pairs" and pair_metrics.several_classes(_labels(judged).numpy())
    return several and not set(pair_metrics.CLASS_METRICS).isdisjoint(metrics)


def _evaluate_pairs(
    model: Measured, judged: Judged, metrics: Sequence[str], dev: Judged | None, progress: bool
) -> Evaluation:
    scores, labels = score_listed(model, judged, progress).numpy(), _labels(judged).numpy()
    if scores.ndim == 2:
        return _evaluate_classes(scores, labels, judged, metrics)
    threshold = None
    if dev is not None and pair_metrics.needs_threshold(metrics):
        threshold = pair_metrics.fit_threshold(
            score_listed(model, dev, progress).numpy(), _labels(dev).numpy()
        )
    users, left_out = _users(judged).numpy(), dict[str, int]()
    means = pair_metrics.pairs(scores, labels, metrics, threshold, users)
    if judged.groups is not None or "GAUC" in metrics:
        per_query = pair_metrics.per_user(scores, labels, metrics, users, threshold)
        if "GAUC" in metrics:
            left_out = {"users with labels of one kind, of GAUC": int(per_query["GAUC"].isna().sum())}
    else:
        per_query = _per_pair(judged, scores, labels)
        if "Accuracy" in metrics and threshold is not None:
            per_query["Accuracy"] = ((scores.astype(np.float64) >= threshold) == (labels > 0)).astype(float)
    method = "a score per pair"
    return Evaluation(judged.name, "pairs", method, means, per_query, len(scores), left_out, threshold)


def _found(
    model: VectorScorer, judged: Judged, kept: Tensor, metrics: Sequence[str], depth: int, progress: bool
) -> tuple[Tensor, Tensor, Tensor, np.ndarray | None]:
    """What a search finds: rows of queries, of candidates, scores; and places, where only those of relevant
    candidates are asked for and told, with their negatives for scores."""
    own = bool((judged.candidates.same == torch.arange(len(judged.candidates))).all())
    if not own or not can_search(model) or any(plain.ranking_metric(m).needs_all for m in metrics):
        return *searched(model, judged, kept, depth, progress), None
    entries = _distinct_of(judged, _labels(judged) > 0)
    query, candidate = query_of(judged.listed)[entries], judged.listed.values[entries]
    place = placed(model, judged, query, candidate, progress)
    first = place < depth
    return query[first], candidate[first], -place[first].float(), place[first].numpy()


def _evaluate_classes(
    logits: np.ndarray, labels: np.ndarray, judged: Judged, metrics: Sequence[str]
) -> Evaluation:
    """By logits [n, C] of a classifier, which decides by the largest: its class stands as the score."""
    means, told = pair_metrics.classified(logits, labels, metrics), logits.argmax(axis=1)
    per_query = _per_pair(judged, told, labels)
    if "Accuracy" in metrics:
        per_query["Accuracy"] = (told == labels).astype(float)
    return Evaluation(judged.name, "pairs", "the likeliest class per pair", means, per_query, len(told))


def _per_pair(judged: Judged, scores: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "query": [judged.queries.ids[row] for row in query_of(judged.listed).tolist()],
            "candidate": [judged.candidates.ids[row] for row in judged.listed.values.tolist()],
            "score": scores,
            "label": labels,
        }
    )


def _users(judged: Judged) -> Tensor:
    """Which user each listed pair belongs to [T]; where the split does not say, its query."""
    query = query_of(judged.listed)
    return query if judged.groups is None else judged.groups[query]


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


def _distinct_of(judged: Judged, wanted: Tensor) -> Tensor:
    """The wanted entries [T] of what is listed, each pair once: what is listed twice is still ranked once."""
    entries = wanted.nonzero()[:, 0]
    pair = (query_of(judged.listed) * len(judged.candidates) + judged.listed.values)[entries]
    return entries[torch.from_numpy(np.unique(pair.numpy(), return_index=True)[1])]


def _catalogue(judged: Judged, place_of: Tensor) -> plain.Catalogue:
    popularity = None if judged.popularity is None else judged.popularity.numpy()
    return plain.Catalogue(place_of.numpy(), popularity)
