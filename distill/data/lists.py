"""The candidates a query lists, ready to be drawn from: part of ``source.py``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distill.batch import Ragged
from distill.data.judged import Judged


class Lists:
    """A judged split's lists: each query's distinct candidates, positives first.

    A candidate that a query lists twice, by row or by text, is kept once, with its highest label. ``most``
    is how many of a query's others are drawn at most; None: as many as fit; 0: there are positives alone.
    """

    rows: Ragged  # rows of candidates (the first of each text), per query
    entries: Tensor  # [T] where each stands in judged.listed.values, hence in labels and scores
    positives: Tensor  # [queries] how many of a query's rows are positives
    longest: int  # the most that one query can list: one positive, and all others, or `most` of them

    def __init__(self, judged: Judged, most: int | None = None):
        self.most = len(judged.listed.values) if most is None else most
        n = len(judged.queries)
        queries = torch.arange(n).repeat_interleave(judged.listed.lengths).numpy()
        entries = np.arange(len(queries))
        candidates = entries
        if len(entries):
            candidates = judged.candidates.same[judged.listed.values].numpy()
        labels = np.zeros(len(queries)) if judged.labels is None else judged.labels.numpy()

        if not (judged.listed.lengths > 1).any():  # as for interactions: nothing to put in order
            self.rows = Ragged(torch.from_numpy(candidates), judged.listed.offsets)
            self.entries = torch.from_numpy(entries)
            self.positives = torch.from_numpy(np.bincount(queries[labels > 0], minlength=n))
            self.longest = min(1, len(entries))
            return
        order = np.lexsort((entries, -labels, candidates, queries))
        first = np.ones(len(order), dtype=bool)
        first[1:] = (np.diff(queries[order]) != 0) | (np.diff(candidates[order]) != 0)
        kept = order[first & ((labels[order] > 0) | (self.most > 0))]
        kept = kept[np.lexsort((kept, labels[kept] <= 0, queries[kept]))]

        lengths = np.bincount(queries[kept], minlength=n)
        self.rows = Ragged.of_lengths(torch.from_numpy(candidates[kept]), torch.from_numpy(lengths))
        self.entries = torch.from_numpy(kept)
        self.positives = torch.from_numpy(np.bincount(queries[kept[labels[kept] > 0]], minlength=n))
        self.longest = int((self.others() + self.positives.clamp(max=1)).max()) if n else 0

    def others(self) -> Tensor:
        """How many candidates that are not positive each query may list [queries]."""
        return (self.rows.lengths - self.positives).clamp(max=self.most)

    def draw(
        self, queries: Tensor, width: int, epoch: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """For each query one positive, the next in each epoch, and others at random, up to ``width``.

        Returns where they stand in ``rows.values`` [B, M], M at least 1, and which of them are real.
        """
        start, counts = self.rows.offsets[queries], self.positives[queries]
        positive = start + (queries + epoch) % counts.clamp(min=1)
        others = self.rows.lengths[queries] - counts
        most = others.clamp(max=self.most)
        longest = int(others.max()) if len(others) else 0
        lots = torch.rand(len(queries), longest, generator=generator)
        lots.masked_fill_(torch.arange(longest) >= others[:, None], 2.0)
        take = min(width, longest)
        chosen = lots.topk(take, dim=1, largest=False).indices  # without replacement
        has = counts > 0
        room = torch.minimum(most, width - has.long())
        real = torch.cat([has[:, None], torch.arange(take) < room[:, None]], dim=1)
        places = torch.cat([positive[:, None], (start + counts)[:, None] + chosen], dim=1)
        return places.masked_fill(~real, 0), real
