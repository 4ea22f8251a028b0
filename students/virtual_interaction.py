"""The student of virtual interaction: texts read apart, whose last layers then attend to each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.batch import Batch
from distill.errors import DataError
from distill.hub import load_heads, local_folder, read_own, resolve_checkpoint
from distill.nn.precision import Precision, serving_autocast
from distill.nn.text_encoder import in_slices
from distill.outputs import Needs, Outputs
from students.bi_encoder import BiEncoder
from students.over_texts import OverTexts

OPENS = "students.VirtualInteraction"
READ = ("query_tokens", "candidate_tokens")
HEARD = ("query_attention", "candidate_attention")
AT_ONCE = 256  # pairs that are compared at a time, where nothing is learnt


def interact(
    queries: tuple[Tensor, Tensor], candidates: tuple[Tensor, Tensor], masks: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """What the tokens of n pairs of texts read of each other's last layer: [n, X, D], [n, Y, D].

    Args:
        queries: Hidden states U [n, X, D], queries and keys of attention [n, X, 2, H, d], queries scaled.
        candidates: The same of the candidates: V [n, Y, D], [n, Y, 2, H, d].
        masks: Which tokens are real: [n, X], [n, Y].
    """
    (u, attention_u), (v, attention_v) = queries, candidates

    def read(asking: Tensor, asked: Tensor, values: Tensor, real: Tensor) -> Tensor:
        logits = torch.einsum("nxhd,nyhd->nhxy", asking[:, :, 0], asked[:, :, 1])
        logits = logits.masked_fill(~real[:, None, None], torch.finfo(logits.dtype).min)
        slices = values.unflatten(-1, (logits.shape[1], -1))  # each head weighs its own part of the vectors
        return torch.einsum("nhxy,nyhe->nxhe", logits.softmax(dim=-1), slices).flatten(2)

    return read(attention_u, attention_v, v, masks[1]), read(attention_v, attention_u, u, masks[0])


def fused(u: Tensor, v: Tensor, square: bool = True) -> Tensor:
    """What the classifier reads of two vectors [n, D] each: [n, 4 D]."""
    largest = torch.maximum(u, v)
    return torch.cat([u, v, (u - v).abs(), largest.square() if square else largest], dim=-1)


class VirtualInteraction(OverTexts):
    r"""Reads two texts apart and lets their last layers attend to each other afterwards (VIRT-adapted).

    .. math:: \tilde U = M_{xy} V, \quad \tilde V = M_{yx} U, \quad
              M_{xy} = \mathrm{softmax}_y (Q_x K_y^\top / \sqrt d)

    with the last layer's hidden states U, V and its queries and keys Q, K of query tokens x and candidate
    tokens y, without special tokens, each head on its part of the vectors. A linear layer reads
    :math:`[u; v; |u - v|; \max(u, v)^2]`, with u and v the means of :math:`\tilde U` and
    :math:`\tilde V`. The maps are those that ``AttentionMSE`` teaches. What is computed of a text does not
    depend on the other, so it can be kept; but that is every token's vector and attention, and no index
    searches by it.

    This form of the interaction is our re-implementation: the paper's code for it was not read.

    Provides ``scores`` [B, N] with one or two classes, ``classes`` [B, N, C] with two or more, and all that
    a :class:`students.BiEncoder` says of texts: vectors, tokens, attention.

    Args:
        checkpoint: Of the encoder; see :class:`students.BiEncoder`.
        classes: C; 1 is a relevance score. None: what the checkpoint was trained with, else 1.
        interaction: False leaves out the maps: u and v are the means of U and V, the siamese baseline.
        residual: Add U and V to what they read.
        square: The maximum of u and v squared, as in the paper's code.
        layers: Keep the first n, or these, layers of the checkpoint.
        max_length: Ids of a candidate with its special ones; None takes the checkpoint's.
        query_max_length: Ids of a query; None is ``max_length``.
        query_prompt: Put before each query; None takes the checkpoint's.
        candidate_prompt: Put before each candidate; None takes the checkpoint's.
        dropout: Of the transformer's layers, and before the classifier, while it is trained; None keeps the
            checkpoint's, and 0.1.
        chunk_tokens: See :class:`distill.nn.text_encoder.TextEncoder`.
        precision: Of scoring outside training: ``auto``, ``no`` (float32), ``bf16``.

    References:
        Li et al., 2022. VIRT: Improving Representation-based Text Matching via Virtual Interaction.
        arXiv:2112.04195
    """

    opens = OPENS

    def __init__(
        self,
        checkpoint: str | Path,
        classes: int | None = None,
        interaction: bool | None = None,
        residual: bool | None = None,
        square: bool | None = None,
        layers: int | Sequence[int] | None = None,
        max_length: int | None = None,
        query_max_length: int | None = None,
        query_prompt: str | None = None,
        candidate_prompt: str | None = None,
        dropout: float | None = None,
        chunk_tokens: int | None = None,
        precision: Precision = "auto",
    ):
        super().__init__()
        folder = local_folder(resolve_checkpoint(checkpoint))
        own = read_own(folder, OPENS)
        given = {"classes": classes, "interaction": interaction, "residual": residual, "square": square}
        settings = {"classes": 1, "interaction": True, "residual": False, "square": True} | own
        for name, value in given.items():
            if own and value not in (None, own[name]):
                raise ValueError(f"{name}: {value}, but the checkpoint was trained with {own[name]}.")
            settings[name] = settings[name] if value is None else value
        self.classes: int = settings["classes"]
        if self.classes < 1:
            raise ValueError(f"classes must be at least 1, got {self.classes}.")
        self.interaction, self.residual, self.square = (
            bool(settings[name]) for name in ("interaction", "residual", "square")
        )
        if self.residual and not self.interaction:
            raise ValueError(
                "residual adds U and V to what they read: with `interaction: false` there is nothing."
            )
        self.texts = BiEncoder(
            checkpoint,
            layers=layers,
            max_length=max_length,
            query_max_length=query_max_length,
            query_prompt=query_prompt,
            candidate_prompt=candidate_prompt,
            dropout=dropout,
            chunk_tokens=chunk_tokens,
            precision=precision,
        )
        size, heads = self.texts.sizes["query_tokens"], self.texts.sizes.get("heads", 0)
        if self.interaction and (not heads or size % heads):
            raise ValueError(
                f"the attention of this checkpoint ({heads} heads over {size} dimensions) cannot be listened "
                f"to or shared out by heads; take another, or `interaction: false`."
            )
        self.heads = nn.ModuleDict({"classifier": nn.Linear(4 * size, self.classes)})
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.checkpoint, self.precision = str(checkpoint), precision
        if own:
            load_heads(folder, self.heads)
        self.eval()

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("classes", "interaction", "residual", "square")}

    @property
    def provides(self) -> frozenset[str]:
        said = {1: {"scores"}, 2: {"scores", "classes"}}.get(self.classes, {"classes"})
        return (self.texts.provides - {"scores", "in_batch", "layer_scores"}) | said

    @property
    def sizes(self) -> dict[str, int]:
        return self.texts.sizes | ({"classes": self.classes} if self.classes > 1 else {})

    def represents(self, needs: Needs) -> Needs:
        apart = needs.only(needs.fields - {"scores", "classes"})
        if apart.fields == needs.fields:
            return apart
        return apart | (Needs(*READ, *HEARD, layers=[-1]) if self.interaction else Needs(*READ))

    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        return self.texts.represent(batch, self.represents(needs))

    def compare(self, outputs: Outputs, batch: Batch, needs: Needs) -> Outputs:
        if not needs.fields & {"scores", "classes"}:
            return outputs
        rows, places = batch.mask.nonzero(as_tuple=True)
        logits = self._logits(outputs, batch, rows, batch.index[rows, places])
        if "classes" in needs:
            outputs = outputs.with_(classes=batch.spread(logits))
        if "scores" in needs:
            outputs = outputs.with_(scores=batch.spread(self._scores(logits)))
        return outputs

    def _logits(self, said: Outputs, batch: Batch, queries: Tensor, candidates: Tensor) -> Tensor:
        """Logits [n, C] of n pairs, given as rows of the batch's queries [n] and candidates [n]."""
        u, real_u = self._placed(said, batch, 0, queries)
        v, real_v = self._placed(said, batch, 1, candidates)
        read_u, read_v = u[0], v[0]
        if self.interaction:
            read_u, read_v = interact((u[0], u[1]), (v[0], v[1]), (real_u, real_v))
            if self.residual:
                read_u, read_v = u[0] + read_u, v[0] + read_v
        u_mean, v_mean = (
            (tokens * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
            for tokens, real in ((read_u, real_u), (read_v, real_v))
        )
        return self.heads["classifier"](self.dropout(fused(u_mean, v_mean, self.square)))

    def _placed(self, said: Outputs, batch: Batch, side: int, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        """Hidden states [n, T, D], attention [n, T, 2, H, d] of rows of a side; which tokens are real."""
        tokens = getattr(said, READ[side]).select(rows)
        length = tokens.longest()
        hidden, real = tokens.placed(length)
        if len(empty := (~real.any(dim=1)).nonzero()[:, 0]):
            where = f"data set '{batch.source}': " if batch.source else ""
            which = int((batch.query_ids, batch.candidate_ids)[side][rows[empty[0]]])
            raise DataError(
                f"{where}{('query', 'candidate')[side]} row {which} (from 0) has no "
                f"token, so there is nothing to attend to. Remove empty texts."
            )
        if not self.interaction:
            return [hidden.float()], real
        heard = getattr(said, HEARD[side]).layer(-1).select(rows).placed(length)[0]
        return [hidden.float(), heard.float()], real

    def _scores(self, classes: Tensor) -> Tensor:
        return classes[..., 0] if self.classes == 1 else classes.log_softmax(dim=-1)[..., 1]

    @torch.no_grad()
    def score_pairs(
        self, queries: Sequence[str], candidates: Sequence[str], progress: bool = False
    ) -> Tensor:
        """Scores [n] float32 on the CPU, of n raw pairs (classes [n, C] from three classes on).

        Of 4,096 pairs each distinct text is read once.
        """
        scores = []
        learning, _ = self.training, self.eval()
        for part in in_slices(len(queries), 4096, progress, "pairs"):
            (first, q), (second, c) = (_distinct(texts[part]) for texts in (queries, candidates))
            batch = self.texts.batch_of(first, second).to(self.device)
            with serving_autocast(self):
                said = self.represent(batch, Needs("classes"))
            for rows in torch.arange(len(q)).split(AT_ONCE):
                logits = self._logits(said, batch, q[rows].to(self.device), c[rows].to(self.device))
                scores.append((logits if self.classes > 2 else self._scores(logits)).cpu())
        self.train(learning)
        return torch.cat(scores) if scores else torch.zeros(0)


def _distinct(texts: Sequence[str]) -> tuple[list[str], Tensor]:
    """Each text once, and which of them each is: [n]."""
    place: dict[str, int] = {}
    rows = [place.setdefault(text, len(place)) for text in texts]
    return list(place), torch.tensor(rows, dtype=torch.int64)
