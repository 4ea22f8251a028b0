"""Contrastive learning from labels, where a guide says which negatives are none."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from distill.batch import Batch
from distill.objectives.base import Objective
from distill.objectives.checks import check_positive, check_shapes, said, unpadded
from distill.objectives.contrast import contrast, contrasted
from distill.objectives.sampled_softmax import sampled_softmax
from distill.outputs import Needs, Outputs


def too_near(
    guide: Tensor, positives: Tensor, negatives: Tensor, margin: float = 0.0, relative_margin: float = 0.0
) -> Tensor:
    """Which negatives a guide [B, M] scores so high that they may be positives: [B, M] bool.

    Above the row's lowest positive score s, less ``margin`` and less the share ``relative_margin`` of |s|.
    """
    check_shapes(guide=guide, positives=positives, negatives=negatives)
    guide = unpadded(guide, positives | negatives)
    lowest = F.pad(guide.masked_fill(~positives, math.inf), (0, 1), value=math.inf).amin(-1, keepdim=True)
    return negatives & (guide > lowest - margin - relative_margin * lowest.abs())


class GuidedSoftmax(Objective):
    r"""Teach a model to score a query's positives above negatives that a guide does not take for positives.

    .. math:: L_b = \frac{1}{|P_b|} \sum_{p \in P_b} -\log
              \frac{e^{s_{bp}/\tau}}{e^{s_{bp}/\tau} + \sum_{n \in N_b} k_n e^{s_{bn}/\tau}}, \qquad
              N_b = \{n : g_{bn} \le g_b - m - r |g_b|\}, \quad g_b = \min_{p \in P_b} g_{bp}

    This is ``SampledSoftmax``, which says what the symbols mean, without the negatives that the guide (the
    arrow's ``from``, with scores g) scores above the query's positive, or too near below it. A positive
    is never left out. A query whose negatives are all left out has a loss of 0. The paper also sets queries
    against queries and candidates against candidates; here a query's rivals are candidates.

    Needs ``in_batch`` [B, P] from student and guide, or ``scores`` [B, N] for the list alone; and labels.

    Args:
        temperature: :math:`\tau` of the student, as of ``SampledSoftmax``.
        in_batch: Take every candidate of the batch as a negative; False: the listed ones only, which any
            teacher of ``ScoreKL`` can guide.
        margin: m, in the guide's scores.
        relative_margin: r, a share of the guide's score of the positive: 0.05 keeps what is below 95% of it,
            0.4 what is below 60% (CADET).

    References:
        Solatorio, 2024. GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding
        Fine-tuning. arXiv:2402.16829

        Tamber et al., 2025. CADET (a reranker's listed scores as guide). arXiv:2505.19274

    Example:
        >>> import torch
        >>> batch = Batch.of_scores(1, 3)  # the first of three is the positive
        >>> guide = Outputs(scores=torch.tensor([[0.5, 0.9, 0.1]]))  # the second is a better one
        >>> objective = GuidedSoftmax(temperature=1.0, in_batch=False)
        >>> objective(Outputs(scores=torch.zeros(1, 3)), guide, batch).loss  # log 2: one rival is left
        tensor([0.6931])
    """

    labelled = True

    def __init__(
        self,
        temperature: float = 0.05,
        in_batch: bool = True,
        margin: float = 0.0,
        relative_margin: float = 0.0,
    ):
        field = "in_batch" if in_batch else "scores"
        super().__init__(student_needs=Needs(field), teacher_needs=Needs(field))
        check_positive(temperature=temperature)
        if not 0 <= margin < math.inf or not 0 <= relative_margin < 1:
            raise ValueError(
                f"margin must be 0 or more and relative_margin below 1, got {margin} and {relative_margin}."
            )
        self.temperature = temperature
        self.margin = margin
        self.relative_margin = relative_margin
        self.across, self.contrasts = in_batch, not in_batch
        self.field = field

    def count(self, batch: Batch) -> Tensor:
        return contrasted(batch, self.across)

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        positives, negatives, draws = contrast(batch, self.across)
        guide = said(teacher, self.field)
        near = too_near(guide, positives, negatives, self.margin, self.relative_margin)
        return sampled_softmax(
            said(student, self.field), positives, negatives & ~near, self.temperature, draws
        )
