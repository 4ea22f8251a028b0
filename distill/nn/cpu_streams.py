"""Several chunks at a time on a CPU, one in each of a few threads, instead of several threads a chunk.

A matrix product of one chunk is too small to be shared well between cores, and the small steps between
products are not shared at all. Measured by ``benchmarks/encode_text.py`` and ``train_text.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distill.nn.dropout import SEEDS

MOST_STREAMS = 8  # beyond, they wait for Python's lock

A = TypeVar("A")
B = TypeVar("B")


def stream_count(chunks: int) -> int:
    """How many of so many chunks run at a time."""
    return min(torch.get_num_threads(), MOST_STREAMS, chunks)


def in_streams(work: Callable[[A], B], given: Sequence[A]) -> list[B]:
    """``work`` of each, several at a time on few cores each; results in order.

    Gradients are recorded, and products cast, as where this is called.
    """
    threads, streams = torch.get_num_threads(), stream_count(len(given))
    if streams < 2:
        return [work(one) for one in given]
    grad = torch.is_grad_enabled()
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def alike(one: A) -> B:  # what a new thread does not inherit
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=dtype, enabled=autocast):
            return work(one)

    share = threads // streams
    torch.set_num_threads(share)  # for MKL, which has one number for all threads
    try:
        with ThreadPoolExecutor(streams, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            return [*pool.map(alike, given)]
    finally:
        torch.set_num_threads(threads)


def learn_in_streams(
    run: Callable[[int, Tensor], Tensor], given: Sequence[Tensor], module: nn.Module
) -> Sequence[Tensor]:
    """``run(i, given[i])`` of each i in streams, and its gradient in streams.

    The same numbers come whatever the threads do: dropout of each i draws from a generator of its own, which
    torch's seeds, and the gradients of the i are added in order.

    Args:
        run: Uses parameters of the module alone.
        given: Tensors that may want gradients.
    """
    seeds = [int(torch.empty((), dtype=torch.int64).random_()) for _ in given]

    def seeded(i: int, one: Tensor) -> Tensor:
        token = SEEDS.set(torch.Generator().manual_seed(seeds[i]))
        try:
            return run(i, one)
        finally:
            SEEDS.reset(token)

    parameters = [p for p in module.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (parameters or any(one.requires_grad for one in given)):
        return _Streams.apply(seeded, len(given), *given, *parameters)
    return in_streams(lambda pair: seeded(*pair), [*enumerate(given)])


class _Streams(torch.autograd.Function):
    """The graph of each chunk is made and walked by a thread; gradients of parameters are added in order."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[int, Tensor], Tensor], chunks: int, *tensors: Tensor) -> Any:
        given = [one.detach().requires_grad_() for one in tensors[:chunks]]
        with torch.enable_grad():
            ctx.found = in_streams(lambda pair: run(*pair), [*enumerate(given)])
        ctx.given, ctx.parameters = given, tensors[chunks:]
        return tuple(one.detach() for one in ctx.found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        def walk(chunk: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor | None, ...]:
            found, given, gradient = chunk
            return torch.autograd.grad(found, [given, *ctx.parameters], gradient, allow_unused=True)

        with torch.enable_grad():
            each = in_streams(walk, [*zip(ctx.found, ctx.given, gradients, strict=True)])
        del ctx.found
        of_given, *of_parameters = zip(*each, strict=True)
        return None, None, *of_given, *map(_sum, of_parameters)


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The sum in order, in place; None where nothing was used."""
    used = [part for part in parts if part is not None]
    for part in used[1:]:
        used[0] += part
    return used[0] if used else None
