"""What frozen teachers said, so that each is asked once about each text and each listed pair.

Kept in memory for one run. Next: ``trainer.py``, which reads it for every batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from distill.batch import Batch
from distill.data.mixture import Mixture
from distill.data.source import Source, TextSource
from distill.graph import DistillationGraph
from distill.outputs import AXES, Needs, Outputs

log = logging.getLogger("distill")

TEXTS_AT_ONCE = 4096
PAIRS_AT_ONCE = 4096
PLURAL = {"query": "queries", "candidate": "candidates", "pair": "pairs"}


@dataclass
class _Said:
    """A frozen node's words on one source: a row of each field per known key."""

    keys: dict[str, Tensor] = field(default_factory=dict)  # axis -> [K] sorted: row of a text, or of a pair
    values: dict[str, Tensor] = field(default_factory=dict)  # field of Outputs -> [K, ...]


class TeacherMemory:
    """Asks each frozen teacher once about every text, and every listed pair, of the training data.

    The blocks in which a teacher is asked are the same in every run of a recipe (the last bits of an answer
    depend on its neighbours in a block), so a run that is resumed hears what it heard before. A pair that a
    sampler brings is not known, and its batch is asked live.

    Args:
        graph: On its device, with its autocast set.
        sources: The text sources by name; their columns are prepared.
    """

    def __init__(self, graph: DistillationGraph, sources: Mapping[str, TextSource]):
        self.graph = graph
        self._known: dict[str, dict[str, _Said]] = {}
        self._sizes = {name: len(source.candidates) for name, source in sources.items()}
        graph.eval()
        for name, source in sources.items():
            arrows = [arrow for arrow in graph.arrows if arrow.data is None or name in arrow.data]
            asked = graph.asked(arrows)
            self._known[name] = {
                node: self._ask(node, graph.nodes[node].represents(needs), source)
                for node, needs in asked.items()
                if node not in graph.trained
                and not graph.nodes[node].of
                and node not in source.scored
                and "in_batch" not in graph.nodes[node].represents(needs)  # depends on the batch
            }

    def recall(self, batch: Batch) -> Batch:
        """The batch, with all that is known of it in ``stored``."""
        stored = dict(batch.stored)
        for node, said in self._known.get(batch.source, {}).items():
            if (answer := self._recall(said, batch)) is not None:
                stored[node] = answer
        return replace(batch, stored=stored)

    @torch.no_grad()
    def _ask(self, name: str, needs: Needs, source: TextSource) -> _Said:
        said = _Said()
        node = self.graph.nodes[name]
        for axis, blocks in (
            ("query", self._query_blocks(source)),
            ("candidate", self._candidate_blocks(source)),
            ("pair", self._pair_blocks(source)),
        ):
            wanted = Needs(*(f for f in needs.fields if AXES[f] == axis))
            if not wanted:
                continue
            keys: list[Tensor] = []
            parts: dict[str, list[Tensor]] = {f: [] for f in wanted.fields}
            with tqdm(blocks, desc=f"{name}: {PLURAL[axis]}", disable=None, leave=False) as bar:
                for key, batch in bar:
                    view = batch.to(node.device).view(*([c.key for c in columns] for columns in node.reads))
                    with self.graph.autocast():
                        answer = node.represent(view, wanted)
                    keys.append(key)
                    for f in wanted.fields:
                        value = getattr(answer, f).float().cpu()
                        parts[f].append(value[batch.mask] if axis == "pair" else value)
            if keys:
                order = torch.cat(keys).argsort()
                said.keys[axis] = torch.cat(keys)[order]
                said.values.update({f: torch.cat(part)[order] for f, part in parts.items()})
                log.info("%s answered %s %s", name, f"{len(order):,}", PLURAL[axis])
        return said

    @staticmethod
    def _query_blocks(source: TextSource) -> Iterator[tuple[Tensor, Batch]]:
        none = torch.empty(0, dtype=torch.int64)
        for rows in source.query_rows.split(TEXTS_AT_ONCE):
            yield rows, source.gather(rows, none)

    @staticmethod
    def _candidate_blocks(source: TextSource) -> Iterator[tuple[Tensor, Batch]]:
        none = torch.empty(0, dtype=torch.int64)
        for rows in source.candidate_rows.split(TEXTS_AT_ONCE):
            yield rows, source.gather(none, rows)

    @staticmethod
    def _pair_blocks(source: TextSource) -> Iterator[tuple[Tensor, Batch]]:
        """Queries in order with all they list, about ``PAIRS_AT_ONCE`` pairs a block."""
        asked = source.query_rows
        lengths = source.lists.rows.lengths[asked]
        block = lengths.cumsum(0).sub(1).div(PAIRS_AT_ONCE, rounding_mode="floor")
        for number in block.unique():
            queries = asked[block == number]
            rows, mask = source.lists.rows.select(queries).padded(0)
            candidates, place = rows[mask].unique(return_inverse=True)
            index = torch.zeros_like(rows)
            index[mask] = place
            key = (queries[:, None] * len(source.candidates) + rows)[mask]
            yield key, source.gather(queries, candidates, index, mask)

    def _recall(self, said: _Said, batch: Batch) -> Outputs | None:
        places: dict[str, Tensor] = {}
        for axis, known in said.keys.items():
            wanted = self._keys_of(axis, batch)
            place = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
            if not torch.equal(known[place], wanted):
                return None
            places[axis] = place
        answer: dict[str, Tensor] = {}
        for f, values in said.values.items():
            rows = values[places[AXES[f]]]
            if AXES[f] == "pair":
                full = rows.new_zeros(*batch.mask.shape, *rows.shape[1:])
                full[batch.mask] = rows
                rows = full
            answer[f] = rows
        return Outputs(**answer) if answer else None

    def _keys_of(self, axis: str, batch: Batch) -> Tensor:
        if axis == "query":
            return batch.query_ids
        if axis == "candidate":
            return batch.candidate_ids
        candidates = self._sizes[batch.source]
        return (batch.query_ids[:, None] * candidates + batch.candidate_ids[batch.index])[batch.mask]


def text_sources(source: Source) -> dict[str, TextSource]:
    """The text sources inside a source, by the name their batches carry."""
    if isinstance(source, Mixture):
        return {name: part for name, part in source.sources.items() if isinstance(part, TextSource)}
    return {source.name: source} if isinstance(source, TextSource) else {}
