"""What ``train_text.py`` trains on: questions with 8 sentences each, and stored scores of a teacher.

The scores are pseudo-scores, the share of a question's words, weighted by rarity, that a sentence holds: who
made them costs neither side anything. Without the data folder ($DISTILL_DATA) the groups are first sentences
of the docstrings installed here, each with eight bodies.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from _measure import data_folder

from distill.batch import Ragged
from distill.data.judged import Judged, TextTable
from distill.data.source import TextSource

BATCH, CANDIDATES, SEED = 16, 8, 1


@dataclass(frozen=True)
class Groups:
    """n queries with ``CANDIDATES`` distinct texts each, and a teacher's score of each pair."""

    queries: list[str]
    candidates: list[list[str]]
    scores: list[list[float]]

    def __len__(self) -> int:
        return len(self.queries)

    def at(self, rows: Sequence[int]) -> Groups:
        return Groups(
            [self.queries[row] for row in rows],
            [self.candidates[row] for row in rows],
            [self.scores[row] for row in rows],
        )

    def texts(self) -> list[str]:
        return [*self.queries, *(text for group in self.candidates for text in group)]


def read_groups(most: int) -> tuple[str, Groups]:
    """Where the groups come from, and at most so many, a whole number of batches."""
    folder = data_folder()
    if folder is None:
        from distill.data import Documentation

        name, pairs = "documentation", Documentation().split("train")
        texts = pairs.candidates.texts
        lists = {q: texts[row : row + CANDIDATES] for row, q in enumerate(pairs.queries.texts)}
    else:
        import pandas as pd

        name, table = "wikiqa", pd.read_parquet(folder / "wikiqa" / "train_tokenized.parquet")
        lists = {q: list(dict.fromkeys(group.sentence)) for q, group in table.groupby("question", sort=False)}
    lists = {q: group[:CANDIDATES] for q, group in lists.items() if len(set(group)) >= CANDIDATES}
    count = min(most, len(lists)) // BATCH * BATCH
    if not count:
        raise SystemExit(f"{name}: {len(lists)} questions list {CANDIDATES} texts; a batch needs {BATCH}.")
    queries, candidates = [*lists][:count], [*lists.values()][:count]
    return name, Groups(queries, candidates, pseudo_scores(queries, candidates))


def pseudo_scores(queries: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
    """For each pair, which share of the query's words the candidate holds, weighted by rarity: 0 to 1."""

    def words(text: str) -> set[str]:
        return set(re.findall(r"\w+", text.lower()))

    held = [[words(text) for text in group] for group in candidates]
    known = Counter(word for group in held for found in group for word in found)
    total = 1 + sum(map(len, held))

    def weight(found: set[str]) -> float:
        return sum(math.log(total / (1 + known[word])) for word in sorted(found))

    return [
        [weight(words(query) & found) / max(weight(words(query)), 1e-9) for found in group]
        for query, group in zip(queries, held, strict=True)
    ]


def source_of(groups: Groups) -> TextSource:
    """Our batches of the groups, with the scores as a column of the data."""
    rows: dict[str, int] = {}
    listed = [[rows.setdefault(text, len(rows)) for text in group] for group in groups.candidates]
    judged = Judged(
        task="rerank",
        queries=TextTable([str(row) for row in range(len(groups))], groups.queries),
        candidates=TextTable([str(row) for row in range(len(rows))], [*rows]),
        listed=Ragged.of(listed),
        scores={"teacher": torch.tensor(groups.scores).flatten()},
    )
    return TextSource(judged, BATCH, CANDIDATES, seed=SEED)


def in_order(groups: Groups, steps: int) -> Groups:
    """The groups as our source brings them in ``steps`` batches: what the peer is given, unshuffled."""
    source = source_of(groups)
    places = [divmod(step, source.steps(0)) for step in range(steps)]
    return groups.at([row for place in places for row in source.batch(*place).query_ids.tolist()])
