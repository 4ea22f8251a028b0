"""A model asked about a batch in pieces: each process about its share, and no more rows at once than fit.

What ``represent`` says of a row never depends on another, so a batch may be cut along each axis and the
answers put together. Next: ``processes.py``, ``gradient_cache.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distill.batch import Batch
from distill.gradient_cache import Ask
from distill.outputs import AXES, ROWWISE, Needs, Outputs, Said
from distill.processes import gather_shares, share
from distill.tokens import Tokens

if TYPE_CHECKING:
    from distill.graph import DistillationGraph


def in_pieces(ask: Ask, batch: Batch, fields: Needs, rows: int | None = None) -> Outputs:
    """What ``ask`` says about all rows of a batch; with several processes each asks about its share.

    Args:
        ask: Of a model, for some rows of the batch.
        batch: With the columns that the model reads.
        fields: What ``represent`` fills, each of ``ROWWISE``.
        rows: The most queries, candidates or pairs of a piece; None: all of the share.
    """
    apart = fields.only(f for f in fields.fields if AXES[f] != "pair")
    pairs = fields.only(f for f in fields.fields if AXES[f] == "pair")
    said = _apart(ask, batch, apart, rows) if apart else {}
    return Outputs().with_(**said, **(_pairs(ask, batch, pairs, rows) if pairs else {}))


def _apart(ask: Ask, batch: Batch, fields: Needs, rows: int | None) -> dict[str, Said]:
    """Fields along queries or candidates: B or P rows."""
    sizes = {"query": batch.sizes[0], "candidate": batch.sizes[2]}
    wanted = {AXES[f] for f in fields.fields}
    device = batch.mask.device
    queries, candidates = (
        torch.arange(n, device=device)[share(n)] if axis in wanted else torch.arange(0, device=device)
        for axis, n in sizes.items()
    )
    pieces = [(queries, candidates)]  # one pass over both: an encoder's chunks are fewer and fuller
    if rows is not None:
        none = queries[:0]
        cut = [(part, none) for part in queries.split(rows)] + [
            (none, part) for part in candidates.split(rows)
        ]
        pieces = [piece for piece in cut if len(piece[0]) or len(piece[1])] or cut[:1]
    parts: dict[str, list[Said]] = {f: [] for f in sorted(fields.fields)}  # all gather in one order
    for piece in pieces:
        answer = dict(ask(batch.select(*piece), fields).given())
        for f in parts:
            parts[f].append(answer[f])
    return {f: _joined(part, sizes[AXES[f]]) for f, part in parts.items()}


def _pairs(ask: Ask, batch: Batch, fields: Needs, rows: int | None) -> dict[str, Said]:
    """Fields along listed pairs: [B, N, ...], 0 or without tokens where nothing is listed."""
    query, place = batch.mask.nonzero(as_tuple=True)
    mine = torch.arange(len(query), device=query.device)[share(len(query))]
    parts: dict[str, list[Said]] = {f: [] for f in sorted(fields.fields)}  # all gather in one order
    for piece in mine.split(rows or max(1, len(mine))):
        q, c = query[piece], batch.index[query[piece], place[piece]]
        q, row = q.unique(return_inverse=True)
        part = batch.select(q, c.unique())
        mask = torch.zeros_like(part.mask)
        mask[row, place[piece]] = True
        answer = dict(ask(replace(part, mask=mask), fields).given())
        for f in parts:
            value = answer[f]
            if isinstance(value, Tokens):
                parts[f].append(value.select(row * mask.shape[1] + place[piece]))
            else:
                parts[f].append(value[row, place[piece]])

    def listed(values: Said) -> Said:
        if isinstance(values, Tokens):
            return values.among(query * batch.mask.shape[1] + place, batch.mask.numel())
        return batch.spread(values)

    return {f: listed(_joined(part, len(query))) for f, part in parts.items()}


def _joined(parts: Sequence[Said], n: int) -> Said:
    """The rows of all pieces, and of all processes: n in all."""
    if not isinstance(parts[0], Tokens):
        return gather_shares(torch.cat([part for part in parts if isinstance(part, Tensor)]), n)
    tokens = Tokens.stack([part for part in parts if isinstance(part, Tokens)])
    lengths = gather_shares(tokens.lengths, n)
    return replace(
        tokens,
        values=gather_shares(tokens.values, n, lengths),
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        places=gather_shares(tokens.places, n, lengths),
    )


def piece_problems(graph: DistillationGraph, cached: bool, several: bool) -> Iterator[str]:
    """What of a graph cannot be asked in pieces, in words: for a cached gradient, or by several processes."""
    why = ["train.gradient_cache"] * cached + ["several processes"] * several
    for name in sorted(graph.trained) if why else ():
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in graph.nodes[name].modules()):
            yield (
                f"models.{name}: its batch normalisation makes rows depend on each other, which "
                f"{' and '.join(why)} cannot allow; take a model with layer normalisation."
            )
    for arrow in graph.arrows if cached else ():
        for name, needs in graph.asked([arrow]).items():
            node = graph.nodes[name]
            for f in sorted(node.represents(needs).fields - ROWWISE) if name in graph.trained else ():
                yield (
                    f"train.gradient_cache: losses.{arrow.name} compares {f}, which '{name}' "
                    f"({type(node).__name__}) does not represent row by row, so its gradient cannot be "
                    f"cached; leave gradient_cache out, or take the arrow out."
                )
