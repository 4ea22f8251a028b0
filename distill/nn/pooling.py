"""The mean of a sequence's rows of a table, with a gradient that is fast on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.batch import Ragged


def mean_of_rows(weight: Tensor, ids: Ragged, sparse: bool) -> Tensor:
    """The mean [n, D] of each sequence's rows of ``weight`` [rows, D]; 0 where one is empty.

    Args:
        sparse: Whether the gradient holds only the rows that were read.
    """
    if weight.device.type == "cpu" and weight.requires_grad and torch.is_grad_enabled():
        return _Mean.apply(weight, ids.values, ids.offsets, sparse)
    return F.embedding_bag(
        ids.values, weight, ids.offsets, mode="mean", sparse=sparse, include_last_offset=True
    )


class _Mean(torch.autograd.Function):
    """``embedding_bag`` whose backward is one too: each row sums what the sequences that hold it say.

    Torch's own takes twice as long (``benchmarks/train_two_tower.py``).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, offsets: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(values, offsets)
        ctx.shape, ctx.sparse = weight.shape, sparse
        return F.embedding_bag(values, weight, offsets, mode="mean", include_last_offset=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        values, offsets = ctx.saved_tensors
        lengths = offsets[1:] - offsets[:-1]
        each = gradients[0] / lengths.clamp(min=1)[:, None]
        order = _order(values, ctx.shape[0])
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[order]
        if ctx.sparse:
            rows, counts = values[order].unique_consecutive(return_counts=True)
        else:
            rows, counts = None, torch.bincount(values, minlength=ctx.shape[0])
        ends = F.pad(counts.cumsum(0), (1, 0))
        summed = F.embedding_bag(owner, each, ends, mode="sum", include_last_offset=True)
        if rows is not None:
            summed = torch.sparse_coo_tensor(
                rows[None], summed, ctx.shape, is_coalesced=True, check_invariants=False
            )
        return summed, None, None, None


def _order(ids: Tensor, rows: int) -> Tensor:
    """Where the ids stand in ascending order; small ones are sorted by numpy's radix sort."""
    if rows <= 2**16:
        return torch.from_numpy(ids.numpy().astype(np.uint16).argsort(kind="stable"))
    return ids.argsort(stable=True)
