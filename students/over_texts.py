"""What students over a BiEncoder share: its texts, and heads of their own that are saved beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from distill.batch import Columns
from distill.hub import atomic_folder, write_own
from distill.model import Model
from distill.nn.text_encoder import TextEncoder
from students.bi_encoder import BiEncoder


class OverTexts(Model):
    """Reads texts apart by ``texts``, and has ``heads`` over what that says of them."""

    shares = frozenset({"encoder"})
    opens: ClassVar[str]  # what a saved folder says opens it
    texts: BiEncoder
    heads: nn.ModuleDict

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments: Any) -> Self:
        return cls(folder, **arguments)

    @property
    def settings(self) -> dict[str, Any]:
        """What is saved beside the weights: plain data that decides, with them, what it answers."""
        raise NotImplementedError

    @property
    def encoder(self) -> TextEncoder:
        return self.texts.encoder

    @property
    def max_length(self) -> int:
        return self.texts.max_length

    @property
    def identity(self) -> dict[str, Any]:
        return {**self.texts.identity, **self.settings}

    @property
    def reads(self) -> Columns:
        return self.texts.reads

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that this class opens; as an encoder, here and elsewhere, it is ``texts``."""
        with atomic_folder(folder) as new:
            self.texts.save_pretrained(new)
            write_own(new, self.opens, self.settings, self.heads)
