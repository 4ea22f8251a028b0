"""What a model says about a batch, and what an objective needs to hear. Next: ``model.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


def _on(axis: str, rowwise: bool = True):
    return field(default=None, metadata={"axis": axis, "rowwise": rowwise})


@dataclass(frozen=True)
class Outputs:
    """What a teacher or a student says about one batch: B queries, N listed each, P distinct candidates.

    A model fills the fields it was asked for. Each field declares the axis its rows lie on (query,
    candidate or pair); whoever stores, gathers or cuts Outputs uses that declaration.
    """

    scores: Tensor | None = _on("pair")  # [B, N]  relevance as served, higher is better, float32
    classes: Tensor | None = _on("pair")  # [B, N, C]  logits of a classifier, float32
    in_batch: Tensor | None = _on(
        "query", rowwise=False
    )  # [B, P]  every query against every candidate of the batch
    queries: Tensor | None = _on("query")  # [B, D]  one vector per query
    candidates: Tensor | None = _on("candidate")  # [P, D]  one vector per distinct candidate
    known: Tensor | None = _on("pair")  # [B, N] bool, which scores were really given; None: all

    def given(self) -> Iterator[tuple[str, Tensor]]:
        """The fields that are filled, by name."""
        for f in fields(self):
            if (value := getattr(self, f.name)) is not None:
                yield f.name, value

    def with_(self, **values: Tensor | None) -> Outputs:
        return replace(self, **values)

    def detach(self) -> Outputs:
        return Outputs(**{name: value.detach() for name, value in self.given()})

    def to(self, device: torch.device | str) -> Outputs:
        return Outputs(**{name: value.to(device) for name, value in self.given()})


AXES: dict[str, str] = {f.name: f.metadata["axis"] for f in fields(Outputs)}
ROWWISE = frozenset(f.name for f in fields(Outputs) if f.metadata["rowwise"])  # a row is known by itself


@dataclass(frozen=True)
class Needs:
    """Which fields of Outputs somebody asks for.

    >>> sorted((Needs("scores") | Needs("queries", "scores")).fields)
    ['queries', 'scores']
    """

    fields: frozenset[str]

    def __init__(self, *names: str):
        if unknown := set(names) - set(AXES):
            raise ValueError(f"Outputs has no field {sorted(unknown)}; it has {', '.join(AXES)}.")
        object.__setattr__(self, "fields", frozenset(names))

    def __or__(self, other: Needs) -> Needs:
        return Needs(*(self.fields | other.fields))

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def __bool__(self) -> bool:
        return bool(self.fields)
