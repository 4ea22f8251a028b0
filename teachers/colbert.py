"""ColBERT: a vector per token, compared by MaxSim; on its own encoder or on another node's tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.batch import Batch, Columns, Ragged
from distill.hub import MultiVectorLayout, read_multi_vector, resolve_checkpoint, write_multi_vector
from distill.hub.layouts import plain
from distill.hub.multi_vector import PUNCTUATION
from distill.maxsim import maxsim_all, maxsim_pairs
from distill.model import Encoder, Model
from distill.nn.precision import Precision, serving_autocast
from distill.nn.text_encoder import (
    Head,
    TextEncoder,
    check_sizes,
    checkpoint_activations,
    dropout_arguments,
    in_slices,
    keep_layers,
    load_backbone,
)
from distill.nn.tokenizer import TextColumn, TextTokenizer
from distill.outputs import Needs, Outputs
from distill.tokens import Tokens
from teachers.token_reader import SIDES, Side, TokenReader

log = logging.getLogger("distill")
TOKENS = frozenset({"query_tokens", "candidate_tokens"})
ATTENTION = frozenset({"query_attention", "candidate_attention"})


class ColBERT(Encoder):
    """Late interaction: each query token finds its best candidate token, and their cosines are summed.

    On its own encoder queries are ``[CLS] [Q] query [SEP] [MASK] ... [MASK]`` of a fixed length, candidates
    ``[CLS] [D] candidate [SEP]``, and tokens of punctuation are left out of candidates. ``of`` a node that
    says something of its tokens, such as a bi-encoder, it is a projection of these, without a forward, a
    marker or mask tokens of its own; gradients pass to that node.

    What is not given is taken from the checkpoint where it says so (a MultiVectorEncoder of
    sentence-transformers, or the authors' ColBERT v2); of another text encoder the projection is new.

    Provides ``query_tokens`` and ``candidate_tokens`` of length 1, ``scores`` [B, N], ``in_batch`` [B, P],
    and ``query_attention`` and ``candidate_attention`` where its transformer lets one listen.

    Args:
        checkpoint: Hub name, folder, or ``package:NAME/FOLDER``.
        of: The node whose tokens it stands on, in place of a checkpoint.
        dim: D, the size of a token's vector; None takes the checkpoint's, else 128.
        layers: Keep the first n, or these, layers of the checkpoint.
        max_length: Ids of a candidate with its special ones; None takes the checkpoint's, else 220.
        query_max_length: Ids of a query, to which it is filled; None takes the checkpoint's, else 32.
        augment: Fill queries with mask tokens, which read the query and are scored; None takes the
            checkpoint's, else true.
        markers: Words of the vocabulary that stand before a query and a candidate; None takes the
            checkpoint's, else ``[unused0]`` and ``[unused1]`` where they are there; [] for none.
        punctuation: Whether candidates keep tokens of punctuation; None: as the checkpoint says, else not.
        dropout: Of the transformer's layers while it is trained; None keeps the checkpoint's.
        activation_checkpointing: Compute activations again in the backward: less memory, more time.
        chunk_tokens: See :class:`distill.nn.text_encoder.TextEncoder`.
        precision: Of encoding outside training: ``auto``, ``no`` (float32), ``bf16``.

    References:
        Khattab and Zaharia, 2020. ColBERT. arXiv:2004.12832

        Santhanam et al., 2022. ColBERTv2. arXiv:2112.01488
    """

    search = "maxsim"
    shares = frozenset({"encoder"})

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        of: Mapping[str, Model] | None = None,
        dim: int | None = None,
        layers: int | Sequence[int] | None = None,
        max_length: int | None = None,
        query_max_length: int | None = None,
        augment: bool | None = None,
        markers: Sequence[str] | None = None,
        punctuation: bool | None = None,
        dropout: float | None = None,
        activation_checkpointing: bool = False,
        chunk_tokens: int | None = None,
        precision: Precision = "auto",
    ):
        from transformers import AutoModel

        super().__init__()
        if (checkpoint is None) == (of is None):
            raise ValueError("give either a `checkpoint`, or the node it stands on by `of: NODE`.")
        check_sizes(dim=dim)
        self.checkpoint = None if checkpoint is None else str(checkpoint)
        self.precision = precision
        self.reader: TokenReader | None = None
        self.below: tuple[Any, ...] = ()  # a node in a tuple: its parameters are not this one's
        layout = MultiVectorLayout()
        if checkpoint is None:
            own = (layers, max_length, query_max_length, augment, markers, dropout, chunk_tokens)
            if own != (None,) * len(own) or activation_checkpointing:
                raise ValueError("`of` a node it reads nothing: give dim, punctuation and precision only.")
            hidden = self._stand_on(dict(of or {}))
        else:
            layout = read_multi_vector(resolve_checkpoint(checkpoint))
            folder = str(layout.transformer_folder)
            backbone = load_backbone(AutoModel, folder, **dropout_arguments(folder, dropout))
            if layers is not None:
                keep_layers(backbone, layers)
            if activation_checkpointing:
                checkpoint_activations(backbone)
            encoder = TextEncoder(backbone, TextTokenizer.from_pretrained(folder), chunk_tokens)
            self.reader = TokenReader(encoder, layout, query_max_length, max_length, augment, markers)
            hidden = backbone.config.hidden_size
        there = layout.projection
        self.projection = nn.Linear(hidden, dim or (128 if there is None else len(there)), bias=False)
        if there is not None and there.shape == self.projection.weight.shape:
            with torch.no_grad():
                self.projection.weight.copy_(there)
        else:
            nn.init.orthogonal_(self.projection.weight)  # keeps angles as well as a map to fewer can
            if there is not None:
                log.warning(
                    "ColBERT: dim %d is not the %d of %s, so its projection is a new one, to be trained",
                    len(self.projection.weight),
                    len(there),
                    checkpoint,
                )
        skip = PUNCTUATION if layout.skip is None else layout.skip
        if punctuation is not None:
            skip = () if punctuation else skip or PUNCTUATION
        text = self.encoder.tokenizer.tokenizer
        ids = {word: text.convert_tokens_to_ids(word) for word in skip}
        self.skip = {word: i for word, i in ids.items() if i not in (None, text.unk_token_id)}
        self.eval()

    def _stand_on(self, of: dict[str, Model]) -> int:
        """Take the node whose tokens it hears; the size of their vectors."""
        if len(of) != 1:
            raise ValueError(f"it stands on the tokens of one node, not of {len(of)}.")
        ((name, node),) = of.items()
        if not node.provides >= TOKENS:
            raise ValueError(f"'{name}' ({type(node).__name__}) says nothing of its tokens to stand on.")
        if not hasattr(node, "query_tower"):
            raise ValueError(f"'{name}' ({type(node).__name__}) is no bi-encoder, which alone it stands on.")
        if node.query_tower is not getattr(node, "candidate_tower", None):
            raise ValueError(f"'{name}' has two encoders, and a ColBERT is saved and served with one.")
        self.of, self.below = (name,), (node,)
        return node.sizes["query_tokens"]

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments) -> ColBERT:
        return cls(folder, **arguments)

    @property
    def encoder(self) -> TextEncoder:
        """Its own text encoder, or that of the node it stands on."""
        return self.below[0].encoder if self.reader is None else self.reader.encoder

    @property
    def max_length(self) -> int:
        """The most ids of a candidate."""
        return self.below[0].max_length if self.reader is None else self.reader.lengths[1]

    @property
    def dim(self) -> int:
        return self.projection.out_features

    @property
    def provides(self) -> frozenset[str]:
        heard = ATTENTION & self.below[0].provides if self.below else ATTENTION
        return TOKENS | {"scores", "in_batch"} | (heard if "layers" in self.sizes else set())

    @property
    def sizes(self) -> dict[str, int]:
        heard = self.below[0].sizes if self.below else self.encoder.attention_sizes
        own = dict.fromkeys(sorted(TOKENS), self.dim)
        return own | {key: heard[key] for key in ("layers", "heads") if key in heard}

    @property
    def identity(self) -> dict[str, Any] | None:
        if self.reader is None:
            return None
        return {"checkpoint": self.checkpoint, **self.reader.identity, "skip": [*self.skip]}

    @property
    def reads(self) -> Columns:
        if self.reader is None:
            return self.below[0].reads
        query, candidate = self.reader.columns
        return Columns((query,), (candidate,))

    def represents(self, needs: Needs) -> Needs:
        pairwise = needs.fields & {"scores", "in_batch"}
        return needs.only((needs.fields - pairwise) | (TOKENS if pairwise else set()))

    def of_needs(self, needs: Needs) -> Needs:
        return self.represents(needs)

    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        assert self.reader is not None, "`of` a node, it is asked by represent_of"
        wanted, outputs = self.represents(needs), Outputs()
        project: dict[str, Head] = {"tokens": lambda output, _: self._project(output.last_hidden_state)}
        for side, ids in zip(SIDES, self._cached(batch), strict=True):
            heads = project if f"{side}_tokens" in wanted else {}
            layers = sorted(wanted.layers) if f"{side}_attention" in wanted else []
            if heads or layers:
                said = self.reader.read(side, ids, heads, self.dim, layers)
                outputs = outputs.with_(**{f"{side}_{kind}": value for kind, value in said.items()})
        return self._scored(outputs, batch)

    def represent_of(self, heard: Mapping[str, Outputs], batch: Batch, needs: Needs) -> Outputs:
        wanted, said = self.represents(needs).fields, dict(heard[self.of[0]].given())
        outputs = Outputs().with_(**{f: said[f] for f in wanted & ATTENTION})
        for name in sorted(wanted & TOKENS):
            tokens = said[name]
            assert isinstance(tokens, Tokens)
            with torch.autocast(tokens.values.device.type, enabled=False):
                outputs = outputs.with_(**{name: replace(tokens, values=self._project(tokens.values))})
        return self._scored(outputs, batch)

    def _project(self, hidden: Tensor) -> Tensor:
        return F.normalize(self.projection(hidden.float()), dim=-1)

    def _cached(self, batch: Batch) -> tuple[Ragged, Ragged]:
        (query,), (candidate,), _ = self.reads
        return batch.queries[query.key], batch.candidates[candidate.key]

    def _scored(self, outputs: Outputs, batch: Batch) -> Outputs:
        """Without the tokens of candidates that are not scored; each text keeps its first."""
        tokens = outputs.candidate_tokens
        if tokens is None or not self.skip or not len(tokens.values):
            return outputs
        ids, place = self._cached(batch)[1].to(tokens.values.device), tokens.places[:, 0]
        starts = ids.offsets[:-1].repeat_interleave(tokens.lengths)
        there = (place >= 0).nonzero()[:, 0]
        word = ids.values[starts[there] + place[there]]
        skipped = there[torch.isin(word, torch.tensor([*self.skip.values()], device=word.device))]
        kept = torch.ones_like(place, dtype=torch.bool).index_fill(0, skipped, False)
        kept = kept.index_fill(0, tokens.offsets[:-1][tokens.lengths > 0], True)
        return outputs.with_(candidate_tokens=tokens.keep(kept))

    def compare(self, outputs: Outputs, batch: Batch, needs: Needs) -> Outputs:
        if not needs.fields & {"scores", "in_batch"}:
            return outputs
        assert outputs.query_tokens is not None and outputs.candidate_tokens is not None
        sides = (outputs.query_tokens, outputs.candidate_tokens)
        queries, candidates = (Ragged(tokens.values, tokens.offsets) for tokens in sides)
        if "in_batch" in needs:
            outputs = outputs.with_(in_batch=maxsim_all(queries, candidates))
        if "scores" in needs:
            rows, places = batch.mask.nonzero(as_tuple=True)
            found = maxsim_pairs(queries, candidates, rows, batch.index[rows, places])
            outputs = outputs.with_(scores=batch.spread(found))
        return outputs

    def encode_queries(self, queries: Sequence[str], progress: bool = False) -> Ragged:
        """Vectors of the tokens of n texts, n rows of [., D] float32 on the CPU."""
        return self._encode(queries, "query", progress)

    def encode_candidates(self, candidates: Sequence[str], progress: bool = False) -> Ragged:
        """Vectors of the scored tokens of n texts, n rows of [., D] float32 on the CPU."""
        return self._encode(candidates, "candidate", progress)

    @torch.no_grad()
    def _encode(self, texts: Sequence[str], side: Side, progress: bool) -> Ragged:
        texts = [texts] if isinstance(texts, str) else list(texts)
        node, field = self.below[0] if self.below else self, f"{side}_tokens"
        learning = [(one, one.training) for one in (self, node)]
        for one, _ in learning:
            one.eval()
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # about the order of ids
        parts = [Ragged(torch.zeros(0, self.dim), torch.zeros(1, dtype=torch.int64))]
        for part in in_slices(len(texts), 2048, progress, "texts"):
            batch = self._texts([texts[row] for row in order[part]], side)
            with serving_autocast(self):
                said = node.represent(batch, Needs(field))
                if self.below:
                    said = self.represent_of({self.of[0]: said}, batch, Needs(field))
            tokens = getattr(said, field).to("cpu")
            parts.append(Ragged(tokens.values, tokens.offsets))
        for one, was in learning:
            one.train(was)
        return Ragged.stack(parts).select(torch.tensor(order, dtype=torch.int64).argsort())

    def _texts(self, texts: list[str], side: Side) -> Batch:
        """A batch of nothing but queries, or candidates."""
        (query,), (candidate,), _ = self.reads
        assert isinstance(query, TextColumn) and isinstance(candidate, TextColumn)
        queries = query.encode(texts if side == "query" else [])
        candidates = candidate.encode(texts if side == "candidate" else [])
        return Batch(
            index=torch.zeros(len(queries), 0, dtype=torch.int64),
            mask=torch.zeros(len(queries), 0, dtype=torch.bool),
            query_ids=torch.arange(len(queries)),
            candidate_ids=torch.arange(len(candidates)),
            queries={query.key: queries},
            candidates={candidate.key: candidates},
        ).to(self.device)

    @torch.no_grad()
    def score_pairs(
        self, queries: Sequence[str], candidates: Sequence[str], progress: bool = False
    ) -> Tensor:
        """Scores [n] float32 on the CPU, of n raw pairs."""
        scores = [torch.zeros(0)]
        for part in in_slices(len(queries), 2048, progress, "pairs"):
            (q, query), (c, candidate) = _distinct(queries[part]), _distinct(candidates[part])
            scores.append(maxsim_pairs(self.encode_queries(q), self.encode_candidates(c), query, candidate))
        return torch.cat(scores)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that this class, and the MultiVectorEncoder of sentence-transformers, opens."""
        weight, skip = plain(self.projection.weight), tuple(self.skip)
        words: tuple[str, ...] = ()
        if self.reader is None:
            node = self.below[0]
            layout = MultiVectorLayout(
                weight,
                (node.query_prompt, node.candidate_prompt),
                query_length=node.query_max_length,
                candidate_length=node.max_length,
                augment=False,
                skip=skip,
            )
        else:
            read = self.reader
            words = read.words
            layout = MultiVectorLayout(
                weight,
                read.prompts,
                query_length=read.lengths[0],
                candidate_length=read.lengths[1],
                augment=read.augment,
                attend=read.attend,
                skip=skip,
            )
        write_multi_vector(folder, self.encoder.backbone, self.encoder.tokenizer.tokenizer, layout, words)


def _distinct(texts: Sequence[str]) -> tuple[list[str], Tensor]:
    """The distinct ones, and which of them each is."""
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return list(place), torch.tensor([place[text] for text in texts], dtype=torch.int64)
