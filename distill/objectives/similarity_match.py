"""Distillation in the space of vectors: how alike texts are to each other, whatever the vectors' sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.batch import Batch
from distill.objectives.base import Objective
from distill.objectives.checks import Fields, check_fields, check_shapes, said
from distill.outputs import Needs, Outputs


def cosines(outputs: Outputs | None, fields: Sequence[str]) -> Tensor:
    """The cosine of each two of all R texts of these fields, one field after the other: [R, R] float32."""
    vectors = [said(outputs, name).float() for name in fields]
    check_shapes(**{name: part[:0] for name, part in zip(fields, vectors, strict=True)})  # of one size
    texts = F.normalize(torch.cat(vectors), dim=-1)
    with torch.autocast(texts.device.type, enabled=False):
        return texts @ texts.T


def texts_in(batch: Batch, fields: Sequence[str]) -> int:
    """R, how many texts these fields are of."""
    queries, _, candidates = batch.sizes
    return sum({"queries": queries, "candidates": candidates}[name] for name in fields)


def similarity_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the similarities [R, R] of each text to all: [R]."""
    check_shapes(student=student, teacher=teacher)
    return (student - teacher).square().sum(dim=-1) / max(1, len(student))


class SimilarityMatch(Objective):
    r"""Teach the student to find two texts as alike as the teacher does, each two of the batch.

    .. math:: L_r = \frac{1}{R} \sum_{j=1}^{R} \left(\cos(e^S_r, e^S_j) - \cos(e^T_r, e^T_j)\right)^2

    with the vectors :math:`e^S` of the student and :math:`e^T` of the teacher for the R texts of the batch:
    its queries, then its distinct candidates. Each text is a row of the loss with count 1. The vectors of the
    two may differ in size, and no labels are read. The student is free to turn its space: where it should
    search an index that its teacher built, match vectors too (``EmbeddingMatch``).

    Needs ``queries`` [B, D] and ``candidates`` [P, D], or the one of them named in ``fields``, from
    student and teacher.

    Args:
        fields: Of which texts: "queries", "candidates" or both.

    References:
        Zhang et al., 2024. Jasper and Stella: distillation of SOTA embedding models (its second loss; at
        weight 200, beside cosines at 10 and ``RelativeOrder`` at 20). arXiv:2412.19048

    Example:
        >>> batch = Batch.of_scores(1, 1)
        >>> alike = Outputs(queries=torch.tensor([[1.0, 0.0]]), candidates=torch.tensor([[1.0, 0.0]]))
        >>> apart = Outputs(queries=torch.tensor([[1.0]]), candidates=torch.tensor([[-1.0]]))
        >>> SimilarityMatch()(alike, apart, batch).loss  # 1 where -1 is taught, and each text with itself
        tensor([2., 2.])
    """

    across = True

    def __init__(self, fields: Fields = ("queries", "candidates")):
        names = check_fields(fields)
        super().__init__(student_needs=Needs(*names), teacher_needs=Needs(*names))
        self.fields = names

    def count(self, batch: Batch) -> Tensor:
        n = texts_in(batch, self.fields)
        return torch.full((n,), float(n > 1), device=batch.mask.device)  # a text alone is like no other

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        losses = similarity_mse(cosines(student, self.fields), cosines(teacher, self.fields))
        return losses * self.count(batch)
