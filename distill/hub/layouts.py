"""What a model folder says beside its weights, as plain data. Next: ``reading.py``, ``writing.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

POOLINGS = ("mean", "cls", "lasttoken")
SETTINGS = "config_sentence_transformers.json"
IDENTITY = "torch.nn.modules.linear.Identity"
SIGMOID = "torch.nn.modules.activation.Sigmoid"


@dataclass(frozen=True, eq=False)
class Dense:
    """A linear layer after the pooling: ``activation(x W^T + b)``, [n, in] -> [n, out]."""

    weight: Tensor  # [out, in]
    bias: Tensor | None = None  # [out]
    activation: str = "Identity"  # the name of a class of torch.nn

    def __post_init__(self):
        kind = getattr(nn, self.activation, None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ValueError(f"activation must name a class of torch.nn, got '{self.activation}'.")

    @classmethod
    def of(cls, linear: nn.Linear, activation: str = "Identity") -> Dense:
        """The layer as it is now, on the CPU in float32."""
        weight, bias = linear.weight, linear.bias
        return cls(plain(weight), None if bias is None else plain(bias), activation)

    def module(self) -> nn.Sequential:
        """A trainable copy: a Linear, and the activation unless it is Identity."""
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=self.bias is not None)
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return nn.Sequential(
            linear, *([] if self.activation == "Identity" else [getattr(nn, self.activation)()])
        )


@dataclass(frozen=True, eq=False)
class EncoderLayout:
    """How the token vectors of a transformer become one vector: pooling, dense layers, normalisation.

    Args:
        pooling: The mean over the text's tokens, the first token ("cls") or the last ("lasttoken").
        normalize: Whether vectors end with length 1.
        dense: The layers between pooling and normalisation.
        max_length: The longest input in ids, special tokens included; None: no limit known.
        query_length: The same for queries alone, where it is shorter; None: ``max_length``.
        candidate_length: The same for candidates alone.
        prompts: What stands before a text: ``query`` and ``document``, "" for nothing.
        similarity: How other tools compare the vectors: cosine or dot.
        transformer_folder: Where the transformer and its tokenizer lie, when read from disk.
    """

    pooling: str = "mean"
    normalize: bool = True
    dense: tuple[Dense, ...] = ()
    max_length: int | None = None
    query_length: int | None = None
    candidate_length: int | None = None
    prompts: Mapping[str, str] = field(default_factory=lambda: {"query": "", "document": ""})
    similarity: str = "cosine"
    transformer_folder: Path | None = None

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got '{self.pooling}'.")
        if self.similarity not in ("cosine", "dot"):
            raise ValueError(f"similarity must be cosine or dot, got '{self.similarity}'.")


class Encoders(NamedTuple):
    """The encoder of queries and that of candidates; ``shared``: one transformer serves both."""

    queries: EncoderLayout
    candidates: EncoderLayout

    @property
    def shared(self) -> bool:
        return self.queries.transformer_folder == self.candidates.transformer_folder


@dataclass(frozen=True)
class CrossEncoderLayout:
    """What a saved cross-encoder says of itself.

    Args:
        max_length: The longest pair in ids, special tokens included; None: no limit known.
        num_labels: Logits per pair; 1 is a relevance score.
        query_length: The longest query in it, without special tokens; None: not said.
        activation: The torch class that ``predict`` of sentence-transformers puts on the logits.
        transformer_folder: Where the transformer and its tokenizer lie.
    """

    max_length: int | None
    num_labels: int
    activation: str
    transformer_folder: Path
    query_length: int | None = None


def plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in float32, that shares no memory."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
