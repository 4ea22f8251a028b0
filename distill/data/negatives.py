"""Where candidates come from that a query does not list. Next: ``source.py``, which deals them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from distill.data.cache import content_hash, replacing
from distill.data.judged import Judged
from distill.paths import cache_folder

# Chinese and Japanese characters one by one, else words of two letters or more
WORDS = r"(?u)[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]{2,}"


class Negatives(ABC):
    """Proposes candidates that a query does not list.

    The source drops those that are known to be relevant, or listed already: a sampler need not know.
    """

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}.")
        self.count = count  # how many per query

    @abstractmethod
    def prepare(self, judged: Judged) -> None:
        """Whatever takes long, once, before the first ``draw``."""

    @abstractmethod
    def draw(self, query_rows: Tensor, generator: torch.Generator) -> Tensor:
        """Rows of candidates [B, count] for the queries at ``query_rows`` [B]; -1 where there is none."""


class RandomNegatives(Negatives):
    """Any candidate of the data set, each distinct text as likely as another."""

    def prepare(self, judged: Judged) -> None:
        self.rows = judged.candidates.same_text.unique()  # [distinct texts]

    def draw(self, query_rows: Tensor, generator: torch.Generator) -> Tensor:
        shape = (len(query_rows), self.count)
        return self.rows[torch.randint(len(self.rows), shape, generator=generator)]


class BM25Negatives(Negatives):
    """Candidates that share words with the query, out of the best that BM25 finds.

    Args:
        count: How many are drawn per query and epoch.
        top: They are drawn from so many of the best, known positives not counted.
        skip: The first so many are passed over: among them are most positives that nobody labelled.

    References:
        Robertson and Zaragoza, 2009. The Probabilistic Relevance Framework: BM25 and Beyond.
    """

    def __init__(self, count: int, top: int = 100, skip: int = 0):
        super().__init__(count)
        if skip < 0 or top < count:
            raise ValueError(f"top ({top}) must be at least count ({count}), and skip ({skip}) not negative.")
        self.top, self.skip = top, skip

    def prepare(self, judged: Judged) -> None:
        same = judged.candidates.same_text
        distinct = same.unique()  # rows that stand for a text, in order
        query_same = judged.queries.same_text
        asked = query_same.unique()
        positives = judged.positives.lengths
        most = int(positives.max()) if len(positives) else 0
        found = _best(
            [judged.candidates.texts[row] for row in distinct],
            [judged.queries.texts[row] for row in asked],
            min(self.top + self.skip + most, len(distinct)),
        )
        rows = torch.where(found >= 0, distinct[found.clamp(min=0).long()], -1)
        rows = rows[torch.searchsorted(asked, query_same)]  # [queries, best]
        rows[judged.is_positive(torch.arange(len(rows))[:, None].expand_as(rows), rows)] = -1
        order = (rows < 0).int().argsort(dim=1, stable=True)
        self.rows = rows.gather(1, order)[:, self.skip : self.skip + self.top]  # [queries, top]

    def draw(self, query_rows: Tensor, generator: torch.Generator) -> Tensor:
        rows = self.rows[query_rows]
        lots = torch.rand(rows.shape, generator=generator).masked_fill(rows < 0, 2.0)
        drawn = rows.gather(1, lots.argsort(dim=1)[:, : self.count])
        return torch.nn.functional.pad(drawn, (0, self.count - drawn.shape[1]), value=-1)


def _best(texts: list[str], queries: list[str], k: int) -> Tensor:
    """For each query the k best texts by BM25, best first: [queries, k] int32, -1 where no word is shared."""
    import bm25s

    settings = json.dumps([bm25s.__version__, WORDS, k, len(texts)])
    path = cache_folder() / "bm25" / f"{content_hash([settings, *texts, *queries])}.npy"
    if path.exists():
        try:
            return torch.from_numpy(np.load(path))
        except (ValueError, OSError, EOFError):  # a damaged file is made again
            path.unlink()
    quiet = {"show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, token_pattern=WORDS, **quiet), **quiet)
    words = bm25s.tokenize(queries, token_pattern=WORDS, return_ids=False, **quiet)
    rows, scores = index.retrieve(words, k=k, **quiet)
    found = np.where(scores > 0, rows, -1).astype(np.int32)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, found)
    return torch.from_numpy(found)
