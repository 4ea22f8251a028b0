"""Texts alone, for objectives that need no lists. Next: ``documentation.py``."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from distill.batch import Ragged
from distill.data.judged import Judged, TextTable
from distill.data.tables import Spec, read_table
from distill.data.text_data import TextData
from distill.errors import DataError

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*")


class Texts(TextData):
    """Distinct texts without judgements: what an embedding is distilled on.

    Args:
        train: A table or a list of tables, as ``read_table`` takes them. One with other column names is
            given as ``{path: ..., columns: [...]}``.
        columns: Names of the columns that hold texts; all of them are taken. A list of names among them is
            one text, as [title, text] where a document is searched by both.
        side: Whether the texts are read as ``candidates`` or as ``queries`` (prompts and lengths differ).
        sentences: Cut the texts into sentences, at full stops.
        limit: At most so many texts, chosen by ``seed``.
        crops: So many random pieces of each text besides it: short texts in a data set's own words, where
            there are too few of them. A teacher says of a piece what it says of any text.
        crop_words: The least and the most words of a piece, cut at spaces.
        seed: Of ``limit`` and ``crops``.

    Empty texts are left out.

    Example:
        >>> import pyarrow as pa
        >>> Texts(pa.table({"text": ["One. Two!", "One."]}), sentences=True).split("train").candidates.texts
        ['One.', 'Two!']
    """

    def __init__(
        self,
        train: Spec | list[Spec],
        columns: Sequence[str | Sequence[str]] = ("text",),
        side: Literal["candidates", "queries"] = "candidates",
        sentences: bool = False,
        limit: int | None = None,
        crops: int = 0,
        crop_words: tuple[int, int] = (2, 10),
        seed: int = 0,
    ):
        if side not in ("candidates", "queries"):
            raise ValueError(f"side must be candidates or queries, got '{side}'.")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}.")
        least, most = crop_words
        if crops < 0 or not 1 <= least <= most:
            raise ValueError(
                f"crops must be 0 or more, of 1 <= least <= most words, got {crops} of {least} to {most}."
            )
        super().__init__(["train"])
        self.tables = list(train) if isinstance(train, list | tuple) else [train]
        self.columns = [columns] if isinstance(columns, str) else list(columns)
        self.side, self.sentences, self.limit, self.seed = side, sentences, limit, seed
        self.crops, self.crop_words = crops, (least, most)

    def read(self, name: str) -> Judged:
        found: dict[str, None] = {}
        for i, spec in enumerate(self.tables):
            columns = self.columns
            if isinstance(spec, Mapping) and "columns" in spec:
                columns, spec = spec["columns"], {**spec, "columns": None}
            joined = [[names] if isinstance(names, str) else list(names) for names in columns]
            table = read_table(spec, {name: name for names in joined for name in names}, where=f"train[{i}]")
            for names in joined:
                for parts in zip(*map(table.strings, names), strict=True):
                    text = " ".join(part for part in parts if part)
                    pieces = SENTENCE_END.split(text) if self.sentences else [text]
                    found.update((piece, None) for piece in pieces if piece and not piece.isspace())
        if not found:
            raise DataError(f"train: the columns {', '.join(map(str, self.columns))} hold no text at all.")
        texts = list(found)
        if self.limit is not None and self.limit < len(texts):
            chosen = random.Random(self.seed).sample(range(len(texts)), self.limit)
            texts = [texts[row] for row in sorted(chosen)]
        texts += self._pieces(texts)
        some = TextTable([str(row) for row in range(len(texts))], texts)
        none = TextTable([], [])
        asked = self.side == "queries"
        return Judged(
            task="texts",
            queries=some if asked else none,
            candidates=none if asked else some,
            listed=Ragged.of([[] for _ in texts] if asked else []),
            name="texts",
        )

    def _pieces(self, texts: list[str]) -> list[str]:
        """Random runs of words of each text, none that is there already."""
        draw, known, (least, most) = random.Random(self.seed), set(texts), self.crop_words
        pieces: dict[str, None] = {}
        for text in texts if self.crops else []:
            words = text.split()
            for _ in range(self.crops):
                length = min(draw.randint(least, most), len(words))
                start = draw.randint(0, len(words) - length)
                pieces[" ".join(words[start : start + length])] = None
        return [piece for piece in pieces if piece not in known]
