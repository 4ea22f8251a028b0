"""What yields batches: Source, JudgedSource over any judged split, TextSource. Next: ``mixture.py``."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from distill.batch import Batch, Ragged, Readable
from distill.data.judged import Judged, Table, TextTable
from distill.data.lists import Lists
from distill.data.negatives import Negatives
from distill.data.tokens import tokenized
from distill.data.topics import Topics
from distill.errors import UserError
from distill.outputs import Outputs

if TYPE_CHECKING:
    from distill.graph import DistillationGraph
    from distill.nn.tokenizer import TextColumn

log = logging.getLogger("distill")


def generator_of(*numbers: int) -> torch.Generator:
    """A random generator that depends on the numbers alone, and on each of them."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


class Source(ABC):
    """Yields batches by their place: any one can be made at any time, so a resumed run just goes on."""

    name: str = "data"

    @property
    @abstractmethod
    def labelled(self) -> bool:
        """Whether its batches have labels."""

    @abstractmethod
    def prepare(
        self,
        queries: Sequence[Readable] = (),
        candidates: Sequence[Readable] = (),
        pair: Sequence[Readable] = (),
    ) -> None:
        """Whatever takes long, before the first batch; the columns are those its batches will have."""

    def refresh(
        self, graph: DistillationGraph, epoch: int, folder: Path, begun: bool = False
    ) -> dict[str, float]:
        """Ask the models for what this epoch's batches depend on (mined negatives), and keep it on disk.

        Called before the first batch of an epoch, and when a run that was interrupted goes on inside one.

        Args:
            folder: What is chosen is written there, and read again by a run that goes on.
            begun: Batches of this epoch have been learnt from, so the models are not as they were.

        Returns:
            Figures of what was chosen just now, for the log.
        """
        return {}

    @abstractmethod
    def steps(self, epoch: int) -> int:
        """How many batches the epoch has."""

    @abstractmethod
    def batch(self, epoch: int, step: int) -> Batch:
        """One batch: a function of (seed, epoch, step) alone."""


