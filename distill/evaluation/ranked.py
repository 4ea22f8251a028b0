"""The arithmetic of ranking metrics, over all queries at once. Part of ``metrics.py``.

What ir_measures computes from a dictionary per query, as a handful of operations on columns: the measures
without other parameters than a cutoff, which are most of what is asked for. The others are asked of
ir_measures itself. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ir_measures
import numpy as np
import pandas as pd

from distill.errors import DataError

if TYPE_CHECKING:
    from distill.evaluation.metrics import Catalogue, Column, Qrels, Run


@dataclass(frozen=True)
class Ranked:
    """Q judged queries with a relevant candidate, what was ranked for them, and what is relevant.

    Queries are numbers from 0 to Q - 1, candidates numbers of ``names``; ranks begin at 0.
    """

    query_names: list[str]  # [Q] in the order of the qrels
    names: list[str]  # of candidates
    query: np.ndarray  # [T] ascending
    candidate: np.ndarray  # [T]
    rank: np.ndarray  # [T] ascending within a query
    judged_query: np.ndarray  # [J] ascending
    judged_candidate: np.ndarray  # [J]
    gain: np.ndarray  # [J] falling within a query; 0: not relevant
    catalogue: np.ndarray | None  # [n] candidates
    popularity: np.ndarray | None  # [names] by candidate; nan outside of the catalogue
    without_positive: int
    unjudged: int

    @classmethod
    def of(cls, run: Run, qrels: Qrels, labels: np.ndarray, catalogue: Catalogue | None) -> Ranked:
        """From columns of ids, which are the same where they print alike."""
        (judged, ranked), query_names = _numbers([qrels.queries, run.queries])
        known = max(judged, default=-1) + 1
        all_of = () if catalogue is None else catalogue.candidates
        (relevant, found, whole), names = _numbers([qrels.candidates, run.candidates, all_of])
        judged, relevant, gain = _highest(judged, relevant, labels, len(names))
        has_positive = np.zeros(len(query_names), dtype=bool)
        has_positive[judged[gain > 0]] = True
        kept = np.flatnonzero(has_positive)
        place = np.full(len(query_names), -1)
        place[kept] = np.arange(len(kept))

        order = _sorted((ranked, -np.asarray(run.scores, dtype=np.float32), _order(run.candidates)))
        ranked, found = ranked[order], found[order]
        _check_once(ranked, found, query_names, names)
        rank = _nth(ranked)
        mine = has_positive[ranked]
        order = np.lexsort((-gain, judged))
        order = order[has_positive[judged[order]]]
        popularity = None
        if catalogue is not None and catalogue.popularity is not None:
            popularity = np.full(len(names), np.nan)
            popularity[whole] = np.asarray(catalogue.popularity, dtype=np.float64)
        return cls(
            query_names=[query_names[row] for row in kept],
            names=names,
            query=place[ranked[mine]],
            candidate=found[mine],
            rank=rank[mine],
            judged_query=place[judged[order]],
            judged_candidate=relevant[order],
            gain=gain[order],
            catalogue=whole if catalogue is not None else None,
            popularity=popularity,
            without_positive=known - len(kept),
            unjudged=int((np.unique(ranked) >= known).sum()),
        )

    def cold(self, most: int) -> Ranked:
        """Only candidates that were chosen at most so often are relevant."""
        assert self.popularity is not None  # was checked
        kept = (self.popularity[self.judged_candidate] <= most) | (self.gain == 0)
        return replace(
            self,
            judged_query=self.judged_query[kept],
            judged_candidate=self.judged_candidate[kept],
            gain=self.gain[kept],
        )

    def values(self, measure: ir_measures.Measure) -> np.ndarray:
        """The measure for each query: [Q]; nan where nothing is relevant."""
        formula = FORMULAS.get(str(measure.NAME))
        if formula is None or set(measure.params) - {"cutoff"}:
            values = self._of_library(measure)
        else:
            values = formula(self, measure.params.get("cutoff"))
        return np.where(self.relevant > 0, values, np.nan)

    def coverage(self, k: int) -> float:
        """Which share of the catalogue is among the first k of some query."""
        assert self.catalogue is not None
        shown = np.unique(self.candidate[self.rank < k])
        return float(np.isin(shown, self.catalogue).sum() / max(len(self.catalogue), 1))

    def average_popularity(self, k: int) -> np.ndarray:
        """How often the first k were chosen in training, on average: [Q]; nan where nothing was ranked."""
        assert self.popularity is not None
        first = self.rank < k
        ranked = np.bincount(self.query[first], minlength=len(self.query_names))
        with np.errstate(invalid="ignore"):
            return self._sum(self.query[first], self.popularity[self.candidate[first]]) / ranked

    @cached_property
    def relevant(self) -> np.ndarray:
        """How many candidates are relevant: [Q]."""
        return np.bincount(self.judged_query[self.gain > 0], minlength=len(self.query_names))

    @cached_property
    def hits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The relevant ones among what was ranked, by query and rank: query, rank and gain [H]."""
        n = max(len(self.names), 1)
        key, wanted = self.query * n + self.candidate, self.judged_query * n + self.judged_candidate
        order = np.flatnonzero(self.gain > 0)
        order = order[wanted[order].argsort()]
        if not len(order):
            return self.query[:0], self.rank[:0], self.gain[:0]
        place = np.searchsorted(wanted[order], key).clip(max=len(order) - 1)
        hit = wanted[order][place] == key
        return self.query[hit], self.rank[hit], self.gain[order][place[hit]]

    def within(self, k: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``hits`` among the first k."""
        query, rank, gain = self.hits
        kept = rank < k if k is not None else np.ones(len(rank), dtype=bool)
        return query[kept], rank[kept], gain[kept]

    def _sum(self, query: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
        """Sums over each query's entries: [Q] float64."""
        return np.bincount(query, values, minlength=len(self.query_names)).astype(np.float64)

    def _share(self, values: np.ndarray, of: np.ndarray) -> np.ndarray:
        return values / np.maximum(of, 1)

    def success(self, k: int | None) -> np.ndarray:
        return (self._sum(self.within(k)[0]) > 0).astype(np.float64)

    def precision(self, k: int | None) -> np.ndarray:
        assert k is not None  # ir_measures wants one
        return self._sum(self.within(k)[0]) / k

    def recall(self, k: int | None) -> np.ndarray:
        return self._share(self._sum(self.within(k)[0]), self.relevant)

    def reciprocal_rank(self, k: int | None) -> np.ndarray:
        query, rank, _ = self.within(k)
        first, place = np.unique(query, return_index=True)
        values = np.zeros(len(self.query_names))
        values[first] = 1.0 / (rank[place] + 1)
        return values

    def average_precision(self, k: int | None) -> np.ndarray:
        query, rank, _ = self.within(k)
        return self._share(self._sum(query, (_nth(query) + 1) / (rank + 1)), self.relevant)

    def ndcg(self, k: int | None) -> np.ndarray:
        query, rank, gain = self.within(k)
        best = _nth(self.judged_query)
        kept = best < k if k is not None else np.ones(len(best), dtype=bool)
        ideal = self._sum(self.judged_query[kept], self.gain[kept] / np.log2(best[kept] + 2))
        found = self._sum(query, gain / np.log2(rank + 2))
        return np.divide(found, ideal, out=np.zeros_like(found), where=ideal > 0)

    def _of_library(self, measure: ir_measures.Measure) -> np.ndarray:
        """Ranks, negated, stand for scores: without ties, whatever the library does with ties."""

        def nested(queries: np.ndarray, candidates: np.ndarray, values: Sequence[Any]) -> dict[str, dict]:
            of: dict[str, dict] = {}
            rows = zip(queries.tolist(), candidates.tolist(), values, strict=True)
            for query, candidate, value in rows:
                of.setdefault(str(query), {})[self.names[candidate]] = value
            return of

        qrels = nested(self.judged_query, self.judged_candidate, self.gain.tolist())
        run = nested(self.query, self.candidate, (-self.rank).astype(float).tolist())
        values = np.zeros(len(self.query_names))
        if qrels:
            evaluator = ir_measures.evaluator([measure], qrels)
            for query, _, value in evaluator.iter_calc({q: run[q] for q in qrels if q in run}):
                values[int(query)] = float(value)
        return values


FORMULAS: dict[str, Callable[[Ranked, int | None], np.ndarray]] = {
    "nDCG": Ranked.ndcg,
    "RR": Ranked.reciprocal_rank,
    "R": Ranked.recall,
    "P": Ranked.precision,
    "AP": Ranked.average_precision,
    "Success": Ranked.success,
}


def _numbers(columns: Sequence[Column]) -> tuple[list[np.ndarray], list[str]]:
    """Columns of ids as numbers, in order of appearance, and what the numbers stand for."""
    names: dict[str, int] = {}
    numbers = []
    for column in columns:
        place, distinct = pd.factorize(np.asarray(column))
        known = [names.setdefault(str(name), len(names)) for name in distinct.tolist()]
        numbers.append(np.array(known, dtype=np.int64)[place] if known else place.astype(np.int64))
    return numbers, list(names)


def _order(column: Column) -> np.ndarray:
    """Numbers in the order of the ids: numbers as numbers, text as text."""
    ids = np.asarray(column)
    return ids if ids.dtype.kind in "iu" else np.unique(ids, return_inverse=True)[1]


def _sorted(keys: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray | slice:
    """What sorts by the first key, then by the second, then by the third; nothing has to, as a rule."""
    later = np.zeros(max(len(keys[0]) - 1, 0), dtype=bool)
    for key in reversed(keys):
        later = (key[:-1] < key[1:]) | ((key[:-1] == key[1:]) & later)
    return slice(None) if later.all() else np.lexsort(keys[::-1])


def _nth(queries: np.ndarray) -> np.ndarray:
    """How many entries of the same query stand before each: [T], of queries [T] that stand together."""
    first = np.flatnonzero(np.diff(queries, prepend=-1))
    return np.arange(len(queries)) - np.repeat(first, np.diff(first, append=len(queries)))


def _highest(
    query: np.ndarray, candidate: np.ndarray, labels: np.ndarray, candidates: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each judged pair once, with the highest of its labels; below 0 counts as 0."""
    pair, place = np.unique(query * max(candidates, 1) + candidate, return_inverse=True)
    highest = np.zeros(len(pair), dtype=np.int64)
    np.maximum.at(highest, place, labels)
    return pair // max(candidates, 1), pair % max(candidates, 1), highest


def _check_once(
    query: np.ndarray, candidate: np.ndarray, query_names: Sequence[str], names: Sequence[str]
) -> None:
    """Refuse a second score for a candidate, which would hide the first."""
    pair = query * max(len(names), 1) + candidate
    ordered = np.sort(pair)
    if len(again := np.flatnonzero(ordered[1:] == ordered[:-1])):
        one = int(ordered[again[0]])
        raise DataError(
            f"query '{query_names[one // len(names)]}' ranks candidate '{names[one % len(names)]}' twice; "
            f"keep one score for it."
        )
