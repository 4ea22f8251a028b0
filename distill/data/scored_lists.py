"""Lists with a teacher's scores, as other tools write them. Next: ``texts.py``."""

from __future__ import annotations

import ast
import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from distill.batch import Ragged
from distill.data.judged import Judged, TextTable
from distill.data.splits import SPLITS, choose, given_splits
from distill.data.tables import RawTable, Spec, read_table
from distill.data.text_data import TextData
from distill.errors import DataError

LABELS = ("label", "labels", "score", "scores")  # what sentence-transformers takes for a label


class ScoredLists(TextData):
    """Queries, each with candidates and a teacher's score of each: distillation data made elsewhere.

    ``flag_embedding``: a row has ``query``, lists of texts ``pos`` and ``neg``, and of their scores
    ``pos_scores`` and ``neg_scores``. What is in ``pos`` is relevant.

    ``sentence_transformers``: the first column is the query, each further one a candidate, or one of them
    a list of candidates; ``label`` (or ``labels``, ``score``, ``scores``) has the list of scores. Columns
    whose name starts with ``positive`` hold what is relevant; if there is none, nothing is labelled.

    ``pylate``: a row has ``query_id`` and the lists ``document_ids`` and ``scores``; the texts are in two
    more tables, with ``query_id`` and ``text``, and ``document_id`` and ``text``. Nothing is labelled.

    Args:
        train: Table, as ``read_table`` takes it.
        format: One of the three above.
        teacher: Name of the model whose scores these are (``teachers.Recorded``, if it is not here). None:
            no scores are read.
        dev: Table; or a number, the share of the train queries to hold out. Its scores are not read.
        test: Like ``dev``.
        queries: Of ``pylate``: the table with the texts of the queries.
        documents: Of ``pylate``: the table with the texts of the candidates.
        columns: Other names of the columns named above (``sentence_transformers``: of ``query``, ``scores``).
        task: What dev and test measure: the order of the listed candidates (rerank), or a search over all
            candidates of the split (retrieval).
        seed: Of the queries held out.

    Example:
        >>> import pyarrow as pa
        >>> rows = [{"query": "a", "pos": ["x"], "neg": ["y"], "pos_scores": [0.9], "neg_scores": [0.2]}]
        >>> lists = ScoredLists(pa.Table.from_pylist(rows), "flag_embedding", teacher="cross")
        >>> lists.split("train").scores["cross"]
        tensor([0.9000, 0.2000])
    """

    def __init__(
        self,
        train: Spec | None = None,
        format: Literal["flag_embedding", "sentence_transformers", "pylate"] = "flag_embedding",
        teacher: str | None = None,
        dev: Spec | float | None = None,
        test: Spec | float | None = None,
        queries: Spec | None = None,
        documents: Spec | None = None,
        columns: Mapping[str, str] | None = None,
        task: Literal["rerank", "retrieval"] = "rerank",
        seed: int = 0,
    ):
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got '{format}'.")
        if task not in ("rerank", "retrieval"):
            raise ValueError(f"task must be rerank or retrieval, got '{task}'.")
        texts = (queries, documents)
        if (format == "pylate") != (None not in texts) or (format != "pylate" and texts != (None, None)):
            raise ValueError("queries and documents: format pylate takes both tables, the others neither.")
        _, names = FORMATS[format]
        if unknown := set(columns or {}) - set(names):
            raise ValueError(f"columns has no key {sorted(unknown)}; {format} takes {', '.join(names)}.")
        self.tables, self.held_out = given_splits({"train": train, "dev": dev, "test": test})
        super().__init__([name for name in SPLITS if name in self.tables or name in self.held_out])
        self.format, self.teacher, self.task, self.seed = format, teacher, task, seed
        self.queries, self.documents = queries, documents
        self.columns = {**names, **(columns or {})}
        self.teachers = () if teacher is None else (teacher,)

    def read(self, name: str) -> Judged:
        read, _ = FORMATS[self.format]
        cut = name in self.held_out or (name == "train" and bool(self.held_out))
        scored = self.teacher is not None and name == "train"
        table, rows = read(self, "train" if cut else name, scored)
        lists = list(rows)
        if cut:
            kept = choose([one.query for one in lists], name, self.held_out, self.seed)
            lists = [one for one, keep in zip(lists, kept, strict=True) if keep]
        if not lists:
            raise DataError(f"{table.name}: no row is left for the split '{name}'.")
        distinct: dict[str, int] = {}
        listed = [[distinct.setdefault(text, len(distinct)) for text in one.candidates] for one in lists]
        labels = [label for one in lists for label in one.labels]
        texts = list(distinct)
        scores = torch.tensor([score for one in lists for score in one.scores], dtype=torch.float32)
        return Judged(
            task=self.task,
            queries=TextTable([str(row) for row in range(len(lists))], [one.query for one in lists]),
            candidates=TextTable([str(row) for row in range(len(texts))], texts),
            listed=Ragged.of(listed),
            labels=torch.tensor(labels) if labels else None,
            scores={self.teacher: scores} if scored and self.teacher is not None else {},
            name=f"{table.name} ({name})",
        )


