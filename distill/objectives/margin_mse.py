"""Pairwise distillation: the teacher's margins between candidates."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.batch import Batch
from distill.objectives.base import Objective
from distill.objectives.checks import check_choice, check_positive, check_shapes, said, unpadded
from distill.objectives.contrast import contrast, margins
from distill.outputs import Needs, Outputs


def margin_mse(student: Tensor, teacher: Tensor, first: Tensor, second: Tensor, scale: float = 1.0) -> Tensor:
    """Mean squared difference of margins over each row's pairs: [B].

    student and teacher [B, M]; a pair (i, j) has i in ``first`` and j in ``second``, both [B, M] bool.
    """
    check_shapes(student=student, teacher=teacher, first=first, second=second)
    mask = first | second
    off = scale * unpadded(student, mask) - unpadded(teacher, mask)
    apart, pairs, _ = margins(off, first, second)  # (s_i - s_j) - (t_i - t_j)
    return apart.square().masked_fill(~pairs, 0.0).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


class MarginMSE(Objective):
    r"""Teach the student by how much the teacher prefers one candidate to another.

    .. math:: L_b = \frac{1}{|I_b|} \sum_{(i,j) \in I_b}
              \left(a (s_{bi} - s_{bj}) - (t_{bi} - t_{bj})\right)^2

    with scores :math:`s_b` of the student and :math:`t_b` of the teacher, and the pairs :math:`I_b`:
    each positive with each negative of the list (``in_batch``: with every candidate of the batch that is
    not known to be relevant), or all :math:`N^2` (a candidate with itself counts, at 0). The two need not
    agree on a zero but on a scale: the student must be able to reach the teacher's margins, as a dot
    product can and a cosine cannot without a scale.

    Needs ``scores`` [B, N] from student and teacher, or ``in_batch`` [B, P]; labels for positive pairs.

    Args:
        pairs: "positive": (positive, negative) by the labels, a label above 0 being positive, as in the
            paper. "all": every pair of the list, which needs no labels (Zeng et al.).
        scale: :math:`a`, multiplies the student's margins: about 20 for a cosine student and a
            teacher of logits.
        in_batch: Compare the margins to every candidate of the batch, not only those a query lists: for a
            teacher that is cheap enough to be asked about them.

    References:
        Hofstätter et al., 2020. Improving Efficient Neural Ranking Models with Cross-Architecture
        Knowledge Distillation. arXiv:2010.02666

        Zeng, Zamani and Vinay, 2022. Curriculum Learning for Dense Retrieval Distillation.
        arXiv:2204.13679

        Hofstätter et al., 2021. Efficiently Teaching an Effective Dense Retriever with Balanced Topic
        Aware Sampling (in_batch, at weight 0.75 beside listed pairs). arXiv:2104.06967

    Example:
        >>> import torch
        >>> batch = Batch.of_scores(1, 3)  # the first of three is the positive
        >>> student = Outputs(scores=torch.tensor([[20.0, 18.5, 18.0]]))
        >>> teacher = Outputs(scores=torch.tensor([[4.0, 2.0, 1.0]]))
        >>> MarginMSE()(student, teacher, batch).loss  # margins 1.5 and 2, where 2 and 3 were taught
        tensor([0.6250])
    """

    def __init__(
        self, pairs: Literal["positive", "all"] = "positive", scale: float = 1.0, in_batch: bool = False
    ):
        field = "in_batch" if in_batch else "scores"
        super().__init__(student_needs=Needs(field), teacher_needs=Needs(field))
        check_choice("pairs", pairs, ("positive", "all"))
        check_positive(scale=scale)
        self.labelled = pairs == "positive"
        self.contrasts = self.labelled and not in_batch
        self.scale = scale
        self.across, self.least_listed = in_batch, 0 if in_batch else 2
        self.field = field

    def sides(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Who may stand first and who second in a pair: two [B, N] or [B, P] bool."""
        if self.labelled:
            first, second, _ = contrast(batch, self.across)
            return first, second
        queries, _, candidates = batch.sizes
        listed = batch.mask.new_ones(queries, candidates) if self.across else batch.mask
        return listed, listed

    def count(self, batch: Batch) -> Tensor:
        first, second = self.sides(batch)
        if not self.labelled:
            return (first.sum(dim=-1) > 1).float()  # a candidate alone has no margin
        return (first.any(dim=-1) & second.any(dim=-1)).float()

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        scores, taught = said(student, self.field), said(teacher, self.field)
        return margin_mse(scores, taught, *self.sides(batch), scale=self.scale)
