"""Batches of interactions, gathered from column tensors. Next: ``sampling.py``, ``frequency.py``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from distill.batch import Batch, ChosenRows, Ragged, Readable
from distill.data.feature_table import FeatureTable, Visits
from distill.data.frequency import LEAST, StreamingFrequency
from distill.data.judged import Judged
from distill.data.negatives import Negatives
from distill.data.sampling import positive_counts
from distill.data.source import JudgedSource, generator_of
from distill.errors import RecipeError
from distill.recipe import nearest

Law = Literal["batch", "listed"]


class InteractionSource(JudgedSource):
    """Batches of users at moments: each lists all of its items, then what the samplers find.

    One gather per column; no row is a Python object. ``log_q`` is the log of the share that a candidate has
    in the pool it is drawn from: of the positives and of every sampler, each by how many it draws. It is None
    where a sampler cannot say its share, and for impressions.

    Args:
        judged: The split; its queries are Visits or a FeatureTable, its candidates a FeatureTable.
        batch_size, candidates, negatives, seed, name, with_positive: As ``JudgedSource`` says.
        frequency: Estimates the positives' shares from the batches so far; None: train's counts.
        law: The pool of ``log_q``: all that is in the batch (``batch``), or what the samplers list
            (``listed``), for an objective that compares a query with its own list alone.
    """

    def __init__(
        self,
        judged: Judged,
        batch_size: int,
        candidates: int = 8,
        negatives: Sequence[Negatives] = (),
        seed: int = 0,
        name: str = "data",
        with_positive: bool = False,
        frequency: StreamingFrequency | None = None,
        law: Law = "batch",
    ):
        super().__init__(judged, batch_size, candidates, negatives, seed, name, with_positive)
        longest = int(judged.listed.lengths.max()) if len(judged.queries) else 0
        if longest > candidates:
            raise ValueError(
                f"{judged.name}: a query lists {longest} items, which is more than candidates ({candidates})."
            )
        self.width = min(candidates, longest + sum(sampler.count for sampler in self.listing))
        self.law = law
        self.frequency = frequency
        self._names: tuple[dict[str, None], ...] = ({}, {}, {})
        self._estimator = (0, None if frequency is None else frequency.fresh())  # after so many batches

    def prepare(
        self,
        queries: Sequence[Readable] = (),
        candidates: Sequence[Readable] = (),
        pair: Sequence[Readable] = (),
    ) -> None:
        super().prepare()
        there = (_columns(self.queries), _columns(self.candidates), list(self.judged.pair))
        sides = zip(self._names, (queries, candidates, pair), there, ("user", "item", "context"), strict=True)
        for names, columns, known, side in sides:
            for column in columns:
                if column.key not in known:
                    raise RecipeError(
                        f"{self.name}: there is no {side} feature '{column.key}'; there are "
                        f"{', '.join(known) or 'none'}.{nearest(column.key, known)}"
                    )
                names[column.key] = None

    def _of_queries(self, rows: Tensor, epoch: int, step: int) -> Batch:
        generator = generator_of(self.seed, 1, epoch, step)
        judged, same = self.judged, self.candidates.same
        start = judged.listed.offsets[rows]
        lengths = judged.listed.offsets[rows + 1] - start
        place = torch.arange(int(lengths.max()))
        valid = place < lengths[:, None]
        entries = torch.where(valid, start[:, None] + place, 0)
        found = same[judged.listed.values[entries]]
        if self.listing:
            drawn, real = self._drawn(rows, generator)
            real &= ~_earlier(drawn, real, found, valid)
            found, valid = torch.cat([found, drawn], dim=1), torch.cat([valid, real], dim=1)
            entries = torch.nn.functional.pad(entries, (0, drawn.shape[1]), value=-1)
            packed = (~valid).byte().argsort(dim=1, stable=True)[:, : self.width]  # what is real comes first
            entries, found, valid = (values.gather(1, packed) for values in (entries, found, valid))
        known = valid & (entries >= 0)
        distinct, index, draws = self._pool(found, valid, generator)
        values = judged.labels
        return self._filled(
            rows,
            distinct,
            index,
            valid,
            entries=torch.where(known, entries, -1),
            labels=None if values is None else torch.where(known, values[entries.clamp(min=0)], 0.0),
            draws=draws,
            log_q=self._log_q(distinct, len(rows), epoch, step),
            known_positives=ChosenRows(judged.taken, judged.who[rows]),
        )

    def _filled(self, queries: Tensor, candidates: Tensor, index: Tensor, mask: Tensor, **others) -> Batch:
        names = [list(side) for side in self._names]
        entries = others.pop("entries", None)
        if names[2] and entries is None:
            entries = self._entries(queries, candidates, index, mask)
        return Batch(
            index,
            mask,
            queries,
            candidates,
            queries=cast(Visits | FeatureTable, self.queries).gather(queries, names[0]),
            candidates=cast(FeatureTable, self.candidates).gather(candidates, names[1]),
            pair={
                name: torch.where(entries >= 0, self.judged.pair[name][entries.clamp(min=0)], 0)
                for name in names[2]
            },
            source=self.name,
            **others,
        )

    def _entries(self, queries: Tensor, candidates: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        """Where the pairs stand in ``judged.listed.values``; -1: nowhere."""
        listed, n = self.judged.listed, len(self.candidates)
        keys, order = self._listed_keys
        asked = queries[:, None] * n + self.candidates.same[candidates[index]]
        place = torch.searchsorted(keys, asked).clamp(max=max(0, len(keys) - 1))
        there = mask & (keys[place] == asked) if len(listed.values) else torch.zeros_like(mask)
        return torch.where(there, order[place], -1)

    @cached_property
    def _listed_keys(self) -> tuple[Tensor, Tensor]:
        listed = self.judged.listed
        rows = torch.arange(len(listed)).repeat_interleave(listed.lengths)
        return (rows * len(self.candidates) + self.candidates.same[listed.values]).sort(stable=True)

    # How likely a candidate is in the pool.

    def no_log_q(self) -> str | None:
        if self.judged.task == "pairs":
            return "pairs are given, not drawn"
        for i, sampler in enumerate(self.negatives):
            if type(sampler).shares is Negatives.shares:
                return f"negatives[{i}] ({type(sampler).__name__}) cannot say how likely it draws a candidate"
        return None

    @cached_property
    def _counted(self) -> Tensor:
        """Share of each candidate among the positives: [candidates] float64."""
        counts = positive_counts(self.judged).double()
        return counts / counts.sum().clamp(min=1)

    def _log_q(self, candidates: Tensor, size: int, epoch: int, step: int) -> Tensor | None:
        """Log of each candidate's share [P] in what a batch of ``size`` queries is drawn from."""
        if self.judged.task == "pairs":
            return None
        pool: list[tuple[int, Tensor | None]] = [
            (s.count if s.background else s.count * size, s.shares(candidates)) for s in self.negatives
        ]
        if self.law == "batch":
            pool.append((size, self._positive_shares(candidates, size, epoch, step)))
        if not pool or any(shares is None for _, shares in pool):
            return None
        drawn = sum(count for count, _ in pool)
        share = sum(count / drawn * shares for count, shares in pool if shares is not None)
        return torch.as_tensor(share).clamp(LEAST, 1.0).log().float()

    def _positive_shares(self, candidates: Tensor, size: int, epoch: int, step: int) -> Tensor:
        """Share of each candidate [P] among positives: counted, or estimated from the batches so far."""
        if self.frequency is None:
            return self._counted[candidates]
        hit = self._estimated(epoch, step).probability(candidates.numpy())
        # a batch of n positives holds an item of share p with probability 1 - (1 - p)^n
        return torch.from_numpy(-np.expm1(np.log1p(-np.minimum(hit, 1 - 1e-12)) / size))

    def _estimated(self, epoch: int, step: int) -> StreamingFrequency:
        """The estimator after that batch, counted from the first batch on where need be.

        It is a function of the batch's place, so a run that is resumed has that of one that was not.
        """
        steps = self.steps(0)
        wanted = epoch * steps + step + 1
        done, estimator = self._estimator
        if estimator is None or done > wanted:
            assert self.frequency is not None
            done, estimator = 0, self.frequency.fresh()
        for place in range(done, wanted):
            self._learn(estimator, *divmod(place, steps), place + 1)
        self._estimator = (wanted, estimator)
        return estimator

    def _learn(self, estimator: StreamingFrequency, epoch: int, step: int, time: int) -> None:
        rows = self._shuffled(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        listed = self.judged.listed.select(rows)
        items = self.candidates.same[listed.values]
        if self.judged.labels is not None:
            items = items[Ragged(self.judged.labels, self.judged.listed.offsets).select(rows).values > 0]
        estimator.update(items.unique().numpy(), time)


def _columns(table: object) -> list[str]:
    if isinstance(table, Visits):
        return [*table.users.columns, *table.histories]
    return list(cast(FeatureTable, table).columns)


def _earlier(drawn: Tensor, real: Tensor, found: Tensor, valid: Tensor) -> Tensor:
    """Which drawn entries [B, M] are listed already [B, L], or drawn further left."""
    again = ((drawn[:, :, None] == found[:, None, :]) & valid[:, None, :]).any(dim=-1)
    for place in range(1, drawn.shape[1]):
        left = (drawn[:, :place] == drawn[:, place, None]) & real[:, :place]
        again[:, place] |= left.any(dim=-1)
    return again
