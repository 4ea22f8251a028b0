"""Cross-modal attention distillation, for text: the student's missing blocks of attention by KL."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.objectives.attention import AttentionObjective, Layers, log_map
from distill.objectives.checks import check_choice, check_shapes


def attention_kl(
    student: Tensor, teacher: Tensor, rows: Tensor, columns: Tensor, official: bool = False
) -> Tensor:
    """KL(teacher || student) of two maps, given as logits [n, H, R, C], mean over heads and real rows: [n].

    Args:
        rows: Which rows are real [n, R].
        columns: Which columns are [n, C].
        official: Count padded rows, in the sum and in the mean.
    """
    check_shapes(student=student, teacher=teacher)
    log_p, log_q = log_map(teacher, columns), log_map(student, columns)
    kl = (log_p.exp() * (log_p - log_q)).masked_fill(~columns[:, None, None, :], 0.0).sum(dim=(1, 3))
    heads, height = student.shape[1:3]
    if official:
        return kl.sum(dim=1) / (heads * height)
    return (kl * rows).sum(dim=1) / (heads * rows.sum(dim=1)).clamp(min=1)


class AttentionKL(AttentionObjective):
    r"""Teach a bi-encoder where a teacher that reads pairs looks (Distilled-DualEncoder).

    .. math:: L = \mathrm{KL}(M^T_{xy} \,\|\, M^S_{xy}) + \mathrm{KL}(M^T_{yx} \,\|\, M^S_{yx}),
              \quad M_{xy} = \mathrm{softmax}_y (Q_x K_y^\top / \sqrt d)

    for each listed pair, of the last layer, with queries Q and keys K of query tokens x and candidate
    tokens y; the mean is over heads and real tokens x, and over layers if several are asked for. The method
    was made for image and text; its text form, and ``student: tokens``, are our re-implementation.

    Needs ``joint_attention`` from the teacher; from the student ``query_attention`` and
    ``candidate_attention``, or ``query_tokens`` and ``candidate_tokens``. Of one tokenizer and no prompts.

    Args:
        layers: ``last``, ``all``, or which: [layer, ...] of both, or [[student's, teacher's], ...].
        heads: ``each`` teaches its like; ``mean``: maps are averaged over heads first, each of sum 1 over the
            other text's tokens, so a head that looks elsewhere weighs as much as one that looks there.
        official: Divide by the number of padded rows, as the authors' code does; see ``AttentionMSE``.
        first: Of how many listed candidates, from the first (positives come first); None: of all.
        student: ``attention``, or ``tokens``: its map is the softmax of its token vectors' products
            (ColBERT's, as ERNIE-Search does), and the teacher's map, of each of its ``layers`` that are
            named, is averaged over heads.
        temperature: Divides the products of ``tokens``; None: 1.

    References:
        Wang et al., 2022. Distilled Dual-Encoder Model for Vision-Language Understanding. arXiv:2112.08723

        Lu et al., 2022. ERNIE-Search: Bridging Cross-Encoder with Dual-Encoder via Self On-the-fly
        Distillation for Dense Passage Retrieval. arXiv:2205.09153

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
        >>> AttentionKL()(student, teacher, batch).loss  # log 2: it looks at both, the teacher at one
        tensor([0.6931])
    """

    def __init__(
        self,
        layers: Layers = "last",
        heads: Literal["each", "mean"] = "each",
        official: bool = False,
        first: int | None = None,
        student: Literal["attention", "tokens"] = "attention",
        temperature: float | None = None,
    ):
        check_choice("student", student, ("attention", "tokens"))
        if student != "tokens" and temperature is not None:
            raise ValueError(
                "temperature divides the products of `student: tokens`, and is nothing without it."
            )
        if student == "tokens" and heads != "each":
            raise ValueError("heads: for `student: tokens` the teacher's are averaged anyway; leave it out.")
        named = () if isinstance(layers, str) else layers
        if student == "tokens" and not all(isinstance(layer, int) for layer in named):
            raise ValueError(
                f"layers: `student: tokens` has one map and no layers, so name the teacher's alone, as [-1]; "
                f"got {layers}."
            )
        by_tokens = (1.0 if temperature is None else temperature) if student == "tokens" else None
        super().__init__(layers, heads, official, first, by_tokens)

    def between(self, student: Tensor, teacher: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return attention_kl(student, teacher, rows, columns, self.official)
