"""Pairwise learning from labels: a positive above each negative (BPR)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.batch import Batch
from distill.objectives.base import Objective
from distill.objectives.checks import check_positive, said
from distill.objectives.contrast import contrast, contrasted, margins
from distill.outputs import Needs, Outputs


def bpr(
    scores: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float = 1.0,
    draws: Tensor | None = None,
) -> Tensor:
    """Mean of -log of the logistic function of each positive's margin over each negative: [B].

    scores [B, M], positives and negatives [B, M] bool; a negative counts ``draws`` [M] times.
    """
    margin, real, _ = margins(scores, positives, negatives)
    weights = real.float() if draws is None else real * draws.float()
    losses = weights * F.softplus(-margin / temperature)
    return losses.sum(dim=(1, 2)) / weights.sum(dim=(1, 2)).clamp(min=1)


class BPR(Objective):
    r"""Teach a model to score each positive above each negative (Bayesian personalised ranking).

    .. math:: L_b = \frac{1}{|P_b| \sum_n k_n} \sum_{p \in P_b} \sum_{n \in N_b} -k_n \log
              \varsigma\left((s_{bp} - s_{bn})/\tau\right)

    with :math:`\varsigma` the logistic function, the candidates :math:`P_b` that query b lists with a
    label above 0 and the negatives :math:`N_b`: the others it lists, or with ``in_batch`` the others of
    the batch, each as often as it was drawn (:math:`k_n`; 1 within a list). A known positive is never a
    negative. A query without a positive says nothing, nor does a list without a negative.

    Needs ``scores`` [B, N] from the student, or ``in_batch`` [B, P] if so set; and labels.

    Args:
        temperature: :math:`\tau`, divides the scores: 1 for logits and dot products, 0.05 to 0.2 for cosines.
        in_batch: Take every candidate of the batch as a negative, not only the listed ones.

    References:
        Rendle et al., 2009. BPR: Bayesian Personalized Ranking from Implicit Feedback. arXiv:1205.2618

    Example:
        >>> import torch
        >>> batch = Batch.of_scores(1, 2)  # the first is the positive
        >>> BPR()(Outputs(scores=torch.tensor([[0.6, 0.2]])), None, batch).loss
        tensor([0.5130])
    """

    labelled = True

    def __init__(self, temperature: float = 1.0, in_batch: bool = False):
        field = "in_batch" if in_batch else "scores"
        super().__init__(student_needs=Needs(field))
        check_positive(temperature=temperature)
        self.temperature = temperature
        self.across, self.contrasts = in_batch, not in_batch
        self.field = field

    def count(self, batch: Batch) -> Tensor:
        return contrasted(batch, self.across)

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        positives, negatives, draws = contrast(batch, self.across)
        return bpr(said(student, self.field), positives, negatives, self.temperature, draws)
