"""How the models of a recipe are measured, and what ``metrics.json`` says of one. Next: ``evaluation/``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from distill.data.judged import Judged
from distill.errors import RecipeError
from distill.evaluation import Evaluation, evaluate_model, queries_per_second, size_in_mb, tells_classes
from distill.model import Encoder, Model
from distill.settings import EvaluateSettings

TIMED = 512  # queries whose encoding is timed


def can_be_measured(model: Model, judged: Judged | None, metrics: Sequence[str]) -> bool:
    """Whether it can search, or at least put candidates in order; of several classes, tell which."""
    by_pairs = hasattr(model, "score_pairs")
    if judged is not None and tells_classes(judged, metrics):
        return by_pairs and "classes" in model.provides and "scores" not in model.provides
    return isinstance(model, Encoder) or (by_pairs and "scores" in model.provides)


def measure(
    model: Model, judged: Judged, settings: EvaluateSettings, dev: Judged | None, progress: bool = False
) -> Evaluation:
    """Measure a model as the ``evaluate`` section of a recipe says; ``dev`` gives the thresholds."""
    if not can_be_measured(model, judged, settings.metrics):
        known = ", ".join(sorted(model.provides))
        raise RecipeError(f"a {type(model).__name__} that provides only {known} cannot be measured.")
    return evaluate_model(
        cast(Encoder, model),  # or a PairScorer
        judged,
        settings.metrics,
        rerank=settings.rerank,
        threshold_from=dev,
        progress=progress,
    )


def entry_of(model: Model, evaluation: Evaluation | None, judged: Judged | None) -> dict[str, Any]:
    """Size, metrics, and how many queries it encodes a second: what ``metrics.json`` says of a model."""
    entry: dict[str, Any] = {"size_mb": round(size_in_mb(model), 3)}
    if evaluation is not None:
        entry |= evaluation.to_json()
    if judged is not None and isinstance(model, Encoder):
        timed = judged.queries.take(torch.arange(min(TIMED, len(judged.queries))))
        entry["queries_per_second"] = round(queries_per_second(model, timed), 1)
    return entry
