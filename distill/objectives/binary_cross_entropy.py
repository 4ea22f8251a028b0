"""Pointwise learning from labels: is this candidate relevant to this query?"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.batch import Batch
from distill.errors import DataError
from distill.objectives.base import Objective
from distill.objectives.checks import check_shapes, labels_of, said, unpadded
from distill.outputs import Needs, Outputs


def pointwise_bce(scores: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy of logits [B, N] against targets in [0, 1], summed over each row: [B]."""
    check_shapes(scores=scores, targets=targets, mask=mask)
    losses = F.binary_cross_entropy_with_logits(
        unpadded(scores, mask), unpadded(targets, mask), reduction="none"
    )
    return losses.masked_fill(~mask, 0.0).sum(dim=-1)


class BinaryCrossEntropy(Objective):
    r"""Teach a model the data's labels, or a teacher's probabilities, one query-candidate pair at a time.

    .. math:: L_b = -\sum_{n=1}^{N} y_{bn} \log \varsigma(s_{bn})
              + (1 - y_{bn}) \log (1 - \varsigma(s_{bn}))

    with the score :math:`s_{bn}` read as a logit, :math:`\varsigma` the logistic function and the
    label :math:`y_{bn}` in [0, 1]. On an arrow with a teacher (``from:``) its probability
    :math:`y_{bn} = \varsigma(t_{bn})` stands for the label: the soft labels of privileged features
    distillation, and ``PointwiseScore(loss="bce")`` without a scale. The mean is over pairs, so a longer
    list weighs more. Scores learned so are calibrated but flat within a list; a teacher for a listwise
    student is better trained with ``SampledSoftmax``.

    Needs ``scores`` [B, N] from the student, and labels; or ``scores`` [B, N] of a teacher.

    References:
        Nogueira and Cho, 2019. Passage Re-ranking with BERT (here with one logit). arXiv:1901.04085

        Xu et al., 2020. Privileged Features Distillation at Taobao Recommendations (soft labels).
        arXiv:1907.05171

    Example:
        >>> import torch
        >>> batch = Batch.of_scores(1, 2, labels=torch.tensor([[1.0, 0.0]]))
        >>> loss, count = BinaryCrossEntropy()(Outputs(scores=torch.zeros(1, 2)), None, batch)
        >>> loss / count  # log 2: nothing known
        tensor([0.6931])
    """

    labelled = contrasts = True

    def __init__(self) -> None:
        super().__init__(student_needs=Needs("scores"))

    def hear(self) -> None:
        self.teacher_needs, self.labelled, self.contrasts = Needs("scores"), False, False

    def count(self, batch: Batch) -> Tensor:
        return batch.mask.sum(dim=-1).float()

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        scores = said(student, "scores")
        if not self.labelled:
            return pointwise_bce(scores, said(teacher, "scores").float().sigmoid(), batch.mask)
        labels = labels_of(batch)
        wrong = batch.mask & ~((labels >= 0) & (labels <= 1))  # NaN is wrong too
        if wrong.any():
            row, place = wrong.nonzero()[0].tolist()
            raise DataError(
                f"BinaryCrossEntropy needs labels from 0 to 1, but query {int(batch.query_ids[row])} of data "
                f"set '{batch.source}' has {labels[row, place].item():g} for candidate "
                f"{int(batch.candidate_ids[batch.index[row, place]])} (rows of its tables). Rescale them."
            )
        return pointwise_bce(scores, labels, batch.mask)
