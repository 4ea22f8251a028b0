"""The cross-encoder: reads query and candidate together and gives one logit, or one per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.batch import Batch, Ragged
from distill.hub import read_cross_encoder, resolve_checkpoint, write_cross_encoder
from distill.hub.checkpoint import read_config
from distill.nn.precision import Precision, serving_autocast
from distill.nn.text_encoder import (
    TextEncoder,
    check_sizes,
    checkpoint_activations,
    dropout_arguments,
    in_slices,
    keep_layers,
    load_backbone,
)
from distill.nn.tokenizer import TextTokenizer
from distill.outputs import Needs, Outputs
from distill.tokens import Tokens
from teachers.pairs import ReadsPairs


class CrossEncoder(ReadsPairs):
    """A transformer over ``[CLS] query [SEP] candidate [SEP]`` with a classification head (monoBERT).

    Any ``AutoModelForSequenceClassification`` will do; a checkpoint without a head gets a new one. Pairs
    are built from the ids of each text, which is tokenised once, and only the candidate is cut to fit, but
    for queries beyond ``query_max_length``. With one class the score is the raw logit, which keeps margins
    that a probability loses; with two it is the log-probability of class 1, as in monoBERT.

    Provides ``scores`` [B, N] with one or two classes, ``classes`` [B, N, C] with two or more, and from the
    same forward ``pair_vectors`` [B, N, D], the first token's last hidden state (where it is a [CLS]) and,
    where the transformer lets one listen, ``joint_attention``.

    Args:
        checkpoint: Hub name, folder, or ``package:NAME/FOLDER``.
        classes: C; None takes what the checkpoint has, 1 where it has no head.
        max_length: Ids of a whole pair; None takes what the checkpoint allows, at most 512.
        query_max_length: Ids of the query inside the pair, special ones not counted; None takes what the
            checkpoint was saved with, else 64, or three quarters of a short pair. Where
            the first text is as long as the second (RTE), give it half of ``max_length``.
        layers: Keep the first n, or these, layers of the checkpoint.
        dropout: Of the transformer's layers and the head, while it is trained; None keeps the checkpoint's.
        activation_checkpointing: Compute activations again in the backward: less memory, more time.
        chunk_tokens: See :class:`distill.nn.text_encoder.TextEncoder`.
        precision: Of scoring outside training: ``auto``, ``no`` (float32), ``bf16``.

    References:
        Nogueira and Cho, 2019. Passage Re-ranking with BERT. arXiv:1901.04085
    """

    def __init__(
        self,
        checkpoint: str | Path,
        classes: int | None = None,
        max_length: int | None = None,
        query_max_length: int | None = None,
        layers: int | Sequence[int] | None = None,
        dropout: float | None = None,
        activation_checkpointing: bool = False,
        chunk_tokens: int | None = None,
        precision: Precision = "auto",
    ):
        super().__init__()
        from transformers import AutoModelForSequenceClassification

        folder = resolve_checkpoint(checkpoint)
        layout = read_cross_encoder(folder)
        config = read_config(layout.transformer_folder)
        headed = any("ForSequenceClassification" in name for name in config.get("architectures") or ())
        if headed and classes not in (None, layout.num_labels):
            raise ValueError(
                f"classes: {classes}, but the checkpoint was trained with {layout.num_labels}; "
                f"leave `classes` out."
            )
        backbone = load_backbone(
            AutoModelForSequenceClassification,
            layout.transformer_folder,
            num_labels=classes or layout.num_labels,
            **dropout_arguments(layout.transformer_folder, dropout),
        )
        if layers is not None:
            keep_layers(backbone, layers)
        if activation_checkpointing:
            checkpoint_activations(backbone)
        self.classes: int = backbone.config.num_labels
        check_sizes(max_length=max_length, query_max_length=query_max_length)
        self.max_length = max_length or min(layout.max_length or 512, 512)
        self.precision = precision
        self.checkpoint = str(checkpoint)
        self.encoder = TextEncoder(
            backbone, TextTokenizer.from_pretrained(layout.transformer_folder), chunk_tokens
        )
        self.query_max_length = self.room_for_query(query_max_length or layout.query_length)
        self.eval()

    @property
    def provides(self) -> frozenset[str]:
        said = {1: {"scores"}, 2: {"scores", "classes"}}.get(self.classes, {"classes"})
        heard = {"joint_attention"} if "layers" in self.sizes else set()
        return frozenset(said | heard | ({"pair_vectors"} & self.sizes.keys()))

    @property
    def sizes(self) -> dict[str, int]:
        first = {"pair_vectors": self.encoder.backbone.config.hidden_size}
        classes = {"classes": self.classes} if self.classes > 1 else {}
        return {
            **self.encoder.attention_sizes,
            **(first if self.encoder.tokenizer.has_cls else {}),
            **classes,
        }

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "classes": self.classes}

    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        rows, places = batch.mask.nonzero(as_tuple=True)
        key, layers = self.column.key, sorted(needs.layers)
        queries = batch.queries[key].select(rows)
        candidates = batch.candidates[key].select(batch.index[rows, places])
        n = batch.mask.numel()
        heard = torch.zeros_like(places, dtype=torch.bool)  # pairs whose attention is asked for
        attention, vectors = None, "pair_vectors" in needs
        if "joint_attention" in needs:
            heard |= True if needs.first is None else places < needs.first
            first = heard.nonzero()[:, 0]
            logits, attention = self._heard(queries.select(first), candidates.select(first), layers, vectors)
            attention = attention.among((rows * batch.mask.shape[1] + places)[first], n)
        if needs.fields <= {"joint_attention"}:
            return Outputs(joint_attention=attention)
        if not heard.any():
            logits = self._logits(queries, candidates, vectors)
        elif not heard.all():
            rest = (~heard).nonzero()[:, 0]
            others = self._logits(queries.select(rest), candidates.select(rest), vectors)
            logits = torch.cat([logits, others])[torch.cat([first, rest]).argsort()]
        listed = batch.spread
        logits, pair_vectors = logits[:, : self.classes], logits[:, self.classes :]
        return Outputs(
            classes=listed(logits) if "classes" in needs else None,
            scores=listed(self._scores(logits)) if "scores" in needs else None,
            pair_vectors=listed(pair_vectors) if vectors else None,
            joint_attention=attention,
        )

    def _logits(self, queries: Ragged, candidates: Ragged, vectors: bool = False) -> Tensor:
        """Logits [n, C] of n pairs of cached ids; with ``vectors`` theirs [n, D] behind them."""
        if not len(queries):
            size = self.encoder.backbone.config.hidden_size if vectors else 0
            return torch.zeros(0, self.classes + size, device=self.device)
        ids, types = self.encoder.tokenizer.frame_pairs(
            queries, candidates, self.max_length, self.query_max_length
        )
        rows = {"logits": _with_vectors if vectors else _logits}
        return self.encoder.read(ids, types, rows, hidden=vectors)["logits"]

    def _heard(
        self, queries: Ragged, candidates: Ragged, layers: Sequence[int], vectors: bool
    ) -> tuple[Tensor, Tokens]:
        """Like ``_logits``, and the attention of the n pairs."""
        lengths = (self.max_length, self.query_max_length)
        ids, types = self.encoder.tokenizer.frame_pairs(queries, candidates, *lengths)
        places = self.encoder.tokenizer.pair_places(queries, candidates, *lengths).to(self.device)
        if len(queries):
            self.encoder.check_whole_maps(layers, int(ids.lengths.max()))
            rows = {"logits": _with_vectors if vectors else _logits}
            said = self.encoder.read(ids, types, rows, layers=layers, hidden=vectors)
        else:
            said = {
                "attention": self.encoder.no_attention(layers),
                "logits": self._logits(queries, candidates, vectors),
            }
        heard = Tokens(said["attention"], ids.offsets.to(self.device), places, tuple(layers))
        return said["logits"], heard

    def _scores(self, classes: Tensor) -> Tensor:
        return classes[..., 0] if self.classes == 1 else classes.log_softmax(dim=-1)[..., 1]

    @torch.no_grad()
    def score_pairs(
        self, queries: Sequence[str], candidates: Sequence[str], progress: bool = False
    ) -> Tensor:
        """Scores [n] float32 on the CPU, of n raw pairs (classes [n, C] from three classes on)."""
        scores = []
        learning, _ = self.training, self.eval()
        with serving_autocast(self):
            for part in in_slices(len(queries), 4096, progress, "pairs"):
                logits = self._logits(self._ids(queries[part]), self._ids(candidates[part]))
                scores.append((logits if self.classes > 2 else self._scores(logits)).cpu())
        self.train(learning)
        return torch.cat(scores) if scores else torch.zeros(0)

    def _ids(self, texts: Sequence[str]) -> Ragged:
        """Ids of raw texts; one that stands in several pairs is tokenised once."""
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        return self.column.encode([*places]).select(torch.tensor([places[text] for text in texts]))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that this class, and the CrossEncoder of sentence-transformers, opens."""
        write_cross_encoder(
            folder,
            self.encoder.backbone,
            self.encoder.tokenizer.tokenizer,
            self.max_length,
            self.query_max_length,
        )


def _logits(output: Any, mask: Tensor) -> Tensor:
    return output.logits


def _with_vectors(output: Any, mask: Tensor) -> Tensor:
    return torch.cat([output.logits, output.hidden_states[-1][:, 0]], dim=-1)
