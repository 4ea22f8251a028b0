"""Search by MaxSim: tokens that Faiss finds name candidates, which are scored exactly. Next: ``index.py``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from distill.batch import Ragged
from distill.evaluation.search import top
from distill.maxsim import maxsim_pairs

NEAR, TOKENS = 1024, 32  # tokens found for each query token: at least, and for each candidate wanted


def search_by_tokens(
    find: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
    queries: Ragged,
    candidates: Ragged,
    k: int,
    near: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best candidates of each query by MaxSim, best first and ties by row: scores, rows [q, k].

    Of a candidate of which no token is near a query's token nothing is known: its row is not among them.
    Where fewer are found the row is -1, the score -inf.

    Args:
        find: A search of Faiss over all tokens of candidates: vectors and k to products and tokens.
        queries: Vectors of their tokens, q rows of [., D].
        candidates: The same, n rows.
        k: How many to find.
        near: How many tokens are found for each query token; None: the more, the more candidates are wanted,
            as all tokens of a candidate may be near.
    """
    near = max(NEAR, TOKENS * k) if near is None else near
    owner = torch.arange(len(candidates)).repeat_interleave(candidates.lengths)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    for row in range(len(queries)):
        if not len(queries[row]):
            continue
        _, found = find(queries[row].numpy(), min(near, len(owner)))
        there = owner[torch.from_numpy(found[found >= 0])].unique()
        exact = maxsim_pairs(queries, candidates, torch.full_like(there, row), there)
        best, place = top(exact[None], k)
        scores[row, : len(best[0])], rows[row, : len(best[0])] = best[0].numpy(), there[place[0]].numpy()
    return scores, rows
