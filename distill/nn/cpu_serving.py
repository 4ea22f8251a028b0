"""Answering fast on a CPU: packed weights. Measured by ``benchmarks/encode_text.py``."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


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
            if isinstance(child, nn.Linear):
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
