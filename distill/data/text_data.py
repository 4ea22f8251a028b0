"""What a text data set is. Next: ``retrieval.py``, ``groups.py``."""

from __future__ import annotations

from collections.abc import Sequence

from distill.data.dataset import DataSet
from distill.data.negatives import Negatives
from distill.data.source import TextSource


class TextData(DataSet):
    """A data set of texts with named splits."""

    def train_source(
        self,
        batch_size: int,
        candidates: int = 8,
        negatives: Sequence[Negatives] = (),
        seed: int = 0,
        name: str = "data",
        with_positive: bool = False,
        listed_negatives: int | None = None,
    ) -> TextSource:
        judged = self.split("train")
        how = (batch_size, candidates, negatives, seed, name, with_positive, listed_negatives)
        return TextSource(judged, *how)
