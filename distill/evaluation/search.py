"""Exact search by matrix products, in bounded memory and with one answer to ties. Next: ``evaluate.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.batch import Ragged
from distill.errors import DataError
from distill.maxsim import maxsim_all

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
    depth = min(k, len(candidate_vectors))
    scores = [torch.empty(0, depth, device=device)]
    rows = [torch.empty(0, depth, dtype=torch.int64, device=device)]
    for start in range(0, len(query_vectors), block):
        queries = query_vectors[start : start + block].float()
        hidden = None
        if seen is not None:
            several = chunk < len(candidate_vectors)
            hidden = _by_candidate(seen, start, len(queries), ordered=several).to(device)
        found = _search_block(queries, candidate_vectors, k, chunk, hidden)
        scores.append(found[0])
        rows.append(found[1])
    found = torch.cat(scores), torch.cat(rows)
    return found if seen is None else (found[0], found[1].masked_fill(found[0] == -torch.inf, -1))


def search_maxsim(queries: Ragged, candidates: Ragged, k: int) -> tuple[Tensor, Tensor]:
    """``search`` by MaxSim of token vectors, rows of [., D] each: scores and rows [n, min(k, m)]."""
    _check_finite(queries.values, "query token")
    _check_finite(candidates.values, "candidate token")
    depth = min(k, len(candidates))
    scores, rows = [torch.empty(0, depth)], [torch.empty(0, depth, dtype=torch.int64)]
    for part in torch.arange(len(queries)).split(64):
        asked = queries.select(part)
        best, place = torch.empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.int64)
        for chunk in torch.arange(len(candidates)).split(1024):
            found, columns = top(maxsim_all(asked, candidates.select(chunk)), k)
            best, place = torch.cat([best, found], dim=1), torch.cat([place, columns + chunk[0]], dim=1)
            best, columns = top(best, k)  # of equal ones the earlier chunk's stand first
            place = place.gather(1, columns)
        scores.append(best)
        rows.append(place)
    return torch.cat(scores), torch.cat(rows)


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row of [n, m] scores, best first; of equal ones the lowest column."""
    return _unpacked(_packed(scores).topk(min(k, scores.shape[1])).values)


def _search_block(
    queries: Tensor, candidates: Tensor, k: int, chunk: int, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = torch.empty(len(queries), 0, device=queries.device)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(candidates), chunk):
        part = candidates[start : start + chunk].to(queries.device, torch.float32)
        products = queries @ part.T
        if hidden is not None:
            first, last = torch.searchsorted(
                hidden[1], hidden.new_tensor([start, start + len(part)])
            ).tolist()
            products[hidden[0, first:last], hidden[1, first:last] - start] = -torch.inf
        found, columns = _best(products, k)
        if start == 0:
            scores, rows = found, columns
            continue
        scores, rows = torch.cat([scores, found], dim=1), torch.cat([rows, columns + start], dim=1)
        scores, columns = _best(scores, k)  # of equal ones the earlier chunk's stand first
        rows = rows.gather(1, columns)
    return scores, rows


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``top``: only rows with a tie among their first k + 1, few as a rule, are sorted with care."""
    n = scores.shape[1]
    values, columns = scores.topk(min(k + 1, n))
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1)
    values, columns = values[:, :k], columns[:, :k]
    if tied.any():
        values, columns = values.clone(), columns.clone()
        values[tied], columns[tied] = top(scores[tied], k)
    return values, columns


def _by_candidate(seen: Ragged, start: int, n: int, ordered: bool) -> Tensor:
    """Queries, from 0, and rows of candidates of what n queries from ``start`` have seen: [2, T]."""
    bounds = seen.offsets[start : start + n + 1]
    rows = seen.values[bounds[0] : bounds[-1]]
    query = torch.repeat_interleave(bounds.diff())
    if ordered:
        order = rows.argsort()
        query, rows = query[order], rows[order]
    return torch.stack([query, rows])


def _packed(scores: Tensor) -> Tensor:
    """One int64 per score, ordered by score and then by lower column: no two are equal, so top-k is unique.

    The bits of a float32, read as an integer, keep its order once those of negative numbers are flipped.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    columns = torch.arange(scores.shape[1], device=scores.device)
    return (ordered << 32) | (0xFFFFFFFF - columns)


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
