"""What a model is asked about: Ragged sequences and the Batch. Next: ``outputs.py``, what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """n sequences laid end to end, without padding.

    Row i is ``values[offsets[i]:offsets[i + 1]]``.

    Example:
        >>> Ragged.of([[1, 2, 3], [], [4]]).lengths
        tensor([3, 0, 1])
    """

    values: Tensor  # [T, ...]
    offsets: Tensor  # [n + 1] int64, from 0 to T

    @classmethod
    def of(cls, rows: Iterable[Sequence[Any]], dtype: torch.dtype = torch.int64) -> Ragged:
        rows = list(rows)
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        values = torch.tensor([value for row in rows for value in row], dtype=dtype)
        return cls.of_lengths(values, lengths)

    @classmethod
    def of_lengths(cls, values: Tensor, lengths: Tensor) -> Ragged:
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=lengths.device)
        torch.cumsum(lengths, dim=0, out=offsets[1:])
        return cls(values, offsets)

    @classmethod
    def join(cls, pieces: Sequence[Ragged | Tensor]) -> Ragged:
        """Row i is row i of every piece, one after the other; a Tensor [k] is the same for all rows.

        >>> Ragged.join([torch.tensor([9]), Ragged.of([[1, 2], [3]])]).tolist()
        [[9, 1, 2], [9, 3]]
        """
        offsets = next(piece.offsets for piece in pieces if isinstance(piece, Ragged))
        n, device = len(offsets) - 1, offsets.device
        parts = [
            piece
            if isinstance(piece, Ragged)
            else cls(piece.to(device).repeat(n), torch.arange(n + 1, device=device) * len(piece))
            for piece in pieces
        ]
        lengths = torch.stack([part.lengths for part in parts])  # [pieces, n]
        starts = lengths.cumsum(0) - lengths + (lengths.sum(0).cumsum(0) - lengths.sum(0))
        values = parts[0].values.new_empty(int(lengths.sum()))
        for part, start in zip(parts, starts, strict=True):
            values[_spread(start, part.lengths)] = part.values
        return cls.of_lengths(values, lengths.sum(0))

    @classmethod
    def stack(cls, parts: Sequence[Ragged]) -> Ragged:
        """The rows of all parts, one part after the other."""
        return cls.of_lengths(torch.cat([p.values for p in parts]), torch.cat([p.lengths for p in parts]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Tensor:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> Tensor:
        """How long each sequence is: [n] int64."""
        return self.offsets[1:] - self.offsets[:-1]

    def select(self, rows: Tensor) -> Ragged:
        """The given rows, in the given order, one gather: rows [m] int64."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        return Ragged.of_lengths(self.values[_spread(starts, lengths)], lengths)

    def truncate(self, length: int | Tensor) -> Ragged:
        """At most the first ``length`` values of each row; one limit for all or one per row [n]."""
        lengths = torch.minimum(self.lengths, torch.as_tensor(length, device=self.offsets.device))
        return Ragged.of_lengths(self.values[_spread(self.offsets[:-1], lengths)], lengths)

    def padded(self, fill: int | float, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Values [n, length] with ``fill`` after each row's end, and the mask of what is real.

        Without ``length`` it is that of the longest row.
        """
        if length is None:
            length = int(self.lengths.max()) if len(self) else 0
        mask = torch.arange(length, device=self.offsets.device) < self.lengths[:, None]
        padded = self.values.new_full((len(self), length, *self.values.shape[1:]), fill)
        padded[mask] = self.values
        return padded, mask

    def to(self, device: torch.device | str) -> Ragged:
        return Ragged(self.values.to(device), self.offsets.to(device))

    def tolist(self) -> list[list[Any]]:
        return [self[row].tolist() for row in range(len(self))]


class ChosenRows(Ragged):
    """``whole.select(rows)``, done when somebody looks: for what most objectives never ask about."""

    def __init__(self, whole: Ragged, rows: Tensor):
        object.__setattr__(self, "whole", whole)
        object.__setattr__(self, "rows", rows)

    whole: Ragged
    rows: Tensor

    @cached_property
    def _made(self) -> Ragged:
        return self.whole.select(self.rows)

    @property
    def values(self) -> Tensor:
        return self._made.values

    @property
    def offsets(self) -> Tensor:
        return self._made.offsets

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: Tensor) -> Ragged:
        return ChosenRows(self.whole, self.rows[rows])

    def to(self, device: torch.device | str) -> Ragged:
        return self if torch.device(device) == self.whole.values.device else self._made.to(device)


def _spread(starts: Tensor, lengths: Tensor) -> Tensor:
    """Positions start, start + 1, ..., start + length - 1 of every row, end to end: [sum of lengths]."""
    ends = lengths.cumsum(0)
    within = torch.arange(int(ends[-1]) if len(ends) else 0, device=lengths.device)
    return within + torch.repeat_interleave(starts - (ends - lengths), lengths)


Column = Tensor | Ragged


class Readable(Protocol):
    """What a model may read of a row, by its key: a text in a tokenizer's ids, a feature."""

    @property
    def key(self) -> str: ...


class Columns(NamedTuple):
    """What is read of queries, of candidates, and of listed pairs."""

    queries: Sequence[Readable] = ()
    candidates: Sequence[Readable] = ()
    pair: Sequence[Readable] = ()

    @property
    def keys(self) -> tuple[list[str], list[str], list[str]]:
        """The columns' names, side by side."""
        queries, candidates, pair = ([column.key for column in side] for side in self)
        return queries, candidates, pair


def _on(axis: str, default: Any = MISSING) -> Any:
    """A field of Batch with a row for each query (its listed candidates along it), or for each candidate."""
    return field(
        metadata={"axis": axis}, **({"default_factory": dict} if default is dict else {"default": default})
    )


def _axis(of: Field) -> str | None:
    return of.metadata.get("axis")


@dataclass(frozen=True)
class Batch:
    """B queries that list N candidates each, out of the P distinct candidates of the batch.

    ``index`` says which of the P a query lists, positives first; P may hold candidates that nobody
    lists. B, N or P may be 0 (a batch of texts only has B = 0). Columns are by name: text is a Ragged
    of token ids, once per tokenizer and prompt; features are Tensors, histories Ragged. A candidate's id
    stands for its content: two candidates with equal text have one id, so a false negative is found by id
    and by text at once.
    """

    index: Tensor  # [B, N] int64, which of the P
    mask: Tensor  # [B, N] bool, which entries are real
    query_ids: Tensor = _on("query")  # [B] int64, the query's row in its source
    candidate_ids: Tensor = _on("candidate")  # [P] int64, the candidate's row in its source, distinct
    labels: Tensor | None = _on("query", None)  # [B, N] float32, what the data says; None: it has no labels
    draws: Tensor | None = _on("candidate", None)  # [P] int64, how often each candidate was drawn; None: once
    log_q: Tensor | None = _on("candidate", None)  # [P] float32, log of the probability to be drawn
    known_positives: Ragged | None = _on("query", None)  # candidate ids per query, in the batch or not
    queries: Mapping[str, Any] = _on("query", dict)  # name -> Column of B rows
    candidates: Mapping[str, Any] = _on("candidate", dict)  # name -> Column of P rows
    pair: Mapping[str, Any] = _on("query", dict)  # name -> Tensor [B, N]; 0 where nothing is listed
    source: str = ""  # the data set's name in the recipe
    stored: Mapping[str, Any] = field(default_factory=dict)  # node -> Outputs known beforehand

    @classmethod
    def of_scores(cls, queries: int, candidates: int, labels: Tensor | None = None) -> Batch:
        """A batch in which each query lists ``candidates`` of its own: for examples and tests."""
        shape = (queries, candidates)
        if labels is None:
            labels = torch.zeros(shape)
            labels[:, :1] = 1.0
        return cls(
            index=torch.arange(queries * candidates).reshape(shape),
            mask=torch.ones(shape, dtype=torch.bool),
            query_ids=torch.arange(queries),
            candidate_ids=torch.arange(queries * candidates),
            labels=labels,
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, N, P."""
        return self.index.shape[0], self.index.shape[1], len(self.candidate_ids)

    def view(
        self, query_columns: Iterable[str], candidate_columns: Iterable[str], pair_columns: Iterable[str] = ()
    ) -> Batch:
        """The same batch with only the named columns: what a model did not ask for cannot reach it."""
        return replace(
            self,
            queries={name: self.queries[name] for name in query_columns},
            candidates={name: self.candidates[name] for name in candidate_columns},
            pair={name: self.pair[name] for name in pair_columns},
            stored={},
        )

    def select(self, queries: Tensor, candidates: Tensor) -> Batch:
        """The given rows of queries [b] and of candidates [p]; what a query lists of the others is masked.

        What is stored is left out: who asks about some rows wants to be told.
        """
        place = self.index.new_full((max(1, len(self.candidate_ids)),), -1)
        place[candidates] = torch.arange(len(candidates), device=place.device)
        index = place[self.index[queries]]

        def rows(values: Any, chosen: Tensor) -> Any:
            if isinstance(values, Mapping):
                return {name: rows(column, chosen) for name, column in values.items()}
            if isinstance(values, Ragged):
                return values.select(chosen)
            return None if values is None else values[chosen]

        return Batch(
            index.clamp(min=0),
            self.mask[queries] & (index >= 0),
            **{f.name: rows(getattr(self, f.name), queries) for f in fields(self) if _axis(f) == "query"},
            **{
                f.name: rows(getattr(self, f.name), candidates)
                for f in fields(self)
                if _axis(f) == "candidate"
            },
            source=self.source,
        )

    def spread(self, values: Tensor) -> Tensor:
        """A value for each listed pair [n, ...], query by query, in its place [B, N, ...]; 0 elsewhere."""
        return values.new_zeros(*self.mask.shape, *values.shape[1:]).index_put(
            self.mask.nonzero(as_tuple=True), values
        )

    def to(self, device: torch.device | str) -> Batch:
        def move(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: move(item) for name, item in value.items()}
            return value.to(device) if hasattr(value, "to") else value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})
