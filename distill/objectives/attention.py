"""What losses over attention share: who teaches which layer, and the blocks between query and candidate.

Of a pair read together, an attention map has four blocks; a model that reads the two apart has no map from
the tokens of one to those of the other, but it has queries and keys to compute one from. Both blocks are
computed here from queries and keys, one layer at a time. Next: ``attention_mse.py``, ``attention_kl.py``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.batch import Batch
from distill.errors import DataError
from distill.objectives.base import Objective
from distill.objectives.checks import check_choice, check_positive, said
from distill.outputs import Needs, Outputs
from distill.tokens import Tokens

Layers = Literal["all", "last"] | Sequence[int] | Sequence[Sequence[int]]
Blocks = tuple[
    Tensor, Tensor
]  # logits of query tokens to candidate tokens [n, H, X, Y], and back [n, H, Y, X]


class AttentionObjective(Objective):
    """A loss between the attention of a student that reads texts apart and of a teacher that reads pairs.

    Tokens are matched by their place in the cached ids; those that only one of the two has read (the end of
    a text that did not fit) and special ones are left out. Each listed pair is a term.

    Args:
        layers: ``all``: each layer teaches its like; ``last``; or which: [layer, ...] on both sides, or
            [[student's, teacher's], ...]. Negative ones count from the top.
        heads: ``each`` head teaches its like; ``mean``: maps are averaged over heads first.
        official: Average over padded rows and columns too, as the authors' code does: up to the longest
            texts of the batch, so that a short one's loss is less. Their padding is read by the model; ours
            is not, and differs by nothing.
        first: Of how many listed candidates, from the first; None: of all.
        by_tokens: The student's blocks are products of token vectors, divided by this temperature, not of
            queries and keys; the teacher's maps are averaged over heads.
    """

    def __init__(
        self, layers: Layers, heads: str, official: bool, first: int | None, by_tokens: float | None = None
    ):
        check_choice("heads", heads, ("each", "mean"))
        if first is not None and first < 1:
            raise ValueError(f"first must be at least 1, got {first}.")
        if by_tokens is not None:
            check_positive(temperature=by_tokens)
        self.pairs = _pairs_of(layers)
        what = "attention" if by_tokens is None else "tokens"
        super().__init__(
            student_needs=Needs(f"query_{what}", f"candidate_{what}"),
            teacher_needs=Needs("joint_attention", first=first),
        )
        self.heads, self.official, self.first, self.by_tokens = heads, official, first, by_tokens
        self._ask(self.pairs or ())

    def _ask(self, pairs: Sequence[tuple[int, int]]) -> None:
        student, teacher = zip(*pairs, strict=True) if pairs else ((), ())
        fields, first = self.student_needs.fields, self.first
        self.student_needs = Needs(*fields, layers=() if self.by_tokens else student)
        self.teacher_needs = Needs("joint_attention", layers=teacher, first=first)

    def bind(self, student_sizes: dict[str, int], teacher_sizes: dict[str, int]) -> None:
        """Find the layers of ``all``, and refuse layers and heads that cannot be matched."""
        name, (deep, high) = type(self).__name__, (student_sizes.get("layers", 0), teacher_sizes["layers"])
        if self.pairs is None:
            if self.by_tokens is None and deep != high:
                raise ValueError(
                    f"{name} compares all layers, but the student has {deep} and the teacher {high}. Say "
                    f"which teaches which: `layers: [[student's, teacher's], ...]`, such as "
                    f"[[{deep - 1}, {high - 1}]], or `layers: last`."
                )
            self.pairs = [(layer, layer) for layer in range(high)]
        for side, total, of in (("student", deep, 0), ("teacher", high, 1)):
            beyond = [pair[of] for pair in self.pairs if not -total <= pair[of] < total]
            if beyond and (of == 1 or self.by_tokens is None):
                raise ValueError(f"{name}: the {side} has {total} layers, and no layer {beyond[0]}.")
        heads = (student_sizes.get("heads"), teacher_sizes["heads"])
        if self.heads == "each" and self.by_tokens is None and heads[0] != heads[1]:
            raise ValueError(
                f"{name}: the student has {heads[0]} heads of attention and the teacher {heads[1]}, so they "
                f"cannot be matched one to one. Compare their averages with `heads: mean`."
            )
        self._ask(self.pairs)

    def count(self, batch: Batch) -> Tensor:
        return batch.mask[:, : self.first].sum(dim=1).float()

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert self.pairs is not None, "bind() comes before the first loss"
        what = "attention" if self.by_tokens is None else "tokens"
        query: Tokens = said(student, f"query_{what}")
        candidate: Tokens = said(student, f"candidate_{what}")
        joint: Tokens = said(teacher, "joint_attention")
        _check_rows(query, candidate, joint, batch)
        rows, places = batch.mask[:, : self.first].nonzero(as_tuple=True)
        listed = batch.index[rows, places]
        joint_rows = rows * batch.mask.shape[1] + places
        x = min(query.longest(), joint.longest(0))
        y = min(candidate.longest(), joint.longest(1))
        there = joint.select(joint_rows) if len(joint_rows) != len(joint) else joint
        masks = (
            _there(query, x)[rows] & _there(there, x, 0),
            _there(candidate, y)[listed] & _there(there, y, 1),
        )
        _check_tokens(masks, batch, rows, listed, punctuation=self.by_tokens is not None)

        def of_layers(below: int, above: int) -> Tensor:
            """The loss of each pair by one layer: [n]."""
            q, c = query, candidate
            if self.by_tokens is None:
                q, c = query.layer(below), candidate.layer(below)
            t = there.layer(above)
            taught = self._blocks(q.placed(x)[0][rows], c.placed(y)[0][listed], masks, self.by_tokens)
            told = self._blocks(t.placed(x, 0)[0], t.placed(y, 1)[0], masks)
            if self.official:  # counts rows that are not read by both; they are to say nothing
                taught, told = (
                    (_filled(one, masks[0]), _filled(two, masks[1])) for one, two in (taught, told)
                )
            return sum(
                (
                    self.between(one, two, *of)
                    for one, two, of in zip(taught, told, (masks, masks[::-1]), strict=True)
                ),
                start=torch.zeros(len(rows), device=rows.device),
            )

        with torch.autocast(batch.mask.device.type, enabled=False):
            losses = torch.zeros(len(rows), device=rows.device)
            for pair in self.pairs:  # no map outlives its layer: the backward computes it again
                again = checkpoint(of_layers, *pair, use_reentrant=False, preserve_rng_state=False)
                assert isinstance(again, Tensor)
                losses = losses + again / len(self.pairs)
        return losses.new_zeros(len(batch.mask)).index_add(0, rows, losses)

    @abstractmethod
    def between(self, student: Tensor, teacher: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The loss [n] of a block of logits [n, H, R, C] each, with masks of rows [n, R], columns [n, C]."""

    def _blocks(
        self, query: Tensor, candidate: Tensor, masks: tuple[Tensor, Tensor], by_tokens: float | None = None
    ) -> Blocks:
        """The two blocks of n pairs: query [n, X, ...] and candidate [n, Y, ...], each token's values."""
        query, candidate = query.float(), candidate.float()
        if by_tokens is not None:
            block = (query @ candidate.transpose(1, 2) / by_tokens)[:, None]
            return block, block.transpose(2, 3)
        (q_query, k_query), (q_candidate, k_candidate) = query.unbind(dim=2), candidate.unbind(dim=2)
        blocks = (
            torch.einsum("nxhd,nyhd->nhxy", q_query, k_candidate),
            torch.einsum("nyhd,nxhd->nhyx", q_candidate, k_query),
        )
        if self.heads == "each" and self.by_tokens is None:
            return blocks
        forth, back = (
            log_map(block, columns).logsumexp(dim=1, keepdim=True) - math.log(block.shape[1])
            for block, columns in zip(blocks, masks[::-1], strict=True)
        )
        return forth, back


