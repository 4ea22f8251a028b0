"""What a text data set is: named splits, each a Judged. Next: ``retrieval.py``, ``pairs.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from distill.data.judged import Judged
from distill.data.negatives import Negatives
from distill.data.source import TextSource


class TextData(ABC):
    """A text data set with named splits; each is read when it is first asked for."""

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

    def train_source(
        self,
        batch_size: int,
        candidates: int = 8,
        negatives: Sequence[Negatives] = (),
        seed: int = 0,
        name: str = "data",
        with_positive: bool = False,
    ) -> TextSource:
        """Batches of the train split; the arguments are those of ``TextSource``."""
        return TextSource(self.split("train"), batch_size, candidates, negatives, seed, name, with_positive)
