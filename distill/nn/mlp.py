"""Layers over rows of features, and the towers that a recipe can put over one side of a student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.nn.cpu_training import LayerNorm
from distill.nn.dropout import Dropout

ROUND = 128  # rows
Activation = Literal["relu", "prelu", "gelu", "silu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "prelu": nn.PReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


class MLP(nn.Sequential):
    """Linear, LayerNorm, activation and dropout, for each width but the last, which is linear alone.

    An activation at the end would keep the vectors of a cosine tower within one orthant, where no cosine is
    below 0. There is no batch normalisation: rows would depend on each other.

    Args:
        inputs: The size of a row.
        widths: Of each layer; the last is the size of the answer.
    """

    def __init__(
        self, inputs: int, widths: Sequence[int], dropout: float = 0.0, activation: Activation = "relu"
    ):
        check_layers(widths, dropout, activation)
        layers: list[nn.Module] = []
        for before, width in zip([inputs, *widths], widths[:-1], strict=False):
            # without a bias: the norm's own follows at once
            layers += [nn.Linear(before, width, bias=False), LayerNorm(width), ACTIVATIONS[activation]()]
            if dropout:
                layers.append(Dropout(dropout))
        layers.append(nn.Linear([inputs, *widths][-2], widths[-1]))
        super().__init__(*layers)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [n, inputs] to rows [n, widths[-1]]."""
        return in_round_numbers(super().forward, rows)


def in_round_numbers(layers: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``layers(rows)``, row by row, asked about a multiple of ``ROUND`` rows where that is faster.

    In bf16 on a CPU each shape of a matrix product is compiled when it is first seen, which takes as long as
    many products; batches have ever new numbers of distinct items.
    """
    n = len(rows)
    if rows.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or n % ROUND == 0:
        return layers(rows)
    return layers(F.pad(rows, (0, 0, 0, -n % ROUND)))[:n]


def check_layers(widths: Sequence[int], dropout: float, activation: str) -> None:
    """Refuse what no MLP can be made of."""
    if not widths or any(width < 1 for width in widths):
        raise ValueError(f"widths must be one or more sizes of layers, each at least 1, got {[*widths]}.")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be a probability below 1, got {dropout}.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got '{activation}'.")


class Tower(nn.Module, ABC):
    """One side of a two-tower: from a row of embedded features to a vector.

    A recipe names a tower before anybody knows what it will read; ``bind`` says so, once, and then it
    makes its parameters.
    """

    @property
    @abstractmethod
    def dim(self) -> int:
        """D, the size of its vectors."""

    @property
    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """What it was made with, as plain data: a saved model makes it again from these."""

    @abstractmethod
    def bind(self, widths: Sequence[int]) -> None:
        """Make the parameters: ``widths`` is how many numbers of a row each feature has, in order."""

    @abstractmethod
    def forward(self, rows: Tensor) -> Tensor:
        """Vectors [n, D] of rows [n, sum of widths]."""


class MLPTower(Tower):
    """An MLP over all features of a side; see :class:`MLP`.

    Args:
        widths: Of its layers; the last is D.
        dropout: After each activation, in training.
        activation: ``relu``, ``prelu``, ``gelu`` or ``silu``.
    """

    def __init__(
        self,
        widths: Sequence[int] = (256, 128, 64),
        dropout: float = 0.0,
        activation: Activation = "relu",
    ):
        super().__init__()
        check_layers(widths, dropout, activation)
        self.widths, self.dropout, self.activation = tuple(widths), dropout, activation
        self.layers: nn.Module = nn.Identity()

    @property
    def dim(self) -> int:
        return self.widths[-1]

    @property
    def arguments(self) -> dict[str, Any]:
        return {"widths": list(self.widths), "dropout": self.dropout, "activation": self.activation}

    def bind(self, widths: Sequence[int]) -> None:
        self.layers = MLP(sum(widths), self.widths, self.dropout, self.activation)

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows)
