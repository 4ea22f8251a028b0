"""Several sources as one: each batch is of one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import torch
from torch import Tensor

from distill.batch import Batch, Readable
from distill.data.source import Source, generator_of

if TYPE_CHECKING:
    from distill.graph import DistillationGraph


class Mixture(Source):
    """One source per batch; an epoch is every batch of every source, in an order drawn anew each epoch.

    Args:
        sources: By the name that ``Batch.source`` then holds.
        seed: Of the order of the sources.
        repeat: How many times an epoch takes a source, with other draws each time, so that a small one is
            heard among large ones; once where nothing is said.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        seed: int = 0,
        name: str = "data",
        repeat: Mapping[str, int] | None = None,
    ):
        if not sources:
            raise ValueError("a mixture needs at least one source.")
        self.sources, self.seed, self.name = dict(sources), seed, name
        self.repeat = {name: (repeat or {}).get(name, 1) for name in self.sources}
        for name, times in self.repeat.items():
            if not isinstance(times, int) or times < 1:
                raise ValueError(f"{name}.repeat must be a whole number of at least 1, got {times!r}.")
        self._plan: tuple[int, Tensor, Tensor] | None = None

    @property
    def labelled(self) -> bool:
        """Whether all its batches have labels."""
        return all(source.labelled for source in self.sources.values())

    def prepare(
        self,
        queries: Sequence[Readable] = (),
        candidates: Sequence[Readable] = (),
        pair: Sequence[Readable] = (),
    ) -> None:
        for source in self.sources.values():
            source.prepare(queries, candidates, pair)

    def refresh(
        self, graph: DistillationGraph, epoch: int, folder: Path, begun: bool = False
    ) -> dict[str, float]:
        return {
            f"{name}.{key}": value
            for name, source in self.sources.items()
            for key, value in source.refresh(graph, epoch, folder / quote(name, safe=""), begun).items()
        }

    def steps(self, epoch: int) -> int:
        return sum(self._taken(epoch))

    def _taken(self, epoch: int) -> list[int]:
        """How many steps of each source an epoch has."""
        return [self.repeat[name] * source.steps(epoch) for name, source in self.sources.items()]

    def batch(self, epoch: int, step: int) -> Batch:
        if not 0 <= step < self.steps(epoch):
            raise IndexError(
                f"{self.name}: epoch {epoch} has {self.steps(epoch)} steps, there is no step {step}."
            )
        which, within = self._planned(epoch)
        name = list(self.sources)[which[step]]
        again, place = divmod(int(within[step]), self.sources[name].steps(epoch))
        batch = self.sources[name].batch(epoch * self.repeat[name] + again, place)
        return replace(batch, source=name)

    def _planned(self, epoch: int) -> tuple[Tensor, Tensor]:
        """For each step its source and which of that source's steps it is: [steps] each."""
        if self._plan is None or self._plan[0] != epoch:
            steps = torch.tensor(self._taken(epoch))
            which = torch.arange(len(steps)).repeat_interleave(steps)
            which = which[torch.randperm(len(which), generator=generator_of(self.seed, 2, epoch))]
            within = torch.empty_like(which)
            for source, count in enumerate(steps.tolist()):
                within[which == source] = torch.arange(count)
            self._plan = (epoch, which, within)
        return self._plan[1:]
