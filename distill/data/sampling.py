"""Negatives by popularity, by rank, for the whole batch, from impressions. Next: ``hard_negatives.py``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from distill.data.judged import Judged
from distill.data.negatives import Negatives

if TYPE_CHECKING:
    from distill.batch import Ragged
    from distill.graph import DistillationGraph

log = logging.getLogger("distill")


def positive_counts(judged: Judged) -> Tensor:
    """How often each candidate is listed as a positive: [candidates] int64; equal ones count as the first."""
    listed = judged.listed.values
    if judged.labels is not None:
        listed = listed[judged.labels > 0]
    return torch.bincount(judged.candidates.same[listed], minlength=len(judged.candidates))


class Weighted(Negatives):
    """Draws candidates by weights that a subclass computes from how often train lists them as positives."""

    def weights(self, counts: Tensor) -> Tensor:
        """Weights [n] float64, not all 0, of n distinct candidates that occur ``counts`` [n] times."""
        raise NotImplementedError

    def prepare(self, judged: Judged) -> None:
        self.rows = judged.candidates.same.unique()
        weights = self.weights(positive_counts(judged)[self.rows])
        self.probability = torch.zeros(len(judged.candidates), dtype=torch.float64)
        self.probability[self.rows] = weights / weights.sum()
        self.upto = self.probability[self.rows].cumsum(0)

    def draw(self, query_rows: Tensor, generator: torch.Generator) -> Tensor:
        lots = torch.rand(len(query_rows), self.count, generator=generator, dtype=torch.float64)
        place = torch.searchsorted(self.upto, lots * self.upto[-1], right=True)
        return self.rows[place.clamp(max=len(self.rows) - 1)]

    def shares(self, candidates: Tensor) -> Tensor:
        return self.probability[candidates]


class PopularNegatives(Weighted):
    r"""Candidates drawn with probability :math:`c_i^{power} / \sum_j c_j^{power}`, with train's counts c.

    What train never lists is never drawn.

    Args:
        count: How many per query.
        power: 0.75 is word2vec's; 1 is what in-batch negatives follow; 0 is uniform over what train lists.

    References:
        Mikolov et al., 2013. Distributed Representations of Words and Phrases. arXiv:1310.4546
    """

    def __init__(self, count: int, power: float = 0.75):
        super().__init__(count)
        if not 0 <= power <= 4:
            raise ValueError(f"power must lie between 0 and 4, got {power}.")
        self.power = power

    def weights(self, counts: Tensor) -> Tensor:
        return torch.where(counts > 0, counts.double() ** self.power, 0.0)


class LogUniformNegatives(Weighted):
    r"""Candidates drawn by rank r = 0, 1, ... of popularity: :math:`\log\frac{r + 2}{r + 1} / \log(N + 1)`.

    Every candidate can be drawn. Equal counts are ranked by row.

    References:
        The sampler of TensorFlow's ``log_uniform_candidate_sampler``; by rank, as some public code that
        puts the count in place of the rank favours what is rarest.
    """

    def weights(self, counts: Tensor) -> Tensor:
        rank = torch.empty_like(counts)
        rank[counts.argsort(descending=True, stable=True)] = torch.arange(len(counts))
        return torch.log1p(1.0 / (rank.double() + 1.0))


class MixedNegatives(Negatives):
    """Candidates drawn uniformly for the whole batch, which no query lists: mixed negative sampling.

    In-batch negatives follow popularity, so what nobody took is never a negative; these are, for an objective
    that compares each query with all of the batch.

    Args:
        count: How many per batch, B'.

    References:
        Yang et al., 2020. Mixed Negative Sampling for Learning Two-tower Neural Networks in
        Recommendations. WWW 2020 Companion
    """

    background: ClassVar[bool] = True

    def prepare(self, judged: Judged) -> None:
        self.rows = judged.candidates.same.unique()

    def draw(self, query_rows: Tensor, generator: torch.Generator) -> Tensor:
        return self.rows[torch.randint(len(self.rows), (1, self.count), generator=generator)]

    def shares(self, candidates: Tensor) -> Tensor:
        return torch.full((len(candidates),), 1.0 / len(self.rows), dtype=torch.float64)


class ExposedNegatives(Negatives):
    """What the user was shown before the measured time and did not take (or rated below ``at_least``).

    A warning says what these alone do: serving scores the whole catalogue, of which they are no sample.

    References:
        Huang et al., 2020. Embedding-based Retrieval in Facebook Search (exposed negatives alone lost 55% of
        recall). arXiv:2006.11632
    """

    def prepare(self, judged: Judged) -> None:
        self.exposed: Ragged | None = getattr(judged.queries, "exposed", None)
        if self.exposed is None:
            raise ValueError(NO_IMPRESSIONS)
        self.users: Tensor = judged.queries.rows  # type: ignore[attr-defined]
        log.warning(
            "ExposedNegatives: what was shown and not taken is no sample of the catalogue that serving "
            "searches. Mix it with RandomNegatives or MixedNegatives, and measure the whole catalogue."
        )

    def draw(self, query_rows: Tensor, generator: torch.Generator) -> Tensor:
        assert self.exposed is not None
        rows, mask = self.exposed.select(self.users[query_rows]).padded(-1, None)
        lots = torch.rand(rows.shape, generator=generator).masked_fill(~mask, 2.0)
        chosen = lots.argsort(dim=1)[:, : self.count]
        drawn = rows.gather(1, chosen)
        return torch.nn.functional.pad(drawn, (0, self.count - drawn.shape[1]), value=-1)

    def problems(self, graph: DistillationGraph, judged: Judged) -> Iterator[str]:
        if getattr(judged.queries, "exposed", None) is None:
            yield f"type: {NO_IMPRESSIONS}"


NO_IMPRESSIONS = (
    "the data does not say what was shown and not taken; give it a label column and at_least, or leave "
    "ExposedNegatives out."
)
