"""Attention and layer norm that train fast on a CPU; elsewhere torch's own are used. See also ``packed.py``.

On a CPU the backward of torch's fused attention takes several times as long as the plain products for
texts of ordinary length, and autocast casts what goes from a layer norm into a matrix product once for each
product, both ways. All are measured by ``benchmarks/train_text.py``.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from distill.nn import dropout as fast
from distill.nn.packed import Packing, packed_attention


class LayerNorm(nn.LayerNorm):
    """Layer norm that under bf16 autocast on a CPU answers in bf16, rounded from float32 once.

    What follows it are matrix products, which autocast would cast it for one by one, and a residual.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _in_bf16(x):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x).to(torch.bfloat16)


def _in_bf16(x: Tensor) -> bool:
    """Whether autocast makes products of x bf16 ones, on a CPU."""
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **others,
) -> tuple[Tensor, None]:
    """An attention of ``transformers``: query, key, value [n, H, T, D] to [n, T, H, D].

    The mask is boolean, [n, 1, 1 or T, T]. With a packing n is 1, T its ids, and no mask is given.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if packing is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [ids, H, D] each
        return packed_attention(q, k, v, packing, scale, dropout)[None], None
    plain = query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad
    causal = attention_mask is None and getattr(module, "is_causal", False)  # said by no mask
    special = causal or any(
        others.get(name) is not None for name in ("position_bias", "softcap", "is_causal")
    )
    if not plain or special or query.shape[1] != key.shape[1]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    weights = (query * scale) @ key.transpose(-1, -2)  # [n, H, T, T]
    if attention_mask is not None:
        low = torch.finfo(weights.dtype).min
        weights = weights + torch.zeros_like(attention_mask, dtype=weights.dtype).masked_fill_(
            ~attention_mask, low
        )
    wide = torch.float32 if weights.dtype == torch.bfloat16 else None  # in bf16 it is slower
    weights = weights.softmax(dim=-1, dtype=wide).to(value.dtype)
    if dropout > 0.0:
        weights = fast.dropout(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


def padding_mask(batch_size: int, q_length: int, kv_length: int, **others) -> Tensor | None:
    """A mask of ``transformers`` that stays [n, 1, 1, T] where padding alone is hidden, not [n, 1, T, T]."""
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    real: Any = others.get("attention_mask")
    simple = others.get("mask_function") is bidirectional_mask_function and real is not None
    if simple and real.shape == (batch_size, kv_length):
        real = real.bool()
        return None if real.device.type == "cpu" and real.all() else real[:, None, None, :]
    return sdpa_mask(batch_size, q_length, kv_length, **others)


@cache
def keep_memory() -> None:
    """Let glibc keep the large blocks that activations live in, not ask for them page by page each step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks of up to 1 GiB come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: whose end is not handed back
        libc.mallopt(-2, 2**26)  # M_TOP_PAD: nor are the heaps of threads


def prepare_for_cpu(backbone: Any) -> None:
    """Put this dropout and layer norm into a transformer; its attention is chosen in ``attention.py``."""
    keep_memory()
    for parent in list(backbone.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, fast.Dropout(child.p).train(child.training))
            elif type(child) is nn.LayerNorm:
                child.__class__ = LayerNorm  # its parameters stay what they are
