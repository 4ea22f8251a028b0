"""What serving a model costs: its size, and how fast it encodes queries."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from torch import nn

from distill.evaluation.scoring import serving
from distill.model import Encoder


def size_in_mb(model: nn.Module) -> float:
    """Size of the parameters in float32, each shared one counted once: 1 MB is 10^6 bytes.

    Of a model built from others it is theirs too.

    >>> size_in_mb(nn.Linear(1000, 250, bias=False))
    1.0
    """
    return 4 * sum({id(p): p.numel() for p in _parameters(model)}.values()) / 1e6


def _parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    yield from model.parameters()
    for part in getattr(model, "parts", {}).values():
        yield from _parameters(part)


def queries_per_second(model: Encoder, queries: Sequence[Any], repeats: int = 5) -> float:
    """How many queries ``encode_queries`` encodes in a second: the median of ``repeats``, after a warm-up."""
    if not len(queries) or repeats < 1:
        raise ValueError(f"need a query and a repeat to time, got {len(queries)} and {repeats}.")
    seconds = []
    with serving(model):
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model.encode_queries(queries)
            seconds.append(time.perf_counter() - start)
    return len(queries) / median(seconds[1:])
