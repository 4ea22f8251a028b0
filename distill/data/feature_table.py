"""Encoded rows: columns of ids and numbers, histories as windows. Next: ``interaction_log.py``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from distill.batch import Ragged
from distill.data.judged import Table

ROWS_AT_ONCE = 65_536  # of a lazy table, where all of it is asked for


class Names(Sequence[str]):
    """Names of rows, made when they are asked for: a million rows cost no million strings.

    ``values [n]`` (numbers or words) are the names; with ``rows [m]`` name i is ``values[rows[i]]``, and with
    ``marks [m]`` it ends in ``@mark``, which tells a user's moments apart.
    """

    def __init__(self, values: Any, rows: Tensor | None = None, marks: Tensor | None = None):
        self.values, self.rows, self.marks = values, rows, marks

    def __len__(self) -> int:
        return len(self.values if self.rows is None else self.rows)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"there is no row {row} in {len(self)} rows")
        row %= len(self)
        name = str(self.values[row if self.rows is None else int(self.rows[row])])
        return name if self.marks is None else f"{name}@{int(self.marks[row])}"

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


@dataclass(frozen=True)
class Windows:
    """n sequences that are stretches of one long row of values, which may overlap: histories.

    A user's history at each of m moments is m stretches of one sequence, not m copies.
    """

    values: Tensor  # [T]
    starts: Tensor  # [n] int64
    lengths: Tensor  # [n] int64

    def __len__(self) -> int:
        return len(self.starts)

    def select(self, rows: Tensor) -> Ragged:
        """The given sequences, one gather."""
        lengths = self.lengths[rows]
        shift = self.starts[rows] - (lengths.cumsum(0) - lengths)
        places = np.repeat(shift.numpy(), lengths.numpy())  # faster than repeat_interleave
        places += np.arange(len(places))
        return Ragged.of_lengths(self.values[torch.from_numpy(places)].long(), lengths)


@dataclass(frozen=True, eq=False)
class FeatureTable(Table):
    """n encoded rows of users or items.

    ``columns``, by feature name: ids are int64 [n] (0 padding, 1 unknown), numbers float32 [n], sequences
    Ragged of int64 ids, oldest first, texts int64 rows of ``Features.text_vectors``.
    """

    ids: Sequence[str]
    columns: Mapping[str, Tensor | Ragged]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> FeatureTable:
        return self.take(torch.arange(*rows.indices(len(self))))

    def take(self, rows: Tensor) -> FeatureTable:
        """The given rows [m], in that order: one gather per column."""
        return FeatureTable(Names(self.ids, rows), self.gather(rows))

    def gather(self, rows: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor | Ragged]:
        """The named columns of the given rows [m]; all without names."""
        return {
            name: _chosen(self.columns[name], rows) for name in (self.columns if names is None else names)
        }

    @cached_property
    def same(self) -> Tensor:
        return _first_of_equal(self.keys())

    def keys(self) -> np.ndarray:
        return content_keys(self.columns, len(self))


@dataclass(frozen=True, eq=False)
class Visits(Table):
    """Users at moments: row i is user ``rows[i]`` with the histories of that moment.

    A user's columns are kept once, however many moments there are, and a history is a window.
    """

    users: FeatureTable
    rows: Tensor  # [n] int64
    histories: Mapping[str, Windows]
    marks: Tensor | None = None  # [n] what tells a user's moments apart in ids; None: one moment each
    beside: np.ndarray | None = None  # [n] uint64 a hash of what belongs to the moment and to no column
    exposed: Ragged | None = None  # rows of items that each user was shown and did not take, in train
    ids: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", Names(self.users.ids, self.rows, self.marks))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> FeatureTable:
        return self.take(torch.arange(*rows.indices(len(self))))

    def take(self, rows: Tensor) -> FeatureTable:
        """The given rows [m] with all their columns."""
        return FeatureTable(Names(self.ids, rows), self.gather(rows))

    def gather(self, rows: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor | Ragged]:
        """The named columns of the given rows [m]; all without names."""
        wanted = [*self.users.columns, *self.histories] if names is None else names
        users = self.rows[rows]
        return {
            name: self.histories[name].select(rows)
            if name in self.histories
            else _chosen(self.users.columns[name], users)
            for name in wanted
        }

    @property
    def columns(self) -> Mapping[str, Tensor | Ragged]:
        """Every row's columns; large, so ask ``take`` for some rows where that is enough."""
        return self.gather(torch.arange(len(self)))

    @cached_property
    def same(self) -> Tensor:
        return _first_of_equal(self.keys())

    def keys(self) -> np.ndarray:
        parts = [self[start : start + ROWS_AT_ONCE].keys() for start in range(0, len(self), ROWS_AT_ONCE)]
        keys = np.concatenate(parts) if parts else np.empty((0, 2), np.uint64)
        return keys if self.beside is None else mixed(keys + self.beside[:, None])


def _chosen(column: Tensor | Ragged, rows: Tensor) -> Tensor | Ragged:
    return column.select(rows) if isinstance(column, Ragged) else column[rows]


def content_keys(columns: Mapping[str, Tensor | Ragged], n: int) -> np.ndarray:
    """A hash of each row's columns, by name: [n, 2] uint64."""
    keys = np.zeros((n, 2), np.uint64)
    for lane in range(2):
        for name in sorted(columns):
            salt = text_hash([f"{lane} {name}"])  # [1]
            keys[:, lane] = mixed(keys[:, lane] * np.uint64(31) + _row_hash(columns[name], salt))
    return keys


def _row_hash(column: Tensor | Ragged, salt: np.ndarray) -> np.ndarray:
    if isinstance(column, Ragged):
        return _sum_hash(_bits(column.values), column.offsets.numpy(), salt)
    return mixed(_bits(column) + salt)


def _bits(values: Tensor) -> np.ndarray:
    array = values.numpy()
    return (array.view(np.uint32) if array.dtype == np.float32 else array).astype(np.uint64)


def _sum_hash(values: np.ndarray, offsets: np.ndarray, salt: np.ndarray) -> np.ndarray:
    """A hash of each stretch of values [T]: the sum of the hashes of (value, place), and the length."""
    lengths = np.diff(offsets)
    place = np.arange(len(values)) - np.repeat(offsets[:-1], lengths)
    terms = mixed(mixed(values + salt) + place.astype(np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
    return mixed(sums[offsets[1:]] - sums[offsets[:-1]] + lengths.astype(np.uint64))


def text_hash(words: Any) -> np.ndarray:
    """A hash of each word that is the same on every machine: [n] uint64, no Python object per word."""
    import pyarrow as pa

    array = pa.array(words, pa.large_string()) if isinstance(words, list) else words.to_arrow()
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    array = array.cast(pa.large_string())
    _, offsets, data = array.buffers()
    starts = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    letters = (
        np.frombuffer(data, np.uint8)[starts[0] : starts[-1]] if data is not None else np.empty(0, np.uint8)
    )
    return _sum_hash(letters.astype(np.uint64), starts - starts[0], np.array([7], np.uint64))


def mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): one to one, and it spreads all bits."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def _first_of_equal(keys: np.ndarray) -> Tensor:
    """For each row of keys [n, 2] the first row that is equal: [n] int64."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in order of rows
    ordered = keys[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[begins][begins.cumsum() - 1] if len(order) else order
    return torch.from_numpy(first)
