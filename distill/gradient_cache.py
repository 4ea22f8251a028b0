"""Gradient caching: large batches in little memory, for any objective over what ``represent`` says.

Each piece of a batch is represented, its activations are forgotten, and when its gradient is known it is
represented again, with the same random numbers, to pass the gradient on. Next: ``pieces.py``, which cuts.

Gao, Zhang, Han and Callan, 2021. Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup
(GradCache). arXiv:2101.06983
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distill.batch import Batch
from distill.outputs import Needs, Outputs, Said
from distill.tokens import Tokens

Ask = Callable[[Batch, Needs], Outputs]


def cached(ask: Ask, device: torch.device) -> Ask:
    """``ask``, with the gradients of its answer's fields cached: nothing else of it is kept for the backward.

    Args:
        ask: Opens its own autocast; draws random numbers from torch's generators alone.
        device: Of the model, whose generator is kept too where it is a GPU.
    """

    def ask_and_forget(batch: Batch, needs: Needs) -> Outputs:
        told: dict[str, Said] = {}
        anchor = torch.zeros((), requires_grad=True)  # so that there is a backward
        values = _Cached.apply(anchor, lambda: ask(batch, needs), told, device)
        said = zip(told.items(), values, strict=True)
        return Outputs().with_(
            **{f: replace(kind, values=v) if isinstance(kind, Tokens) else v for (f, kind), v in said}
        )

    return ask_and_forget


class _Cached(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, answer: Callable[[], Outputs], told: dict[str, Said], device: torch.device
    ) -> tuple[Tensor, ...]:
        ctx.answer, ctx.device, ctx.random = answer, device, _random_state(device)
        with torch.enable_grad():  # though its graph is dropped: kernels choose by it, and draw by it
            told |= {name: value.detach() for name, value in answer().given()}
        return tuple(map(_values, told.values()))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        with _drawing_again(ctx.random, ctx.device), torch.enable_grad():
            said = [_values(value) for _, value in ctx.answer().given()]
        learnt = [
            (value, gradient) for value, gradient in zip(said, gradients, strict=True) if value.requires_grad
        ]
        if learnt:
            torch.autograd.backward([value for value, _ in learnt], [gradient for _, gradient in learnt])
        return None, None, None, None


def _values(said: Said) -> Tensor:
    return said.values if isinstance(said, Tokens) else said


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def _drawing_again(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """Inside, the random numbers are those that were drawn after ``state``; afterwards, as if never drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        yield
