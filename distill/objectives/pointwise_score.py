"""Pointwise distillation: the teacher's score itself."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.batch import Batch
from distill.objectives.base import Objective
from distill.objectives.binary_cross_entropy import pointwise_bce
from distill.objectives.checks import check_choice, check_positive, check_shapes, said, unpadded
from distill.outputs import Needs, Outputs


def score_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Squared difference of scores [B, N], summed over each row: [B]."""
    check_shapes(student=student, teacher=teacher, mask=mask)
    return (unpadded(student, mask) - unpadded(teacher, mask)).square().sum(dim=-1)


class PointwiseScore(Objective):
    r"""Teach the student to give each candidate the teacher's own score.

    .. math:: L_b = \sum_{n=1}^{N} (a\, s_{bn} - t_{bn})^2 \quad\text{or}\quad
              L_b = -\sum_{n=1}^{N} p_{bn} \log q_{bn} + (1 - p_{bn}) \log (1 - q_{bn})

    with scores :math:`s_b` of the student and :math:`t_b` of the teacher, and for the second form
    :math:`p = \varsigma(t)`, :math:`q = \varsigma(a s)`, :math:`\varsigma` the logistic function. The mean
    is over pairs. Both ask for the teacher's zero and scale: right where the score itself is used (a
    similarity, a probability of a click); where only order counts, ``ScoreKL`` or
    ``RankNet`` leave the student freer.

    Needs ``scores`` [B, N] from student and teacher.

    Args:
        loss: "mse": the squared difference. "bce": cross-entropy of the probabilities, for a teacher
            whose scores are logits; it heeds small differences near 0 and 1 less.
        scale: :math:`a`, multiplies the student's scores.

    References:
        Ba and Caruana, 2014. Do Deep Nets Really Need to be Deep? (mse). arXiv:1312.6184

        Hinton, Vinyals and Dean, 2015. Distilling the Knowledge in a Neural Network (bce: its soft
        targets, for two classes). arXiv:1503.02531

    Example:
        >>> import torch
        >>> student = Outputs(scores=torch.tensor([[2.0, 1.0]]))
        >>> teacher = Outputs(scores=torch.tensor([[5.0, 1.0]]))
        >>> PointwiseScore()(student, teacher, Batch.of_scores(1, 2)).loss
        tensor([9.])
    """

    def __init__(self, loss: Literal["mse", "bce"] = "mse", scale: float = 1.0):
        super().__init__(student_needs=Needs("scores"), teacher_needs=Needs("scores"))
        check_choice("loss", loss, ("mse", "bce"))
        check_positive(scale=scale)
        self.form = loss
        self.scale = scale

    def count(self, batch: Batch) -> Tensor:
        return batch.mask.sum(dim=-1).float()

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        scores, taught = self.scale * said(student, "scores").float(), said(teacher, "scores").float()
        if self.form == "mse":
            return score_mse(scores, taught, batch.mask)
        return pointwise_bce(scores, taught.sigmoid(), batch.mask)
