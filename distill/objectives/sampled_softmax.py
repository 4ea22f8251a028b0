"""Contrastive learning from labels: a positive against sampled negatives."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.batch import Batch
from distill.errors import DataError
from distill.objectives.base import Objective
from distill.objectives.checks import check_choice, check_positive, check_shapes, said, unpadded
from distill.objectives.contrast import contrast, contrasted
from distill.outputs import Needs, Outputs

Correction = Literal["none", "all", "negatives", "refined"]


def sampled_softmax(
    scores: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float = 1.0,
    draws: Tensor | None = None,
    log_q: Tensor | None = None,
    correction: Correction = "all",
) -> Tensor:
    """Mean over a row's positives of -log softmax of each against the row's negatives: [B].

    scores [B, M], positives and negatives [B, M] bool; a negative counts ``draws`` [M] times. ``log_q``
    [M] or [B, M]: log of the probability that each was sampled by, which ``correction`` takes out.
    """
    check_shapes(scores=scores, positives=positives, negatives=negatives)
    logits = unpadded(scores, positives | negatives) / temperature
    corrected = logits if log_q is None else logits - log_q
    rivals = corrected if draws is None else corrected + draws.log()
    rivals = rivals.masked_fill(~negatives, torch.finfo(rivals.dtype).min).logsumexp(dim=-1, keepdim=True)
    if log_q is None or correction != "refined":
        right = corrected if correction == "all" else logits
        losses = F.softplus(rivals - right)  # -log(e^s / (e^s + e^rivals)), for every s at once
    else:
        rivals = rivals + (-log_q.expm1()).clamp(min=1e-6).log()  # q of a negative, given who is positive
        n = negatives.sum(dim=-1) if draws is None else (negatives * draws).sum(dim=-1)
        weights = (rivals - n.clamp(min=1).log()[:, None] - logits).sigmoid().detach()
        losses = weights * (rivals - logits)
    return losses.masked_fill(~positives, 0.0).sum(dim=-1) / positives.sum(dim=-1).clamp(min=1)


class SampledSoftmax(Objective):
    r"""Teach a model to score a query's positives above sampled negatives (InfoNCE).

    .. math:: L_b = \frac{1}{|P_b|} \sum_{p \in P_b} -\log
              \frac{e^{s_{bp}/\tau}}{e^{s_{bp}/\tau} + \sum_{n \in N_b} k_n e^{s_{bn}/\tau}}

    with the candidates :math:`P_b` that query b lists with a label above 0 and the negatives
    :math:`N_b`: the other candidates b lists, and with ``in_batch`` every other candidate of the batch.
    Another positive of b is never a negative, nor is a candidate among the query's known positives,
    by id and by text, since equal texts have one id. A batch holds each candidate once;
    :math:`k_n`, how often it was drawn, keeps the loss what it would be with the copies
    (``in_batch``; within one list :math:`k_n = 1`). A query without a positive says nothing, nor does
    a list without a negative.

    Needs ``in_batch`` [B, P] from the student, or ``scores`` [B, N] for the list alone; and labels.

    Candidates that come often, as positives of other queries do, are negatives often, and their scores fall
    with their popularity. Where a source says by which probability :math:`q_j` it sampled each candidate
    (``Batch.log_q``), ``log_q`` takes that out, after the temperature, in training only: "all" puts
    :math:`s/\tau - \log q` in place of every :math:`s/\tau` (Yi et al.); "negatives" in place of the
    negatives' only, as the positive was not sampled (mixed negative sampling); "refined" also takes the
    negatives' probabilities given the positive p, :math:`q'_{n} = q_n / (1 - q_p)`, and weighs what
    has to be learnt yet, with :math:`\mathrm{sg}` for no gradient and n negatives in all:

    .. math:: L_{bp} = \mathrm{sg}\left[1 - \sigma\left(s_{bp}/\tau,\; s_{bn}/\tau - \log q'_n - \log n
              \right)_p\right]
              \left(-s_{bp}/\tau + \log \sum_{n \in N_b} k_n e^{s_{bn}/\tau - \log q'_n}\right)

    It can fall below 0, and wants shares that sum to 1: not the chance that a batch holds a candidate.

    Args:
        temperature: :math:`\tau`. The default suits cosines, which lie between -1 and 1. Give 1 to a model
            whose scores are logits or dot products, as a cross-encoder's are.
        in_batch: Take every candidate of the batch as a negative. False: the listed ones only, which
            is all a cross-encoder can do, and with labels of one positive first is the listwise
            (localised contrastive) loss of rerankers.
        log_q: Whose sampling probability is taken out: none, all, negatives or refined.

    References:
        Van den Oord, Li and Vinyals, 2018. Representation Learning with Contrastive Predictive Coding
        (InfoNCE). arXiv:1807.03748

        Karpukhin et al., 2020. Dense Passage Retrieval (in-batch negatives). arXiv:2004.04906

        Gao, Dai and Callan, 2021. Rethink Training of BERT Rerankers (listed negatives).
        arXiv:2101.08751

        Yi et al., 2019. Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations
        (all). RecSys 2019

        Yang et al., 2020. Mixed Negative Sampling for Learning Two-tower Neural Networks in
        Recommendations (negatives). WWW 2020 Companion

        Khrylchenko et al., 2025. Correcting the LogQ Correction (refined; its rule as in the authors'
        code). RecSys 2025

    Example:
        >>> batch = Batch.of_scores(1, 3)  # the first of three is the positive
        >>> listed = SampledSoftmax(temperature=1.0, in_batch=False)
        >>> listed(Outputs(scores=torch.zeros(1, 3)), None, batch).loss  # log 3: nothing known
        tensor([1.0986])
    """

    labelled = True

    def __init__(self, temperature: float = 0.05, in_batch: bool = True, log_q: Correction = "none"):
        field = "in_batch" if in_batch else "scores"
        super().__init__(student_needs=Needs(field))
        check_positive(temperature=temperature)
        check_choice("log_q", log_q, ("none", "all", "negatives", "refined"))
        self.temperature = temperature
        self.correction, self.corrects = log_q, log_q != "none"
        self.across, self.contrasts = in_batch, not in_batch
        self.field = field

    def count(self, batch: Batch) -> Tensor:
        return contrasted(batch, self.across)

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        positives, negatives, draws = contrast(batch, self.across)
        return sampled_softmax(
            said(student, self.field),
            positives,
            negatives,
            self.temperature,
            draws,
            self._log_q(batch),
            self.correction,
        )

    def _log_q(self, batch: Batch) -> Tensor | None:
        """Of each candidate [P], or of each that is listed [B, N]; None: nothing is corrected."""
        if self.correction == "none":
            return None
        if batch.log_q is None:
            raise DataError(
                f"SampledSoftmax corrects by log_q ({self.correction}), but data set '{batch.source}' does "
                f"not say how likely it draws a candidate. Give it samplers that do, or leave out log_q."
            )
        log_q = batch.log_q.float()
        if (wrong := ~(log_q <= 0) | log_q.isinf()).any():  # NaN is wrong too
            row = int(wrong.nonzero()[0])
            raise DataError(
                f"the sampling probability of candidate {int(batch.candidate_ids[row])} of data set "
                f"'{batch.source}' is exp({log_q[row].item():g}); it must be above 0 and at most 1."
            )
        if self.across:
            return log_q
        return log_q[batch.index] if len(log_q) else log_q.new_zeros(batch.mask.shape)
