"""The attention of our text encoders: the fused kernel's result, and who listens hears queries and keys.

An attention is registered with ``transformers`` by name. It hands the layer's queries and keys, by
reference, to whoever listens, and lets the kernel do the work: no second forward, no map of attention.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

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


def by_token(heard: Sequence[Heard], real: Tensor) -> list[Tensor]:
    """Query and key of l layers, in turn, of each real token: 2 l of [t, H, d], the queries scaled.

    Grouped keys are repeated, so that each head of queries has its own.

    Args:
        heard: Of each layer.
        real: The places [t] of the real tokens among the n * T of the chunk.
    """

    def rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1).index_select(0, real)

    said = []
    for query, key, scale in heard:
        groups = query.shape[1] // key.shape[1]
        scaled = rows(query) * scale if torch.is_grad_enabled() else rows(query).mul_(scale)
        said += [scaled, rows(key).repeat_interleave(groups, dim=1) if groups > 1 else rows(key)]
    return said


def side_by_side(said: Sequence[Tensor]) -> Tensor:
    """What ``by_token`` says, as one: [t, l, 2, H, d]."""
    return torch.stack([*said], dim=1).unflatten(1, (len(said) // 2, 2))


class InPlace:
    """What ``by_token`` says of n tokens by chunks, from any thread, each at once in its place: no gradient.

    Nothing of it is held twice: touching so much memory for the first time takes as long as filling it.
    """

    def __init__(self, n: int):
        self.n, self.lock = n, threading.Lock()
        self.rows: Tensor | None = None  # [n, l, 2, H, d]

    def put(self, said: Sequence[Tensor], places: Tensor) -> None:
        with self.lock:
            if self.rows is None:
                self.rows = said[0].new_empty(self.n, len(said) // 2, 2, *said[0].shape[1:])
        columns = _wide(self.rows.view(self.n, len(said), -1))
        for column, values in enumerate(said):
            values = _wide(values.flatten(1))
            columns[:, column].scatter_(0, places[:, None].expand_as(values), values)


def _wide(values: Tensor) -> Tensor:
    """The same bytes as fewer, wider numbers: they are only moved."""
    return values.view(torch.int64) if values.shape[-1] * values.element_size() % 8 == 0 else values
