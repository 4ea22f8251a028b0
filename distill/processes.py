"""Several processes that work on one run, as ``accelerate launch`` starts them; alone, nothing here acts.

All make the same batches and take the same decisions. Each represents its share of the rows, then all hear
all of them (``pieces.py``) and know the whole loss; each trains on an equal part of it, and gradients are
summed. Only the first writes and speaks, into folders that all can read. A function here with "all processes"
in its words must be called by all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.batch import Ragged
from distill.errors import RunError

PATIENCE = timedelta(hours=24)  # for one that works alone; a dead one is noticed at once
BUCKET = 2**24  # values that are summed at a time

T = TypeVar("T")
R = TypeVar("R", Tensor, Ragged)


class LostProcess(RunError):
    """Another process has ended in the middle of what all do together."""


def start() -> None:
    """Join the processes of a launcher, all processes; alone, or when that is done, nothing happens.

    CPUs talk by gloo, GPUs by what Accelerate chooses.
    """
    from accelerate.state import PartialState
    from accelerate.utils import parse_flag_from_env

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
        PartialState(cpu=cpu, timeout=PATIENCE)


def end() -> None:
    """Part from the others, all processes, when the last has done its work: should one go wrong as it ends,
    the launcher stops all.
    """
    if dist.is_available() and dist.is_initialized():
        wait()
        dist.destroy_process_group()


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world() > 1 else 0


def is_first() -> bool:
    """Whether this process writes and speaks."""
    return rank() == 0


def share(n: int, of: int | None = None) -> slice:
    """Which of n rows are this process's, or that of rank ``of``: consecutive ones, about as many for each.

    >>> share(7)
    slice(0, 7, None)
    """
    mine = rank() if of is None else of
    return slice(n * mine // world(), n * (mine + 1) // world())


def gather(rows: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """The rows [n_i, ...] of all processes, one after the other: [sum of n_i, ...]. Without gradient.

    Args:
        rows: This process's; all but the first axis alike everywhere, also where it is 0.
        sizes: How many rows each process has; None: they are asked.
    """
    if world() == 1:
        return rows
    device = _device()
    if sizes is None:
        counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world())]
        _together(dist.all_gather, counts, torch.tensor([len(rows)], device=device))
        sizes = [int(count) for count in counts]
    padded = torch.zeros(max(sizes), *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    _together(dist.all_gather, parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(rows.device)


def gather_shares(rows: Tensor, n: int, lengths: Tensor | None = None) -> Tensor:
    """The n rows of which each process has its ``share``: [n, ...], with gradient.

    Every process goes on to compute the whole loss, so what it finds for its own rows is their gradient;
    it counts ``world()`` times, as each trains on that part of the loss only.

    Args:
        rows: This process's.
        n: How many there are in all.
        lengths: Where a row is several of ``rows``, how many each of the n is [n].
    """
    if world() == 1:
        return rows
    shares = [share(n, of) for of in range(world())]
    sizes = [_length(part) if lengths is None else int(lengths[part].sum()) for part in shares]
    return _Gathered.apply(rows, sizes)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        start = sum(sizes[: rank()])
        ctx.mine = slice(start, start + sizes[rank()])
        return gather(rows, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.mine] * world(), None


def in_shares(work: Callable[[Any], R], given: Any) -> R:
    """``work(given)``, a row for each of a list or Tensor: all processes do their share and have all."""
    if world() == 1:
        return work(given)
    said = work(given[share(len(given))])
    if isinstance(said, Ragged):
        return Ragged.of_lengths(gather(said.values), gather(said.lengths))
    return gather(said)


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients over all processes, in place; where a process has none it counts as zero.

    A parameter without a gradient on any process keeps none: no optimiser moves it. Of sparse gradients only
    the rows that some process has are sent.
    """
    if world() == 1:
        return
    none, dense, sparse = range(3)
    kinds = [none if p.grad is None else sparse if p.grad.is_sparse else dense for p in parameters]
    there = torch.tensor(kinds, dtype=torch.int32, device=_device())
    _together(dist.all_reduce, there, dist.ReduceOp.MAX)
    kinds = there.tolist()
    for p in [p for p, kind in zip(parameters, kinds, strict=True) if kind == sparse]:
        p.grad = _summed_rows(p)
    learnt = [p for p, kind in zip(parameters, kinds, strict=True) if kind == dense]
    while learnt:
        size, bucket = 0, list[nn.Parameter]()
        while learnt and (not bucket or size + learnt[0].numel() <= BUCKET):
            bucket.append(learnt.pop(0))
            size += bucket[-1].numel()
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        _together(dist.all_reduce, flat)
        for p, gradient in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = gradient.view_as(p)


def _summed_rows(parameter: nn.Parameter) -> Tensor:
    """The sum of all processes' sparse gradients of a table [rows, D]."""
    rows, values = torch.empty(0, dtype=torch.int64), parameter.new_empty(0, *parameter.shape[1:])
    if parameter.grad is not None:
        own = parameter.grad.coalesce()
        rows, values = own.indices()[0], own.values()
    rows, values = gather(rows.to(_device())), gather(values)
    return torch.sparse_coo_tensor(rows[None], values, parameter.shape, check_invariants=False).coalesce()


@torch.no_grad()
def take_from_first(parameters: Sequence[Tensor]) -> None:
    """Give all processes the values that the first has, in place."""
    if world() > 1:
        for parameter in parameters:
            _together(dist.broadcast, parameter.data, 0)


def from_first(value: T) -> T:
    """What the first process passes, for all processes: where a clock or a disk decides."""
    if world() == 1:
        return value
    said = [value]
    _together(dist.broadcast_object_list, said, 0, None, _device())
    return said[0]


def of_each(value: T) -> list[T]:
    """What each process passes, in their order, for all processes."""
    if world() == 1:
        return [value]
    said: list[Any] = [None] * world()
    _together(dist.all_gather_object, said, value)
    return said


def any_of(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether some process of all processes has raised it."""
    if world() == 1:
        return flags
    raised = torch.tensor(flags, dtype=torch.int32, device=_device())
    _together(dist.all_reduce, raised, dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in raised.tolist())


def wait() -> None:
    """Until all processes are here: what the first has written can then be read."""
    any_of(False)


@contextmanager
def first_goes_first() -> Iterator[None]:
    """The others enter the block when the first has left it: it fills a cache that they then read."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()


def speaks() -> bool:
    """Whether this process, which is failing, is the first to: the others fail because of it, or like it."""
    if world() == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("distill/failed", 1) == 1
    except RuntimeError:  # whoever kept the count has gone
        return False


def _length(part: slice) -> int:
    return part.stop - part.start


def _device() -> torch.device:
    from accelerate.state import PartialState

    return PartialState().device


def _together(operation: Callable[..., Any], *arguments: Any) -> None:
    """A collective; when another process dies in it, that is said in one way, whatever talks."""
    try:
        operation(*arguments)
    except RuntimeError as error:
        raise LostProcess(
            f"another process of this run ended without a word; it may have been killed for lack of memory "
            f"({str(error).splitlines()[0]}). The same command goes on from the last checkpoint."
        ) from error
