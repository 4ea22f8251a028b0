"""Virtual interaction: the student's missing blocks of attention by squared error."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.objectives.attention import AttentionObjective, Layers, log_map
from distill.objectives.checks import check_shapes


def attention_mse(
    student: Tensor, teacher: Tensor, rows: Tensor, columns: Tensor, official: bool = False
) -> Tensor:
    """Mean squared error of two maps, given as logits [n, H, R, C], over real rows and columns: [n].

    Args:
        rows: Which rows are real [n, R].
        columns: Which columns are [n, C].
        official: Divide by the size of the padded block, and count padded rows.
    """
    check_shapes(student=student, teacher=teacher)
    squares = (log_map(student, columns).exp() - log_map(teacher, columns).exp()).square()
    heads, height, width = student.shape[1:]
    if official:
        return squares.sum(dim=(1, 2, 3)) / (heads * height * width)
    size = heads * rows.sum(dim=1) * columns.sum(dim=1)
    return (squares.sum(dim=(1, 3)) * rows).sum(dim=1) / size.clamp(min=1)


class AttentionMSE(AttentionObjective):
    r"""Teach a bi-encoder the attention between query and candidate that it would have, read together (VIRT).

    .. math:: L = \frac1l \sum_{i=1}^{l} \mathrm{MSE}(M^S_{xy}, M^T_{xy}) + \mathrm{MSE}(M^S_{yx}, M^T_{yx}),
              \quad M_{xy} = \mathrm{softmax}_y (Q_x K_y^\top / \sqrt d)

    for each listed pair, over l layers, with queries Q and keys K of query tokens x and candidate tokens y.
    The student's come from the texts read apart; the teacher's softmax is taken inside the block, which is
    the block of its map divided by the row's sum. The mean is over heads and real tokens. Nothing of it is
    computed when the student serves.

    Needs ``query_attention`` and ``candidate_attention`` from the student, ``joint_attention`` from the
    teacher, of one tokenizer, with no prompts before the student's texts.

    Args:
        layers: ``all`` teach their likes, ``last`` alone, or which: [layer, ...] of both, or
            [[student's, teacher's], ...]. Negative ones count from the top.
        heads: ``each`` teaches its like; ``mean``: maps are averaged over heads first.
        official: Divide by the size of the padded block, up to the longest texts of the batch, as the code of
            the authors does, so that short texts weigh less. That is all: their models read padding, whose
            rows add to their loss; ours read none, and it adds nothing.
        first: Of how many listed candidates, from the first (positives come first); None: of all.

    References:
        Li et al., 2022. VIRT: Improving Representation-based Text Matching via Virtual Interaction.
        arXiv:2112.04195

    Example:
        >>> import torch
        >>> from distill.batch import Batch
        >>> from distill.outputs import Outputs
        >>> from distill.tokens import Tokens
        >>> def tokens(values, *places):  # one layer, one head of one dimension; queries are 1, keys given
        ...     values = torch.tensor([[[[[1.0]], [[key]]]] for key in values])
        ...     ends = torch.tensor([0, len(values)])
        ...     return Tokens(values, ends, torch.tensor(places), layers=(-1,))
        >>> batch = Batch.of_scores(1, 1)
        >>> query, candidate = tokens([0.0], [0]), tokens([0.0, 0.0], [0], [1])
        >>> student = Outputs(query_attention=query, candidate_attention=candidate)
        >>> teacher = Outputs(joint_attention=tokens([0.0, 9.0, -9.0], [0, -1], [-1, 0], [-1, 1]))
        >>> AttentionMSE(layers="last")(student, teacher, batch).loss  # it looks at both, the teacher at one
        tensor([0.2500])
    """

    def __init__(
        self,
        layers: Layers = "all",
        heads: Literal["each", "mean"] = "each",
        official: bool = False,
        first: int | None = None,
    ):
        super().__init__(layers, heads, official, first)

    def between(self, student: Tensor, teacher: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return attention_mse(student, teacher, rows, columns, self.official)
