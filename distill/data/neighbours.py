"""Who finds candidates near a query, and who scores pairs: in bounded memory. Next: ``hard_negatives.py``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distill.data.bm25 import best_by_words
from distill.data.cache import replacing
from distill.data.judged import Judged, Table
from distill.errors import DataError
from distill.processes import any_of, first_goes_first, gather, in_shares, is_first, share, wait

if TYPE_CHECKING:
    from distill.evaluation import PairScorer
    from distill.model import Encoder

log = logging.getLogger("distill")

NUMBERS_AT_ONCE = 2**25  # of candidates' vectors in memory: 128 MB


class Search(Protocol):
    """What finds candidates."""

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Rows of candidates, -1 where there is none, and scores, nan where they tell nothing: [n, <= k]."""


class Words:
    """BM25 over the distinct texts, with what it finds for all queries kept in the cache.

    Args:
        deep: How many are found of each query, besides its positives and its own text.
    """

    def __init__(self, judged: Judged, deep: int):
        self.asked = judged.queries.same.unique()
        distinct = judged.candidates.same.unique()
        most = int(judged.positives.lengths.max()) + 1
        with first_goes_first():
            found = best_by_words(
                judged.candidates.take(distinct),
                judged.queries.take(self.asked),
                min(deep + most, len(distinct)),
            )
        self.rows = torch.where(found >= 0, distinct[found.clamp(min=0).long()], -1)

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        rows = self.rows[torch.searchsorted(self.asked, queries)][:, :k]
        return rows, torch.full(rows.shape, math.nan)


class Neighbours:
    """An encoder's vectors of all candidates, on disk, and the search among them with Faiss.

    The vectors lie in pieces of ``NUMBERS_AT_ONCE`` numbers; one piece is in memory at a time, whatever
    the size of the corpus. A piece that is there already, left by a mining that was interrupted, is not
    made again. Each distinct text has one vector.

    Args:
        folder: Where the pieces lie; nobody else's, for these weights and texts alone.
    """

    def __init__(self, model: Encoder, judged: Judged, folder: Path):
        self.model, self.judged, self.folder = model, judged, folder
        self.rows = judged.candidates.same.unique()  # of the distinct texts, in order
        self.size = max(1, NUMBERS_AT_ONCE // model.dim)
        self._last: tuple[Tensor, np.ndarray] | None = None

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Rows of candidates and scores, both [n, at most k], of the queries at rows [n]; ties by row."""
        import faiss

        from distill.evaluation.search import top
        from distill.index import nearest

        asked = self._queries(queries)[share(len(queries))]
        rows, scores = torch.empty(len(asked), 0, dtype=torch.int64), torch.empty(len(asked), 0)
        for start, vectors in self._pieces():
            find = partial(_swapped, faiss.knn, vectors, metric=faiss.METRIC_INNER_PRODUCT)
            more_scores, more = map(
                torch.from_numpy, nearest(find, asked, min(k, len(vectors)), len(vectors))
            )
            scores, place = top(torch.cat([scores, more_scores], dim=1), k)
            rows = torch.cat([rows, more + start], dim=1).gather(1, place)
        return self.rows[gather(rows)], gather(scores) * self._scale

    def scores(self, queries: Tensor, which: Tensor, candidates: Tensor) -> Tensor:
        """Scores [T] of the candidates at rows [T], each with ``queries[which[t]]``."""
        asked = torch.from_numpy(self._queries(queries))
        place = torch.searchsorted(self.rows, candidates)
        said = torch.empty(len(candidates))
        for start, vectors in self._pieces():
            here = ((place >= start) & (place < start + len(vectors))).nonzero()[:, 0]
            piece = torch.from_numpy(vectors)
            for part in here.split(2**14):
                said[part] = (asked[which[part]] * piece[place[part] - start]).sum(dim=1)
        return said * self._scale

    @property
    def _scale(self) -> float:
        """From products to scores as served, in which limits are given."""
        with torch.no_grad():
            return float(self.model.scale())

    def _queries(self, rows: Tensor) -> np.ndarray:
        """Vectors [n, D]; the last are kept, as a block is searched and then judged."""
        if self._last is None or not torch.equal(self._last[0], rows):
            self._last = (rows, self._encoded(self.model.encode_queries, self.judged.queries, rows))
        return self._last[1]

    def _pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Where each piece starts, and its vectors."""
        for number, start in enumerate(range(0, len(self.rows), self.size)):
            rows = self.rows[start : start + self.size]
            path = self.folder / f"vectors-{number:05}.npy"
            vectors = self._piece(path, len(rows))
            if any_of(vectors is None)[0]:
                vectors = self._encoded(self.model.encode_candidates, self.judged.candidates, rows)
                if is_first():
                    with replacing(path) as temporary, temporary.open("wb") as file:
                        np.save(file, vectors)
                wait()
                done = f"{start + len(rows):,} of {len(self.rows):,}"
                log.info("mining: %s candidates are encoded", done)
            assert vectors is not None
            yield start, vectors

    def _piece(self, path: Path, n: int) -> np.ndarray | None:
        """The n vectors in a file; None: it is not there yet, or not whole."""
        try:
            vectors = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return vectors if vectors.shape == (n, self.model.dim) and vectors.dtype == np.float32 else None

    def _encoded(self, encode: Callable[[Any], Tensor], table: Table, rows: Tensor) -> np.ndarray:
        from distill.evaluation.scoring import serving

        with serving(self.model):
            vectors = in_shares(encode, table.take(rows))
            vectors = vectors.float().cpu().contiguous()
        if not (finite := vectors.isfinite().all(dim=1)).all():
            broken = table.ids[int(rows[~finite][0])]
            raise DataError(f"the vector of '{broken}' is not finite: the model overflowed or has diverged.")
        return vectors.numpy()


def _swapped(knn, vectors: np.ndarray, queries: np.ndarray, k: int, metric: int):
    return knn(queries, vectors, k, metric=metric)


class Pairs:
    """A model that scores pairs, asked about mined ones."""

    def __init__(self, model: PairScorer, judged: Judged):
        self.model, self.judged = model, judged

    def scores(self, queries: Tensor, which: Tensor, candidates: Tensor) -> Tensor:
        """Scores [T] of the candidates at rows [T], each with ``queries[which[t]]``."""
        from distill.evaluation.scoring import score

        return score(self.model, self.judged, queries[which], candidates)
