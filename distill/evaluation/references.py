"""What needs no training and any table of results should show: popularity, and chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data.judged import Judged, Table
from distill.errors import RecipeError
from distill.evaluation.evaluate import Evaluation, evaluate_model
from distill.evaluation.pair_metrics import BLIND_TO_SCALE

REFERENCES = ("popularity", "random")


def evaluate_reference(
    name: str, judged: Judged, metrics: Sequence[str], *, top_k: int = 1000, seed: int = 0
) -> Evaluation:
    """Measure ``popularity`` or ``random`` as a model is measured, on the same queries.

    Of pairs, only metrics that read nothing but the order of scores: these scores are no probabilities.

    Raises:
        RecipeError: The split does not say how often its candidates were chosen in training.
    """
    check_reference(name, judged)
    if judged.task == "pairs":
        metrics = [metric for metric in metrics if metric in BLIND_TO_SCALE]
    model: Popularity | Random = Random(len(judged.queries), len(judged.candidates), seed)
    if name == "popularity":
        assert judged.popularity is not None  # was checked
        model = Popularity(judged.popularity)
    by_row = replace(
        judged, queries=Rows(judged.queries.ids), candidates=Rows(judged.candidates.ids), pair={}
    )
    return evaluate_model(model, by_row, metrics, top_k=top_k)


def check_reference(name: str, judged: Judged) -> None:
    """Refuse a reference that nobody knows, or that these data do not allow."""
    if name not in REFERENCES:
        raise RecipeError(f"'{name}' is not a reference; there are {', '.join(REFERENCES)}.")
    if name == "popularity" and judged.popularity is None:
        raise RecipeError(
            f"{judged.name or 'the split'} does not say how often its candidates were chosen in training, so "
            f"popularity cannot be measured; take it out."
        )


@dataclass(frozen=True)
class Popularity:
    """Scores a candidate by how often it was chosen in training, whoever asks."""

    counts: Tensor  # [candidates]
    search: ClassVar[str] = "dot"

    def scale(self) -> float:
        return 1.0

    def encode_queries(self, queries: Tensor, progress: bool = False) -> Tensor:
        return torch.ones(len(queries), 1)

    def encode_candidates(self, candidates: Tensor, progress: bool = False) -> Tensor:
        return self.counts[candidates].float()[:, None]


class Random:
    """Puts the candidates of each query in an order of its own, each place as likely for one as another.

    Random directions: the candidates' lengths are equal, so none is nearer to all queries than another.
    """

    search: ClassVar[str] = "dot"
    dim = 16

    def __init__(self, queries: int, candidates: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.queries = torch.randn(queries, self.dim, generator=generator)
        self.candidates = F.normalize(torch.randn(candidates, self.dim, generator=generator))

    def scale(self) -> float:
        return 1.0

    def encode_queries(self, queries: Tensor, progress: bool = False) -> Tensor:
        return self.queries[queries]

    def encode_candidates(self, candidates: Tensor, progress: bool = False) -> Tensor:
        return self.candidates[candidates]


@dataclass(frozen=True)
class Rows(Table):
    """A table whose rows are known by their number alone."""

    ids: Sequence[str]

    @property
    def same(self) -> Tensor:
        return torch.arange(len(self))

    def take(self, rows: Tensor) -> Any:
        return rows

    def keys(self) -> np.ndarray:
        return np.stack([np.zeros(len(self), dtype=np.uint64), np.arange(len(self), dtype=np.uint64)], axis=1)
