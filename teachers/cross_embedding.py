"""The cross-embedding model: reads query and candidate together and gives a vector of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.batch import Batch, Ragged
from distill.errors import DataError
from distill.hub import (
    atomic_folder,
    local_folder,
    read_cross_encoder,
    read_own,
    resolve_checkpoint,
    write_own,
)
from distill.nn.precision import Precision, serving_autocast
from distill.nn.text_encoder import (
    TextEncoder,
    check_sizes,
    dropout_arguments,
    in_slices,
    keep_layers,
    load_backbone,
)
from distill.nn.tokenizer import TextTokenizer
from distill.outputs import Needs, Outputs
from teachers.pairs import ReadsPairs

OPENS = "teachers.CrossEmbedding"
AT_ONCE = 512  # pairs whose token vectors are held, where nothing is learnt


class CrossEmbedding(ReadsPairs):
    """A transformer over ``[CLS] query [SEP] candidate [SEP]`` with a vector for each of the two (ENDX).

    The vector of each is the mean over its tokens without special ones (a bi-encoder's has these too), each
    having read the other text. The score is their cosine. Any encoder will do as a checkpoint, a
    cross-encoder too (its head is dropped); a fine-tuned bi-encoder starts near what it is to teach.

    Pooling, and the score as what it is trained by, are our re-implementation.

    Provides ``joint_queries`` and ``joint_candidates`` [B, N, D], ``scores`` [B, N].

    Args:
        checkpoint: Hub name, folder, or ``package:NAME/FOLDER``.
        max_length: Ids of a whole pair; None takes what the checkpoint allows, at most 512.
        query_max_length: Ids of the query inside the pair; None: 64, or three quarters of a short pair.
        layers: Keep the first n, or these, layers of the checkpoint.
        dropout: Of the transformer's layers while it is trained; None keeps the checkpoint's.
        chunk_tokens: See :class:`distill.nn.text_encoder.TextEncoder`.
        precision: Of scoring outside training: ``auto``, ``no`` (float32), ``bf16``.

    References:
        Wang et al., 2021. Enhancing Dual-Encoders with Question and Answer Cross-Embeddings for Answer
        Retrieval. arXiv:2206.02978
    """

    def __init__(
        self,
        checkpoint: str | Path,
        max_length: int | None = None,
        query_max_length: int | None = None,
        layers: int | Sequence[int] | None = None,
        dropout: float | None = None,
        chunk_tokens: int | None = None,
        precision: Precision = "auto",
    ):
        super().__init__()
        from transformers import AutoModel

        folder = resolve_checkpoint(checkpoint)
        layout = read_cross_encoder(folder)
        own = read_own(local_folder(folder), OPENS)
        transformer = layout.transformer_folder
        backbone = load_backbone(AutoModel, transformer, **dropout_arguments(transformer, dropout))
        if layers is not None:
            keep_layers(backbone, layers)
        check_sizes(max_length=max_length, query_max_length=query_max_length)
        self.max_length: int = max_length or own.get("max_length") or min(layout.max_length or 512, 512)
        self.precision = precision
        self.checkpoint = str(checkpoint)
        self.encoder = TextEncoder(backbone, TextTokenizer.from_pretrained(transformer), chunk_tokens)
        self.query_max_length: int = self.room_for_query(query_max_length or own.get("query_max_length"))
        self.eval()

    @property
    def dim(self) -> int:
        return self.encoder.backbone.config.hidden_size

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"joint_queries", "joint_candidates", "scores"})

    @property
    def sizes(self) -> dict[str, int]:
        return {"joint_queries": self.dim, "joint_candidates": self.dim}

    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        rows, places = batch.mask.nonzero(as_tuple=True)
        listed, key = batch.index[rows, places], self.column.key
        queries, candidates = batch.queries[key].select(rows), batch.candidates[key].select(listed)
        for side, ids, texts in (
            ("query", batch.query_ids[rows], queries),
            ("candidate", batch.candidate_ids[listed], candidates),
        ):
            if len(empty := (texts.lengths == 0).nonzero()[:, 0]):
                raise DataError(
                    f"data set '{batch.source}': {side} row {int(ids[empty[0]])} (from 0) "
                    f"has no token, so there is nothing to take the mean of. Remove empty texts."
                )
        joint = self._joint(queries, candidates)  # [2, n, D]
        said = batch.spread
        return Outputs(
            joint_queries=said(joint[0]) if "joint_queries" in needs else None,
            joint_candidates=said(joint[1]) if "joint_candidates" in needs else None,
            scores=said(F.cosine_similarity(joint[0], joint[1], dim=-1)) if "scores" in needs else None,
        )

    def _joint(self, queries: Ragged, candidates: Ragged) -> Tensor:
        """The vectors of both texts of n pairs of cached ids: [2, n, D] float32."""
        n, step = len(queries), max(1, len(queries)) if torch.is_grad_enabled() else AT_ONCE
        parts = [torch.zeros(2, 0, self.dim, device=self.device)]
        for rows in torch.arange(n, device=queries.offsets.device).split(step) if n else ():
            parts.append(self._means(queries.select(rows), candidates.select(rows)))
        return torch.cat(parts, dim=1)

    def _means(self, queries: Ragged, candidates: Ragged) -> Tensor:
        tokenizer, lengths = self.encoder.tokenizer, (self.max_length, self.query_max_length)
        ids, types = tokenizer.frame_pairs(queries, candidates, *lengths)
        places = tokenizer.pair_places(queries, candidates, *lengths)
        hidden = self.encoder.read(ids, types, tokens={"hidden": lambda output, _: output.last_hidden_state})
        row = torch.arange(len(ids), device=places.device).repeat_interleave(ids.lengths)
        means = []
        for there in (places >= 0).unbind(dim=1):
            token = there.nonzero()[:, 0].to(self.device)
            of = row[there].to(self.device)
            values = hidden["hidden"].index_select(0, token)
            sums = values.new_zeros(len(ids), self.dim).index_add(0, of, values)
            means.append(sums / torch.bincount(of, minlength=len(ids)).clamp(min=1)[:, None])
        return torch.stack(means)

    @torch.no_grad()
    def score_pairs(
        self, queries: Sequence[str], candidates: Sequence[str], progress: bool = False
    ) -> Tensor:
        """Scores [n] float32 on the CPU, of n raw pairs."""
        scores = [torch.zeros(0)]
        learning, _ = self.training, self.eval()
        with serving_autocast(self):
            for part in in_slices(len(queries), 4096, progress, "pairs"):
                texts = self.column.encode(list(queries[part])), self.column.encode(list(candidates[part]))
                joint = self._joint(*texts)
                scores.append(F.cosine_similarity(joint[0], joint[1], dim=-1).cpu())
        self.train(learning)
        return torch.cat(scores)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that this class opens, and ``AutoModel`` as the transformer that it is."""
        with atomic_folder(folder) as new:
            self.encoder.backbone.save_pretrained(new)
            self.encoder.tokenizer.save_pretrained(new)
            settings = {"max_length": self.max_length, "query_max_length": self.query_max_length}
            write_own(new, OPENS, settings)
