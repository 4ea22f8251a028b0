"""Where candidates come from that a query does not list. Next: ``hard_negatives.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from distill.data.judged import Judged

if TYPE_CHECKING:
    from distill.graph import DistillationGraph


class Negatives(ABC):
    """Proposes candidates that a query does not list.

    The source drops those that are known to be relevant, or listed already: a sampler need not know.
    """

    names_nodes: ClassVar[tuple[str, ...]] = ()  # its arguments that name nodes of the graph
    background: ClassVar[bool] = False  # draws [1, count] for the whole batch, which no query lists

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}.")
        self.count = count  # how many per query

    @abstractmethod
    def prepare(self, judged: Judged) -> None:
        """Whatever can be done without a model, before the first ``draw``."""

    def refresh(
        self, graph: DistillationGraph, epoch: int, folder: Path, queries: Tensor, begun: bool = False
    ) -> dict[str, float]:
        """What ``Source.refresh`` asks of a sampler, for the queries at rows [n]."""
        return {}

    @abstractmethod
    def draw(self, query_rows: Tensor, generator: torch.Generator) -> Tensor:
        """Rows of candidates [B, count] for the queries at ``query_rows`` [B]; -1 where there is none."""

    def shares(self, candidates: Tensor) -> Tensor | None:
        """The probability that one draw gives each of the candidates at rows [P]; None: it cannot say."""
        return None

    def problems(self, graph: DistillationGraph, judged: Judged) -> Iterator[str]:
        """Why it cannot work with this graph and these data; each begins with the argument's name."""
        return iter(())

    def costs(self, graph: DistillationGraph, judged: Judged, queries: Tensor) -> Iterator[str]:
        """What ``refresh`` will ask of the nodes, a line each."""
        return iter(())


class RandomNegatives(Negatives):
    """Any candidate of the data set, each distinct text as likely as another."""

    def prepare(self, judged: Judged) -> None:
        self.rows = judged.candidates.same.unique()  # [distinct texts]

    def draw(self, query_rows: Tensor, generator: torch.Generator) -> Tensor:
        shape = (len(query_rows), self.count)
        return self.rows[torch.randint(len(self.rows), shape, generator=generator)]

    def shares(self, candidates: Tensor) -> Tensor:
        return torch.full((len(candidates),), 1.0 / len(self.rows), dtype=torch.float64)
