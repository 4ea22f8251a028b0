"""Layer-wise distillation of scores: what a teacher's layers would say, whatever their width."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.batch import Batch
from distill.objectives.base import Objective
from distill.objectives.checks import check_positive, check_shapes, said, unpadded
from distill.objectives.score_kl import listwise_kl
from distill.outputs import Needs, Outputs


class LayerScoreKL(Objective):
    r"""Teach layers of the student to rank a list as layers of the teacher do (LEAD); our re-implementation.

    .. math:: L_b = \tau_t^2 \sum_{i=1}^{k} w_{bi} \,
              \mathrm{KL}\left(\sigma(t_b^{u_i}/\tau_t) \,\|\, \sigma(s_b^{v_i}/\tau_s)\right)
              \qquad w_b = \sigma\left(-\mathrm{NLL}(t_b^{u})/T\right)

    with scores :math:`t^l, s^l` that layer l of teacher and student would give: those of its pooled vectors.
    For each query k layers of each side are drawn, :math:`u_1 < \dots < u_k` and
    :math:`v_1 < \dots < v_k`, and a teacher's layer weighs more the more surely it finds the positive (mean
    over several; all alike where a query has none, or the data no labels). The paper draws and weighs once
    a step, we for each query, by its row and those of the candidates that it lists this time: so a step is
    the same on any number of processes, and a query whose list is always the same keeps its layers.

    Both sides are encoders that give a vector (``students.BiEncoder``); the paper's other teachers, ColBERT
    and a cross-encoder, have no scores by layer here.

    Widths and tokenizers need not agree, as scores alone are compared. Stands beside ``ScoreKL`` and a loss
    on labels, all of weight 1 in the paper.

    Needs ``layer_scores`` [B, N, L] from student and teacher.

    Args:
        layers: k; None: as many as the shallower of the two has.
        temperature: :math:`\tau_s`, divides the student's scores.
        teacher_temperature: :math:`\tau_t`, divides the teacher's; None: the same as the student's.
        evenness: T; the larger, the more alike the teacher's layers weigh.

    References:
        Sun et al., 2023. LEAD: Liberal Feature-based Distillation for Dense Retrieval. arXiv:2212.05225

    Example:
        >>> scores, batch = torch.tensor([[[0.1, 2.0], [0.3, 0.5]]]), Batch.of_scores(1, 2)
        >>> objective = LayerScoreKL()
        >>> objective.bind({"layer_scores": 2}, {"layer_scores": 2})
        >>> loss, _ = objective(Outputs(layer_scores=scores), Outputs(layer_scores=scores + 3.0), batch)
        >>> loss.abs() < 1e-6
        tensor([True])
    """

    least_listed = 2

    def __init__(
        self,
        layers: int | None = None,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        evenness: float = 10.0,
    ):
        super().__init__(student_needs=Needs("layer_scores"), teacher_needs=Needs("layer_scores"))
        teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
        check_positive(temperature=temperature, teacher_temperature=teacher_temperature, evenness=evenness)
        if layers is not None and layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}.")
        self.layers, self.temperature, self.evenness = layers, temperature, evenness
        self.teacher_temperature = teacher_temperature
        self.depths: tuple[int, int] | None = None  # of student and teacher

    def bind(self, student_sizes: dict[str, int], teacher_sizes: dict[str, int]) -> None:
        self.depths = (student_sizes["layer_scores"], teacher_sizes["layer_scores"])
        if self.layers is not None and self.layers > min(self.depths):
            raise ValueError(
                f"LayerScoreKL: layers {self.layers} are more than there are: the student has "
                f"{self.depths[0]} and the teacher {self.depths[1]}."
            )

    def count(self, batch: Batch) -> Tensor:
        return (batch.mask.sum(dim=-1) > 1).float()

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert self.depths is not None, "bind() comes before the first loss"
        k = self.layers or min(self.depths)
        sides = [said(one, "layer_scores").float() for one in (student, teacher)]
        for depth, scores in zip(self.depths, sides, strict=True):
            check_shapes(scores=scores, mask=batch.mask[..., None].expand(*batch.mask.shape, depth))
        rows = batch.query_ids + 7919 * (batch.candidate_ids[batch.index] * batch.mask).sum(dim=1)
        taught, told = (
            scores.gather(2, drawn(rows, depth, k, side)[:, None].expand(-1, scores.shape[1], -1))
            for side, (depth, scores) in enumerate(zip(self.depths, sides, strict=True))
        )
        mask = batch.mask[:, None].expand(-1, k, -1)  # [B, k, N]
        divergence = listwise_kl(
            taught.transpose(1, 2), told.transpose(1, 2), mask, self.temperature, self.teacher_temperature
        )
        with torch.no_grad():
            weights = (-self._surprise(told.transpose(1, 2), batch) / self.evenness).softmax(dim=-1)
        return self.teacher_temperature**2 * (weights * divergence).sum(dim=-1)

    def _surprise(self, scores: Tensor, batch: Batch) -> Tensor:
        """How unlikely the teacher's layers [B, k, N] find the positives: NLL [B, k]."""
        if batch.labels is None:
            return scores.new_zeros(scores.shape[:2])
        positive = (unpadded(batch.labels, batch.mask) > 0).float()[:, None]
        filled = (scores / self.teacher_temperature).masked_fill(~batch.mask[:, None], torch.finfo().min)
        nll = -(filled.log_softmax(dim=-1) * positive).sum(dim=-1)
        return nll / positive.sum(dim=-1).clamp(min=1)


def drawn(rows: Tensor, depth: int, k: int, side: int) -> Tensor:
    """Which k of ``depth`` layers are taken for each of n lists, by their numbers: [n, k], ascending."""
    layer = torch.arange(depth, device=rows.device)
    mixed = (rows[:, None] + 1) * 0x9E3779B97F4A7C1 + (layer * 2 + side + 1) * 0x5851F42D4C957F2D
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    return ((mixed ^ (mixed >> 32)) & 0x7FFFFFFF).argsort(dim=1)[:, :k].sort(dim=1).values
