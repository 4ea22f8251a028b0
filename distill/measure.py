"""How the models of a recipe are measured, and what ``metrics.json`` says of one. Next: ``evaluation/``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from distill.data.judged import Judged, TextTable
from distill.errors import RecipeError
from distill.evaluation import (
    Evaluation,
    evaluate_model,
    latency,
    queries_per_second,
    size_in_mb,
    tells_classes,
)
from distill.evaluation.scoring import can_search, pair_columns
from distill.evaluation.stored import stored
from distill.model import Encoder, Model
from distill.settings import EvaluateSettings

TIMED = 512  # queries whose encoding is timed
ALONE = 50  # of these, each by itself


def can_be_measured(model: Model) -> bool:
    """Whether it can search, or at least put candidates in order, by what it knows when it serves."""
    scorer = hasattr(model, "score_pairs") and bool(model.provides & {"scores", "classes"})
    return model.measurable and (isinstance(model, Encoder) or scorer)


def why_not(model: Model, judged: Judged, first: Model | None = None, metrics: Sequence[str] = ()) -> str:
    """Why a model cannot be measured on a split, in words that begin with the model's class; "" if it can.

    ``first`` finds the candidates that a model re-ranks which cannot search; None: BM25, which reads texts.
    ``metrics`` are what is to be measured.
    """
    kind, known = type(model).__name__, ", ".join(sorted(model.provides))
    several = tells_classes(judged, metrics)
    by_classes = not isinstance(model, Encoder) and "scores" not in model.provides
    if not can_be_measured(model) or (by_classes and not several):
        return f"a {kind} provides only {known}, from which nothing can be ranked"
    if several and not by_classes:
        return f"a {kind} gives a score, and the labels are of more than two classes"
    if can_search(model) or judged.task != "retrieval":
        return ""
    if columns := pair_columns(model):
        return f"a {kind} reads features of a listed pair ({', '.join(columns)}), which a search cannot know"
    texts = isinstance(judged.queries, TextTable) and judged.seen is None
    if not texts and not (first is not None and can_search(first)):
        return f"a {kind} cannot search, and nothing finds the candidates that it could re-rank"
    return ""


def measure(
    model: Model,
    judged: Judged,
    settings: EvaluateSettings,
    dev: Judged | None,
    progress: bool = False,
    first: Model | None = None,
    latest: dict[bytes, Tensor] | None = None,
) -> Evaluation:
    """Measure a model as the ``evaluate`` section of a recipe says; frozen teachers of texts by the store.

    Args:
        dev: Gives the thresholds.
        first: Finds, where these are no texts, the candidates that a model re-ranks which cannot search.
        latest: Holds the vectors of texts that a model which learns has searched last.
    """
    if problem := why_not(model, judged, first, settings.metrics):
        raise RecipeError(f"{problem}; measure it on listed candidates.")
    texts = isinstance(judged.queries, TextTable)
    measured = stored(model, judged.task == "retrieval", latest) if texts else model
    evaluation = evaluate_model(
        cast(Encoder, measured),  # or a PairScorer
        judged,
        settings.metrics,
        rerank=settings.rerank,
        rerank_from=None if texts or not can_search(first) else first,
        threshold_from=dev,
        progress=progress,
    )
    return replace(evaluation, asked=getattr(measured, "asked", None))


def entry_of(model: Model, evaluation: Evaluation | None, judged: Judged | None) -> dict[str, Any]:
    """Size, metrics, and how fast it encodes queries, many and one: what ``metrics.json`` says of a model."""
    entry: dict[str, Any] = {"size_mb": round(size_in_mb(model), 3)}
    if evaluation is not None:
        entry |= evaluation.to_json()
    if judged is not None and isinstance(model, Encoder):
        timed = judged.queries.take(torch.arange(min(TIMED, len(judged.queries))))
        entry["queries_per_second"] = round(queries_per_second(model, timed), 1)
        alone = [judged.queries.take(torch.tensor([row])) for row in range(min(ALONE, len(judged.queries)))]
        entry["latency_ms"] = {name: round(ms, 2) for name, ms in latency(model, alone)._asdict().items()}
    return entry
