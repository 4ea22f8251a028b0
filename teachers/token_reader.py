"""How ColBERT reads: markers, mask tokens behind a query, and what a transformer says of each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.batch import Ragged
from distill.hub import MultiVectorLayout
from distill.nn.text_encoder import Head, TextEncoder, check_sizes
from distill.nn.tokenizer import TextColumn
from distill.tokens import Tokens

Side = Literal["query", "candidate"]
SIDES: tuple[Side, Side] = ("query", "candidate")
MARKERS = ("[unused0]", "[unused1]")  # the authors'


class TokenReader(nn.Module):
    """Queries as ``[CLS] [Q] query [SEP] [MASK] ...``, candidates as ``[CLS] [D] candidate [SEP]``.

    Markers are put in by their ids, so that a text's own ids are those that other models cache.

    Args:
        encoder: The transformer and its tokenizer.
        layout: What its checkpoint says of lengths, prompts and mask tokens.
        query_length: Ids of a query; None: the layout's, else 32.
        candidate_length: The most ids of a candidate; None: the layout's, else 220.
        augment: Fill queries up with mask tokens; None: as the layout says, else true.
        markers: Two words of the vocabulary; None: the layout's, else ``MARKERS``; [] for none.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        layout: MultiVectorLayout,
        query_length: int | None,
        candidate_length: int | None,
        augment: bool | None,
        markers: Sequence[str] | None,
    ):
        super().__init__()
        check_sizes(query_max_length=query_length, max_length=candidate_length)
        self.encoder = encoder
        longest, text = layout.max_length or 512, encoder.tokenizer.tokenizer
        self.lengths = (
            query_length or layout.query_length or min(32, longest),
            candidate_length or layout.candidate_length or min(220, longest),
        )
        self.prompts, self.words = ("", ""), self._markers(layout, markers)
        for name, length in zip(("query_max_length", "max_length"), self.lengths, strict=True):
            encoder.check_length(name, length, len(self.words) // 2)
        self.augment = next(said for said in (augment, layout.augment, True) if said is not None)
        self.attend = layout.attend
        self.fill: int | None = text.eos_token_id if text.mask_token_id is None else text.mask_token_id
        if self.augment and self.fill is None:
            raise ValueError("the tokenizer has no mask token to fill queries with; set `augment: false`.")
        if self.words:
            encoder.tokenizer.forget(self.words)
        elif markers is None and layout.prompts is not None:
            self.prompts = layout.prompts
        self.marker_ids = [[text.convert_tokens_to_ids(word)] for word in self.words] or [[], []]

    def _markers(self, layout: MultiVectorLayout, markers: Sequence[str] | None) -> tuple[str, ...]:
        """Two words of the vocabulary, or none where prompts are text."""
        text = self.encoder.tokenizer.tokenizer
        words = MARKERS if markers is None else tuple(markers)
        if markers is None and layout.prompts is not None:
            words = tuple(prompt.strip() for prompt in layout.prompts)
            if not layout.prompts_are_markers and not {*words} <= text.get_added_vocab().keys():
                return ()
        known = [word for word in words if text.convert_tokens_to_ids(word) not in (None, text.unk_token_id)]
        if markers and len(known) != 2:
            raise ValueError(f"markers must be two words of the vocabulary, got {', '.join(markers)}.")
        return words if len(known) == 2 else ()

    @property
    def identity(self) -> dict[str, Any]:
        return {
            **self.encoder.identity,
            "lengths": [*self.lengths],
            "augment": [self.augment, self.attend],
            "markers": [*self.words],
            "prompts": [*self.prompts],
        }

    @property
    def columns(self) -> tuple[TextColumn, TextColumn]:
        """Of queries and of candidates."""
        query, candidate = map(self.encoder.tokenizer.column, self.prompts)
        return query, candidate

    def frame(self, side: Side, ids: Ragged) -> tuple[Ragged, Tensor, Tensor]:
        """What is read of n texts, the places [T, 1] of its ids, and how many of each row are attended to."""
        of, tokenizer = SIDES.index(side), self.encoder.tokenizer
        length, marker = self.lengths[of], self.marker_ids[of]
        framed, places = tokenizer.frame(ids, length, marker), tokenizer.places(ids, length, marker)
        attended = framed.lengths
        if side == "query" and self.augment:
            room = length - attended
            fill = torch.full(
                (int(room.sum()),), self.fill or 0, dtype=framed.values.dtype, device=room.device
            )
            nowhere = Ragged.of_lengths(torch.full_like(fill, -1, dtype=places.dtype), room)
            places = Ragged.join([Ragged(places[:, 0], framed.offsets), nowhere]).values[:, None]
            framed = Ragged.join([framed, Ragged(fill, nowhere.offsets)])
            attended = framed.lengths if self.attend else attended
        return framed, places, attended

    def read(
        self, side: Side, ids: Ragged, heads: dict[str, Head], size: int, layers: Sequence[int]
    ) -> dict[str, Tokens]:
        """What each head says of tokens, [T, size], by its name, and ``attention`` of the layers if any."""
        framed, places, attended = self.frame(side, ids)
        if len(ids):
            said = self.encoder.read(framed, tokens=heads, layers=layers, attended=attended)
        else:
            none = self.encoder.no_attention(layers)
            empty = none.new_zeros(0, size, dtype=torch.float32)  # as heads answer, also under autocast
            said = dict.fromkeys(heads, empty) | ({"attention": none} if layers else {})
        return {
            name: Tokens(
                values,
                framed.offsets.to(values.device),
                places.to(values.device),
                tuple(layers) if name == "attention" else (),
            )
            for name, values in said.items()
        }
