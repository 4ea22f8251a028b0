"""What objectives refuse, in one wording, and the padding they all leave out. Next: ``score_kl.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from distill.batch import Batch
from distill.errors import DataError
from distill.outputs import Outputs

Fields = Sequence[Literal["queries", "candidates"]]


def said(outputs: Outputs | None, name: str) -> Any:
    """The field of that name, which whoever made ``outputs`` was asked for."""
    value = None if outputs is None else getattr(outputs, name)
    if value is None:
        given = "nothing" if outputs is None else ", ".join(name for name, _ in outputs.given()) or "nothing"
        raise ValueError(f"This objective needs '{name}' and was given {given}. Ask the model for '{name}'.")
    return value


def labels_of(batch: Batch) -> Tensor:
    """The labels [B, N] of a batch whose source must have them."""
    if batch.labels is None:
        raise DataError(
            f"Data set '{batch.source}' has no labels, and this loss reads them. "
            "Take the loss out of the recipe, or name data that has labels."
        )
    return batch.labels


def check_shapes(**tensors: Tensor) -> None:
    """Refuse shapes that would broadcast: a [B, 1] teacher would teach that all candidates are equal."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {[*tensor.shape]}" for name, tensor in tensors.items())
        raise ValueError(f"Shapes must match: {shapes}.")


def check_positive(**numbers: float) -> None:
    """Refuse a temperature or a scale of 0, below 0, infinite or NaN."""
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {number}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


def check_fields(
    fields: Sequence[str], known: tuple[str, ...] = ("queries", "candidates")
) -> tuple[str, ...]:
    """The fields of vectors that are named, queries first."""
    if isinstance(fields, str) or not fields or set(fields) - {*known}:
        choice = "queries, candidates or both" if len(known) == 2 else f"some of {', '.join(known)}"
        raise ValueError(f"fields must be a list of {choice}; got {fields!r}.")
    return tuple(name for name in known if name in fields)


def unpadded(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` in float32, with 0 where ``mask`` is False.

    Filled before any arithmetic: an infinite value in the padding, masked only in the result, would
    still give a NaN gradient (0 times infinity).
    """
    return values.float().masked_fill(~mask, 0.0)
