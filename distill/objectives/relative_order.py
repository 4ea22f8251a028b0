"""Distillation in the space of vectors: which of two texts is nearer to a third."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.batch import Batch
from distill.objectives.base import Objective
from distill.objectives.checks import Fields, check_fields, check_shapes
from distill.objectives.similarity_match import cosines, texts_in
from distill.outputs import Needs, Outputs

AT_ONCE = 2**24  # comparisons that are held, 64 MB for each tensor of them


def relative_order(student: Tensor, teacher: Tensor, margin: float, at_once: int = AT_ONCE) -> Tensor:
    """Mean hinge over the pairs of others that the teacher orders, by their likeness [R, R] to each: [R].

    Where there are more than ``at_once`` comparisons, each block of them is made again in the backward.
    """
    check_shapes(student=student, teacher=teacher)
    other = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    blocks = [one.split(max(1, at_once // max(1, len(student) ** 2))) for one in (student, teacher, other)]
    if len(blocks[0]) == 1:
        return _of_rows(student, teacher, other, margin)
    parts = [checkpoint(_of_rows, *block, margin, use_reentrant=False) for block in zip(*blocks, strict=True)]
    return torch.cat(parts)


def _of_rows(student: Tensor, teacher: Tensor, other: Tensor, margin: float) -> Tensor:
    """The same of r of the R texts: [r]."""
    nearer = (teacher[:, :, None] > teacher[:, None, :]) & other[:, :, None] & other[:, None, :]
    losses = F.relu(student[:, None, :] - student[:, :, None] + margin).masked_fill(~nearer, 0.0)
    return losses.sum(dim=(1, 2)) / nearer.sum(dim=(1, 2)).clamp(min=1)


class RelativeOrder(Objective):
    r"""Teach the student which of two texts is nearer to a third.

    .. math:: L_r = \frac{1}{|I_r|} \sum_{(j,k) \in I_r} \max\left(0,\; c^S_{rk} - c^S_{rj} + m\right),
              \qquad I_r = \{(j, k) : c^T_{rj} > c^T_{rk},\; j, k \ne r\}

    with the cosines :math:`c` of student and teacher between the R texts of the batch, as in
    ``SimilarityMatch``. Each text is a row of the loss with count 1; fewer than three say nothing. The
    paper compares the similarities of any two pairs of texts; here the pairs share a text, since only those
    are ever compared in a search, and :math:`R^3` comparisons fit where :math:`R^4` do not.

    Needs ``queries`` [B, D] and ``candidates`` [P, D], or the one of them named in ``fields``, from
    student and teacher.

    Args:
        fields: Of which texts: "queries", "candidates" or both.
        margin: m, in cosines.

    References:
        Zhang et al., 2024. Jasper and Stella: distillation of SOTA embedding models (its third loss).
        arXiv:2412.19048

    Example:
        >>> batch = Batch.of_scores(1, 2)  # three texts, on a line for the teacher
        >>> student = Outputs(queries=torch.ones(1, 2), candidates=torch.ones(2, 2))  # all the same
        >>> line = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.8, 0.6], [0.0, 1.0]])]
        >>> teacher = Outputs(queries=line[0], candidates=line[1])
        >>> RelativeOrder()(student, teacher, batch).loss
        tensor([0.0150, 0.0150, 0.0150])
    """

    across = True

    def __init__(self, fields: Fields = ("queries", "candidates"), margin: float = 0.015):
        names = check_fields(fields)
        super().__init__(student_needs=Needs(*names), teacher_needs=Needs(*names))
        if not 0 <= margin < math.inf:
            raise ValueError(f"margin must be 0 or more, and finite, got {margin}.")
        self.fields = names
        self.margin = margin

    def count(self, batch: Batch) -> Tensor:
        n = texts_in(batch, self.fields)
        return torch.full((n,), float(n > 2), device=batch.mask.device)

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return relative_order(cosines(student, self.fields), cosines(teacher, self.fields), self.margin)
