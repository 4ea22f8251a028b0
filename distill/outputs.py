"""What a model says about a batch, and what an objective needs to hear. Next: ``model.py``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from distill.tokens import Tokens

Said = Tensor | Tokens


def _on(axis: str, rowwise: bool = True, tokens: bool = False):
    return field(default=None, metadata={"axis": axis, "rowwise": rowwise, "tokens": tokens})


@dataclass(frozen=True)
class Outputs:
    """What a teacher or a student says about one batch: B queries, N listed each, P distinct candidates.

    A model fills the fields it was asked for. Each field declares the axis its rows lie on (query,
    candidate or pair) and whether it tells of tokens; whoever stores, gathers or cuts Outputs uses that
    declaration.
    """

    scores: Tensor | None = _on("pair")  # [B, N]  relevance as served, higher is better, float32
    classes: Tensor | None = _on("pair")  # [B, N, C]  logits of a classifier, float32
    in_batch: Tensor | None = _on(
        "query", rowwise=False
    )  # [B, P]  every query against every candidate of the batch
    queries: Tensor | None = _on("query")  # [B, D]  one vector per query
    candidates: Tensor | None = _on("candidate")  # [P, D]  one vector per distinct candidate
    query_cls: Tensor | None = _on("query")  # [B, D]  the first token's last hidden state
    candidate_cls: Tensor | None = _on("candidate")  # [P, D]
    query_layers: Tensor | None = _on("query")  # [B, L, D]  one vector per query and layer, the last last
    candidate_layers: Tensor | None = _on("candidate")  # [P, L, D]
    layer_scores: Tensor | None = _on("pair")  # [B, N, L]  what each layer would say, float32
    pair_vectors: Tensor | None = _on("pair")  # [B, N, D]  one vector per listed pair
    joint_queries: Tensor | None = _on("pair")  # [B, N, D]  of each query, read together with a candidate
    joint_candidates: Tensor | None = _on("pair")  # [B, N, D]  of each candidate, read with the query
    query_tokens: Tokens | None = _on("query", tokens=True)  # B rows: a vector per token
    candidate_tokens: Tokens | None = _on("candidate", tokens=True)  # P rows
    query_attention: Tokens | None = _on("query", tokens=True)  # B rows: attention of texts read apart
    candidate_attention: Tokens | None = _on("candidate", tokens=True)  # P rows
    joint_attention: Tokens | None = _on("pair", tokens=True)  # B * N rows: of query and candidate together
    known: Tensor | None = _on("pair")  # [B, N] bool, which scores were really given; None: all

    def given(self) -> Iterator[tuple[str, Said]]:
        """The fields that are filled, by name."""
        for f in fields(self):
            if (value := getattr(self, f.name)) is not None:
                yield f.name, value

    def with_(self, **values: Said | None) -> Outputs:
        return replace(self, **values)  # type: ignore[arg-type]

    def detach(self) -> Outputs:
        return Outputs().with_(**{name: value.detach() for name, value in self.given()})

    def to(self, device: torch.device | str) -> Outputs:
        return Outputs().with_(**{name: value.to(device) for name, value in self.given()})


AXES: dict[str, str] = {f.name: f.metadata["axis"] for f in fields(Outputs)}
ROWWISE = frozenset(f.name for f in fields(Outputs) if f.metadata["rowwise"])  # a row is known by itself
OF_TOKENS = frozenset(f.name for f in fields(Outputs) if f.metadata["tokens"])  # Tokens, too large to store
STORABLE = ROWWISE - OF_TOKENS
JOINT = frozenset(name for name in OF_TOKENS if AXES[name] == "pair")


@dataclass(frozen=True)
class Needs:
    """Which fields of Outputs somebody asks for.

    Args:
        names: The fields.
        layers: Of which layers attention is asked for; -1 is the last.
        first: Of how many listed candidates, from the first, joint signals are asked for; None: of all.

    >>> sorted((Needs("scores") | Needs("queries", "scores")).fields)
    ['queries', 'scores']
    """

    fields: frozenset[str]
    layers: frozenset[int]
    first: int | None

    def __init__(self, *names: str, layers: Iterable[int] = (), first: int | None = None):
        if unknown := set(names) - set(AXES):
            raise ValueError(f"Outputs has no field {sorted(unknown)}; it has {', '.join(AXES)}.")
        object.__setattr__(self, "fields", frozenset(names))
        object.__setattr__(self, "layers", frozenset(layers))
        object.__setattr__(self, "first", first)

    def only(self, names: Iterable[str]) -> Needs:
        """These fields, in the layers and of the candidates that are asked for here."""
        return Needs(*names, layers=self.layers, first=self.first)

    def __or__(self, other: Needs) -> Needs:
        asked = [needs.first for needs in (self, other) if needs.fields & JOINT]
        known = [first for first in asked if first is not None]
        first = max(known) if asked and len(known) == len(asked) else None
        return Needs(*(self.fields | other.fields), layers=self.layers | other.layers, first=first)

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def __bool__(self) -> bool:
        return bool(self.fields)