@dataclass(frozen=True)
class _List:
    """One query's candidates; ``labels`` and ``scores`` are empty where there are none."""

    query: str
    candidates: list[str]
    labels: list[float]
    scores: list[float]


def _flag_embedding(data: ScoredLists, name: str, scored: bool) -> tuple[RawTable, Iterator[_List]]:
    wanted = {k: v for k, v in data.columns.items() if scored or "_scores" not in k}
    table = read_table(data.tables[name], wanted, {"neg", "neg_scores"}, name)

    def lists() -> Iterator[_List]:
        queries = table.texts("query")
        empty: list[list[Any]] = [[] for _ in queries]
        sides = [(side, _lists(table, side) if side in table else empty) for side in ("pos", "neg")]
        given = {side: _lists(table, f"{side}_scores") if f"{side}_scores" in table else empty
                 for side, _ in sides}  # fmt: skip
        for row, query in enumerate(queries):
            candidates, scores, labels = [], [], []
            for side, texts in sides:
                candidates += _texts(table, side, row, texts[row])
                labels += [float(side == "pos")] * len(texts[row])
                if scored:
                    scores += _scores(table, f"{side}_scores", row, given[side][row], len(texts[row]))
            _some(table, "pos", row, candidates)
            yield _List(query, candidates, labels, scores)

    return table, lists()


def _sentence_transformers(data: ScoredLists, name: str, scored: bool) -> tuple[RawTable, Iterator[_List]]:
    table = read_table(data.tables[name], where=name)
    names = list(table.data.column_names)
    query = data.columns["query"] or names[0]
    marks = [data.columns["scores"]] if data.columns["scores"] else [n for n in LABELS if n in names]
    for wanted in [query, *marks]:
        if wanted not in names:
            raise DataError(f"{table.name}: there is no column '{wanted}'; it has {', '.join(names)}.")
    if scored and not marks:
        raise DataError(
            f"{table.name}: no column has scores: none is called {', '.join(LABELS)}. Say which one it is "
            f"with columns: {{scores: ...}}."
        )
    others = [n for n in names if n != query and n not in marks]
    if not others:
        raise DataError(f"{table.name}: there is no column of candidates beside {', '.join(names)}.")
    labelled = any(n.startswith("positive") for n in others)

    def lists() -> Iterator[_List]:
        columns = [_lists(table, n) if _is_list(table, n) else [[t] for t in table.texts(n)] for n in others]
        given = _lists(table, marks[0]) if scored else []
        for row, text in enumerate(table.texts(query)):
            candidates, labels = [], []
            for n, values in zip(others, columns, strict=True):
                candidates += _texts(table, n, row, values[row])
                labels += [float(n.startswith("positive"))] * (len(values[row]) if labelled else 0)
            _some(table, others[0], row, candidates)
            scores = _scores(table, marks[0], row, given[row], len(candidates)) if scored else []
            yield _List(text, candidates, labels, scores)

    return table, lists()


