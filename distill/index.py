"""A Faiss index over candidates' vectors, with their ids and texts: build, save, load, search."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distill.batch import Ragged
from distill.errors import DataError, RecipeError, UserError
from distill.hub.files import atomic_folder, read_json, write_json
from distill.token_search import search_by_tokens

VECTORS, ROWS, ABOUT, TOKENS = "vectors.faiss", "candidates.parquet", "index.json", "tokens.npy"
TIED = 2**22  # scores held at a time while a tie is followed to its end


class Hit(NamedTuple):
    """One candidate that a search found."""

    rank: int  # from 1
    id: str
    score: float
    text: str | None


class Index:
    """Candidates that can be searched by the inner product of their vectors with a query's.

    Of candidates with a vector per token Faiss finds the tokens, and MaxSim scores exactly whose they are.
    Equal scores are ordered by the candidate's row, so the same index gives the same list everywhere.
    Made by ``Index.build`` or ``Index.load``.

    Args:
        faiss_index: A trained Faiss index, metric inner product, that holds one vector per id, or token.
        ids: The candidates' ids, by row.
        texts: Their texts, if they are to be shown.
        about: What ``index.json`` says: factory, metric, search, dim, count, model.
        tokens: The vectors of their tokens, where they have several.

    Example:
        >>> index = Index.build(torch.eye(3), ids=["a", "b", "c"])
        >>> [hit.id for hit in index.search(torch.tensor([[0.1, 0.9, 0.3]]), k=2)[0]]
        ['b', 'c']
    """

    def __init__(
        self,
        faiss_index: Any,
        ids: list[str],
        texts: list[str] | None,
        about: dict[str, Any],
        tokens: Ragged | None = None,
    ):
        self.faiss_index = faiss_index
        self.ids = ids
        self.texts = texts
        self.about = about
        self.tokens = tokens

    @classmethod
    def build(
        cls,
        vectors: Tensor | np.ndarray | Ragged,
        ids: Sequence[str],
        texts: Sequence[str] | None = None,
        factory: str = "Flat",
        metric: str = "dot",
        search: Mapping[str, Any] | None = None,
        model: str = "",
    ) -> Index:
        """Train (where the factory needs it) and fill an index.

        Args:
            vectors: One per candidate [n, D], or n rows of them, one per token.
            ids: n distinct ids.
            texts: n texts, kept to be shown with the hits.
            factory: A string of Faiss' ``index_factory``: ``Flat`` compares with every vector, ``HNSW32``
                walks a graph, ``IVF1024,PQ32`` looks into some cells of compressed vectors.
            metric: ``dot``, or ``cosine``, which brings vectors and queries to length 1 first.
            search: Faiss' search-time parameters by name, e.g. ``{"nprobe": 16}`` or ``{"efSearch": 64}``.
            model: The name of the model that made the vectors; kept in ``index.json``.
        """
        if metric not in ("dot", "cosine"):
            raise RecipeError(f"index: metric must be dot or cosine, got '{metric}'.")
        rows = _vectors(vectors.values if isinstance(vectors, Ragged) else vectors, "vectors")
        n, dim = len(vectors), rows.shape[1]
        ids, texts = [str(i) for i in ids], None if texts is None else list(texts)
        _check_rows(n, ids, texts)
        about = {
            "factory": factory,
            "metric": metric,
            "search": dict(search or {}),
            "dim": dim,
            "count": n,
            "model": model,
        }
        index = cls(_make(factory, dim), ids, texts, about)
        rows = index._ready(rows)
        if isinstance(vectors, Ragged):
            index.tokens = Ragged(torch.from_numpy(rows), vectors.offsets)
        if not index.faiss_index.is_trained:
            _train(index.faiss_index, rows, factory)
        index.faiss_index.add(rows)
        index.set_search(**about["search"])
        return index

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """D, the size of a vector."""
        return self.about["dim"]

    def set_search(self, **values: Any) -> None:
        """Set Faiss' search-time parameters by name: more work for more recall."""
        import faiss

        for name, value in values.items():
            try:
                faiss.ParameterSpace().set_index_parameter(self.faiss_index, name, value)
            except (RuntimeError, TypeError, ValueError) as error:
                raise RecipeError(
                    f"index: '{name}' = {value} cannot be set on the factory '{self.about['factory']}'; "
                    f"HNSW takes efSearch, IVF takes nprobe. Faiss says: {_reason(error)}."
                ) from error
        self.about["search"] = {**self.about["search"], **values}

    def search_arrays(self, vectors: Tensor | np.ndarray | Ragged, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best candidates of each query: scores [q, k] float32 and rows [q, k] int64, best first.

        Where fewer are found (a small index, or few cells looked into), the row is -1, the score -inf.
        """
        if k < 1:
            raise RecipeError(f"index: k must be at least 1, got {k}.")
        if isinstance(vectors, Ragged) != (self.tokens is not None):
            here, there = ("token", "text") if self.tokens is not None else ("text", "token")
            raise DataError(
                f"index: it holds a vector per {here}, the queries have one per {there}. Encode the queries "
                f"with the model that made the index."
            )
        queries = _vectors(vectors.values if isinstance(vectors, Ragged) else vectors, "query vectors")
        if queries.shape[1] != self.dim:
            raise DataError(
                f"index: the queries have {queries.shape[1]} dimensions, the index has {self.dim}"
                + (f" (made with {self.about['model']})" if self.about["model"] else "")
                + ". Encode the queries with the model that made the index."
            )
        queries = self._ready(queries)
        if isinstance(vectors, Ragged) and self.tokens is not None:
            asked = Ragged(torch.from_numpy(queries), vectors.offsets)
            return search_by_tokens(self.faiss_index.search, asked, self.tokens, k)
        found = min(k, len(self))
        scores, rows = nearest(self.faiss_index.search, queries, found, len(self))
        if found < k:
            wide = ((0, 0), (0, k - found))
            scores = np.pad(scores, wide, constant_values=-np.inf)
            rows = np.pad(rows, wide, constant_values=-1)
        return scores, rows

    def search(self, vectors: Tensor | np.ndarray | Ragged, k: int = 10) -> list[list[Hit]]:
        """The k best candidates of each query ([q, D], or q rows of token vectors), best first."""
        scores, rows = self.search_arrays(vectors, k)
        return [
            [
                Hit(rank, self.ids[row], score, None if self.texts is None else self.texts[row])
                for rank, (score, row) in enumerate(zip(*pair, strict=True), start=1)
                if row >= 0
            ]
            for pair in zip(scores.tolist(), rows.tolist(), strict=True)
        ]

    def save(self, folder: str | Path) -> None:
        """Write vectors, ids and texts, and ``index.json``; replaces the folder."""
        import faiss

        columns = {"id": self.ids} if self.texts is None else {"id": self.ids, "text": self.texts}
        table = pa.table({name: pa.array(v, pa.string()) for name, v in columns.items()})
        with atomic_folder(folder) as new:
            faiss.write_index(self.faiss_index, str(new / VECTORS))
            if self.tokens is not None:
                np.save(new / TOKENS, self.tokens.values.numpy())
                table = table.append_column("tokens", pa.array(self.tokens.lengths.numpy()))
            pq.write_table(table, new / ROWS)
            write_json(new / ABOUT, self.about)

    @classmethod
    def load(cls, folder: str | Path) -> Index:
        """Open a saved index; refuses one that is not whole."""
        import faiss

        folder = Path(folder)
        if missing := [name for name in (ABOUT, VECTORS, ROWS) if not (folder / name).is_file()]:
            raise DataError(
                f"{folder} is no index: {', '.join(missing)} missing. Build it with `distill index`."
            )
        about = read_json(folder / ABOUT)
        try:
            faiss_index = faiss.read_index(str(folder / VECTORS))
            table = pq.read_table(folder / ROWS)
            tokens = None
            if "tokens" in table.column_names:
                values = torch.from_numpy(np.load(folder / TOKENS, mmap_mode="c"))  # read as it is needed
                tokens = Ragged.of_lengths(values, torch.tensor(table["tokens"].to_pylist()))
        except (RuntimeError, pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{folder} cannot be read ({_reason(error)}). Build the index again.") from error
        ids = table["id"].to_pylist()
        texts = table["text"].to_pylist() if "text" in table.column_names else None
        told = {"index.json": about.get("count"), VECTORS: faiss_index.ntotal, ROWS: len(ids)}
        if tokens is not None:
            total = int(tokens.offsets[-1])
            whole = faiss_index.ntotal == len(tokens.values) == total
            told |= {VECTORS: len(ids) if whole else faiss_index.ntotal}
        if len(set(told.values())) != 1 or faiss_index.d != about.get("dim"):
            counts = ", ".join(f"{name} {count}" for name, count in told.items())
            raise DataError(
                f"{folder}: its parts do not belong together (candidates: {counts}; dimensions: index.json "
                f"{about.get('dim')}, {VECTORS} {faiss_index.d}). Build the index again."
            )
        index = cls(faiss_index, ids, texts, about, tokens)
        index.set_search(**about.get("search", {}))
        return index

    def _ready(self, rows: np.ndarray) -> np.ndarray:
        if self.about["metric"] != "cosine":
            return rows
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def nearest(
    find: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]], queries: np.ndarray, k: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of ``count`` vectors for each query [q, D], best first and ties by row: scores, rows [q, k].

    Faiss keeps any of the rows that tie at the end of a list, so it is asked for more until the tie ends,
    for so few queries at a time that memory stays bounded; an approximate index may still not have seen a
    tied row.

    Args:
        find: A search of Faiss: queries and k to scores and rows, -1 where fewer were found.
    """
    if not len(queries) or not k:
        return np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    scores, rows = _ordered(find, queries, min(k + 1, count))
    wide = rows.shape[1]
    open_ends = np.flatnonzero((scores[:, k - 1] == scores[:, -1]) & (rows[:, -1] >= 0))
    scores, rows = scores[:, :k].copy(), rows[:, :k].copy()
    while len(open_ends) and wide < count:
        wide = min(2 * wide, count)
        still, size = [], max(1, TIED // wide)
        for start in range(0, len(open_ends), size):
            part = open_ends[start : start + size]
            more_scores, more_rows = _ordered(find, queries[part], wide)
            still.append(part[(more_scores[:, k - 1] == more_scores[:, -1]) & (more_rows[:, -1] >= 0)])
            scores[part], rows[part] = more_scores[:, :k], more_rows[:, :k]
        open_ends = np.concatenate(still)
    return scores, rows


def _ordered(find: Callable, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores, rows = find(queries, k)
    scores = np.where(rows < 0, np.float32(-np.inf), scores)
    order = np.lexsort((np.where(rows < 0, np.iinfo(np.int64).max, rows), -scores), axis=1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _make(factory: str, dim: int) -> Any:
    import faiss

    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise RecipeError(
            f"index: Faiss cannot build '{factory}' over {dim} dimensions: {_reason(error)}. "
            f"Known to work: Flat, HNSW32, IVF256,Flat."
        ) from error


def _train(index: Any, rows: np.ndarray, factory: str) -> None:
    """Learn cells or codes from the vectors themselves."""
    try:
        index.train(rows)
    except RuntimeError as error:
        raise UserError(
            f"index: {len(rows)} vectors are too few to train '{factory}'. Use Flat or HNSW32, which need no "
            f"training, or a factory with fewer cells. Faiss says: {_reason(error)}."
        ) from error


def _vectors(vectors: Tensor | np.ndarray, name: str) -> np.ndarray:
    if isinstance(vectors, torch.Tensor):
        vectors = vectors.detach().to("cpu", torch.float32).numpy()
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    if rows.ndim != 2:
        raise DataError(f"index: {name} must be [n, D], got the shape {[*rows.shape]}.")
    if not np.isfinite(rows).all():
        bad = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise DataError(
            f"index: {name} have a value that is not finite in row {bad}. Check the model's weights."
        )
    return rows


def _check_rows(n: int, ids: list[str], texts: list[str] | None) -> None:
    if n == 0:
        raise DataError("index: there are no vectors, so there is nothing to search.")
    if len(ids) != n or (texts is not None and len(texts) != n):
        told = f"{len(ids)} ids" + ("" if texts is None else f" and {len(texts)} texts")
        raise DataError(f"index: {n} vectors came with {told}; give one for each vector.")
    if len(set(ids)) != n:
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise DataError(f"index: the id '{twice}' comes more than once; ids must be distinct.")


def _reason(error: Exception) -> str:
    """What a library says is wrong, without the place in its source."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = re.sub(r"^Error in .* at \S+:\d+: ", "", text)
    return text.split("failed: ")[-1].rstrip(".")
