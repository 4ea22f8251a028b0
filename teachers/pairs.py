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

    def room_for_query(self, wanted: int | None) -> int:
        """The ids of a query for which a pair has room beside a candidate; None: 64, less in short pairs."""
        self.encoder.check_length("max_length", self.max_length)
        room = self.max_length - self.encoder.tokenizer.pair_specials
        if room < 2:
            raise ValueError(
                f"max_length must be at least {self.max_length - room + 2}, a token of each text among those "
                f"that frame a pair; got {self.max_length}."
            )
        length = min(64, room - max(1, room // 4)) if wanted is None else wanted
        if not 0 < length < room:
            raise ValueError(
                f"query_max_length must be between 1 and {room - 1}, so that a pair of max_length "
                f"{self.max_length} has room for the candidate; got {length}."
            )
        return length

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
