"""The bi-encoder: queries and candidates are encoded apart and compared by a dot product."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.batch import Batch, Columns, Ragged
from distill.hub import (
    Dense,
    EncoderLayout,
    Side,
    read_encoders,
    resolve_checkpoint,
    write_encoder,
    write_two_encoders,
)
from distill.model import Encoder
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
from distill.nn.tokenizer import TextColumn, TextTokenizer
from distill.outputs import Needs, Outputs, Said
from distill.tokens import Tokens

Pooling = Literal["mean", "cls", "lasttoken"]

KINDS = {  # what a tower says of a text, and the fields of Outputs that hold it for each side
    "vectors": ("queries", "candidates"),
    "cls": ("query_cls", "candidate_cls"),
    "tokens": ("query_tokens", "candidate_tokens"),
    "attention": ("query_attention", "candidate_attention"),
    "layers": ("query_layers", "candidate_layers"),
}


class BiEncoder(Encoder):
    """One transformer, or one per side, pooled into a vector per text.

    The score of a pair is the dot product of its vectors, the cosine when they are normalised. What is
    not given is taken from the checkpoint where it says so (a sentence-transformers folder), else mean
    pooling and normalised vectors.

    Provides ``queries`` [B, D], ``candidates`` [P, D], ``scores`` [B, N] and ``in_batch`` [B, P]; from the
    same forward the vectors of all tokens before pooling (``query_tokens``, ``candidate_tokens``), of the
    first alone (``query_cls``, ``candidate_cls``) and, where the transformer lets one listen,
    ``query_attention`` and ``candidate_attention``.

    Args:
        checkpoint: Hub name, folder, or ``package:NAME/FOLDER``.
        pooling: ``mean`` over real tokens, ``cls`` (the first) or ``lasttoken`` (the last real one).
        normalize: Vectors of length 1.
        dim: D, by a learned projection without bias; None keeps the checkpoint's size.
        encoders: ``shared``: one for both sides; ``separate``: one each, from the same checkpoint.
        encoder: The encoder of another node, shared (``{ref: student.encoder}``).
        layers: Keep the first n, or these, layers of the checkpoint.
        max_length: Ids of a candidate with its special ones; None takes the checkpoint's.
        query_max_length: Ids of a query; None is ``max_length``.
        query_prompt: Put before each query; None takes the checkpoint's.
        candidate_prompt: Put before each candidate; None takes the checkpoint's.
        dropout: Of the transformer's layers while it is trained; None keeps the checkpoint's.
        activation_checkpointing: Compute activations again in the backward: less memory, more time.
        chunk_tokens: See :class:`distill.nn.text_encoder.TextEncoder`.
        precision: Of encoding outside training: ``auto``, ``no`` (float32), ``bf16``.

    References:
        Reimers and Gurevych, 2019. Sentence-BERT. arXiv:1908.10084
    """

    shares = frozenset({"encoder"})

    def __init__(
        self,
        checkpoint: str | Path,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        dim: int | None = None,
        encoders: Literal["shared", "separate"] | None = None,
        encoder: TextEncoder | None = None,
        layers: int | Sequence[int] | None = None,
        max_length: int | None = None,
        query_max_length: int | None = None,
        query_prompt: str | None = None,
        candidate_prompt: str | None = None,
        dropout: float | None = None,
        activation_checkpointing: bool = False,
        chunk_tokens: int | None = None,
        precision: Precision = "auto",
    ):
        super().__init__()
        from transformers import AutoModel

        layouts = read_encoders(resolve_checkpoint(checkpoint))
        separate = encoders == "separate" or (encoders is None and not layouts.shared)
        own = (layers, dropout, chunk_tokens, activation_checkpointing or None)
        if encoder is not None and (separate or own != (None,) * 4):
            raise ValueError(
                "a shared `encoder` is taken as it is: leave out `layers`, `dropout`, `chunk_tokens`, "
                "`activation_checkpointing` and `encoders: separate`."
            )

        def tower(layout: EncoderLayout) -> Tower:
            text = encoder
            if text is None:
                folder = str(layout.transformer_folder)
                backbone = load_backbone(AutoModel, folder, **dropout_arguments(folder, dropout))
                if layers is not None:
                    keep_layers(backbone, layers)
                if activation_checkpointing:
                    checkpoint_activations(backbone)
                text = TextEncoder(backbone, TextTokenizer.from_pretrained(folder), chunk_tokens)
            dense = [part.module() for part in layout.dense]
            size = layout.dense[-1].weight.shape[0] if layout.dense else text.backbone.config.hidden_size
            if dim is not None and dim != size:
                dense.append(nn.Sequential(nn.Linear(size, dim, bias=False)))
            return Tower(
                text, pooling or layout.pooling, layout.normalize if normalize is None else normalize, dense
            )

        check_sizes(dim=dim, max_length=max_length, query_max_length=query_max_length)
        self.query_tower = tower(layouts[0])
        self.candidate_tower = tower(layouts[1]) if separate else self.query_tower
        self.max_length = max_length or layouts[1].candidate_length or layouts[1].max_length or 512
        self.query_max_length = query_max_length or max_length or layouts[0].query_length or self.max_length
        self.query_prompt = layouts[0].prompts["query"] if query_prompt is None else query_prompt
        self.candidate_prompt = (
            layouts[1].prompts["document"] if candidate_prompt is None else candidate_prompt
        )
        self.precision = precision
        self.checkpoint = str(checkpoint)
        self.query_tower.encoder.check_length("query_max_length", self.query_max_length)
        self.candidate_tower.encoder.check_length("max_length", self.max_length)
        self.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments) -> BiEncoder:
        return cls(folder, **arguments)

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder, of the queries where there are two."""
        return self.query_tower.encoder

    @property
    def dim(self) -> int:
        return self.query_tower.dim

    @property
    def provides(self) -> frozenset[str]:
        heard = {"query_attention", "candidate_attention"} if "layers" in self.sizes else set()
        read = {field for kind in ("vectors", "cls", "tokens", "layers") for field in KINDS[kind]}
        compared = {"scores", "in_batch"} | ({"layer_scores"} & self.sizes.keys())
        return frozenset({*read, *heard, *compared})

    @property
    def sizes(self) -> dict[str, int]:
        hidden = {
            f"{side}_{kind}": tower.encoder.backbone.config.hidden_size
            for side, tower in (("query", self.query_tower), ("candidate", self.candidate_tower))
            for kind in ("cls", "tokens", "layers")
        }
        heard = self.query_tower.encoder.attention_sizes
        alike = heard == self.candidate_tower.encoder.attention_sizes
        configs = [tower.encoder.backbone.config for tower in (self.query_tower, self.candidate_tower)]
        deep, wide = ({getattr(c, size) for c in configs} for size in ("num_hidden_layers", "hidden_size"))
        by_layer = {"layer_scores": deep.pop()} if len(deep) == len(wide) == 1 else {}
        return {**super().sizes, **hidden, **by_layer, **(heard if alike else {})}

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "checkpoint": self.checkpoint,
            "query_tower": self.query_tower.identity,
            "candidate_tower": self.candidate_tower.identity,
            "max_length": self.max_length,
            "query_max_length": self.query_max_length,
            "query_prompt": self.query_prompt,
            "candidate_prompt": self.candidate_prompt,
        }

    @property
    def reads(self) -> Columns:
        return Columns((self._query_column,), (self._candidate_column,))

    @property
    def _query_column(self) -> TextColumn:
        return self.query_tower.encoder.tokenizer.column(self.query_prompt)

    @property
    def _candidate_column(self) -> TextColumn:
        return self.candidate_tower.encoder.tokenizer.column(self.candidate_prompt)

    def represents(self, needs: Needs) -> Needs:
        wanted = super().represents(needs)
        if "layer_scores" not in wanted:
            return wanted
        return wanted.only((wanted.fields - {"layer_scores"}) | {*KINDS["layers"]})

    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        wanted = self.represents(needs)
        towers = (self.query_tower, self.candidate_tower)
        texts = (batch.queries[self._query_column.key], batch.candidates[self._candidate_column.key])
        lengths = (self.query_max_length, self.max_length)
        sides = [i for i in (0, 1) if any(fields[i] in wanted for fields in KINDS.values())]
        framed = {i: towers[i].encoder.tokenizer.frame(texts[i], lengths[i]) for i in sides}
        kinds = [kind for kind, fields in KINDS.items() if wanted.fields & {*fields}]
        places = {
            i: towers[i].encoder.tokenizer.places(texts[i], lengths[i])
            for i in sides
            if {"tokens", "attention"} & {*kinds}
        }
        layers = sorted(wanted.layers)
        said: dict[int, dict[str, Said]] = {}
        if len(sides) == 2 and towers[0] is towers[1]:  # one pass: fewer, fuller chunks
            both = towers[0].read(
                Ragged.stack([framed[0], framed[1]]),
                torch.cat([places[0], places[1]]) if places else None,
                kinds,
                layers,
            )
            n = len(texts[0])
            said = {
                0: {kind: _rows(value, slice(0, n)) for kind, value in both.items()},
                1: {kind: _rows(value, slice(n, n + len(texts[1]))) for kind, value in both.items()},
            }
        else:
            said = {i: towers[i].read(framed[i], places.get(i), kinds, layers) for i in sides}
        return Outputs().with_(
            **{KINDS[kind][i]: said[i][kind] for i in sides for kind in kinds if KINDS[kind][i] in wanted}
        )

    def batch_of(self, queries: Sequence[str], candidates: Sequence[str]) -> Batch:
        """A batch of raw texts, which lists nothing."""
        nothing = torch.zeros(len(queries), 0, dtype=torch.int64)
        return Batch(
            index=nothing,
            mask=nothing.bool(),
            query_ids=torch.arange(len(queries)),
            candidate_ids=torch.arange(len(candidates)),
            queries={self._query_column.key: self._query_column.encode(list(queries))},
            candidates={self._candidate_column.key: self._candidate_column.encode(list(candidates))},
        )

    def compare(self, outputs: Outputs, batch: Batch, needs: Needs) -> Outputs:
        if "layer_scores" in needs:
            by_query, by_candidate = outputs.query_layers, outputs.candidate_layers
            assert by_query is not None and by_candidate is not None
            of_layers = (by_candidate[batch.index] * by_query[:, None]).sum(dim=-1)  # [B, N, L]
            outputs = outputs.with_(layer_scores=of_layers)
        if not needs.fields & {"scores", "in_batch"}:
            return outputs
        queries, candidates = outputs.queries, outputs.candidates
        assert queries is not None and candidates is not None
        if "scores" in needs:
            listed = candidates[batch.index]  # [B, N, D]
            outputs = outputs.with_(scores=(listed * queries[:, None]).sum(dim=-1))
        if "in_batch" in needs:
            outputs = outputs.with_(in_batch=queries @ candidates.T)
        return outputs

    def _framed_queries(self, ids: Ragged) -> Ragged:
        return self.query_tower.encoder.tokenizer.frame(ids, self.query_max_length)

    def _framed_candidates(self, ids: Ragged) -> Ragged:
        return self.candidate_tower.encoder.tokenizer.frame(ids, self.max_length)

    def encode_queries(self, queries: Sequence[str], progress: bool = False) -> Tensor:
        """Vectors [n, D] float32 on the CPU, of n texts."""
        return self._encode(queries, self._query_column, self._framed_queries, self.query_tower, progress)

    def encode_candidates(self, candidates: Sequence[str], progress: bool = False) -> Tensor:
        """Vectors [n, D] float32 on the CPU, of n texts."""
        tower = self.candidate_tower
        return self._encode(candidates, self._candidate_column, self._framed_candidates, tower, progress)

    @torch.no_grad()
    def _encode(self, texts, column: TextColumn, framed, tower: Tower, progress: bool) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        vectors = torch.empty(len(texts), self.dim)
        learning, _ = self.training, self.eval()
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # about the order of ids
        with serving_autocast(self):
            for part in in_slices(len(texts), 8192, progress, "texts"):
                rows = order[part]
                vectors[rows] = tower(framed(column.encode([texts[row] for row in rows]))).cpu()
        self.train(learning)
        return vectors

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that this class, and ``SentenceTransformer(folder)``, opens with equal vectors."""
        queries, candidates = self._side(self.query_tower), self._side(self.candidate_tower)
        if self.query_tower is self.candidate_tower:
            write_encoder(folder, *queries)
        else:
            write_two_encoders(folder, queries, candidates)

    def _side(self, tower: Tower) -> Side:
        shorter = self.query_max_length if self.query_max_length != self.max_length else None
        layout = EncoderLayout(
            pooling=tower.pooling,
            normalize=tower.normalize,
            dense=tuple(
                Dense.of(part[0], type(part[1]).__name__ if len(part) > 1 else "Identity")
                for part in tower.dense
            ),
            max_length=max(self.max_length, self.query_max_length),
            query_length=shorter,
            candidate_length=self.max_length if shorter else None,
            prompts={"query": self.query_prompt, "document": self.candidate_prompt},
            similarity="cosine" if tower.normalize else "dot",
        )
        return Side(tower.encoder.backbone, tower.encoder.tokenizer.tokenizer, layout)


class Tower(nn.Module):
    """From framed ids to vectors: transformer, pooling, dense layers, perhaps length 1."""

    def __init__(self, encoder: TextEncoder, pooling: str, normalize: bool, dense: Sequence[nn.Module]):
        super().__init__()
        if pooling not in ("mean", "cls", "lasttoken"):
            raise ValueError(f"pooling must be mean, cls or lasttoken, got '{pooling}'.")
        self.encoder = encoder
        self.pooling = pooling
        self.normalize = normalize
        self.dense: Any = nn.Sequential(*dense)

    @property
    def dim(self) -> int:
        return self.dense[-1][0].out_features if len(self.dense) else self.encoder.backbone.config.hidden_size

    @property
    def identity(self) -> dict[str, Any]:
        activations = [type(part[1]).__name__ if len(part) > 1 else "Identity" for part in self.dense]
        return {
            **self.encoder.identity,
            "pooling": self.pooling,
            "dense": activations,
            "normalize": self.normalize,
        }

    def forward(self, ids: Ragged) -> Tensor:
        """Vectors [n, D] float32 of n framed texts."""
        vectors = self.read(ids, None, ["vectors"])["vectors"]
        assert isinstance(vectors, Tensor)
        return vectors

    def read(
        self, ids: Ragged, places: Tensor | None, kinds: Sequence[str], layers: Sequence[int] = ()
    ) -> dict[str, Said]:
        """Of n framed texts from one forward: ``vectors`` [n, D], and the others of ``KINDS``.

        Args:
            places: Of their tokens [T, 1]; needed for tokens and attention.
        """

        def of_layers(output: Any, mask: Tensor) -> Tensor:
            pooled = [pool(layer, mask, self.pooling) for layer in output.hidden_states[1:]]
            return torch.stack(pooled, dim=1)

        rows = {
            "vectors": lambda output, mask: pool(output.last_hidden_state, mask, self.pooling),
            "cls": lambda output, mask: output.last_hidden_state[:, 0],
            "layers": of_layers,
        }
        tokens = {"tokens": lambda output, mask: output.last_hidden_state}
        if len(ids):
            said = self.encoder.read(
                ids,
                rows={kind: head for kind, head in rows.items() if kind in kinds},
                tokens=tokens if "tokens" in kinds else None,
                layers=layers if "attention" in kinds else (),
                hidden="layers" in kinds,
            )
        else:
            heard = self.encoder.no_attention(layers)
            size = self.encoder.backbone.config.hidden_size
            hidden = heard.new_zeros(0, size, dtype=torch.float32)  # as heads answer, also under autocast
            each = hidden.new_zeros(0, self.encoder.backbone.config.num_hidden_layers, hidden.shape[1])
            answers = {"vectors": hidden, "cls": hidden, "tokens": hidden, "attention": heard, "layers": each}
            said = {kind: answers[kind] for kind in kinds}
        answer: dict[str, Said] = {}
        for kind, values in said.items():
            if kind == "vectors":
                with torch.autocast(values.device.type, enabled=False):
                    vectors = self.dense(values)
                    answer[kind] = F.normalize(vectors, dim=-1) if self.normalize else vectors
            elif kind == "layers":  # pooled and of length 1 like the last one's, before any dense layer
                answer[kind] = F.normalize(values, dim=-1) if self.normalize else values
            elif kind == "cls":
                answer[kind] = values
            else:
                assert places is not None
                held, device = tuple(layers) if kind == "attention" else (), values.device
                answer[kind] = Tokens(values, ids.offsets.to(device), places.to(device), held)
        return answer


def _rows(said: Said, rows: slice) -> Said:
    return said.rows(rows) if isinstance(said, Tokens) else said[rows]


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector per text: hidden [n, T, D], mask [n, T] with the padding on the right -> [n, D] float32."""
    if pooling == "cls":
        return hidden[:, 0].float()
    lengths = mask.sum(dim=1)
    if pooling == "lasttoken":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1].float()
    return (hidden.float() * mask[..., None]).sum(dim=1) / lengths[:, None]
