"""Classification of query-candidate pairs, from labels or a teacher's soft ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.batch import Batch
from distill.errors import DataError
from distill.objectives.base import Objective
from distill.objectives.checks import check_positive, check_shapes, labels_of, said, unpadded
from distill.outputs import Needs, Outputs


def pair_cross_entropy(classes: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of logits [B, N, C] against class indices [B, N], summed over each row: [B]."""
    check_shapes(classes=classes[..., 0], labels=labels, mask=mask)
    log_q = unpadded(classes, mask[..., None]).log_softmax(dim=-1)
    targets = labels.masked_fill(~mask, 0).long()
    losses = F.nll_loss(log_q.flatten(0, 1), targets.flatten(), reduction="none").view(mask.shape)
    return losses.masked_fill(~mask, 0.0).sum(dim=-1)


def pair_class_kl(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of each pair's classes, from logits [B, N, C], summed over each row: [B]."""
    check_shapes(student=student, teacher=teacher)
    log_p, log_q = (
        (unpadded(logits, mask[..., None]) / temperature).log_softmax(dim=-1) for logits in (teacher, student)
    )
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).masked_fill(~mask, 0.0).sum(dim=-1)


class CrossEntropy(Objective):
    r"""Teach a classifier of query-candidate pairs the data's classes, or a teacher's soft labels.

    .. math:: L_b = -\sum_{n=1}^{N} \log \sigma(z_{bn})_{y_{bn}} \quad\text{or}\quad
              L_b = \tau^2 \sum_{n=1}^{N}
              \mathrm{KL}\left(\sigma(t_{bn}/\tau) \,\|\, \sigma(z_{bn}/\tau)\right)

    with the logits :math:`z_{bn}` of C classes, :math:`\sigma` the softmax over them, and the label
    :math:`y_{bn}`, a whole number from 0 to C - 1: entailment, paraphrase or not, a grade of relevance. On
    an arrow with a teacher (``from:``) its logits :math:`t_{bn}` stand for the label, and what is left of
    the cross-entropy less the teacher's own entropy is the divergence. The mean is over pairs.

    Needs ``classes`` [B, N, C] from the student, and labels; or ``classes`` [B, N, C] of a teacher.

    Args:
        temperature: :math:`\tau`, of soft labels only.

    References:
        Nogueira and Cho, 2019. Passage Re-ranking with BERT (two classes). arXiv:1901.04085

        Hinton, Vinyals and Dean, 2015. Distilling the Knowledge in a Neural Network. arXiv:1503.02531

        Wang et al., 2022. Distilled Dual-Encoder Model for Vision-Language Understanding (its soft labels,
        at temperature 1). arXiv:2112.08723

    Example:
        >>> import torch
        >>> batch = Batch.of_scores(1, 2, labels=torch.tensor([[1.0, 0.0]]))
        >>> logits = torch.tensor([[[-9.0, 9.0], [0.0, 0.0]]])  # sure of the first pair, not of the second
        >>> CrossEntropy()(Outputs(classes=logits), None, batch).loss
        tensor([0.6931])
    """

    labelled = True

    def __init__(self, temperature: float | None = None):
        super().__init__(student_needs=Needs("classes"))
        check_positive(temperature=1.0 if temperature is None else temperature)
        self.temperature = temperature

    def hear(self) -> None:
        self.teacher_needs, self.labelled = Needs("classes"), False

    def bind(self, student_sizes: dict[str, int], teacher_sizes: dict[str, int]) -> None:
        if self.labelled and self.temperature is not None:
            raise ValueError("CrossEntropy: a temperature does nothing to labels; leave it out.")
        sizes = (student_sizes.get("classes"), teacher_sizes.get("classes"))
        if None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                f"CrossEntropy: the student tells {sizes[0]} classes apart and the teacher {sizes[1]}; give "
                f"both the same `classes`."
            )

    def count(self, batch: Batch) -> Tensor:
        return batch.mask.sum(dim=-1).float()

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        classes = said(student, "classes")
        if not self.labelled:
            tau = 1.0 if self.temperature is None else self.temperature
            return tau**2 * pair_class_kl(classes, said(teacher, "classes"), batch.mask, tau)
        labels = labels_of(batch)
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
