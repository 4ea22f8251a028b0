"""The attention of our text encoders: the fused kernel's result, and who listens hears queries and keys.

An attention is registered with ``transformers`` by name. It hands the layer's queries and keys, by
reference, to whoever listens, and lets the kernel do the work: no second forward, no map of attention.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.errors import RecipeError, RunError
from distill.nn import cpu_training
from distill.nn.packed import ATTENTION

Heard = tuple[Tensor, Tensor, float]  # queries [n, H, T, d], keys [n, G, T, d], scale of their products


class Listener:
    """What the layers of one forward hand over; layers are told apart by their order."""

    def __init__(self, layers: Collection[int]):
        self.layers = layers
        self.heard: dict[int, Heard] = {}
        self.passed = 0  # layers that have answered

    def hear(self, query: Tensor, key: Tensor, scaling: float | None) -> None:
        if self.passed in self.layers:
            self.heard[self.passed] = (query, key, scaling or query.shape[-1] ** -0.5)
        self.passed += 1


_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others,
) -> tuple[Tensor, None]:
    """An attention of ``transformers`` that can be listened to; see ``cpu_training.attention``."""
    if (listener := _LISTENER.get()) is not None:
        listener.hear(query, key, scaling)
    return cpu_training.attention(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )


def use_attention(backbone: Any) -> None:
    """Put this attention into a transformer, where it lets one choose."""
    config = backbone.config
    if config._attn_implementation == "sdpa" and not getattr(config, "is_decoder", False):
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, cpu_training.padding_mask)
        backbone.set_attn_implementation(ATTENTION)


def can_listen(backbone: Any) -> bool:
    """Whether the attention of a transformer can be heard."""
    return backbone.config._attn_implementation == ATTENTION


@contextmanager
def listening(backbone: Any, layers: Sequence[int]) -> Iterator[list[Heard]]:
    """Inside, one forward of the transformer; afterwards the list holds what each layer said.

    Args:
        layers: Which ones; -1 is the last.

    Raises:
        RecipeError: It has no such layer.
        RunError: It has layers that did not pass through this attention, or that cannot learn by it.
    """
    total = backbone.config.num_hidden_layers
    if beyond := [layer for layer in layers if not -total <= layer < total]:
        raise RecipeError(f"attention of layer {beyond[0]} is asked for, and there are {total} layers.")
    listener, found = Listener({layer % total for layer in layers}), list[Heard]()
    token = _LISTENER.set(listener)
    try:
        yield found
    finally:
        _LISTENER.reset(token)
    if listener.passed != total:
        raise RunError(
            f"{type(backbone).__name__} of {total} layers passed {listener.passed} times through its "
            f"attention, so its layers cannot be told apart."
        )
    found += [listener.heard[layer % total] for layer in layers]


def by_place(heard: Sequence[Heard]) -> Iterator[Tensor]:
    """Query and key of l layers, in turn, at each of the n * T places of a chunk: 2 l of [n * T, H, d].

    The queries are scaled; grouped keys are repeated, so that each head of queries has its own.
    """
    for query, key, scale in heard:
        groups = query.shape[1] // key.shape[1]
        queries, keys = (x.transpose(1, 2).flatten(0, 1) for x in (query, key))
        yield queries * scale
        yield keys.repeat_interleave(groups, dim=1) if groups > 1 else keys


def side_by_side(heard: Sequence[Heard], real: Tensor) -> Tensor:
    """Queries and keys of l layers of each real token: [t, l, 2, H, d].

    Args:
        heard: Of each layer.
        real: The places [t] of the real tokens among the n * T of the chunk.
    """
    said = [x.index_select(0, real) for x in by_place(heard)]
    return torch.stack(said, dim=1).unflatten(1, (len(heard), 2))


class InPlace:
    """What ``side_by_side`` says of n tokens, by chunks, from any thread, each in its place: no gradient.

    Nothing of it is held twice: touching so much memory for the first time takes as long as filling it.
    """

    def __init__(self, n: int):
        self.n, self.lock = n, threading.Lock()
        self.rows: Tensor | None = None  # [n + 1, 2 l, H, d], the last row for padding

    def put(self, heard: Sequence[Heard], real: Tensor, places: Tensor) -> None:
        """Of the ``real`` tokens [t] among those of the chunk, at their ``places`` [t] among the n."""
        n, _, length, _ = heard[0][0].shape
        to = torch.full((n * length,), self.n, device=real.device).index_copy_(0, real, places)
        for column, values in enumerate(by_place(heard)):
            rows = self._rows(2 * len(heard), values)
            if values.device.type == "cpu":  # in a third of torch's time
                _cells(rows)[to.numpy(), column] = _cells(values)
            else:
                rows[:, column].index_copy_(0, to, values)

    def _rows(self, columns: int, like: Tensor) -> Tensor:
        with self.lock:
            if self.rows is None:
                self.rows = _empty(self.n + 1, columns, like=like)
            return self.rows

    def said(self) -> Tensor:
        """[n, l, 2, H, d]."""
        assert self.rows is not None
        return self.rows[:-1].unflatten(1, (-1, 2))


def _empty(*shape: int, like: Tensor) -> Tensor:
    """Of cells alike; from numpy on a CPU, which takes large memory in large pages."""
    shape = (*shape, *like.shape[1:])
    if like.device.type != "cpu":
        return like.new_empty(shape)
    size = math.prod(shape) * like.element_size()
    return torch.from_numpy(np.empty(size, np.uint8)).view(like.dtype).view(shape)


def _cells(x: Tensor) -> np.ndarray:
    """The last two axes [H, d] as one piece of memory each."""
    raw = x.reshape(*x.shape[:-2], -1).view(torch.uint8).numpy()
    return raw.view(np.dtype((np.void, raw.shape[-1])))[..., 0]
