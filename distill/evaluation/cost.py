"""What serving a model costs: its size, and how fast it encodes queries."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
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


class Latency(NamedTuple):
    """Milliseconds that one query takes, by itself."""

    median: float
    p95: float


def latency(model: Encoder, queries: Sequence[Any]) -> Latency:
    """How long ``encode_queries`` takes for each of these, which hold one query each, after a warm-up."""
    if not len(queries):
        raise ValueError("need a query to time, got none.")
    seconds = []
    with serving(model):
        for query in (queries[0], *queries):
            start = time.perf_counter()
            model.encode_queries(query)
            seconds.append(time.perf_counter() - start)
    found = np.percentile(seconds[1:], [50, 95]) * 1e3
    return Latency(float(found[0]), float(found[1]))


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
