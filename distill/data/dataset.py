"""What a data set is: named splits, each a Judged. Next: ``text_data.py``, ``interactions.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill.data.judged import Judged
from distill.data.negatives import Negatives
from distill.data.source import JudgedSource
from distill.errors import RecipeError

if TYPE_CHECKING:
    from distill.data.features import Features


class DataSet(ABC):
    """A data set with named splits; each is read when it is first asked for."""

    teachers: tuple[str, ...] = ()  # whose scores come with it

    def __init__(self, splits: Sequence[str]):
        self.splits = tuple(splits)
        self._read: dict[str, Judged] = {}

    @abstractmethod
    def read(self, name: str) -> Judged:
        """Read the split ``name``, one of ``splits``."""

    def split(self, name: str) -> Judged:
        """The split ``name``, read and checked once."""
        if name not in self.splits:
            raise ValueError(f"{type(self).__name__} has no split '{name}'; it has {', '.join(self.splits)}.")
        if name not in self._read:
            self._read[name] = self.read(name)
        return self._read[name]

    @property
    def features(self) -> Features:
        """What its queries and candidates are made of, fitted on the train split.

        Raises:
            RecipeError: They are texts.
        """
        raise RecipeError(f"{type(self).__name__} holds texts, which have no features.")

    @abstractmethod
    def train_source(
        self,
        batch_size: int,
        candidates: int = 8,
        negatives: Sequence[Negatives] = (),
        seed: int = 0,
        name: str = "data",
        with_positive: bool = False,
    ) -> JudgedSource:
        """Batches of the train split; the arguments are those of ``JudgedSource``, some of them or all."""
