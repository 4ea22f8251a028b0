"""Pairwise distillation from the teacher's order alone."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.batch import Batch
from distill.objectives.base import Objective
from distill.objectives.checks import check_choice, check_positive, check_shapes, said, unpadded
from distill.outputs import Needs, Outputs


def ranknet(
    student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0, form: str = "log"
) -> Tensor:
    """Mean loss over the pairs of each row of [B, N] that the teacher orders: [B]."""
    check_shapes(student=student, teacher=teacher, mask=mask)
    student, teacher = unpadded(student, mask) / temperature, unpadded(teacher, mask)
    above = (teacher[:, :, None] > teacher[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    margins = student[:, :, None] - student[:, None, :]
    losses = torch.sigmoid(-margins) if form == "probability" else F.softplus(-margins)
    return losses.masked_fill(~above, 0.0).sum(dim=(1, 2)) / above.sum(dim=(1, 2)).clamp(min=1)


class RankNet(Objective):
    r"""Teach the student the teacher's order of each list, whatever its scores.

    .. math:: L_b = \frac{1}{|I_b|} \sum_{(i,j) \in I_b} \log\left(1 + e^{-(s_{bi} - s_{bj})/\tau}\right),
              \qquad I_b = \{(i, j) : t_{bi} > t_{bj}\}

    with scores :math:`s_b` of the student and :math:`t_b` of the teacher. Only the order of
    :math:`t_b` counts, so any scale will do: a permutation by a language model, a rank. Candidates the
    teacher ties make no pair; a list it ties throughout has a loss of 0.

    Needs ``scores`` [B, N] from student and teacher.

    Args:
        temperature: :math:`\tau`, divides the student's scores: near 1 for logits and dot products, about
            0.05 for cosines.
        form: "log": the loss above. "probability": :math:`\varsigma((s_{bj} - s_{bi})/\tau)`, the
            probability of the wrong order, which is one minus the softmax of the two (CEDR, TRMD); it is
            bounded, and hardly pulls at what is confidently wrong.

    References:
        Burges et al., 2005. Learning to Rank using Gradient Descent. ICML 2005

        Choi et al., 2021. Improving Bi-encoder Document Ranking Models with Two Rankers and Multi-teacher
        Distillation (the second form, in its code). arXiv:2103.06523

        Schlatt et al., 2024. Rank-DistiLLM (its use to distil an order). arXiv:2405.07920

    Example:
        >>> import torch
        >>> student = Outputs(scores=torch.tensor([[1.0, 1.0]]))
        >>> teacher = Outputs(scores=torch.tensor([[900.0, -3.0]]))
        >>> RankNet()(student, teacher, Batch.of_scores(1, 2)).loss  # log 2: the student ties them
        tensor([0.6931])
    """

    least_listed = 2

    def __init__(self, temperature: float = 1.0, form: Literal["log", "probability"] = "log"):
        super().__init__(student_needs=Needs("scores"), teacher_needs=Needs("scores"))
        check_positive(temperature=temperature)
        check_choice("form", form, ("log", "probability"))
        self.temperature, self.form = temperature, form

    def count(self, batch: Batch) -> Tensor:
        return (batch.mask.sum(dim=-1) > 1).float()

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        scores = said(student, "scores"), said(teacher, "scores")
        return ranknet(*scores, batch.mask, self.temperature, self.form)
