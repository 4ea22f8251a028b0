"""Texts to ids: one tokenizer's columns, and how it frames one text or a pair. Next: ``text_encoder.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from distill.batch import Ragged
from distill.errors import RecipeError


class TextTokenizer:
    """A fast tokenizer of ``transformers`` that cuts texts into ids without special tokens.

    Ids are cached without special tokens and without truncation. What a model reads, one text or a pair,
    is framed from them: the tokenizer's own template is found by asking it once.

    Args:
        tokenizer: A ``PreTrainedTokenizerFast``.
    """

    def __init__(self, tokenizer):
        if not getattr(tokenizer, "is_fast", False):
            raise RecipeError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; a checkpoint with a tokenizer.json "
                f"has one."
            )
        self.tokenizer = tokenizer
        if tokenizer.pad_token_id is None:  # decoders have none; the mask hides whatever stands there
            tokenizer.pad_token = tokenizer.eos_token

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path) -> TextTokenizer:
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(checkpoint))

    def column(self, prompt: str = "") -> TextColumn:
        return TextColumn(self, prompt)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which ids a text gets."""
        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        state.pop("truncation", None)
        state.pop("padding", None)
        return xxhash.xxh3_128_hexdigest(json.dumps(state, sort_keys=True).encode())

    @property
    def has_cls(self) -> bool:
        """Whether a text begins with a token that stands for all of it."""
        return self.tokenizer.cls_token_id is not None

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    def ids(self, texts: list[str]) -> Ragged:
        """Ids without special tokens, never truncated: int32."""
        if not texts:
            return Ragged.of([], dtype=torch.int32)
        rows = self.tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return Ragged.of(rows, dtype=torch.int32)

    @cached_property
    def _frames(self) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int], list[int]]]:
        """What stands before and after one text; before, between and after two."""
        text = next(t for t in ("a", "the", "0") if self.ids([t]).lengths[0] == 1)
        content = int(self.ids([text]).values[0])
        one = self.tokenizer(text)["input_ids"]
        two = self.tokenizer(text, text)["input_ids"]
        at = one.index(content)
        first = two.index(content)
        second = two.index(content, first + 1)
        return (one[:at], one[at + 1 :]), (two[:first], two[first + 1 : second], two[second + 1 :])

    @cached_property
    def _pair_types(self) -> list[int] | None:
        """Segments of the parts (before, first text, between, second text, after), if they are told."""
        if "token_type_ids" not in self.tokenizer.model_input_names:
            return None
        before, between, _ = self._frames[1]
        text = next(t for t in ("a", "the", "0") if self.ids([t]).lengths[0] == 1)
        types = self.tokenizer(text, text, return_token_type_ids=True)["token_type_ids"]
        places = [0, len(before), len(before) + 1, len(before) + 1 + len(between), -1]
        return [types[place] for place in places]

    @property
    def specials(self) -> int:
        """How many ids the frame of one text adds."""
        return sum(map(len, self._frames[0]))

    @property
    def pair_specials(self) -> int:
        """How many ids the frame of a pair adds."""
        return sum(map(len, self._frames[1]))

    def frame(self, texts: Ragged, max_length: int, marker: Sequence[int] = ()) -> Ragged:
        """[CLS] marker text [SEP] in this tokenizer's words, at most ``max_length`` ids in all."""
        before, after = self._frames[0]
        room = max_length - len(before) - len(marker) - len(after)
        return Ragged.join([_ids([*before, *marker]), texts.truncate(room), _ids(after)])

    def places(self, texts: Ragged, max_length: int, marker: Sequence[int] = ()) -> Tensor:
        """For each id that ``frame`` gives, its place in its text's ids, -1 outside: [T, 1]."""
        before, after = self._frames[0]
        room = max_length - len(before) - len(marker) - len(after)
        outside = _outside([*before, *marker]), _outside(after)
        parts: list[Ragged | Tensor] = [outside[0], _places(texts).truncate(room), outside[1]]
        return Ragged.join(parts).values[:, None]

    def frame_pairs(
        self, first: Ragged, second: Ragged, max_length: int, max_first: int
    ) -> tuple[Ragged, Ragged | None]:
        """[CLS] first [SEP] second [SEP], and the segments where the tokenizer tells them.

        The second text alone pays for ``max_length``; the first is capped at ``max_first`` ids of its own.
        """
        before, between, after = self._frames[1]
        first, second = self._cut_pairs(first, second, max_length, max_first)
        parts: list[Ragged | Tensor] = [_ids(before), first, _ids(between), second, _ids(after)]
        types = self._pair_types
        if types is None or len(set(types)) == 1:
            return Ragged.join(parts), None
        segments = [
            torch.full_like(part, kind)
            if isinstance(part, Tensor)
            else Ragged(torch.full_like(part.values, kind), part.offsets)
            for part, kind in zip(parts, types, strict=True)
        ]
        return Ragged.join(parts), Ragged.join(segments)

    def pair_places(self, first: Ragged, second: Ragged, max_length: int, max_first: int) -> Tensor:
        """For each id that ``frame_pairs`` gives, its place in the first and in the second text: [T, 2]."""
        before, between, after = map(_outside, self._frames[1])
        parts = self._cut_pairs(_places(first), _places(second), max_length, max_first)
        nowhere = [Ragged(torch.full_like(part.values, -1), part.offsets) for part in parts]
        sides = ((parts[0], nowhere[1]), (nowhere[0], parts[1]))
        return torch.stack(
            [Ragged.join([before, one, between, two, after]).values for one, two in sides], dim=1
        )

    def _cut_pairs(
        self, first: Ragged, second: Ragged, max_length: int, max_first: int
    ) -> tuple[Ragged, Ragged]:
        room = max_length - self.pair_specials
        first = first.truncate(min(max_first, room))
        return first, second.truncate(room - first.lengths)

    def forget(self, words: Sequence[str]) -> None:
        """Cut these words of the vocabulary like any text again, where someone had them left whole."""
        backend = self.tokenizer.backend_tokenizer
        state = json.loads(backend.to_str())
        base = state["model"].get("vocab", {})
        kept = [
            token
            for token in state["added_tokens"]
            if token["content"] not in words or token["content"] not in base
        ]
        if len(kept) < len(state["added_tokens"]):
            state["added_tokens"] = kept
            self.tokenizer._tokenizer = type(backend).from_str(json.dumps(state))
            vars(self).pop("fingerprint", None)

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)


def _ids(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _places(texts: Ragged) -> Ragged:
    """In place of each id, its place in its text: 0, 1, ... in each row."""
    starts = texts.offsets[:-1].repeat_interleave(texts.lengths)
    return Ragged(torch.arange(len(starts), device=starts.device) - starts, texts.offsets)


def _outside(special: list[int]) -> Tensor:
    return torch.full((len(special),), -1)


@dataclass(frozen=True, eq=False)
class TextColumn:
    """One text column as one tokenizer and one prompt see it."""

    tokenizer: TextTokenizer
    prompt: str = ""

    @property
    def fingerprint(self) -> str:
        return self.tokenizer.fingerprint

    @cached_property
    def key(self) -> str:
        """The column's name in a Batch."""
        prompt = f"+{xxhash.xxh3_64_hexdigest(self.prompt.encode())}" if self.prompt else ""
        return f"ids:{self.fingerprint[:16]}{prompt}"

    def encode(self, texts: list[str]) -> Ragged:
        return self.tokenizer.ids([self.prompt + text for text in texts] if self.prompt else texts)
