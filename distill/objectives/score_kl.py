"""Listwise distillation: the KL divergence between two distributions over candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.batch import Batch
from distill.objectives.base import Objective
from distill.objectives.checks import check_positive, check_shapes, said
from distill.outputs import Needs, Outputs


def listwise_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
) -> Tensor:
    """KL(teacher || student) over each row of [B, N] scores: [B]."""
    check_shapes(student=student, teacher=teacher, mask=mask)

    def log_probs(scores: Tensor, temperature: float) -> Tensor:
        scores = scores.float() / temperature  # float32: half precision has too few digits here
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).log_softmax(dim=-1)

    log_p = log_probs(teacher, teacher_temperature or temperature)
    log_q = log_probs(student, temperature)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


class ScoreKL(Objective):
    r"""Teach the student to rank each candidate list as the teacher does.

    .. math:: L_b = \tau_t^2 \,
              \mathrm{KL}\left(\sigma(t_b/\tau_t) \,\|\, \sigma(s_b/\tau_s)\right)

    with scores :math:`s_b` of the student and :math:`t_b` of the teacher, and :math:`\sigma` the
    softmax over the N listed candidates of query b (``in_batch``: over the batch's P distinct
    candidates). The two need not agree on a zero. A list of fewer than two candidates says nothing.

    Needs ``scores`` [B, N] from student and teacher; ``in_batch`` [B, P] instead if so set.

    The factor: with one temperature it is Hinton's :math:`\tau^2`, which keeps the gradient from
    shrinking as both distributions soften (section 2 of the paper). For two temperatures the
    literature has no rule; that of the teacher is our choice. Seen from the teacher,
    :math:`\tau_t/\tau_s` only converts the student's unit, and what is left is Hinton's loss at
    :math:`\tau_t`. So a cosine student at 0.05 that hears logits at 1 has the factor 1, where the
    student's own temperature squared would leave 0.0025 of the loss.

    Args:
        temperature: :math:`\tau_s`, divides the student's scores: near 1 for logits and dot products,
            0.01 to 0.05 for cosines.
        teacher_temperature: :math:`\tau_t`, divides the teacher's; None: the same as the student's.
        in_batch: Compare over every candidate of the batch, not only those a query lists.

    References:
        Hinton, Vinyals and Dean, 2015. Distilling the Knowledge in a Neural Network.
        arXiv:1503.02531

        Tamber et al., 2025. CADET (two temperatures, a cosine student). arXiv:2502.19712

        Lin, Yang and Lin, 2020. TCT-ColBERT (in-batch). arXiv:2010.11386

    Example:
        >>> scores, batch = torch.tensor([[2.0, 0.5, -1.0]]), Batch.of_scores(1, 3)
        >>> ScoreKL()(Outputs(scores=scores), Outputs(scores=scores + 7.0), batch).loss
        tensor([0.])
    """

    def __init__(
        self, temperature: float = 1.0, teacher_temperature: float | None = None, in_batch: bool = False
    ):
        field = "in_batch" if in_batch else "scores"
        super().__init__(student_needs=Needs(field), teacher_needs=Needs(field))
        teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
        check_positive(temperature=temperature, teacher_temperature=teacher_temperature)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.across, self.least_listed = in_batch, 0 if in_batch else 2
        self.field = field

    def compared(self, batch: Batch) -> Tensor:
        """Which entries of a row are compared: [B, N] or [B, P] bool."""
        queries, _, candidates = batch.sizes
        return batch.mask.new_ones(queries, candidates) if self.across else batch.mask

    def count(self, batch: Batch) -> Tensor:
        return (self.compared(batch).sum(dim=-1) > 1).float()

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        divergence = listwise_kl(
            said(student, self.field),
            said(teacher, self.field),
            self.compared(batch),
            self.temperature,
            self.teacher_temperature,
        )
        return self.teacher_temperature**2 * divergence
