"""Queries that list candidates, and pairs of texts: rows of one table. Next: ``scored_lists.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from distill.batch import Ragged
from distill.data.judged import Judged, TextTable
from distill.data.splits import SPLITS, choose, given_splits
from distill.data.tables import RawTable, Spec, read_table
from distill.data.text_data import TextData
from distill.errors import DataError


class Groups(TextData):
    """Rows of query, candidate and label: each query lists the candidates of its rows.

    Args:
        train: Table, as ``read_table`` takes it; a split whose columns have other names is given as
            ``{path: ..., columns: ...}``.
        dev: The same for dev; or a number, the share of the train queries to hold out.
        test: Like ``dev``, for test.
        columns: Names of the columns ``query``, ``candidate``, ``label`` and ``query_id``. ``label``: more
            than 0 means relevant; ``label: null`` says that every row is. Rows with one ``query_id`` are
            one query; without it, those with one query text.
        classes: Labels that are words; the label is the word's place among them: the first is not relevant.
        scores: Teacher -> the column with its score of the row.
        task: What dev and test measure: the order of the listed candidates (rerank), or a search over all
            candidates of the split (retrieval).
        seed: Of the queries held out.

    Example:
        >>> import pyarrow as pa
        >>> rows = pa.table({"query": ["a", "a"], "candidate": ["x", "y"], "label": [1, 0]})
        >>> Groups(train=rows).split("train").listed.tolist()
        [[0, 1]]
    """

    def __init__(
        self,
        train: Spec | None = None,
        dev: Spec | float | None = None,
        test: Spec | float | None = None,
        columns: Mapping[str, str | None] | None = None,
        classes: Sequence[str] | None = None,
        scores: Mapping[str, str] | None = None,
        task: Literal["rerank", "retrieval"] = "rerank",
        seed: int = 0,
    ):
        _check_classes(classes)
        if task not in ("rerank", "retrieval"):
            raise ValueError(f"task must be rerank or retrieval, got '{task}'.")
        self.tables, self.held_out = given_splits({"train": train, "dev": dev, "test": test})
        super().__init__([name for name in SPLITS if name in self.tables or name in self.held_out])
        names = {"query": "query", "candidate": "candidate", "label": "label", "query_id": None}
        self.columns = _columns(names, columns)
        self.classes, self.scores, self.task, self.seed = classes, dict(scores or {}), task, seed
        self.teachers = tuple(self.scores)

    def read(self, name: str) -> Judged:
        table, kept = _read_rows(self, name, "query")
        queries, candidates = table.texts("query"), table.texts("candidate")
        keys = table.ids("query_id") if "query_id" in table else queries
        rows_of: dict[str, list[int]] = {}
        for row in kept:
            first = rows_of.setdefault(keys[row], [row])[0]
            if queries[first] != queries[row]:
                raise DataError(
                    f"{table.where('query', row)}: query_id '{keys[row]}' has another text in an earlier "
                    f"row. One id must stand for one query."
                )
            if first != row:
                rows_of[keys[row]].append(row)
        order = [row for rows in rows_of.values() for row in rows]
        distinct: dict[str, int] = {}
        listed = [distinct.setdefault(candidates[row], len(distinct)) for row in order]
        texts = list(distinct)
        return Judged(
            task=self.task,
            queries=TextTable(list(rows_of), [queries[rows[0]] for rows in rows_of.values()]),
            candidates=TextTable([str(i) for i in range(len(texts))], texts),
            listed=Ragged.of_lengths(
                torch.tensor(listed), torch.tensor([len(rows) for rows in rows_of.values()])
            ),
            labels=_labels(table, self.classes)[order] if "label" in table else torch.ones(len(order)),
            scores=_scores(table, self.scores, order),
            name=f"{table.name} ({name})",
        )


class TextPairs(TextData):
    """Rows of two texts and how alike they are; each row is a query with one candidate.

    Args:
        train: Table, as ``read_table`` takes it; a split whose columns have other names is given as
            ``{path: ..., columns: ...}``.
        dev: The same for dev; or a number, the share of the train pairs to hold out (by ``text1``).
        test: Like ``dev``, for test.
        columns: Names of the columns ``text1``, ``text2`` and ``label``; ``label: null``: no labels.
        label_scale: Lowest and highest label, mapped to 0 and 1 (STS Benchmark: [0, 5]).
        classes: Labels that are words; the label is the word's place among them, from 0.
        scores: Teacher -> the column with its score of the row.
        seed: Of the pairs held out.

    Example:
        >>> import pyarrow as pa
        >>> rows = pa.table({"text1": ["a"], "text2": ["b"], "label": [4.0]})
        >>> TextPairs(train=rows, label_scale=[0, 5]).split("train").labels
        tensor([0.8000])
    """

    def __init__(
        self,
        train: Spec | None = None,
        dev: Spec | float | None = None,
        test: Spec | float | None = None,
        columns: Mapping[str, str | None] | None = None,
        label_scale: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
        scores: Mapping[str, str] | None = None,
        seed: int = 0,
    ):
        if label_scale is not None and (len(label_scale) != 2 or not label_scale[0] < label_scale[1]):
            raise ValueError(f"label_scale must be [lowest, highest], got {list(label_scale)}.")
        _check_classes(classes)
        if classes is not None and label_scale is not None:
            raise ValueError("classes takes the place of label_scale; give one of them.")
        self.tables, self.held_out = given_splits({"train": train, "dev": dev, "test": test})
        super().__init__([name for name in SPLITS if name in self.tables or name in self.held_out])
        self.columns = _columns({"text1": "text1", "text2": "text2", "label": "label"}, columns)
        self.label_scale, self.classes = label_scale, classes
        self.scores, self.seed = dict(scores or {}), seed
        self.teachers = tuple(self.scores)

    def read(self, name: str) -> Judged:
        table, kept = _read_rows(self, name, "text1")
        first, second = table.texts("text1"), table.texts("text2")
        ids, n = [str(row) for row in kept], len(kept)
        return Judged(
            task="pairs",
            queries=TextTable(ids, [first[row] for row in kept]),
            candidates=TextTable(ids, [second[row] for row in kept]),
            listed=Ragged(torch.arange(n), torch.arange(n + 1)),
            labels=self._labels(table)[kept] if "label" in table else None,
            scores=_scores(table, self.scores, kept),
            name=f"{table.name} ({name})",
        )

    def _labels(self, table: RawTable) -> Tensor:
        labels = _labels(table, self.classes)
        if self.classes is not None:
            return labels
        low, high = self.label_scale or (0.0, 1.0)
        outside = (labels < low) | (labels > high)
        if outside.any():
            row = int(outside.nonzero()[0])
            raise DataError(
                f"{table.where('label', row)}: {labels[row]:g} lies outside {low:g} to {high:g}. "
                f"Say with label_scale: [lowest, highest] which labels there are."
            )
        return (labels - low) / (high - low)


def _columns(names: dict[str, str | None], given: Mapping[str, str | None] | None) -> dict[str, str | None]:
    if unknown := set(given or {}) - set(names):
        raise ValueError(f"columns has no key {sorted(unknown)}; it takes {', '.join(names)}.")
    return {**names, **(given or {})}


def _read_rows(data: Groups | TextPairs, name: str, by: str) -> tuple[RawTable, list[int]]:
    """The table a split stands in, and which rows are the split's."""
    cut = name in data.held_out or (name == "train" and bool(data.held_out))
    source = "train" if cut else name
    scores = {f"score of {teacher}": column for teacher, column in data.scores.items()}
    # a teacher's scores are needed where one trains; dev and test may do without
    table = read_table(
        data.tables[source], {**data.columns, **scores}, set() if source == "train" else set(scores), source
    )
    if not cut:
        return table, list(range(len(table)))
    kept = choose(table.texts(by), name, data.held_out, data.seed)
    rows = [row for row, keep in enumerate(kept) if keep]
    if not rows:
        raise DataError(f"{table.name}: no row is left for the split '{name}'.")
    return table, rows


def _check_classes(classes: Sequence[str] | None) -> None:
    if classes is not None and len(set(classes)) < 2:
        raise ValueError("classes must name two labels or more.")


def _labels(table: RawTable, classes: Sequence[str] | None) -> Tensor:
    """The labels of all rows, as they stand there, or the place of each among the classes."""
    if classes is None:
        return _numbers(table, "label")
    value = {word: float(i) for i, word in enumerate(map(str, classes))}
    words = table.ids("label")
    for row, word in enumerate(words):
        if word not in value:
            raise DataError(
                f"{table.where('label', row)}: '{word}' is none of the classes {', '.join(value)}. "
                f"Add it to classes, or mend the row."
            )
    return torch.tensor([value[word] for word in words])


def _numbers(table: RawTable, column: str) -> Tensor:
    return torch.tensor(table.numbers(column), dtype=torch.float32)


def _scores(table: RawTable, teachers: Mapping[str, str], rows: list[int]) -> dict[str, Tensor]:
    columns = {teacher: f"score of {teacher}" for teacher in teachers}
    return {teacher: _numbers(table, name)[rows] for teacher, name in columns.items() if name in table}
