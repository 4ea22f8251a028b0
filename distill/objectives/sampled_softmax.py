"""Contrastive learning from labels: a positive against sampled negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.batch import Batch
from distill.objectives.base import Objective
from distill.objectives.checks import check_positive, check_shapes, labels_of, said, unpadded
from distill.outputs import Needs, Outputs


def sampled_softmax(
    scores: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float = 1.0,
    draws: Tensor | None = None,
) -> Tensor:
    """Mean over a row's positives of -log softmax of each against the row's negatives: [B].

    scores [B, M], positives and negatives [B, M] bool; a negative counts ``draws`` [M] times.
    """
    check_shapes(scores=scores, positives=positives, negatives=negatives)
    logits = unpadded(scores, positives | negatives) / temperature
    rivals = logits if draws is None else logits + draws.log()
    rivals = rivals.masked_fill(~negatives, torch.finfo(rivals.dtype).min).logsumexp(dim=-1, keepdim=True)
    losses = F.softplus(rivals - logits)  # -log(e^s / (e^s + e^rivals)), for every s at once
    return losses.masked_fill(~positives, 0.0).sum(dim=-1) / positives.sum(dim=-1).clamp(min=1)


def listed_positives(batch: Batch) -> Tensor:
    """Which of the batch's P candidates a query lists as positive: [B, P] bool."""
    queries, _, candidates = batch.sizes
    positives = batch.mask.new_zeros(queries, candidates)
    row, place = (batch.mask & (labels_of(batch) > 0)).nonzero(as_tuple=True)
    positives[row, batch.index[row, place]] = True
    return positives


def known_positives(batch: Batch) -> Tensor:
    """Which of the batch's P candidates are known to be positive for a query, listed or not: [B, P] bool."""
    queries, _, candidates = batch.sizes
    positives = batch.mask.new_zeros(queries, candidates)
    known = batch.known_positives
    if known is None or candidates == 0:
        return positives
    ids, order = batch.candidate_ids.sort()
    row = torch.arange(queries, device=ids.device).repeat_interleave(known.lengths)
    place = torch.searchsorted(ids, known.values).clamp(max=candidates - 1)
    here = ids[place] == known.values
    positives[row[here], order[place[here]]] = True
    return positives


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

    Args:
        temperature: :math:`\tau`. The default suits cosines, which lie between -1 and 1. Give 1 to a model
            whose scores are logits or dot products, as a cross-encoder's are.
        in_batch: Take every candidate of the batch as a negative. False: the listed ones only, which
            is all a cross-encoder can do, and with labels of one positive first is the listwise
            (localised contrastive) loss of rerankers.

    References:
        Van den Oord, Li and Vinyals, 2018. Representation Learning with Contrastive Predictive Coding
        (InfoNCE). arXiv:1807.03748

        Karpukhin et al., 2020. Dense Passage Retrieval (in-batch negatives). arXiv:2004.04906

        Gao, Dai and Callan, 2021. Rethink Training of BERT Rerankers (listed negatives).
        arXiv:2101.08751

    Example:
        >>> batch = Batch.of_scores(1, 3)  # the first of three is the positive
        >>> listed = SampledSoftmax(temperature=1.0, in_batch=False)
        >>> listed(Outputs(scores=torch.zeros(1, 3)), None, batch).loss  # log 3: nothing known
        tensor([1.0986])
    """

    labelled = True

    def __init__(self, temperature: float = 0.05, in_batch: bool = True):
        super().__init__(student_needs=Needs("in_batch" if in_batch else "scores"))
        check_positive(temperature=temperature)
        self.temperature = temperature
        self.across = in_batch

    def count(self, batch: Batch) -> Tensor:
        positive = labels_of(batch) > 0
        counted = (batch.mask & positive).any(dim=-1)
        if not self.across:
            counted &= (batch.mask & ~positive).any(dim=-1)
        return counted.float()

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        if not self.across:
            positive = labels_of(batch) > 0
            return sampled_softmax(
                said(student, "scores"), batch.mask & positive, batch.mask & ~positive, self.temperature
            )
        positives = listed_positives(batch)
        negatives = ~(positives | known_positives(batch))
        return sampled_softmax(said(student, "in_batch"), positives, negatives, self.temperature, batch.draws)
