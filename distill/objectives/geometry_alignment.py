"""Distillation of geometry: which of the batch's texts are near which, seen together and seen apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.batch import Batch
from distill.objectives.base import Objective
from distill.objectives.checks import check_choice, check_positive, check_shapes, said
from distill.objectives.score_kl import listwise_kl
from distill.outputs import Needs, Outputs

Term = Literal["C|Q", "Q|C", "Q|Q", "C|C"]
TERMS: tuple[Term, ...] = ("C|Q", "Q|C", "Q|Q", "C|C")  # targets given anchors
APART = {"Q": "queries", "C": "candidates"}
TOGETHER = {"Q": "joint_queries", "C": "joint_candidates"}
LEAST = 1e-7  # of (1 + cos) / 2, before its logarithm


def log_kernel(anchors: Tensor, targets: Tensor, kernel: str) -> Tensor:
    """Logarithms of how near each of [M, D] is to each of [K, D], up to a constant: [M, K] float32."""
    with torch.autocast(anchors.device.type, enabled=False):
        cosines = F.normalize(anchors.float(), dim=-1) @ F.normalize(targets.float(), dim=-1).T
    return cosines if kernel == "softmax" else ((1.0 + cosines) / 2.0).clamp(min=LEAST).log()


class GeometryAlignment(Objective):
    r"""Teach a student that reads texts apart the geometry of a teacher that reads pairs together (ENDX).

    .. math:: L_i = \sum_{(T|A)} \mathrm{KL}\left(P^X(\cdot\,|\,a_i) \,\|\, P^D(\cdot\,|\,a_i)\right),
              \quad P(t_j | a_i) = \frac{K(a_i, t_j)^{1/\tau}}{\sum_{k \in S_i} K(a_i, t_k)^{1/\tau}}

    over the batch's matched pairs, each a query and its first listed candidate, which must be a positive
    where the data has labels. X are the vectors that a teacher made of the pair read together, D those of the
    student. The four terms take anchors a and targets t from queries (Q) and candidates (C): ``C|Q``,
    ``Q|C``, ``Q|Q``, ``C|C``. The kernel K is :math:`(1 + \cos)/2`, or :math:`e^{\cos}`.
    :math:`S_i` leaves out what would only say that a text is itself: of ``Q|Q`` the anchor and queries equal
    to it, of ``C|C`` likewise, of the other two terms targets of other pairs with an equal query or candidate
    (duplicates in the batch; of data that lists a query's text in several rows, each row is a query).

    Each term is logged under its name. Of a query that was read with its answer, the nearest candidate is
    that answer, so ``C|Q`` and ``Q|C`` tend to repeat the labels. What helps: to train the teacher with
    negatives read together too (``SampledSoftmax`` with ``in_batch: false`` on its ``scores``), a higher
    ``teacher_temperature``, and less weight on them (``terms`` in arrows of their own).

    The paper tells the idea; kernel, pooling, weights and schedule are our re-implementation.

    Needs ``queries`` [B, D] and ``candidates`` [P, D] from the student, ``joint_queries`` and
    ``joint_candidates`` [B, N, D] from the teacher (the two D may differ); two queries in a batch, better 16.

    Args:
        kernel: "cosine": :math:`(1 + \cos)/2`, that of probabilistic knowledge transfer. "softmax":
            :math:`e^{\cos}`, sharp at a temperature of 0.05 to 0.5.
        temperature: :math:`\tau` of the student.
        teacher_temperature: :math:`\tau` of the teacher; None: the same.
        terms: Which of the four.

    References:
        Wang et al., 2021. Enhancing Dual-Encoders with Question and Answer Cross-Embeddings for Answer
        Retrieval. arXiv:2206.02978

        Passalis and Tefas, 2018. Learning Deep Representations with Probabilistic Knowledge Transfer (the
        kernel). arXiv:1803.10837

    Example:
        >>> batch, vectors = Batch.of_scores(2, 1), torch.eye(2)
        >>> teacher = Outputs(joint_queries=vectors[:, None], joint_candidates=vectors[:, None])
        >>> student = Outputs(queries=vectors, candidates=vectors)
        >>> GeometryAlignment()(student, teacher, batch).loss
        tensor([0., 0.])
    """

    across = True
    least_queries = 2

    def __init__(
        self,
        kernel: Literal["cosine", "softmax"] = "cosine",
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        terms: Sequence[Term] = TERMS,
    ):
        check_choice("kernel", kernel, ("cosine", "softmax"))
        teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
        check_positive(temperature=temperature, teacher_temperature=teacher_temperature)
        if isinstance(terms, str) or not terms or set(terms) - {*TERMS}:
            raise ValueError(f"terms must be a list of {', '.join(TERMS)}, or some of them; got {terms!r}.")
        sides = [side for side in "QC" if any(side in term for term in terms)]
        super().__init__(
            student_needs=Needs(*(APART[side] for side in sides)),
            teacher_needs=Needs(*(TOGETHER[side] for side in sides)),
        )
        self.kernel, self.temperature, self.teacher_temperature = kernel, temperature, teacher_temperature
        self.terms, self.sides = tuple(term for term in TERMS if term in terms), sides

    def count(self, batch: Batch) -> Tensor:
        matched = _matched(batch)
        return (matched & (matched.sum() >= self.least_queries)).float()

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        rows = self.count(batch).nonzero()[:, 0]
        first = batch.index[rows, 0] if len(rows) else rows
        learnt, taught = dict[str, Tensor](), dict[str, Tensor]()
        for side in self.sides:
            joint = said(teacher, TOGETHER[side])
            check_shapes(**{TOGETHER[side]: joint[..., 0], "mask": batch.mask})
            taught[side] = joint[rows, 0] if len(rows) else joint.new_zeros(0, joint.shape[-1])
            learnt[side] = said(student, APART[side])[rows if side == "Q" else first]
        same = {"Q": batch.query_ids[rows, None] == batch.query_ids[rows], "C": first[:, None] == first}
        itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        parts = dict[str, Tensor]()
        for term in self.terms:
            target, anchor = term.split("|")
            mask = ~same[target] if target == anchor else ~(same["Q"] | same["C"]) | itself
            divergence = listwise_kl(
                log_kernel(learnt[anchor], learnt[target], self.kernel),
                log_kernel(taught[anchor], taught[target], self.kernel),
                mask,
                self.temperature,
                self.teacher_temperature,
            )
            parts[term] = divergence.new_zeros(len(batch.mask)).index_put((rows,), divergence)
        return parts


def _matched(batch: Batch) -> Tensor:
    """Which queries list a match first: [B] bool."""
    if not batch.mask.shape[1]:
        return batch.mask.new_zeros(len(batch.mask))
    matched = batch.mask[:, 0]
    return matched if batch.labels is None else matched & (batch.labels[:, 0] > 0)
