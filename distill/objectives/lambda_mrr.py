"""Pairwise distillation of a teacher's order, weighted by what a swap would cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.batch import Batch
from distill.objectives.base import Objective
from distill.objectives.checks import check_positive, check_shapes, said, unpadded
from distill.outputs import Needs, Outputs


def places(scores: Tensor, mask: Tensor) -> Tensor:
    """Each entry's place in its row of [B, N], from 1 for the highest; equals keep their order: [B, N]."""
    scores = scores.detach().float().masked_fill(~mask, torch.finfo(torch.float32).min)
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) + 1


def levels(teacher: Tensor, mask: Tensor, groups: Sequence[int]) -> Tensor:
    """The level of each entry when a teacher's order [B, N] is cut into groups of these sizes: [B, N].

    The first group has the highest level, ``len(groups)``; what is left after the last has 0.
    """
    ends = torch.tensor(groups, device=teacher.device).cumsum(0)
    return (places(teacher, mask)[..., None] <= ends).sum(dim=-1)


def lambda_mrr(student: Tensor, target: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over the pairs of each row of [B, N] that ``target`` orders: [B]."""
    check_shapes(student=student, target=target, mask=mask)
    weights = 1.0 / places(student, mask)
    student, target = unpadded(student, mask) / temperature, target.masked_fill(~mask, 0)
    above = (target[:, :, None] > target[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    cost = (weights[:, :, None] - weights[:, None, :]).abs()
    losses = cost * F.softplus(student[:, None, :] - student[:, :, None])
    return losses.masked_fill(~above, 0.0).sum(dim=(1, 2)) / above.sum(dim=(1, 2)).clamp(min=1)


class LambdaMRR(Objective):
    r"""Teach the student the teacher's order, and most of all where a swap would change the top (CL-DRD).

    .. math:: L_b = \frac{1}{|I_b|} \sum_{(i,j) \in I_b} \left|\frac{1}{r_i} - \frac{1}{r_j}\right|
              \log\left(1 + e^{-(s_{bi} - s_{bj})/\tau}\right), \qquad I_b = \{(i, j) : y_{bi} > y_{bj}\}

    with scores :math:`s_b` of the student, :math:`r` its present ranks, which are constants, and the targets
    :math:`y_b`: the teacher's scores, or the level that it puts a candidate on. ``groups: [1, 4]`` sets its
    first above the next four, and these above the rest; within a group no order is taught. Coarse groups
    first and finer ones later are the paper's curriculum: several arrows whose weights open one after the
    other. Its own groups are known to us only in outline; those of our recipe are our re-implementation.

    Needs ``scores`` [B, N] from student and teacher.

    Args:
        groups: Sizes of the groups, from the teacher's first; equals stand in the list's order. None: its
            whole order; what it ties makes no pair.
        temperature: :math:`\tau`, divides the student's scores: near 1 for logits and dot products, about
            0.05 for cosines.

    References:
        Zeng, Zamani and Vinay, 2022. Curriculum Learning for Dense Retrieval Distillation.
        arXiv:2204.13679

        Burges, 2010. From RankNet to LambdaRank to LambdaMART. MSR-TR-2010-82

    Example:
        >>> student = Outputs(scores=torch.tensor([[1.0, 1.2, 0.3]]))  # ranks 2, 1 and 3
        >>> teacher = Outputs(scores=torch.tensor([[4.0, 2.0, 1.0]]))
        >>> LambdaMRR()(student, teacher, Batch.of_scores(1, 3)).loss
        tensor([0.2312])
    """

    least_listed = 2

    def __init__(self, groups: Sequence[int] | None = None, temperature: float = 1.0):
        super().__init__(student_needs=Needs("scores"), teacher_needs=Needs("scores"))
        check_positive(temperature=temperature)
        if groups is not None and (not groups or min(groups) < 1):
            raise ValueError(f"groups must be sizes of at least 1, got {list(groups)}.")
        self.groups = groups
        self.temperature = temperature

    def count(self, batch: Batch) -> Tensor:
        return (batch.mask.sum(dim=-1) > 1).float()

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        target = said(teacher, "scores").float()
        check_shapes(teacher=target, mask=batch.mask)
        if self.groups is not None:
            target = levels(target, batch.mask, self.groups)
        return lambda_mrr(said(student, "scores"), target, batch.mask, self.temperature)
