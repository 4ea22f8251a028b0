"""Whom a query's positives are set against: part of ``sampled_softmax.py``, ``bpr.py`` and ``hinge.py``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distill.batch import Batch
from distill.objectives.checks import check_shapes, labels_of, unpadded


class Contrast(NamedTuple):
    """M candidates per query, listed (M = N) or all of the batch (M = P): who is right and who is wrong."""

    positives: Tensor  # [B, M] bool
    negatives: Tensor  # [B, M] bool
    draws: Tensor | None = None  # [M] how often each was drawn; None: once


def contrast(batch: Batch, in_batch: bool) -> Contrast:
    """The positives and negatives among the listed candidates, or among all candidates of the batch.

    ``in_batch``: whoever is neither listed as positive nor known to be one is a negative, also a candidate
    that no query lists (a background negative, as in mixed negative sampling).
    """
    positive = labels_of(batch) > 0
    if not in_batch:
        return Contrast(batch.mask & positive, batch.mask & ~positive)
    positives = _listed_positives(batch)
    return Contrast(positives, ~(positives | _known_positives(batch)), batch.draws)


def contrasted(batch: Batch, in_batch: bool) -> Tensor:
    """Which queries have something to say: those with a positive and, in a list, a negative: [B] float32."""
    positive = labels_of(batch) > 0
    counted = (batch.mask & positive).any(dim=-1)
    if not in_batch:
        counted &= (batch.mask & ~positive).any(dim=-1)
    return counted.float()


def margins(
    scores: Tensor, positives: Tensor, negatives: Tensor, most: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Each positive's score over each negative's, s+ - s-, of [B, M] scores.

    Args:
        most: Only so many negatives of each query, those with the highest scores; None: all.

    Returns:
        Margins [B, K, M'], which of them are of a positive and a negative [B, K, M'] bool, and which
        columns of ``scores`` the negatives are [B, M']. K is the most positives that a query has.
    """
    check_shapes(scores=scores, positives=positives, negatives=negatives)
    scores = unpadded(scores, positives | negatives)
    k = int(positives.sum(dim=-1).max()) if positives.numel() else 0
    first = positives.int().topk(k, dim=-1).indices
    columns = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    if most is not None and most < scores.shape[1]:
        lowest = torch.finfo(scores.dtype).min
        columns = scores.detach().masked_fill(~negatives, lowest).topk(most, dim=-1).indices
    margin = scores.gather(1, first)[:, :, None] - scores.gather(1, columns)[:, None, :]
    return margin, positives.gather(1, first)[:, :, None] & negatives.gather(1, columns)[:, None, :], columns


def _listed_positives(batch: Batch) -> Tensor:
    """Which of the batch's P candidates a query lists as positive: [B, P] bool."""
    queries, _, candidates = batch.sizes
    positives = batch.mask.new_zeros(queries, candidates)
    row, place = (batch.mask & (labels_of(batch) > 0)).nonzero(as_tuple=True)
    positives[row, batch.index[row, place]] = True
    return positives


def _known_positives(batch: Batch) -> Tensor:
    """Which of the batch's P candidates are known to be positive for a query, listed or not: [B, P] bool."""
    queries, _, candidates = batch.sizes
    positives = batch.mask.new_zeros(queries, candidates)
    known = batch.known_positives
    if known is None or candidates == 0:
        return positives
    ids, order = batch.candidate_ids.sort()
    row = torch.arange(queries, device=ids.device).repeat_interleave(known.lengths)
    place = torch.searchsorted(ids, known.values).clamp(max=candidates - 1)
    here = ids[place] == known.values
    positives[row[here], order[place[here]]] = True
    return positives