def _pylate(data: ScoredLists, name: str, scored: bool) -> tuple[RawTable, Iterator[_List]]:
    own = {k: data.columns[k] for k in ("query_id", "document_ids", *(["scores"] if scored else []))}
    table = read_table(data.tables[name], own, where=name)
    texts = {}
    for key, spec in (("query_id", data.queries), ("document_id", data.documents)):
        part = read_table(spec, {"id": data.columns[key], "text": data.columns["text"]}, where=key)
        texts[key] = dict(zip(part.ids("id", unique=True), part.texts("text"), strict=True)), part.name

    def text(key: str, column: str, row: int, value: Any) -> str:
        known, where = texts[key]
        if str(value) not in known:
            raise DataError(f"{table.where(column, row)}: there is no {key} '{value}' in {where}.")
        return known[str(value)]

    def lists() -> Iterator[_List]:
        ids = _lists(table, "document_ids")
        given = _lists(table, "scores") if scored else []
        for row, query in enumerate(table.ids("query_id")):
            candidates = [text("document_id", "document_ids", row, value) for value in ids[row]]
            _some(table, "document_ids", row, candidates)
            scores = _scores(table, "scores", row, given[row], len(candidates)) if scored else []
            yield _List(text("query_id", "query_id", row, query), candidates, [], scores)

    return table, lists()


Reader = Callable[[ScoredLists, str, bool], tuple[RawTable, Iterator[_List]]]
FORMATS: dict[str, tuple[Reader, dict[str, str]]] = {
    "flag_embedding": (
        _flag_embedding,
        {name: name for name in ("query", "pos", "neg", "pos_scores", "neg_scores")},
    ),
    "sentence_transformers": (_sentence_transformers, {"query": "", "scores": ""}),  # by their places
    "pylate": (
        _pylate,
        {name: name for name in ("query_id", "document_ids", "scores", "document_id", "text")},
    ),
}


def _is_list(table: RawTable, column: str) -> bool:
    return "list" in str(table.data[column].type)


def _lists(table: RawTable, column: str) -> list[list[Any]]:
    """A column of lists, none where a row has nothing; in files without lists they are written as text."""
    found = []
    for row, written in enumerate(table.data[column].to_pylist()):
        value = [] if written is None else written
        for parse in (json.loads, ast.literal_eval) if isinstance(value, str) else ():
            with contextlib.suppress(ValueError, SyntaxError):  # said below
                value = parse(written)
                break
        if not isinstance(value, list):
            raise DataError(f"{table.where(column, row)}: {written!r} is not a list. Mend the row.")
        found.append(value)
    return found


def _texts(table: RawTable, column: str, row: int, values: list[Any]) -> list[str]:
    for place, text in enumerate(values):
        if not isinstance(text, str) or not text or text.isspace():
            raise DataError(
                f"{table.where(column, row)}: {text!r} at place {place} of the list is no text. Mend the row."
            )
    return values


def _some(table: RawTable, column: str, row: int, candidates: list[str]) -> None:
    if not candidates:
        raise DataError(f"{table.where(column, row)}: the row lists no candidate. Remove it.")


def _scores(table: RawTable, column: str, row: int, values: list[Any], candidates: int) -> list[float]:
    """The scores of a row, finite and as many as its candidates."""
    if len(values) != candidates:
        margins = (
            " Margins are not enough: every candidate needs a score." if len(values) < candidates else ""
        )
        raise DataError(
            f"{table.where(column, row)}: {len(values)} scores for {candidates} candidates. Mend the row."
            f"{margins}"
        )
    for place, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(
                f"{table.where(column, row)}: {value!r} at place {place} of the list is not a finite number. "
                f"Remove the row, or mend the value."
            )
    return [float(value) for value in values]
