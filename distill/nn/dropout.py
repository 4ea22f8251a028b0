"""Dropout whose random numbers come fast on a CPU: torch's draws one at a time."""

from __future__ import annotations

from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor, nn

# Where seeds of dropout come from: what runs beside others in a thread has a generator of its own, lest the
# numbers follow from who comes first. None: torch's.
SEEDS: ContextVar[torch.Generator | None] = ContextVar("seeds_of_dropout", default=None)


class Dropout(nn.Module):
    """Dropout whose mask is drawn by a fast generator, seeded by torch's: a resumed run draws the same.

    Probabilities are taken to 1/65,536.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        return dropout(x, self.p)


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each value with probability p and divide the others by 1 - p."""
    if x.device.type != "cpu":
        return nn.functional.dropout(x, p)
    return x * dropout_factors(x, p)


def dropout_factors(x: Tensor, p: float) -> Tensor:
    """What dropout multiplies x with, on a CPU: 0 with probability p, else 1 / (1 - p)."""
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=SEEDS.get()))
    words = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, -(-x.numel() // 4), dtype=np.uint64)
    drawn = torch.from_numpy(words.view(np.int16)[: x.numel()]).view(x.shape)
    least = round(p * 65536) - 32768
    if x.dtype != torch.bfloat16:
        return ((drawn >= least) * (1.0 / (1.0 - p))).to(x.dtype)
    scale = torch.tensor(1.0 / (1.0 - p), dtype=torch.bfloat16).view(torch.int16)  # as its 16 bits
    return torch.ge(drawn, least, out=torch.empty_like(drawn)).mul_(scale).view(torch.bfloat16)