def _filled(block: Tensor, rows: Tensor) -> Tensor:
    """Logits [n, H, R, C], alike for both models where a row [n, R] is not one that both have read."""
    return block.masked_fill(~rows[:, None, :, None], 0.0)


def log_map(logits: Tensor, columns: Tensor) -> Tensor:
    """Log-probabilities over the real columns [n, C] of each row of [n, H, R, C], in float32."""
    logits = logits.float()
    hidden = ~columns[:, None, None, :]
    return logits.masked_fill(hidden, torch.finfo(logits.dtype).min).log_softmax(dim=-1)


def _pairs_of(layers: Layers) -> list[tuple[int, int]] | None:
    """(student's, teacher's) layers; None: all."""
    if isinstance(layers, str):
        check_choice("layers", layers, ("all", "last"))
        return None if layers == "all" else [(-1, -1)]
    pairs = [[layer, layer] if isinstance(layer, int) else list(layer) for layer in layers]
    if not pairs or any(len(pair) != 2 or not all(isinstance(i, int) for i in pair) for pair in pairs):
        raise ValueError(
            f"layers must be all, last, a list of layers, or of [student's, teacher's] layers; got {layers}."
        )
    return [(pair[0], pair[1]) for pair in pairs]


def _there(tokens: Tokens, length: int, text: int = 0) -> Tensor:
    """Which of the first ``length`` ids of a text each row has a token of: [n, length]."""
    return Tokens(tokens.places[:, 0] >= -1, tokens.offsets, tokens.places).placed(length, text)[1]


def _check_rows(query: Tokens, candidate: Tokens, joint: Tokens, batch: Batch) -> None:
    found = (len(query), len(candidate), len(joint))
    if found != (len(batch.mask), len(batch.candidate_ids), batch.mask.numel()):
        raise ValueError(
            f"Shapes must match: tokens of {found[0]} queries, {found[1]} candidates, {found[2]} pairs, for "
            f"a batch of {len(batch.mask)}, {len(batch.candidate_ids)} and {[*batch.mask.shape]}."
        )


def _check_tokens(
    masks: tuple[Tensor, Tensor], batch: Batch, rows: Tensor, listed: Tensor, punctuation: bool
) -> None:
    """Refuse a pair of which no token of a side is left: it has no block."""
    for side, mask in zip(("query", "candidate"), masks, strict=True):
        if len(gone := (~mask.any(dim=1)).nonzero()[:, 0]):
            row = int(gone[0])
            raise DataError(
                f"Data set '{batch.source}': of query row {int(batch.query_ids[rows[row]])} and candidate "
                f"row {int(batch.candidate_ids[listed[row]])} (from 0) no token of the "
                f"{side} is left that student and teacher have both read. Raise max_length, or lower the "
                f"teacher's query_max_length; remove empty texts"
                + (", and those of punctuation alone." if punctuation else ".")
            )
