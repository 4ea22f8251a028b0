"""What every text data set becomes: two tables of texts, and who lists whom. Next: ``source.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from distill.batch import Ragged

Task = Literal["retrieval", "rerank", "pairs", "texts"]


@dataclass(frozen=True)
class TextTable:
    """n texts and their ids, both unique per row only where the data says so."""

    ids: list[str]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def same_text(self) -> Tensor:
        """For each row the first row with the same text: [n] int64. A text's identity."""
        first: dict[str, int] = {}
        return torch.tensor(
            [first.setdefault(text, row) for row, text in enumerate(self.texts)], dtype=torch.int64
        )


@dataclass(frozen=True)
class Judged:
    """One split of a text data set.

    ``listed[i]`` are the rows of ``candidates`` that query i lists, with ``labels`` and the teachers'
    ``scores`` aligned to ``listed.values``. What is measured on it follows from ``task``: a search over
    all candidates (retrieval), an order of the listed ones (rerank), a score per pair (pairs), nothing
    (texts).
    """

    task: Task
    queries: TextTable
    candidates: TextTable
    listed: Ragged  # rows of candidates, per query
    labels: Tensor | None = None  # [T] float32; positive means relevant (pairs: the graded score)
    scores: Mapping[str, Tensor] = field(default_factory=dict)  # teacher -> [T] float32
    name: str = ""  # what errors call it

    @cached_property
    def _known(self) -> Tensor:
        """Sorted keys of (query text, candidate text) that are positive; listed, where no labels are."""
        queries = self.queries.same_text.repeat_interleave(self.listed.lengths)
        candidates = self.candidates.same_text[self.listed.values] if len(queries) else queries
        if self.labels is not None:
            relevant = self.labels > 0
            queries, candidates = queries[relevant], candidates[relevant]
        return (queries * len(self.candidates) + candidates).unique()

    @cached_property
    def positives(self) -> Ragged:
        """Per query the candidates known to be relevant to its text: the first row of each text, in order.

        Without labels all listed candidates count: none of them may pass for a negative.
        """
        n = max(len(self.candidates), 1)
        counts = torch.bincount(self._known // n, minlength=len(self.queries))
        return Ragged.of_lengths(self._known % n, counts).select(self.queries.same_text)

    def is_positive(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """Whether the candidates at rows (first rows of their texts) are known positives of the queries."""
        if not len(self._known):
            return torch.zeros(candidates.shape, dtype=torch.bool)
        keys = self.queries.same_text[queries] * len(self.candidates) + candidates
        place = torch.searchsorted(self._known, keys).clamp(max=len(self._known) - 1)
        return (self._known[place] == keys) & (candidates >= 0)


def summary(judged: Judged) -> dict[str, int | float]:
    """The sizes of a split, for the ``check`` command and for a reader's eye."""

    def mean_words(table: TextTable) -> float:
        words = sum(len(text.split()) for text in table.texts)
        return round(words / len(table), 1) if len(table) else 0.0

    return {
        "queries": len(judged.queries),
        "candidates": len(judged.candidates),
        "listed": len(judged.listed.values),
        "positives": 0 if judged.labels is None else int((judged.labels > 0).sum()),
        "words per query": mean_words(judged.queries),
        "words per candidate": mean_words(judged.candidates),
    }
