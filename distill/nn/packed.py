"""Texts end to end without padding, to learn from on a CPU. Attention alone pads, a few texts at a time.

All else in a transformer reads one id at a time and need not know where a text ends: texts of unlike lengths
cost what their ids cost. Answering without gradient does not use this: thousands of texts are sorted by
length then, little is padded, and torch's fused attention is faster. ``benchmarks/train_text.py`` measures
what it brings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from distill.nn.dropout import dropout_factors

ATTENTION = "distill"  # as `transformers` registers it
LENGTHS = 32  # the length of a bucket is a multiple of it: softmax in bf16 is twice as fast then
ROWS = 128  # the ids of a packing are rounded up to a multiple: kernels are made once per shape
BUCKET_IDS = 2048  # padded ids of a bucket: its attention stays near the core

# The transformers that take texts end to end: they pass keywords on to the attention, take positions, and
# hide nothing but padding. Their first position, by their configuration.
FIRST_POSITION: dict[str, Callable[[Any], int]] = {
    "BertModel": lambda config: 0,
    "CamembertModel": lambda config: config.pad_token_id + 1,
    "RobertaModel": lambda config: config.pad_token_id + 1,
    "XLMRobertaModel": lambda config: config.pad_token_id + 1,
}


def takes_packed(backbone: Any) -> bool:
    """Whether a transformer, as it is set up, takes texts end to end.

    Not one that computes activations again: its dropout would be drawn anew.
    """
    ours = backbone.config._attn_implementation == ATTENTION and type(backbone).__name__ in FIRST_POSITION
    return ours and not any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules())


def first_position(backbone: Any) -> int:
    return FIRST_POSITION[type(backbone).__name__](backbone.config)


@dataclass(frozen=True)
class Bucket:
    """n neighbours in a packing, padded to one length T for their attention."""

    rows: slice  # where their ids lie in the packing
    lengths: Tensor  # [n] int64
    length: int  # T

    @cached_property
    def mask(self) -> Tensor:
        """What is real, [n, T]."""
        return torch.arange(self.length) < self.lengths[:, None]

    @cached_property
    def full(self) -> bool:
        return bool(self.mask.all())

    def bias(self, dtype: torch.dtype) -> Tensor:
        """What takes the weight from padded keys when added to scores: [n, 1, 1, T]."""
        bias = torch.zeros(self.mask.shape, dtype=dtype)
        return bias.masked_fill_(~self.mask, torch.finfo(dtype).min)[:, None, None]

    @cached_property
    def _real(self) -> Tensor:
        """The padded place of each id: [ids]."""
        return self.mask.flatten().nonzero().squeeze(1)

    def pad(self, rows: Tensor) -> Tensor:
        """[ids, ...] as [n, T, ...]; zeros pad."""
        shape = (len(self.lengths), self.length, *rows.shape[1:])
        if self.full:
            return rows.reshape(shape)
        padded = rows.new_zeros(shape)
        padded.view(-1, *rows.shape[1:]).index_copy_(0, self._real, rows)
        return padded

    def unpad(self, padded: Tensor) -> Tensor:
        """The ids' rows [ids, ...] of [n, T, ...]."""
        rows = padded.reshape(-1, *padded.shape[2:])
        return rows if self.full else rows.index_select(0, self._real)


