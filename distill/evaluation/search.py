"""Exact search by matrix products, in bounded memory and with one answer to ties. Next: ``evaluate.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.batch import Ragged
from distill.errors import DataError

_BLOCK = 2**23  # scores held at a time


def search(
    query_vectors: Tensor,
    candidate_vectors: Tensor,
    k: int,
    chunk: int = 8192,
    seen: Ragged | None = None,
) -> tuple[Tensor, Tensor]:
    """The k candidates with the highest dot product, best first; of equal ones the lowest row.

    Args:
        query_vectors: [n, D].
        candidate_vectors: [m, D].
        k: How many to find; at most m are returned.
        chunk: How many candidates to score at a time. It changes the memory needed, not the answer.
        seen: Rows of candidates per query that are left out.

    Returns:
        Scores [n, min(k, m)] float32 and rows [n, min(k, m)] int64; where nothing is left to be found,
        minus infinity and -1.

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
    if seen is not None and len(seen) != len(query_vectors):
        raise ValueError(f"seen must have a row for each of {len(query_vectors)} queries, got {len(seen)}.")
    device, block = query_vectors.device, max(1, _BLOCK // chunk)
    keys = [torch.empty(0, min(k, len(candidate_vectors)), dtype=torch.int64, device=device)]
    for start in range(0, len(query_vectors), block):
        queries = query_vectors[start : start + block].float()
        hidden = None if seen is None else _by_candidate(seen, start, len(queries)).to(device)
        keys.append(_search_block(queries, candidate_vectors, k, chunk, hidden))
    scores, rows = _unpacked(torch.cat(keys))
    return scores, rows if seen is None else rows.masked_fill(scores == -torch.inf, -1)


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row of [n, m] scores, best first; of equal ones the lowest column."""
    return _unpacked(_packed(scores, 0).topk(min(k, scores.shape[1])).values)


def _search_block(queries: Tensor, candidates: Tensor, k: int, chunk: int, hidden: Tensor | None) -> Tensor:
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(candidates), chunk):
        part = candidates[start : start + chunk].to(queries.device, torch.float32)
        scores = queries @ part.T
        if hidden is not None:
            first, last = torch.searchsorted(
                hidden[1], hidden.new_tensor([start, start + len(part)])
            ).tolist()
            scores[hidden[0, first:last], hidden[1, first:last] - start] = -torch.inf
        keys = torch.cat([best, _best(scores, start, min(k, len(part)))], dim=1)
        best = keys.topk(min(k, keys.shape[1])).values
    return best


def _best(scores: Tensor, first_row: int, k: int) -> Tensor:
    """The keys of the k highest of each row of [n, m] scores, in any order.

    Sorting keys takes several times as long as sorting scores, and they are needed only by those few rows
    whose k-th score ties with a score that was not taken.
    """
    values, columns = scores.topk(k)
    keys = _keys(values, columns + first_row)
    least = values[:, -1:]
    tied = ((scores >= least).sum(dim=1) > k) & (least[:, 0] > -torch.inf)
    if tied.any():
        keys[tied] = _packed(scores[tied], first_row).topk(k).values
    return keys


def _by_candidate(seen: Ragged, start: int, n: int) -> Tensor:
    """Queries, from 0, and rows of candidates of what n queries from ``start`` have seen: [2, T], by row."""
    part = seen.select(torch.arange(start, start + n, device=seen.offsets.device))
    query = torch.arange(n, device=part.values.device).repeat_interleave(part.lengths)
    order = part.values.argsort()
    return torch.stack([query[order], part.values[order]])


def _packed(scores: Tensor, first_row: int) -> Tensor:
    """The keys of [n, m] scores, of rows from ``first_row``."""
    return _keys(scores, torch.arange(first_row, first_row + scores.shape[1], device=scores.device))


def _keys(scores: Tensor, rows: Tensor) -> Tensor:
    """One int64 per score, ordered by score and then by lower row: no two are equal, so top-k is unique.

    The bits of a float32, read as an integer, keep its order once those of negative numbers are flipped.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
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
