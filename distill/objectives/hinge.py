"""Pairwise learning from labels: a positive above the negatives by a margin."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.batch import Batch
from distill.objectives.base import Objective
from distill.objectives.checks import check_positive, said
from distill.objectives.contrast import contrast, contrasted, margins
from distill.outputs import Needs, Outputs


def hinge(
    scores: Tensor,
    positives: Tensor,
    negatives: Tensor,
    margin: float = 1.0,
    hardest: int | None = None,
    warp: int | None = None,
    draws: Tensor | None = None,
) -> Tensor:
    """Mean of max(0, margin - s+ + s-) over each row's positives and their negatives: [B].

    scores [B, M], positives and negatives [B, M] bool. ``hardest``: only so many negatives, those with the
    highest scores, each once; else all, each ``draws`` [M] times. ``warp``: how many candidates there are,
    for a factor log(1 + estimated rank) of each positive.
    """

    def violations(most: int | None) -> tuple[Tensor, Tensor]:
        """By how much each pair falls short of the margin, and its weight: two [B, K, M']."""
        over, real, columns = margins(scores, positives, negatives, most)
        weights = real.float()
        if draws is not None and most is None:
            weights = weights * draws[columns][:, None, :]
        return (margin - over).clamp(min=0), weights

    short, weights = violations(hardest)
    if warp is not None:
        with torch.no_grad():
            of_all, times = violations(None)
            wrong = (times * (of_all > 0)).sum(dim=-1) / times.sum(dim=-1).clamp(min=1)  # [B, K]
            factor = torch.log1p(warp * wrong)[:, :, None]
        short = short * factor
    return (weights * short).sum(dim=(1, 2)) / weights.sum(dim=(1, 2)).clamp(min=1)


class Hinge(Objective):
    r"""Teach a model to score each positive above its negatives by a margin (triplet loss).

    .. math:: L_b = \frac{1}{|I_b|} \sum_{(p,n) \in I_b} w_{bp} \max(0,\, m - s_{bp} + s_{bn})

    with a margin :math:`m` and the pairs :math:`I_b` of a positive that query b lists (a label above 0)
    and a negative: the others it lists, or with ``in_batch`` the others of the batch, each as often as it
    was drawn. With cosines as scores this is the triplet loss over distances :math:`1 - \cos`. The weight
    :math:`w_{bp}` is 1, or with ``warp`` :math:`\log(1 + N \hat r_{bp})`, where :math:`\hat r_{bp}` is the
    share of the negatives within the margin and N the number of candidates of the catalogue, so
    :math:`N \hat r_{bp}` estimates the positive's rank; it passes no gradient. A known positive is never a
    negative. A query without a positive says nothing, nor does a list without a negative.

    Needs ``scores`` [B, N] from the student, or ``in_batch`` [B, P] if so set; and labels.

    Args:
        margin: :math:`m`, in the unit of the scores, to be tuned: 1 (our choice) suits dot products, 0.1 to
            0.5 cosines.
        hardest: Set each positive only against so many negatives, those that the student scores highest;
            1 or 2 with ``in_batch`` are the online hard negatives of Huang et al. None: against all.
        in_batch: Take every candidate of the batch as a negative, not only the listed ones.
        warp: N, the number of candidates of the catalogue; None: :math:`w = 1`.

    References:
        Huang et al., 2020. Embedding-based Retrieval in Facebook Search (triplet loss, online hard
        negatives). arXiv:2006.11632

        Weston, Bengio and Usunier, 2011. WSABIE: Scaling Up to Large Vocabulary Image Annotation (the
        weight by rank, here of the sampled negatives as in torch-rechub's HingeLoss). IJCAI 2011

    Example:
        >>> batch = Batch.of_scores(1, 2)  # the first is the positive
        >>> Hinge(margin=0.5)(Outputs(scores=torch.tensor([[0.6, 0.2]])), None, batch).loss
        tensor([0.1000])
    """

    labelled = True

    def __init__(
        self,
        margin: float = 1.0,
        hardest: int | None = None,
        in_batch: bool = False,
        warp: int | None = None,
    ):
        field = "in_batch" if in_batch else "scores"
        super().__init__(student_needs=Needs(field))
        check_positive(margin=margin)
        for name, number in (("hardest", hardest), ("warp", warp)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, or null; got {number}.")
        self.margin, self.hardest, self.warp = margin, hardest, warp
        self.across, self.contrasts = in_batch, not in_batch
        self.field = field

    def count(self, batch: Batch) -> Tensor:
        return contrasted(batch, self.across)

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        positives, negatives, draws = contrast(batch, self.across)
        scores = said(student, self.field)
        return hinge(scores, positives, negatives, self.margin, self.hardest, self.warp, draws)
