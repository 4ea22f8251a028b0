"""Classification of query-candidate pairs from labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.batch import Batch
from distill.errors import DataError
from distill.objectives.base import Objective
from distill.objectives.checks import check_shapes, labels_of, said, unpadded
from distill.outputs import Needs, Outputs


def pair_cross_entropy(classes: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of logits [B, N, C] against class indices [B, N], summed over each row: [B]."""
    check_shapes(classes=classes[..., 0], labels=labels, mask=mask)
    log_q = unpadded(classes, mask[..., None]).log_softmax(dim=-1)
    targets = labels.masked_fill(~mask, 0).long()
    losses = F.nll_loss(log_q.flatten(0, 1), targets.flatten(), reduction="none").view(mask.shape)
    return losses.masked_fill(~mask, 0.0).sum(dim=-1)


class CrossEntropy(Objective):
    r"""Teach a classifier of query-candidate pairs the data's classes.

    .. math:: L_b = -\sum_{n=1}^{N} \log \sigma(z_{bn})_{y_{bn}}

    with the logits :math:`z_{bn}` of C classes, :math:`\sigma` the softmax over them, and the label
    :math:`y_{bn}`, a whole number from 0 to C - 1: entailment, paraphrase or not, a grade of relevance.
    The mean is over pairs.

    Needs ``classes`` [B, N, C] from the student, and labels.

    References:
        Nogueira and Cho, 2019. Passage Re-ranking with BERT (two classes). arXiv:1901.04085

    Example:
        >>> import torch
        >>> batch = Batch.of_scores(1, 2, labels=torch.tensor([[1.0, 0.0]]))
        >>> logits = torch.tensor([[[-9.0, 9.0], [0.0, 0.0]]])  # sure of the first pair, not of the second
        >>> CrossEntropy()(Outputs(classes=logits), None, batch).loss
        tensor([0.6931])
    """

    labelled = True

    def __init__(self) -> None:
        super().__init__(student_needs=Needs("classes"))

    def count(self, batch: Batch) -> Tensor:
        return batch.mask.sum(dim=-1).float()

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        classes, labels = said(student, "classes"), labels_of(batch)
        known = (labels >= 0) & (labels < classes.shape[-1]) & (labels == labels.round())
        wrong = batch.mask & ~known
        if wrong.any():
            row = int(wrong.any(dim=-1).nonzero()[0])
            raise DataError(
                f"CrossEntropy needs whole numbers from 0 to {classes.shape[-1] - 1} as labels, one per "
                f"class of the model, but query {int(batch.query_ids[row])} of data set '{batch.source}' has "
                f"{labels[row][wrong[row]][0].item():g}. Number the classes from 0, or give the model more."
            )
        return pair_cross_entropy(classes, labels, batch.mask)