@dataclass(frozen=True)
class Packing:
    """Where each text lies whose ids are end to end, the longest first."""

    lengths: Tensor  # [n] int64, descending

    @cached_property
    def positions(self) -> Tensor:
        """The place of each id within its text: [ids] int64."""
        starts = self.lengths.cumsum(0) - self.lengths
        return torch.arange(int(self.lengths.sum())) - torch.repeat_interleave(starts, self.lengths)

    def rounded(self, rows: Tensor) -> Tensor:
        """The rows [ids, ...] and a few more, which belong to no text: zeros."""
        more = -len(rows) % ROWS
        return torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])]) if more else rows

    @cached_property
    def buckets(self) -> list[Bucket]:
        rounded = [-(-length // LENGTHS) * LENGTHS for length in self.lengths.tolist()]
        found, start, row = [], 0, 0
        while start < len(rounded):
            end, most = start + 1, start + max(1, BUCKET_IDS // rounded[start])
            while end < min(most, len(rounded)) and rounded[end] == rounded[start]:
                end += 1
            lengths = self.lengths[start:end]
            ids = int(lengths.sum())
            found.append(Bucket(slice(row, row + ids), lengths, rounded[start]))
            start, row = end, row + ids
        return found

    def padded(self, packed: Tensor) -> list[Tensor]:
        """Each bucket's rows of [rounded ids, D], as [n, T, D]."""
        sizes = [bucket.rows.stop - bucket.rows.start for bucket in self.buckets]
        parts = packed[: sum(sizes)].split(sizes)
        return [_Pad.apply(part, bucket) for part, bucket in zip(parts, self.buckets, strict=True)]


class _Pad(torch.autograd.Function):
    """``Bucket.pad``, whose gradient is a gather."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bucket: Bucket) -> Tensor:
        ctx.bucket = bucket
        return bucket.pad(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.bucket.unpad(gradient), None


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, dropout: float
) -> Tensor:
    """Attention of each text of a packing to itself: three times [rounded ids, H, D] to one."""
    return _PackedAttention.apply(query, key, value, packing, scale, dropout)


class _PackedAttention(torch.autograd.Function):
    """Attention by plain products, and its gradient: on a CPU several times as fast as torch's fused one's.

    With s = q k^T scale, p = softmax(s), w = p d and o = w v, where d are the factors of dropout:
    dv = w^T do, dp = do v^T d, ds = p (dp - sum(p dp)), dq = ds k scale, dk = ds^T q scale.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, dropout: float
    ) -> Tensor:
        out = torch.zeros_like(value, memory_format=torch.contiguous_format)
        kept: list[Tensor] = []
        for bucket in packing.buckets:
            q, k, v = _by_head(bucket, query, key, value)
            scores = q.mul_(scale) @ k.transpose(-1, -2)  # [n, H, T, T]
            if not bucket.full:
                scores += bucket.bias(scores.dtype)
            weights = scores.softmax(dim=-1)
            kept.append(weights)
            if dropout > 0.0:
                kept.append(dropout_factors(weights, dropout))
                weights = weights * kept[-1]
            out[bucket.rows] = bucket.unpad((weights @ v).transpose(1, 2))
        ctx.save_for_backward(query, key, value, *kept)
        ctx.packing, ctx.scale, ctx.dropout = packing, scale, dropout > 0.0
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        found = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        saved = iter(kept)
        for bucket in ctx.packing.buckets:
            q, k, v, g = _by_head(bucket, query, key, value, gradient)
            weights = next(saved)
            factors = next(saved) if ctx.dropout else None
            dropped = weights if factors is None else weights * factors
            dv = dropped.transpose(-1, -2) @ g
            dw = g @ v.transpose(-1, -2)
            if factors is not None:
                dw *= factors
            ds = torch._softmax_backward_data(dw, weights, -1, weights.dtype)
            dq, dk = ds @ k.mul_(ctx.scale), ds.transpose(-1, -2) @ q.mul_(ctx.scale)
            for whole, part in zip(found, (dq, dk, dv), strict=True):
                whole[bucket.rows] = bucket.unpad(part.transpose(1, 2))
        return (*found, None, None, None)


def _by_head(bucket: Bucket, *packed: Tensor) -> list[Tensor]:
    """The bucket's part of each [ids, H, D], as a copy [n, H, T, D] laid out for matrix products."""
    return [
        bucket.pad(x[bucket.rows]).transpose(1, 2).clone(memory_format=torch.contiguous_format)
        for x in packed
    ]
