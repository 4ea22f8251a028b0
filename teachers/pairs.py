"""What teachers share that read query and candidate together, from the ids of each text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from distill.batch import Columns
from distill.model import Model
from distill.nn.text_encoder import TextEncoder
from distill.nn.tokenizer import TextColumn


class ReadsPairs(Model):
    """A transformer over both texts: ``max_length`` ids of a pair, ``query_max_length`` of them the query."""

    encoder: TextEncoder
    checkpoint: str
    max_length: int
    query_max_length: int

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments: Any) -> Self:
        return cls(folder, **arguments)

    @property
    def column(self) -> TextColumn:
        return self.encoder.tokenizer.column()

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "checkpoint": self.checkpoint,
            **self.encoder.identity,
            "max_length": self.max_length,
            "query_max_length": self.query_max_length,
        }

    @property
    def reads(self) -> Columns:
        return Columns((self.column,), (self.column,))
