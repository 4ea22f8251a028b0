"""The student of two rankers: texts encoded apart, and two heads whose scores are added."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from distill.batch import Batch, Columns
from distill.hub import atomic_folder, load_heads, local_folder, read_own, resolve_checkpoint, write_own
from distill.model import Encoder
from distill.nn.precision import Precision, serving_autocast
from distill.nn.text_encoder import TextEncoder, in_slices
from distill.objectives.checks import check_choice
from distill.outputs import Needs, Outputs
from students.bi_encoder import BiEncoder

OPENS = "students.TwoRankers"
PAIRWISE = frozenset({"scores", "in_batch", "pair_vectors"})


class TwoRankers(Encoder):
    r"""A bi-encoder with two rankers, one taught by a cross-encoder and one by a bi-encoder (TRMD).

    .. math:: s(q, d) = w \cdot c + b + s_2(r_q, r_d), \qquad
              c = m + W_m m + b_m, \quad m = \max(h_q, h_d)

    Of each text two vectors come from one forward: the first token's, h (CLS), and the pooled one, r (REP).
    The first ranker reads the merged CLS c (the maximum is taken element by element), which is what a
    cross-encoder's CLS teaches (``EmbeddingMatch`` with ``fields: [pair_vectors]``); the second is a
    bi-encoder's own, over what a bi-encoder's vectors teach (``fields: [queries, candidates]``).

    Neither h nor r of a document depends on a query, so they are computed beforehand; the score is no dot
    product, so this model puts candidates in order and no index searches by it. The heads' last layers
    start at zero (our choice): with ``ranker: dot`` a new student ranks as the bi-encoder it was made from.

    Provides ``queries`` [B, D] and ``candidates`` [P, D] (REP), ``query_cls`` and ``candidate_cls`` (CLS),
    ``pair_vectors`` [B, N, D] (merged CLS), ``scores`` [B, N] and ``in_batch`` [B, P].

    Args:
        checkpoint: Of the encoder; see :class:`students.BiEncoder`.
        ranker: The second: "dot": the product of both REPs, the cosine where they have length 1, as
            :class:`students.BiEncoder` scores; "twin": TwinBERT's, :math:`v \cdot (x + W_r x + b_r) + b_v`
            with :math:`x = \max(r_q, r_d)`.
        layers: Keep the first n, or these, layers of the checkpoint.
        pooling: Of REP; None takes the checkpoint's.
        normalize: REPs of length 1; None takes the checkpoint's.
        max_length: Ids of a candidate with its special ones; None takes the checkpoint's.
        query_max_length: Ids of a query; None is ``max_length``.
        dropout: Of the transformer's layers, and before the first ranker, while it is trained; None keeps
            the checkpoint's, and 0.1.
        chunk_tokens: See :class:`distill.nn.text_encoder.TextEncoder`.
        precision: Of encoding outside training: ``auto``, ``no`` (float32), ``bf16``.

    References:
        Choi et al., 2021. Improving Bi-encoder Document Ranking Models with Two Rankers and Multi-teacher
        Distillation. arXiv:2103.06523

        Lu, Jiao and Zhang, 2020. TwinBERT (the second ranker). arXiv:2002.06275
    """

    shares = frozenset({"encoder"})
    search: ClassVar[str] = "own"

    def __init__(
        self,
        checkpoint: str | Path,
        ranker: Literal["dot", "twin"] | None = None,
        layers: int | Sequence[int] | None = None,
        pooling: Literal["mean", "cls", "lasttoken"] | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        query_max_length: int | None = None,
        dropout: float | None = None,
        chunk_tokens: int | None = None,
        precision: Precision = "auto",
    ):
        super().__init__()
        folder = local_folder(resolve_checkpoint(checkpoint))
        own = read_own(folder, OPENS)
        self.ranker = ranker or own.get("ranker", "dot")
        check_choice("ranker", self.ranker, ("dot", "twin"))
        if own and self.ranker != own["ranker"]:
            raise ValueError(f"ranker: {ranker}, but the checkpoint was trained with {own['ranker']}.")
        self.texts = BiEncoder(
            checkpoint,
            pooling=pooling,
            normalize=normalize,
            layers=layers,
            max_length=max_length,
            query_max_length=query_max_length,
            dropout=dropout,
            chunk_tokens=chunk_tokens,
            precision=precision,
        )
        if not self.encoder.tokenizer.has_cls:
            raise ValueError("the tokenizer of this checkpoint has no [CLS], which the first ranker reads.")
        hidden, size = self.texts.sizes["query_cls"], self.texts.dim
        heads = {"merge": nn.Linear(hidden, hidden), "first": nn.Linear(hidden, 1)}
        if self.ranker == "twin":
            heads |= {"twin": nn.Linear(size, size), "second": nn.Linear(size, 1)}
        self.heads = nn.ModuleDict(heads)
        for head in heads.values():
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.checkpoint, self.precision = str(checkpoint), precision
        if own:
            load_heads(folder, self.heads)
        self.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments) -> TwoRankers:
        return cls(folder, **arguments)

    @property
    def encoder(self) -> TextEncoder:
        return self.texts.encoder

    @property
    def max_length(self) -> int:
        return self.texts.max_length

    @property
    def dim(self) -> int:
        """Of what is encoded: REP, then CLS."""
        return self.texts.dim + self.sizes["query_cls"]

    @property
    def sizes(self) -> dict[str, int]:
        hidden = self.texts.sizes["query_cls"]
        first = {name: hidden for name in ("query_cls", "candidate_cls", "pair_vectors")}
        return {"queries": self.texts.dim, "candidates": self.texts.dim, **first}

    @property
    def provides(self) -> frozenset[str]:
        return frozenset(self.sizes) | PAIRWISE

    @property
    def identity(self) -> dict[str, Any]:
        return {**self.texts.identity, "ranker": self.ranker}

    @property
    def reads(self) -> Columns:
        return self.texts.reads

    def represents(self, needs: Needs) -> Needs:
        wanted = set(needs.fields - PAIRWISE)
        if needs.fields & PAIRWISE:
            wanted |= {"query_cls", "candidate_cls"}
        if needs.fields & {"scores", "in_batch"}:
            wanted |= {"queries", "candidates"}
        return needs.only(wanted)

    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        return self.texts.represent(batch, self.represents(needs))

    def compare(self, outputs: Outputs, batch: Batch, needs: Needs) -> Outputs:
        cls, reps = (outputs.query_cls, outputs.candidate_cls), (outputs.queries, outputs.candidates)
        if needs.fields & {"scores", "pair_vectors"}:
            assert cls[0] is not None and cls[1] is not None
            merged = self.merged(cls[0][:, None], cls[1][batch.index])
            outputs = outputs.with_(pair_vectors=merged)
            if "scores" in needs:
                assert reps[0] is not None and reps[1] is not None
                outputs = outputs.with_(scores=self.ranked(merged, reps[0][:, None], reps[1][batch.index]))
        if "in_batch" in needs:
            assert cls[0] is not None and cls[1] is not None and reps[0] is not None and reps[1] is not None
            merged = self.merged(cls[0][:, None], cls[1])
            outputs = outputs.with_(in_batch=self.ranked(merged, reps[0][:, None], reps[1]))
        return outputs

    def merged(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """The merged CLS [..., D] of CLS vectors that broadcast."""
        largest = torch.maximum(queries, candidates)
        return largest + self.heads["merge"](largest)

    def ranked(self, merged: Tensor, queries: Tensor, candidates: Tensor) -> Tensor:
        """The sum [...] of both rankers' scores, of merged CLS [..., D] and of REPs that broadcast."""
        first = self.heads["first"](self.dropout(merged))[..., 0]
        if self.ranker == "dot":
            return first + (queries * candidates).sum(dim=-1)
        largest = torch.maximum(queries, candidates)
        return first + self.heads["second"](largest + self.heads["twin"](largest))[..., 0]

    def encode_queries(self, queries: Sequence[str], progress: bool = False) -> Tensor:
        """REP and CLS, end to end [n, D + D] float32 on the CPU, of n texts."""
        return self._encode(queries, "query", progress)

    def encode_candidates(self, candidates: Sequence[str], progress: bool = False) -> Tensor:
        """REP and CLS, end to end [n, D + D] float32 on the CPU, of n texts."""
        return self._encode(candidates, "candidate", progress)

    @torch.no_grad()
    def _encode(self, texts: Sequence[str], side: str, progress: bool) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        fields = ("queries", "query_cls") if side == "query" else ("candidates", "candidate_cls")
        vectors = torch.empty(len(texts), self.dim)
        learning, _ = self.training, self.eval()
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # about the order of ids
        with serving_autocast(self):
            for part in in_slices(len(texts), 8192, progress, "texts"):
                given = [texts[row] for row in order[part]]
                batch = self.texts.batch_of(*((given, []) if side == "query" else ([], given)))
                said = self.texts.represent(batch, Needs(*fields))
                rep, cls = (getattr(said, field) for field in fields)
                vectors[order[part]] = torch.cat([rep, cls], dim=-1).cpu()
        self.train(learning)
        return vectors

    @torch.no_grad()
    def score_encoded(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """Scores [n] float32 on the CPU, of n pairs of encoded texts [n, D + D]."""
        learning, _ = self.training, self.eval()
        sizes = [self.texts.dim, self.dim - self.texts.dim]
        (rep_q, cls_q), (rep_c, cls_c) = (
            side.to(self.device).split(sizes, dim=-1) for side in (queries, candidates)
        )
        scores = self.ranked(self.merged(cls_q, cls_c), rep_q, rep_c).cpu()
        self.train(learning)
        return scores

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that this class opens; as an encoder, here and elsewhere, it is that of REP."""
        with atomic_folder(folder) as new:
            self.texts.save_pretrained(new)
            write_own(new, OPENS, {"ranker": self.ranker}, self.heads)
