"""The attention of our text encoders: the fused kernel's result, and who listens hears queries and keys.

An attention is registered with ``transformers`` by name. It hands the layer's queries and keys, by
reference, to whoever listens, and lets the kernel do the work: no second forward, no map of attention.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
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
    """Told of the layers of one forward as they answer; layers are told apart by their order.

    Args:
        take: Given the number of a layer, and what it said.
        layers: Whose numbers ``take`` wants to hear of.
    """

    def __init__(self, layers: Collection[int], take: Callable[[int, Heard], None]):
        self.layers, self.take = layers, take
        self.passed = 0  # layers that have answered

    def hear(self, query: Tensor, key: Tensor, scaling: float | None) -> None:
        if self.passed in self.layers:
            self.take(self.passed, (query, key, scaling or query.shape[-1] ** -0.5))
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
def listening(
    backbone: Any, layers: Sequence[int], take: Callable[[int, Heard], None] | None = None
) -> Iterator[list[Heard]]:
    """Inside, one forward of the transformer; afterwards the list holds what each layer said.

    Args:
        layers: Which ones; -1 is the last.
        take: Gets what a layer said at once, with its place in ``layers``, and the list stays empty: so
            nothing is held until the forward ends.

    Raises:
        RecipeError: It has no such layer.
        RunError: It has layers that did not pass through this attention, or that cannot learn by it.
    """
    total = backbone.config.num_hidden_layers
    if beyond := [layer for layer in layers if not -total <= layer < total]:
        raise RecipeError(f"attention of layer {beyond[0]} is asked for, and there are {total} layers.")
    places: dict[int, list[int]] = {}
    for place, layer in enumerate(layers):
        places.setdefault(layer % total, []).append(place)
    held, found = dict[int, Heard](), list[Heard]()

    def hear(layer: int, heard: Heard) -> None:
        for place in places[layer]:
            (take or held.__setitem__)(place, heard)

    listener = Listener(places, hear)
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
    found += [held[place] for place in range(len(layers))] if take is None else []


def by_place(heard: Heard) -> tuple[Tensor, Tensor]:
    """Query and key of a layer at each of the n * T places of a chunk: [n * T, H, d] each.

    The queries are scaled; grouped keys are repeated, so that each head of queries has its own.
    """
    query, key, scale = heard
    groups = query.shape[1] // key.shape[1]
    queries, keys = (x.transpose(1, 2).flatten(0, 1) for x in (query, key))
    return queries * scale, keys.repeat_interleave(groups, dim=1) if groups > 1 else keys


def side_by_side(heard: Sequence[Heard], real: Tensor) -> Tensor:
    """Queries and keys of l layers of each real token: [t, l, 2, H, d].

    Args:
        heard: Of each layer.
        real: The places [t] of the real tokens among the n * T of the chunk.
    """
    said = [x.index_select(0, real) for layer in heard for x in by_place(layer)]
    return torch.stack(said, dim=1).unflatten(1, (len(heard), 2))


class InPlace:
    """What ``side_by_side`` says of n tokens, by chunks, from any thread, each layer at once in its place.

    Nothing of it is held twice, as touching so much memory for the first time takes as long as filling it;
    and there is no gradient.
    """

    def __init__(self, n: int, layers: int):
        self.n, self.layers, self.lock = n, layers, threading.Lock()
        self.rows: Tensor | None = None  # [n + 1, 2 l, H, d], the last row for padding

    def rows_of(self, mask: Tensor, places: Tensor) -> Tensor:
        """Which row each of the m * T places of a chunk goes to: of real tokens (mask [m, T]) their place."""
        real = mask.flatten().nonzero()[:, 0]
        return torch.full((mask.numel(),), self.n, device=mask.device).index_copy_(0, real, places)

    def put(self, layer: int, heard: Heard, to: Tensor) -> None:
        """What a layer said at the places of a chunk, by ``rows_of``."""
        for side, values in enumerate(by_place(heard)):
            with self.lock:
                if self.rows is None:
                    self.rows = _empty(self.n + 1, 2 * self.layers, like=values)
            if values.device.type == "cpu":  # in a third of torch's time
                _cells(self.rows)[to.numpy(), 2 * layer + side] = _cells(values)
            else:
                self.rows[:, 2 * layer + side].index_copy_(0, to, values)

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
