"""Answering fast on a CPU: packed weights, and several chunks at a time instead of several threads a chunk.

Both are measured by ``benchmarks/encode_text.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

MOST_STREAMS = 8  # beyond, they wait for Python's lock

A = TypeVar("A")
B = TypeVar("B")


class PackedLinear(nn.Module):
    """A linear layer whose bf16 weights lie as the CPU's matrix product reads them; it cannot learn."""

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def serving_copy(backbone: Any, rows: int) -> Any:
    """A bf16 copy of a transformer to answer with, on a CPU with packed weights.

    Args:
        backbone: A ``PreTrainedModel``.
        rows: About how many rows its matrix products will have.
    """
    half = copy.deepcopy(backbone).to(torch.bfloat16).eval().requires_grad_(False)
    if backbone.device.type != "cpu" or not packs():
        return half
    for parent in list(half.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child, rows))
    return half


@cache
def packs() -> bool:
    """Whether this build of torch has the two operators, which are not part of its public interface."""
    try:
        linear = nn.Linear(32, 32, dtype=torch.bfloat16)
        x = torch.randn(4, 32, dtype=torch.bfloat16)
        with torch.no_grad():
            return torch.allclose(PackedLinear(linear, 4)(x), linear(x), rtol=0.05, atol=0.05)
    except (AttributeError, RuntimeError):
        return False


def in_streams(work: Callable[[A], B], given: Sequence[A]) -> list[B]:
    """``work`` of each, without gradient, several at a time on few cores each; results in order.

    A matrix product of one chunk is too small to be shared well between cores.
    """
    threads = torch.get_num_threads()
    streams = min(threads, MOST_STREAMS, len(given))
    if streams < 2:
        return [work(one) for one in given]
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def alike(one: A) -> B:  # what a new thread does not inherit
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=autocast):
            return work(one)

    share = threads // streams
    torch.set_num_threads(share)  # for MKL, which has one number for all threads
    try:
        with ThreadPoolExecutor(streams, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            return [*pool.map(alike, given)]
    finally:
        torch.set_num_threads(threads)
