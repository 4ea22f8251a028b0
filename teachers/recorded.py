"""A teacher that is not here: of it there are only the scores that it gave elsewhere."""

from __future__ import annotations

from pathlib import Path

import torch

from distill.batch import Batch, Columns
from distill.errors import RecipeError
from distill.model import Model
from distill.outputs import Needs, Outputs


class Recorded(Model):
    """Scores that come with the data (``scores:`` or ``teacher:`` of a data set), under this node's name.

    It cannot be asked, so it teaches only on what the data lists: no samplers of negatives, no vectors.

    Provides ``scores`` [B, N].
    """

    recorded = True

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"scores"})

    @property
    def reads(self) -> Columns:
        return Columns()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        raise RecipeError(
            "a recorded teacher has only the scores that come with the data: it cannot be asked."
        )

    def save_pretrained(self, folder: str | Path) -> None:
        raise RecipeError("a recorded teacher has no weights to save.")
