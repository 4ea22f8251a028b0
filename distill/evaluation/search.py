"""Exact search by matrix products, in bounded memory and with one answer to ties. Next: ``evaluate.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.batch import Ragged
from distill.errors import DataError
from distill.maxsim import maxsim_all

_BLOCK = 2**23  # scores held at a time


def search(
    query_vectors: Tensor, candidate_vectors: Tensor, k: int, chunk: int = 8192
) -> tuple[Tensor, Tensor]:
    """The k candidates with the highest dot product, best first; of equal ones the lowest row.

    Args:
        query_vectors: [n, D].
        candidate_vectors: [m, D].
        k: How many to find; at most m are returned.
        chunk: How many candidates to score at a time. It changes the memory needed, not the answer.

    Returns:
        Scores [n, min(k, m)] float32 and rows [n, min(k, m)] int64.

    Example:
        >>> search(torch.eye(2), torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 0.0]]), k=2)[1]
        tensor([[1, 0],
                [0, 1]])
    """
    if (
        query_vectors.ndim != 2
        or candidate_vectors.ndim != 2
        or query_vectors.shape[1] != candidate_vectors.shape[1]
    ):
        raise ValueError(
            f"query vectors {[*query_vectors.shape]} and candidate vectors {[*candidate_vectors.shape]} "
            f"must be [n, D] and [m, D] with the same D."
        )
    if k < 1 or chunk < 1:
        raise ValueError(f"k and chunk must be at least 1, got {k} and {chunk}.")
    _check_finite(query_vectors, "query")
    _check_finite(candidate_vectors, "candidate")
    keys = [
        _search_block(queries.float(), candidate_vectors, k, chunk)
        for queries in query_vectors.split(max(1, _BLOCK // chunk))
    ]
    none = torch.empty(0, min(k, len(candidate_vectors)), dtype=torch.int64, device=query_vectors.device)
    return _unpacked(torch.cat([none, *keys]))


def search_maxsim(queries: Ragged, candidates: Ragged, k: int) -> tuple[Tensor, Tensor]:
    """``search`` by MaxSim of token vectors, rows of [., D] each: scores and rows [n, min(k, m)]."""
    _check_finite(queries.values, "query token")
    _check_finite(candidates.values, "candidate token")
    keys = [torch.empty(0, min(k, len(candidates)), dtype=torch.int64)]
    for part in torch.arange(len(queries)).split(64):
        asked, best = queries.select(part), torch.empty(len(part), 0, dtype=torch.int64)
        for rows in torch.arange(len(candidates)).split(1024):
            found = _packed(maxsim_all(asked, candidates.select(rows)), int(rows[0]))
            best = torch.cat([best, found], dim=1)
            best = best.topk(min(k, best.shape[1])).values
        keys.append(best)
    return _unpacked(torch.cat(keys))


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row of [n, m] scores, best first; of equal ones the lowest column."""
    return _unpacked(_packed(scores, 0).topk(min(k, scores.shape[1])).values)


def _search_block(queries: Tensor, candidates: Tensor, k: int, chunk: int) -> Tensor:
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(candidates), chunk):
        part = candidates[start : start + chunk].to(queries.device, torch.float32)
        keys = torch.cat([best, _packed(queries @ part.T, start)], dim=1)
        best = keys.topk(min(k, keys.shape[1])).values
    return best


def _packed(scores: Tensor, first_row: int) -> Tensor:
    """One int64 per score, ordered by score and then by lower row: no two are equal, so top-k is unique.

    The bits of a float32, read as an integer, keep its order once those of negative numbers are flipped.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    rows = torch.arange(first_row, first_row + scores.shape[1], device=scores.device)
    return (ordered << 32) | (0xFFFFFFFF - rows)


def _unpacked(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys >> 32).int()
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _check_finite(vectors: Tensor, whose: str) -> None:
    for start in range(0, len(vectors), 2**16):
        finite = vectors[start : start + 2**16].isfinite().all(dim=1)
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            raise DataError(
                f"the vector of {whose} {row} is not finite: the model overflowed on it or diverged."
            )
