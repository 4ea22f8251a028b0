"""Listwise distillation that leaves probabilities what they are (CLID)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.batch import Batch
from distill.objectives.base import Objective
from distill.objectives.checks import check_shapes, said
from distill.outputs import Needs, Outputs


def calibrated_list(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of the probabilities of [B, N] logits, each row's divided by their sum: [B]."""
    check_shapes(student=student, teacher=teacher, mask=mask)

    def log_shares(logits: Tensor) -> Tensor:
        log_p = F.logsigmoid(logits.float().masked_fill(~mask, 0.0))
        return log_p.masked_fill(~mask, torch.finfo(log_p.dtype).min).log_softmax(dim=-1)

    losses = -(log_shares(teacher).exp() * log_shares(student))
    return losses.masked_fill(~mask, 0.0).sum(dim=-1)


class CalibratedList(Objective):
    r"""Teach the student the teacher's order of each list and stay calibrated (CLID).

    .. math:: L_b = -\sum_{n=1}^{N} \frac{\varsigma(t_{bn})}{\sum_j \varsigma(t_{bj})}
              \log \frac{\varsigma(s_{bn})}{\sum_j \varsigma(s_{bj})}

    with logits :math:`s_b` of the student and :math:`t_b` of the teacher, and :math:`\varsigma` the
    logistic function. A softmax of logits is blind to a constant added to all of them, so it lets
    probabilities drift; the probability of a click that ``BinaryCrossEntropy`` would find is among the
    minima of this one, beside which it is used. Its least value is the entropy of the teacher's shares, not
    0. A list of fewer than two candidates says nothing.

    Needs ``scores`` [B, N] from student and teacher.

    References:
        Gui et al., 2024. Calibration-compatible Listwise Distillation of Privileged Features for CTR
        Prediction. arXiv:2312.08727

    Example:
        >>> batch = Batch.of_scores(1, 3)
        >>> student = Outputs(scores=torch.tensor([0.5, 0.5, 0.2]).logit()[None])
        >>> teacher = Outputs(scores=torch.tensor([0.8, 0.4, 0.2]).logit()[None])
        >>> CalibratedList()(student, teacher, batch).loss
        tensor([1.0064])
    """

    least_listed = 2

    def __init__(self) -> None:
        super().__init__(student_needs=Needs("scores"), teacher_needs=Needs("scores"))

    def count(self, batch: Batch) -> Tensor:
        return (batch.mask.sum(dim=-1) > 1).float()

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        losses = calibrated_list(said(student, "scores"), said(teacher, "scores"), batch.mask)
        return losses * self.count(batch)
