"""What a model says of each token, and the token's place in the cached ids. Next: ``outputs.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.batch import Ragged


@dataclass(frozen=True)
class Tokens:
    """A value for each token of n rows, end to end: row i is tokens ``offsets[i]`` to ``offsets[i + 1]``.

    A row is one text, or two that were read together. Two models that cache the same ids agree on the
    places of a text's tokens however each of them frames, cuts, filters or pads it.

    Example:
        >>> ids = torch.tensor([[-1], [0], [1], [-1], [0]])  # [CLS] a b, [CLS] c
        >>> said = Tokens(torch.arange(5.0), torch.tensor([0, 3, 5]), ids)
        >>> said.placed(3)[0]
        tensor([[1., 2., 0.],
                [4., 0., 0.]])
    """

    values: Tensor  # [T, ...]; attention: [T, l, 2, H, d], query and key of l layers, the query scaled
    offsets: Tensor  # [n + 1] int64, from 0 to T
    places: Tensor  # [T, S] int64, the place in the cached ids of each of the row's S texts; -1: not of it
    layers: tuple[int, ...] = ()  # of attention: which layers, as they were asked for

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """How many tokens each row has: [n] int64."""
        return self.offsets[1:] - self.offsets[:-1]

    def placed(self, length: int, text: int = 0) -> tuple[Tensor, Tensor]:
        """The values [n, length, ...] of a text of each row by place in its ids, and which there are.

        Tokens that are not of the text (special ones), or beyond ``length``, are left out.
        """
        place = self.places[:, text]
        there = ((place >= 0) & (place < length)).nonzero()[:, 0]
        rows = torch.arange(len(self), device=place.device).repeat_interleave(self.lengths)
        at = rows[there], place[there]
        mask = torch.zeros(len(self), length, dtype=torch.bool, device=place.device).index_put(
            at, torch.ones((), dtype=torch.bool, device=place.device)
        )
        grid = self.values.new_zeros(len(self), length, *self.values.shape[1:])
        return grid.index_put(at, self.values.index_select(0, there)), mask

    def longest(self, text: int = 0) -> int:
        """One more than the last place of a text that any row has."""
        return int(self.places[:, text].max()) + 1 if len(self.places) else 0

    def layer(self, layer: int) -> Tokens:
        """Attention of one layer, as it was asked for: values [T, 2, H, d]."""
        return replace(self, values=self.values[:, self.layers.index(layer)], layers=())

    def select(self, rows: Tensor) -> Tokens:
        """The given rows, in the given order: rows [m] int64."""
        picked = Ragged(torch.arange(len(self.values), device=self.offsets.device), self.offsets).select(rows)
        return replace(
            self,
            values=self.values.index_select(0, picked.values),
            offsets=picked.offsets,
            places=self.places[picked.values],
        )

    def rows(self, rows: slice) -> Tokens:
        """Consecutive rows, without a copy."""
        offsets = self.offsets[rows.start : rows.stop + 1]
        tokens = slice(int(offsets[0]), int(offsets[-1]))
        offsets, places = offsets - offsets[0], self.places[tokens]
        return replace(self, values=self.values[tokens], offsets=offsets, places=places)

    def keep(self, kept: Tensor) -> Tokens:
        """Only the tokens where ``kept`` [T] is True."""
        ends = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
        there = kept.nonzero()[:, 0]
        values = self.values.index_select(0, there)
        return replace(self, values=values, offsets=ends[self.offsets], places=self.places[there])

    def among(self, rows: Tensor, n: int) -> Tokens:
        """n rows, of which ``rows`` [len(self)], ascending, are these and the others empty."""
        lengths = self.offsets.new_zeros(n).index_copy(0, rows, self.lengths)
        return replace(self, offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))

    @classmethod
    def stack(cls, parts: Sequence[Tokens]) -> Tokens:
        """The rows of all parts, one part after the other."""
        lengths = torch.cat([part.lengths for part in parts])
        return replace(
            parts[0],
            values=torch.cat([part.values for part in parts]),
            offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            places=torch.cat([part.places for part in parts]),
        )

    def detach(self) -> Tokens:
        return replace(self, values=self.values.detach())

    def to(self, device: torch.device | str) -> Tokens:
        return replace(
            self,
            values=self.values.to(device),
            offsets=self.offsets.to(device),
            places=self.places.to(device),
        )
