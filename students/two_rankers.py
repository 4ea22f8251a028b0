"""The student of two rankers: texts encoded apart, and two heads whose scores are added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.batch import Batch, Ragged
from distill.hub import load_heads, local_folder, read_own, resolve_checkpoint
from distill.maxsim import maxsim_all, maxsim_pairs
from distill.model import Encoder
from distill.nn.precision import Precision, serving_autocast
from distill.nn.text_encoder import check_sizes, in_slices
from distill.objectives.checks import check_choice
from distill.outputs import Needs, Outputs
from distill.tokens import Tokens
from students.bi_encoder import BiEncoder
from students.over_texts import OverTexts

OPENS = "students.TwoRankers"
PAIRWISE = frozenset({"scores", "in_batch", "pair_vectors"})


class TwoRankers(OverTexts, Encoder):
    r"""A bi-encoder with two rankers, one taught by a cross-encoder and one by a bi-encoder (TRMD).

    .. math:: s(q, d) = w \cdot c + b + s_2(r_q, r_d), \qquad
              c = m + W_m m + b_m, \quad m = \max(h_q, h_d)

    Of each text two vectors come from one forward: the first token's, h (CLS), and the pooled one, r (REP).
    The first ranker reads the merged CLS c (the maximum is taken element by element), which is what a
    cross-encoder's CLS teaches (``EmbeddingMatch`` with ``fields: [pair_vectors]``); the second is a
    bi-encoder's own, over what a bi-encoder's vectors teach (``fields: [queries, candidates]``), or a
    ColBERT's, over what a ColBERT's tokens teach (``fields: [query_tokens, candidate_tokens]``). Where the
    paper teaches TwinBERT's one feature of both texts, ours teaches the vector of each (our own choice).

    Neither h nor r of a document depends on a query, so they are computed beforehand; the score is no dot
    product, so this model puts candidates in order and no index searches by it. The heads' last layers
    start at zero (our choice): with ``ranker: dot`` a new student ranks as the bi-encoder it was made from.

    Provides ``queries`` [B, D] and ``candidates`` [P, D] (REP; with ``maxsim`` ``query_tokens`` and
    ``candidate_tokens`` instead), ``query_cls`` and ``candidate_cls`` (CLS), ``pair_vectors`` [B, N, D]
    (merged CLS), ``scores`` [B, N] and ``in_batch`` [B, P].

    Args:
        checkpoint: Of the encoder; see :class:`students.BiEncoder`.
        ranker: The second: "dot": the product of both REPs, the cosine where they have length 1, as
            :class:`students.BiEncoder` scores; "twin": TwinBERT's, :math:`v \cdot (x + W_r x + b_r) + b_v`
            with :math:`x = \max(r_q, r_d)`; "maxsim": ColBERT's, over a vector per token.
        size: Of a token's vector, with ``maxsim``; None: 128, or the encoder's own if that is no multiple.
        layers: Keep the first n, or these, layers of the checkpoint.
        pooling: Of REP; None takes the checkpoint's.
        normalize: REPs of length 1; None takes the checkpoint's.
        max_length: Ids of a candidate with its special ones; None takes the checkpoint's.
        query_max_length: Ids of a query; None is ``max_length``.
        query_prompt: Put before each query; None takes the checkpoint's.
        candidate_prompt: Put before each candidate; None takes the checkpoint's.
        dropout: Of the transformer's layers, and before the first ranker, while it is trained; None keeps
            the checkpoint's, and 0.1.
        chunk_tokens: See :class:`distill.nn.text_encoder.TextEncoder`.
        precision: Of encoding outside training: ``auto``, ``no`` (float32), ``bf16``.

    References:
        Choi et al., 2021. Improving Bi-encoder Document Ranking Models with Two Rankers and Multi-teacher
        Distillation. arXiv:2103.06523

        Lu, Jiao and Zhang, 2020. TwinBERT (the second ranker). arXiv:2002.06275
    """

    opens = OPENS
    search: ClassVar[str] = "own"

    def __init__(
        self,
        checkpoint: str | Path,
        ranker: Literal["dot", "twin", "maxsim"] | None = None,
        size: int | None = None,
        layers: int | Sequence[int] | None = None,
        pooling: Literal["mean", "cls", "lasttoken"] | None = None,
        normalize: bool | None = None,
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
        self.ranker = ranker or own.get("ranker", "dot")
        check_choice("ranker", self.ranker, ("dot", "twin", "maxsim"))
        if own and self.ranker != own["ranker"]:
            raise ValueError(f"ranker: {ranker}, but the checkpoint was trained with {own['ranker']}.")
        if size is not None and self.ranker != "maxsim":
            raise ValueError(
                "size is that of a token's vector, which only `ranker: maxsim` has; leave it out."
            )
        check_sizes(size=size)
        self.texts = BiEncoder(
            checkpoint,
            pooling=pooling,
            normalize=normalize,
            layers=layers,
            max_length=max_length,
            query_max_length=query_max_length,
            query_prompt=query_prompt,
            candidate_prompt=candidate_prompt,
            dropout=dropout,
            chunk_tokens=chunk_tokens,
            precision=precision,
        )
        if not self.encoder.tokenizer.has_cls:
            raise ValueError("the tokenizer of this checkpoint has no [CLS], which the first ranker reads.")
        hidden, rep = self.texts.sizes["query_cls"], self.texts.dim
        heads = {"merge": nn.Linear(hidden, hidden), "first": nn.Linear(hidden, 1)}
        if self.ranker == "twin":
            heads |= {"twin": nn.Linear(rep, rep), "second": nn.Linear(rep, 1)}
        self.heads = nn.ModuleDict(heads)
        for head in heads.values():
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.reps = ("queries", "candidates")
        if self.ranker == "maxsim":
            size = size or own.get("size") or (128 if hidden % 128 == 0 else hidden)
            if hidden % size:
                raise ValueError(f"size: {size} does not divide the encoder's own, {hidden}.")
            self.heads["tokens"] = project = nn.Linear(hidden, size, bias=False)
            nn.init.orthogonal_(project.weight)
            self.reps = ("query_tokens", "candidate_tokens")
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.checkpoint, self.precision = str(checkpoint), precision
        if own:
            load_heads(folder, self.heads)
        self.eval()

    @property
    def dim(self) -> int:
        """Of what is encoded: REP, then CLS; with ``maxsim`` of each row."""
        if isinstance(project := self.heads["tokens"] if self.ranker == "maxsim" else None, nn.Linear):
            return project.out_features
        return self.texts.dim + self.sizes["query_cls"]

    @property
    def sizes(self) -> dict[str, int]:
        hidden = self.texts.sizes["query_cls"]
        first = {name: hidden for name in ("query_cls", "candidate_cls", "pair_vectors")}
        rep = self.dim if self.ranker == "maxsim" else self.texts.dim
        return dict.fromkeys(self.reps, rep) | first

    @property
    def provides(self) -> frozenset[str]:
        return frozenset(self.sizes) | PAIRWISE

    @property
    def settings(self) -> dict[str, Any]:
        return {"ranker": self.ranker} | ({"size": self.dim} if self.ranker == "maxsim" else {})

    def represents(self, needs: Needs) -> Needs:
        wanted = set(needs.fields - PAIRWISE)
        if needs.fields & PAIRWISE:
            wanted |= {"query_cls", "candidate_cls"}
        if needs.fields & {"scores", "in_batch"}:
            wanted |= {*self.reps}
        return needs.only(wanted)

    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        said = self.texts.represent(batch, self.represents(needs))
        if self.ranker != "maxsim":
            return said
        tokens = {name: self._projected(value) for name, value in said.given() if isinstance(value, Tokens)}
        return said.with_(**tokens)

    def _projected(self, tokens: Tokens) -> Tokens:
        with torch.autocast(tokens.values.device.type, enabled=False):
            return replace(tokens, values=F.normalize(self.heads["tokens"](tokens.values.float()), dim=-1))

    def compare(self, outputs: Outputs, batch: Batch, needs: Needs) -> Outputs:
        cls, reps = (outputs.query_cls, outputs.candidate_cls), [getattr(outputs, f) for f in self.reps]
        if not needs.fields & PAIRWISE:
            return outputs
        assert cls[0] is not None and cls[1] is not None
        if needs.fields & {"scores", "pair_vectors"}:
            merged = self.merged(cls[0][:, None], cls[1][batch.index])
            outputs = outputs.with_(pair_vectors=merged)
            if "scores" in needs and self.ranker == "maxsim":
                rows, places = batch.mask.nonzero(as_tuple=True)
                found = maxsim_pairs(_ragged(reps[0]), _ragged(reps[1]), rows, batch.index[rows, places])
                outputs = outputs.with_(scores=self.first(merged) + batch.spread(found))
            elif "scores" in needs:
                outputs = outputs.with_(scores=self.ranked(merged, reps[0][:, None], reps[1][batch.index]))
        if "in_batch" in needs:
            merged = self.merged(cls[0][:, None], cls[1])
            if self.ranker == "maxsim":
                scores = self.first(merged) + maxsim_all(_ragged(reps[0]), _ragged(reps[1]))
            else:
                scores = self.ranked(merged, reps[0][:, None], reps[1])
            outputs = outputs.with_(in_batch=scores)
        return outputs

    def merged(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """The merged CLS [..., D] of CLS vectors that broadcast."""
        largest = torch.maximum(queries, candidates)
        return largest + self.heads["merge"](largest)

    def first(self, merged: Tensor) -> Tensor:
        """The first ranker's scores [...] of merged CLS [..., D]."""
        return self.heads["first"](self.dropout(merged))[..., 0]

    def ranked(self, merged: Tensor, queries: Tensor, candidates: Tensor) -> Tensor:
        """The sum [...] of both rankers' scores, of merged CLS [..., D] and of REPs that broadcast."""
        first = self.first(merged)
        if self.ranker == "dot":
            return first + (queries * candidates).sum(dim=-1)
        largest = torch.maximum(queries, candidates)
        return first + self.heads["second"](largest + self.heads["twin"](largest))[..., 0]

    def encode_queries(self, queries: Sequence[str], progress: bool = False) -> Any:
        """Of n texts REP and CLS, end to end [n, D + D] float32 on the CPU.

        With ``maxsim`` n rows of [., size]: CLS, cut into as many rows as it fills, then its tokens.
        """
        return self._encode(queries, "query", progress)

    def encode_candidates(self, candidates: Sequence[str], progress: bool = False) -> Any:
        """The same of candidates."""
        return self._encode(candidates, "candidate", progress)

    @torch.no_grad()
    def _encode(self, texts: Sequence[str], side: str, progress: bool) -> Tensor | Ragged:
        texts = [texts] if isinstance(texts, str) else list(texts)
        rep, cls = self.reps[side == "candidate"], f"{side}_cls"
        parts: list[Any] = []
        learning, _ = self.training, self.eval()
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # about the order of ids
        with serving_autocast(self):
            for part in in_slices(len(texts), 8192, progress, "texts"):
                given = [texts[row] for row in order[part]]
                batch = self.texts.batch_of(*((given, []) if side == "query" else ([], given)))
                said = self.represent(batch, Needs(rep, cls))
                parts.append(self._together(getattr(said, rep), getattr(said, cls)))
        self.train(learning)
        back = torch.tensor(order, dtype=torch.int64).argsort()
        if self.ranker == "maxsim":
            nothing = Ragged(torch.zeros(0, self.dim), torch.zeros(1, dtype=torch.int64))
            return Ragged.stack([nothing, *parts]).select(back)
        return torch.cat([torch.zeros(0, self.dim), *parts])[back]

    def _together(self, rep: Tensor | Tokens, cls: Tensor) -> Tensor | Ragged:
        """What is kept of texts, on the CPU."""
        if isinstance(rep, Tensor):
            return torch.cat([rep, cls], dim=-1).cpu()
        rows, tokens = cls.float().cpu().reshape(-1, self.dim), rep.values.float().cpu()
        each = cls.shape[-1] // self.dim
        place = Ragged.join([
            Ragged(torch.arange(len(rows)), torch.arange(len(cls) + 1) * each),
            Ragged(torch.arange(len(rows), len(rows) + len(tokens)), rep.offsets.cpu()),
        ])  # fmt: skip
        return Ragged(torch.cat([rows, tokens])[place.values], place.offsets)

    @torch.no_grad()
    def score_encoded(self, queries: Any, candidates: Any) -> Tensor:
        """Scores [n] float32 on the CPU, of n pairs of encoded texts, as they were encoded."""
        learning, _ = self.training, self.eval()
        sides = [side.to(self.device) for side in (queries, candidates)]
        if self.ranker == "maxsim":
            (cls_q, rep_q), (cls_c, rep_c) = (self._apart(side) for side in sides)
            pairs = torch.arange(len(cls_q), device=self.device)
            scores = self.first(self.merged(cls_q, cls_c)) + maxsim_pairs(rep_q, rep_c, pairs, pairs)
        else:
            sizes = [self.texts.dim, self.dim - self.texts.dim]
            (rep_q, cls_q), (rep_c, cls_c) = (side.split(sizes, dim=-1) for side in sides)
            scores = self.ranked(self.merged(cls_q, cls_c), rep_q, rep_c)
        self.train(learning)
        return scores.cpu()

    def score_pairs(
        self, queries: Sequence[str], candidates: Sequence[str], progress: bool = False
    ) -> Tensor:
        """Scores [n] float32 on the CPU, of n raw pairs."""
        scores = [torch.zeros(0)]
        for part in in_slices(len(queries), 4096, progress, "pairs"):
            sides = self.encode_queries(queries[part]), self.encode_candidates(candidates[part])
            scores.append(self.score_encoded(*sides))
        return torch.cat(scores)

    def _apart(self, encoded: Ragged) -> tuple[Tensor, Ragged]:
        """CLS [n, D] and tokens of encoded texts."""
        n = self.sizes["query_cls"] // self.dim
        places = encoded.offsets[:-1, None] + torch.arange(n, device=encoded.offsets.device)
        others = torch.ones(len(encoded.values), dtype=torch.bool, device=places.device)
        others[places] = False
        return encoded.values[places].flatten(1), Ragged.of_lengths(
            encoded.values[others], encoded.lengths - n
        )


def _ragged(tokens: Tokens) -> Ragged:
    return Ragged(tokens.values, tokens.offsets)
