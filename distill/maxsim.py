"""MaxSim: each query token finds its best candidate token, and their products are summed. Next: ``index.py``.

    score(q, c) = sum over query tokens i of max over candidate tokens j of <q_i, c_j>

Khattab and Zaharia, 2020. ColBERT. arXiv:2004.12832
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.batch import Ragged

BUDGET = 2**24  # float32 values held at a time


def maxsim_pairs(
    queries: Ragged, candidates: Ragged, query: Tensor, candidate: Tensor, budget: int = BUDGET
) -> Tensor:
    """Scores [n] float32 of n pairs, in bounded memory whatever n is, also for a gradient.

    Args:
        queries: Vectors of their tokens, rows of [., D].
        candidates: The same.
        query: Rows of queries [n].
        candidate: Rows of candidates [n].
        budget: Values held at a time.

    Example:
        >>> two = Ragged(torch.eye(2), torch.tensor([0, 2]))  # one text of two tokens
        >>> maxsim_pairs(two, two, torch.tensor([0]), torch.tensor([0]))
        tensor([2.])
    """
    if not len(query):
        return queries.values.new_zeros(0, dtype=torch.float32)
    by_length = candidates.lengths[candidate].argsort()

    def scores(part: Tensor) -> Tensor:
        asked, real = _padded(queries, query[part])
        found, there = _padded(candidates, candidate[part])
        products = (asked @ found.transpose(1, 2)).masked_fill(~there[:, None, :], _LOW)
        return products.amax(dim=2).masked_fill(~real, 0.0).sum(dim=1)

    width, size = int(queries.lengths[query].max()), queries.values.shape[-1]
    lengths = candidates.lengths[candidate[by_length]].tolist()
    parts = list(_parts(by_length, lengths, lambda length: width * length + (width + length) * size, budget))
    return torch.cat(_each(scores, parts))[by_length.argsort()]


def maxsim_all(queries: Ragged, candidates: Ragged, budget: int = BUDGET) -> Tensor:
    """Scores [B, P] float32 of every query against every candidate; see ``maxsim_pairs``."""
    if not len(queries) or not len(candidates):
        return queries.values.new_zeros(len(queries), len(candidates), dtype=torch.float32)
    asked, real = _padded(queries, torch.arange(len(queries), device=queries.offsets.device))
    n, width, size = asked.shape
    by_length = candidates.lengths.argsort()

    def scores(part: Tensor) -> Tensor:
        found, there = _padded(candidates, part)
        products = (asked.flatten(0, 1) @ found.flatten(0, 1).T).view(n, width, *found.shape[:2])
        best = products.masked_fill(~there, _LOW).amax(dim=3)  # [B, Q, m]
        return best.masked_fill(~real[..., None], 0.0).sum(dim=1)

    lengths = candidates.lengths[by_length].tolist()
    parts = list(_parts(by_length, lengths, lambda length: (n * width + size) * length, budget))
    return torch.cat(_each(scores, parts), dim=1)[:, by_length.argsort()]


_LOW = torch.finfo(torch.float32).min


def _parts(order: Tensor, lengths: list[int], size: Callable[[int], int], budget: int) -> Iterator[Tensor]:
    """Rows in the order of length, shortest first, as many at a time as fit into the budget."""
    start = 0
    while start < len(lengths):
        end = start + 1
        while end < len(lengths) and (end + 1 - start) * size(lengths[end]) <= budget:
            end += 1
        yield order[start:end]
        start = end


def _each(scores: Callable[[Tensor], Tensor], parts: list[Tensor]) -> list[Tensor]:
    """The scores of each part; of several, nothing is kept for the backward, which computes them again."""
    with torch.autocast(parts[0].device.type, enabled=False):
        if len(parts) == 1 or not torch.is_grad_enabled():
            return [scores(part) for part in parts]
        again = [checkpoint(scores, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return [value for value in again if isinstance(value, Tensor)]


def _padded(tokens: Ragged, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [m, T, D] of the given rows in float32, anything behind their ends, and which are real."""
    lengths = tokens.lengths[rows]
    within = torch.arange(int(lengths.max()), device=rows.device)
    places = (tokens.offsets[rows][:, None] + within).clamp(max=len(tokens.values) - 1)
    vectors = tokens.values.index_select(0, places.flatten()).view(*places.shape, -1)
    return vectors.float(), within < lengths[:, None]