class JudgedSource(Source):
    """Batches of a judged split: shuffled queries, each with its candidates.

    A query lists one of its positives, in turn from epoch to epoch, then listed candidates that are not
    positive (drawn anew each epoch if there are more than fit), then what the samplers find, up to
    ``candidates``. So samplers only fill what a list leaves free: ``listed_negatives`` gives them more.
    Candidates with equal content are one. Without queries a batch is candidates only.

    Args:
        judged: The split.
        batch_size: B, how many queries (or candidates, if there are no queries) a batch has; the last of an
            epoch has what is left.
        candidates: The most that a query lists. Fewer, N, if data and samplers never give as many.
        negatives: Samplers, asked in this order.
        seed: Of the order and of all that is drawn.
        name: What batches and errors call it.
        with_positive: Leave out the queries without a positive.
        listed_negatives: At most so many of a query's listed candidates that are not positive; 0: all its
            negatives are the samplers'. None: as many as fit.
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
        listed_negatives: int | None = None,
    ):
        if batch_size < 1 or candidates < 1:
            raise ValueError(f"batch_size ({batch_size}) and candidates ({candidates}) must be at least 1.")
        if listed_negatives is not None and listed_negatives < 0:
            raise ValueError(f"listed_negatives must be 0 or more, got {listed_negatives}.")
        if listed_negatives is not None and judged.labels is None:
            raise ValueError(f"{judged.name}: listed_negatives: without labels nothing listed is a negative.")
        if negatives and not len(judged.candidates):
            raise ValueError(f"{judged.name}: there are no candidates that negatives could be drawn from.")
        self.judged, self.batch_size, self.seed, self.name = judged, batch_size, seed, name
        self.negatives = tuple(negatives)
        self.lists = Lists(judged, listed_negatives)
        self.with_positive = with_positive
        if with_positive and not (self.lists.positives > 0).any():
            raise ValueError(f"{judged.name}: with_positive leaves nothing, no query has a positive.")
        self.width = min(candidates, self.lists.longest + sum(sampler.count for sampler in self.listing))
        self.topics: Topics | None = None  # whoever sets them has batches of one topic
        self._ready = False
        self._order: tuple[int, Tensor] | None = None

    @property
    def queries(self) -> Table:
        return self.judged.queries

    @property
    def candidates(self) -> Table:
        return self.judged.candidates

    @property
    def labelled(self) -> bool:
        return self.judged.labels is not None

    @property
    def scored(self) -> tuple[str, ...]:
        """Teachers whose scores of all that is listed come with the data."""
        return tuple(self.judged.scores)

    def no_log_q(self) -> str | None:
        """Why its batches do not say how likely a candidate is drawn; None: they do."""
        return "nothing says how likely a candidate is drawn"

    def prepare(
        self,
        queries: Sequence[Readable] = (),
        candidates: Sequence[Readable] = (),
        pair: Sequence[Readable] = (),
    ) -> None:
        for sampler in self.negatives if not self._ready else ():
            sampler.prepare(self.judged)
        self._ready = True

    def refresh(
        self, graph: DistillationGraph, epoch: int, folder: Path, begun: bool = False
    ) -> dict[str, float]:
        if not self._ready:
            self.prepare()
        if self.topics is not None:
            try:
                self.topics.refresh(graph, self.judged, folder, self.seed)
            except UserError as error:
                raise type(error)(f"{self.name}.{error}") from error
        figures: dict[str, float] = {}
        for i, sampler in enumerate(self.negatives):
            where = f"negatives[{i}]"
            try:
                told = sampler.refresh(graph, epoch, folder / f"negatives-{i}", self.query_rows, begun)
            except UserError as error:
                raise type(error)(f"{self.name}.{where}: {error}") from error
            if told:
                words = ", ".join(f"{name} {value:,.4g}" for name, value in told.items())
                log.info("%s.%s, epoch %d: %s", self.name, where, epoch, words)
            figures |= {f"{where}/{name}": value for name, value in told.items()}
        return figures

    def steps(self, epoch: int) -> int:
        return -(-len(self._rows) // self.batch_size)

    def batch(self, epoch: int, step: int) -> Batch:
        if not 0 <= step < self.steps(epoch):
            raise IndexError(
                f"{self.name}: epoch {epoch} has {self.steps(epoch)} steps, there is no step {step}."
            )
        if not self._ready:
            self.prepare()
        rows = self._shuffled(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        if len(self.queries):
            return self._of_queries(rows, epoch, step)
        none = torch.empty(0, dtype=torch.int64)
        return self._filled(none, rows.sort().values, none.view(0, 0), none.view(0, 0).bool())

    @cached_property
    def _rows(self) -> Tensor:
        """What is shuffled: the queries, or without queries the distinct texts."""
        return self.query_rows if len(self.queries) else self.candidates.same.unique()

    def _shuffled(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            rows, generator = self._rows, generator_of(self.seed, 0, epoch)
            if self.topics is not None:
                order = self.topics.ordered(rows, self.batch_size, generator)
            else:
                order = rows[torch.randperm(len(rows), generator=generator)]
            self._order = (epoch, order)
        return self._order[1]

    def _of_queries(self, rows: Tensor, epoch: int, step: int) -> Batch:
        """The batch of the queries at ``rows`` [B]."""
        generator = generator_of(self.seed, 1, epoch, step)
        entries, valid = self.lists.draw(rows, self.width, epoch, generator)  # [B, M], of the judgements
        listed = self.lists.rows.values
        found = listed[entries] if len(listed) else entries  # [B, M] rows of candidates
        if self.listing:
            drawn, real = self._drawn(rows, generator)
            entries = torch.cat([entries, torch.full_like(drawn, -1)], dim=1)
            found, valid = torch.cat([found, drawn], dim=1), torch.cat([valid, real], dim=1)
            valid &= ~_repeated(found, valid)
        packed = (~valid).int().argsort(dim=1, stable=True)[:, : self.width]  # what is real comes first
        entries, found, mask = (values.gather(1, packed) for values in (entries, found, valid))
        distinct, index, draws = self._pool(found, mask, generator)
        known = mask & (entries >= 0)
        sampled = not torch.equal(known, mask)  # what a sampler brought has no label and no given score
        entries = self.lists.entries[entries.clamp(min=0)] if len(listed) else entries

        def told(values: Tensor) -> Tensor:
            return torch.where(known, values[entries], 0.0) if len(values) else torch.zeros(known.shape)

        labels, scores = self.judged.labels, self.judged.scores
        return self._filled(
            rows,
            distinct,
            index,
            mask,
            labels=None if labels is None else told(labels),
            draws=draws,
            known_positives=self.judged.positives_of(rows) if self.width else None,
            stored={
                teacher: Outputs(scores=told(scores[teacher]), known=known if sampled else None)
                for teacher in self.scored
            },
        )

    @property
    def listing(self) -> list[Negatives]:
        """The samplers whose candidates are listed; the others' are the whole batch's."""
        return [sampler for sampler in self.negatives if not sampler.background]

    def _drawn(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the samplers draw for each query [B, M], the first row of each text; what may be listed."""
        drawn = torch.cat([sampler.draw(rows, generator) for sampler in self.listing], dim=1)
        real = drawn >= 0
        drawn = torch.where(real, self.candidates.same[drawn.clamp(min=0)], 0)
        real &= ~self.judged.is_positive(rows[:, None].expand_as(drawn), drawn)
        return drawn, real

    def _pool(self, found: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The distinct candidates [P] of what is listed [B, N] or drawn for the batch, index and draws."""
        nobody = torch.empty(0, dtype=torch.int64)
        loose = [s.draw(nobody, generator).flatten() for s in self.negatives if s.background]
        pool = torch.cat([found[mask], *loose])
        distinct, place, draws = _distinct(pool, len(self.candidates))
        index = torch.zeros_like(found)
        index[mask] = place[: len(place) - sum(map(len, loose))]
        return distinct, index, draws

    @cached_property
    def query_rows(self) -> Tensor:
        """The rows of the queries that batches are made of."""
        if self.with_positive:
            return (self.lists.positives > 0).nonzero()[:, 0]
        return torch.arange(len(self.queries))

    @property
    def candidate_rows(self) -> Tensor:
        """The rows of all candidates that a batch can hold, each text once."""
        if self.negatives or not len(self.queries):
            return self.candidates.same.unique()
        return self.lists.rows.select(self.query_rows).values.unique()

    def gather(
        self,
        queries: Tensor,
        candidates: Tensor,
        index: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Batch:
        """A batch of chosen rows [B] and [P]; without ``index`` [B, N] and ``mask`` nothing is listed."""
        if index is None or mask is None:
            index = torch.zeros(len(queries), 0, dtype=torch.int64)
            mask = torch.zeros(len(queries), 0, dtype=torch.bool)
        return self._filled(queries, candidates, index, mask)

    @abstractmethod
    def _filled(self, queries: Tensor, candidates: Tensor, index: Tensor, mask: Tensor, **others) -> Batch:
        """The batch of these rows, with the columns that were prepared."""


class TextSource(JudgedSource):
    """Batches of a judged text data set, with the ids of its texts, each distinct text once."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self._columns: tuple[dict[str, _Tokens], dict[str, _Tokens]] = ({}, {})

    def prepare(
        self,
        queries: Sequence[Readable] = (),
        candidates: Sequence[Readable] = (),
        pair: Sequence[Readable] = (),
    ) -> None:
        super().prepare()
        sides = zip(self._columns, (self.queries, self.candidates), (queries, candidates), strict=True)
        for known, table, columns in sides:
            for column in columns:
                if column.key not in known:
                    known[column.key] = _Tokens.of(cast(TextTable, table), cast("TextColumn", column))

    def _filled(self, queries: Tensor, candidates: Tensor, index: Tensor, mask: Tensor, **others) -> Batch:
        rows = (queries, candidates)
        columns = [
            {key: tokens.ids.select(tokens.place[chosen]) for key, tokens in known.items()}
            for known, chosen in zip(self._columns, rows, strict=True)
        ]
        return Batch(
            index, mask, *rows, queries=columns[0], candidates=columns[1], source=self.name, **others
        )


class _Tokens:
    """The ids of a table's texts, each distinct text once."""

    def __init__(self, ids: Ragged, place: Tensor):
        self.ids = ids
        self.place = place  # [n] which row of ids holds the text of the table's row

    @classmethod
    def of(cls, table: TextTable, column: TextColumn) -> _Tokens:
        distinct, place = table.same.unique(return_inverse=True)
        return cls(tokenized([table.texts[row] for row in distinct.tolist()], column), place)


def _distinct(rows: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """``rows.unique`` [m] of rows below n, with where each row is in it and how often each comes."""
    if n > 16 * len(rows):
        return rows.unique(return_inverse=True, return_counts=True)
    counts = torch.bincount(rows, minlength=n)  # linear where there are few possible rows
    distinct = counts.nonzero()[:, 0]
    place = torch.empty(n, dtype=torch.int64)
    place[distinct] = torch.arange(len(distinct))
    return distinct, place[rows], counts[distinct]


def _repeated(rows: Tensor, valid: Tensor) -> Tensor:
    """Which valid entries of [B, M] stand further left in their row already."""
    marks = torch.where(valid, rows, -1 - torch.arange(rows.shape[1]))  # what is not valid never repeats
    ordered, order = marks.sort(dim=1, stable=True)
    again = torch.zeros_like(valid)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(valid).scatter(1, order, again)
