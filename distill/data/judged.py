"""What every data set becomes: queries, candidates, and who lists whom. Next: ``source.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from distill.batch import Ragged

MARKS = 2**25  # bytes of a table that says which pairs are known

Task = Literal["retrieval", "rerank", "pairs", "texts"]


def text_keys(texts: Sequence[str]) -> np.ndarray:
    """A key per text: [n, 2] uint64, the same on every machine."""
    digests = b"".join(xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass")) for text in texts)
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)


class Table(ABC):
    """n queries or candidates: texts, or rows of features. An id is unique only where the data says so."""

    ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    @abstractmethod
    def same(self) -> Tensor:
        """For each row the first row with the same content: [n] int64. A row's identity."""

    @abstractmethod
    def take(self, rows: Tensor) -> Any:
        """The rows [m] as models encode and score them: a list of texts, a table of features."""

    @abstractmethod
    def keys(self) -> np.ndarray:
        """A hash of each row's content, the same on every machine: [n, 2] uint64."""


@dataclass(frozen=True)
class TextTable(Table):
    """n texts and their ids."""

    ids: list[str]
    texts: list[str]

    def take(self, rows: Tensor) -> list[str]:
        return [self.texts[row] for row in rows.tolist()]

    def keys(self) -> np.ndarray:
        return text_keys(self.texts)

    @cached_property
    def same(self) -> Tensor:
        first: dict[str, int] = {}
        return torch.tensor(
            [first.setdefault(text, row) for row, text in enumerate(self.texts)], dtype=torch.int64
        )


@dataclass(frozen=True)
class Judged:
    """One split of a data set.

    ``listed[i]`` are the rows of ``candidates`` that query i lists, with ``labels``, the teachers'
    ``scores`` and the features ``pair`` aligned to ``listed.values``. What is measured on it follows from
    ``task``: a search over all candidates but those ``seen`` (retrieval), an order of the listed ones
    (rerank), a score per pair (pairs), nothing (texts).
    """

    task: Task
    queries: Table
    candidates: Table
    listed: Ragged  # rows of candidates, per query
    labels: Tensor | None = None  # [T] float32; positive means relevant (pairs: the graded score)
    scores: Mapping[str, Tensor] = field(default_factory=dict)  # teacher -> [T] float32
    name: str = ""  # what errors call it
    pair: Mapping[str, Tensor] = field(default_factory=dict)  # feature of a listed pair -> [T]
    seen: Ragged | None = None  # rows of candidates per query that a search leaves out
    groups: Tensor | None = None  # [queries] int64, which user each belongs to; None: each its own
    popularity: Tensor | None = None  # [candidates] how often each was chosen in training, for metrics

    @property
    def who(self) -> Tensor:
        """Who asks: queries of one group, or without groups of equal content, share their positives."""
        return self.queries.same if self.groups is None else self.groups

    @cached_property
    def _known(self) -> Tensor:
        """Sorted keys of (who, candidate text) that are positive; listed, where no labels are."""
        queries = self.who.repeat_interleave(self.listed.lengths)
        candidates = self.candidates.same[self.listed.values] if len(queries) else queries
        if self.labels is not None:
            relevant = self.labels > 0
            queries, candidates = queries[relevant], candidates[relevant]
        return (queries * len(self.candidates) + candidates).unique()

    @cached_property
    def taken(self) -> Ragged:
        """The candidates known to be relevant, by ``who``: the first row of each text, in order.

        Without labels all listed candidates count: none of them may pass for a negative.
        """
        n = max(len(self.candidates), 1)
        askers = int(self.who.max()) + 1 if len(self.queries) else 0
        return Ragged.of_lengths(self._known % n, torch.bincount(self._known // n, minlength=askers))

    def positives_of(self, queries: Tensor) -> Ragged:
        """The candidates known to be relevant to who asks: one row for each of the queries [n]."""
        return self.taken.select(self.who[queries])

    @cached_property
    def positives(self) -> Ragged:
        """``positives_of`` every query."""
        return self.positives_of(torch.arange(len(self.queries)))

    @cached_property
    def _marks(self) -> Tensor | None:
        """Whether each key is known, where a table of all keys is small: a look-up beats a search."""
        size = len(self.taken) * len(self.candidates)
        if size > MARKS:
            return None
        return torch.zeros(size, dtype=torch.bool).index_fill_(0, self._known, True)

    def is_positive(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """Whether the candidates at rows (first rows of their texts) are known positives of the queries."""
        if not len(self._known):
            return torch.zeros(candidates.shape, dtype=torch.bool)
        keys = self.who[queries] * len(self.candidates) + candidates
        if self._marks is not None:
            return self._marks[keys.clamp(min=0)] & (candidates >= 0)
        place = torch.searchsorted(self._known, keys).clamp(max=len(self._known) - 1)
        return (self._known[place] == keys) & (candidates >= 0)


def summary(judged: Judged) -> dict[str, int | float]:
    """The sizes of a split, for the ``check`` command and for a reader's eye."""

    def mean_words(table: TextTable) -> float:
        words = sum(len(text.split()) for text in table.texts)
        return round(words / len(table), 1) if len(table) else 0.0

    sizes: dict[str, int | float] = {
        "queries": len(judged.queries),
        "candidates": len(judged.candidates),
        "listed": len(judged.listed.values),
        "positives": 0 if judged.labels is None else int((judged.labels > 0).sum()),
    }
    if isinstance(judged.queries, TextTable) and isinstance(judged.candidates, TextTable):
        sizes["words per query"] = mean_words(judged.queries)
        sizes["words per candidate"] = mean_words(judged.candidates)
    return sizes
