"""Asks teachers about a sample through the store, and says how healthy they are. Next: ``health.py``."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch

from distill.batch import Ragged
from distill.data.dataset import DataSet
from distill.data.interaction_source import InteractionSource
from distill.data.judged import Judged, Table, TextTable
from distill.data.lists import Lists
from distill.data.source import JudgedSource, TextSource, generator_of
from distill.graph import DistillationGraph
from distill.health import OPPOSITE, SHARP, SURE, Health, Said, agreement_of, ailments, examine, misheard
from distill.model import Model
from distill.outputs import Needs
from distill.results import NOTHING
from distill.store import Listener, TeacherMemory, of_pairs
from distill.store_files import Precision

log = logging.getLogger("distill")

QUERIES = 256  # whose lists are looked at when a run starts
LONGEST = 32  # candidates of a list that are looked at
FEW = 32  # queries whose lists of positives are filled up when a run starts
FILLED = 8  # candidates of a list where the data lists positives only
FIGURES = ("pairs", "mean", "spread", "in lists", "ties", "at the ends", "agreement", "temperature")
HEADER = ("teacher", "data", "split", *FIGURES)


@dataclass(frozen=True)
class Patient:
    """A teacher on one split of one data set."""

    teacher: str
    data: str
    split: str
    said: Said
    health: Health

    def row(self) -> list[str]:
        h = self.health
        agreement = NOTHING if h.agreement is None else f"{h.agreement:+.3f}"
        temperature = NOTHING if h.temperature is None else f"{h.temperature:.2g}"
        numbers = [
            f"{h.mean:.3g}",
            f"{h.spread:.3g}",
            f"{h.in_list:.3g}",
            f"{h.ties:.1%}",
            f"{h.saturation:.1%}",
        ]
        return [self.teacher, self.data, self.split, f"{h.pairs:,}", *numbers, agreement, temperature]


class Between(NamedTuple):
    """How far two teachers order the same lists alike: 1 the same, 0 as by chance, -1 the opposite."""

    one: str
    other: str
    data: str
    agreement: float
    luck: float
    lists: int

    def __str__(self) -> str:
        over = f"{self.lists:,} lists" if self.lists > 1 else "all pairs"
        return f"{self.one} and {self.other} on {self.data}: agreement {self.agreement:+.3f} over {over}"


class Checkup(NamedTuple):
    """What ``check`` found of the teachers; of those that it did not ask, why not."""

    patients: list[Patient]
    between: list[Between]
    warnings: list[str]
    not_asked: dict[str, str]


def health_at_start(memory: TeacherMemory) -> dict[str, Any]:
    """The health of the teachers that the store holds: warned of in the log, returned for ``metrics.json``.

    Only training data is looked at. Where the memory was filled nothing is asked, but for data that lists
    positives only: there candidates drawn at random stand beside those of a few queries.
    """
    patients = {(one.teacher, one.data): one for one in _patients(memory, "train", QUERIES)}
    for name, source in memory.sources.items():
        told = {one.teacher for one in patients.values() if one.data == name and one.health.lists}
        teachers = {one.name for one in memory.listeners if one.data == name} - told
        if source.judged.task == "retrieval" and teachers and (sample := sample_of(source.judged, FEW)):
            found, asked = _of_sample(memory.graph, name, sample, memory.precision, "train", teachers)
            memory.asked, memory.seconds = memory.asked + asked.asked, memory.seconds + asked.seconds
            patients |= {(one.teacher, name): one for one in found}
    return _told(memory.graph, list(patients.values()))


def _told(graph: DistillationGraph, patients: Sequence[Patient]) -> dict[str, Any]:
    warnings = list(_warnings(graph, patients))
    for line in warnings:
        log.warning("%s", line)
    figures = [{"teacher": one.teacher, "data": one.data, **one.health.to_json()} for one in patients]
    pairs = [one._asdict() for one in between(patients)]
    return {"teachers": figures, "between": pairs, "warnings": warnings} if figures else {}


def checkup(
    graph: DistillationGraph,
    data: Mapping[str, DataSet],
    precision: Precision,
    queries: int,
    unmade: Collection[str] = (),
) -> Checkup:
    """The health of frozen teachers on lists of train, and of dev as held out; how far any two agree.

    What is not known of the sample is asked, and kept in the teacher store.

    Args:
        graph: On its device, with its autocast set.
        data: By the names that arrows are limited to.
        queries: How many queries' lists of each split are looked at.
        unmade: Teachers that are not there yet.
    """
    frozen = set(graph.nodes) - graph.trained
    not_asked = {name: "the run that makes it comes first" for name in sorted(frozen.intersection(unmade))}
    for name in sorted(frozen - set(unmade)):
        if type(graph.nodes[name]).fit is not Model.fit and graph.nodes[name].identity is None:
            not_asked[name] = "it is fitted when the recipe is run, and looked at then"
    patients: list[Patient] = []
    tails = {arrow.tail for arrow in graph.arrows if arrow.tail is not None}
    heard = frozen & tails.union(*(graph.below(tail) for tail in tails))
    heard = {name for name in heard if not graph.nodes[name].of}  # of the others the parts are looked at
    for name, part in data.items():
        for split in ("train", "dev"):
            if "train" not in part.splits or split not in part.splits:
                continue
            if (sample := sample_of(part.split(split), queries)) is None:
                continue
            patients += _of_sample(graph, name, sample, precision, split, frozen - set(not_asked))[0]
    for name in sorted(heard - {one.teacher for one in patients} - set(not_asked)):
        not_asked[name] = "what is heard of it are no scores of listed candidates, and these are looked at"
    return Checkup(patients, list(between(patients)), list(_warnings(graph, patients)), not_asked)


def _of_sample(
    graph: DistillationGraph,
    name: str,
    sample: Judged,
    precision: Precision,
    split: str,
    teachers: Collection[str],
) -> tuple[list[Patient], TeacherMemory]:
    """The health of some teachers on a sample of a data set, and the memory by which they were asked."""
    kind: type[JudgedSource] = TextSource if isinstance(sample.queries, TextTable) else InteractionSource
    source = kind(sample, len(sample.queries), int(sample.listed.lengths.max()), name=name)
    source.prepare(*graph.columns())
    memory = TeacherMemory(graph, {name: source}, precision, mend=False)
    memory.listeners = [
        one
        for one in memory.listeners
        if one.name in teachers and (one.name in source.scored or not one.node.recorded)
    ]
    memory.fill()
    return list(_patients(memory, split, len(sample.queries))), memory


def sample_of(judged: Judged, queries: int) -> Judged | None:
    """The lists of some queries; None: nobody lists anything.

    Where only positives are listed and others are searched for (retrieval), lists are filled up with
    candidates drawn at random, which count as not relevant.
    """
    asked, there = judged.queries, judged.candidates
    lists = Lists(judged)
    having = (lists.rows.lengths > 0).nonzero()[:, 0]
    if not len(having):
        return None
    queries *= FILLED if judged.task == "pairs" else 1  # lists of one: as many pairs as elsewhere
    generator = generator_of(0, len(having))
    chosen = having[torch.randperm(len(having), generator=generator)[:queries]].sort().values
    rows = lists.rows.select(chosen).truncate(LONGEST)
    entries = Ragged(lists.entries, lists.rows.offsets).select(chosen).truncate(LONGEST).values
    labels = None if judged.labels is None else judged.labels[entries]
    scores, pair = (
        {name: values[entries] for name, values in given.items()} for given in (judged.scores, judged.pair)
    )
    if judged.task == "retrieval" and labels is not None and not (scores or pair):
        drawn = torch.randint(len(judged.candidates), (len(chosen), FILLED), generator=generator)
        drawn = there.same[drawn]
        new = ~judged.is_positive(chosen[:, None].expand_as(drawn), drawn)
        new &= torch.arange(FILLED) < (FILLED - rows.lengths)[:, None]
        more = Ragged.of_lengths(drawn[new], new.sum(1))
        labels = _beside(
            Ragged(labels, rows.offsets), Ragged(torch.zeros(len(more.values)), more.offsets)
        ).values
        rows = _beside(rows, more)
    kept, place = rows.values.unique(return_inverse=True)

    return Judged(
        judged.task,
        _chosen(asked, chosen),
        _chosen(there, kept),
        Ragged(place, rows.offsets),
        labels,
        scores,
        judged.name,
        pair,
    )


def _chosen(table: Table, rows: torch.Tensor) -> Table:
    if isinstance(table, TextTable):
        return TextTable([table.ids[row] for row in rows.tolist()], table.take(rows))
    return table.take(rows)


def _beside(one: Ragged, other: Ragged) -> Ragged:
    """Each row of ``one`` followed by the row of ``other``."""
    both = Ragged.stack([one, other])
    n = len(one)
    order = torch.stack([torch.arange(n), torch.arange(n) + n], dim=1).reshape(-1)
    return Ragged.of_lengths(both.select(order).values, one.lengths + other.lengths)


def _patients(memory: TeacherMemory, split: str, queries: int) -> Iterator[Patient]:
    for listener in memory.listeners:
        if (said := _said_by(memory, listener, queries)) is not None:
            yield Patient(listener.name, listener.data, split, said, examine(said))


def _said_by(memory: TeacherMemory, listener: Listener, most: int) -> Said | None:
    """A teacher's scores of what up to ``most`` queries list; None: what is stored does not tell them."""
    source, node = listener.source, listener.node
    queries = source.query_rows[:: max(1, len(source.query_rows) // most)][:most]
    rows = source.lists.rows.select(queries).truncate(LONGEST)
    if not len(rows.values):
        return None
    entries = Ragged(source.lists.entries, source.lists.rows.offsets).select(queries).truncate(LONGEST).values
    asked = queries.repeat_interleave(rows.lengths)
    if listener.name in source.scored:
        scores = source.judged.scores[listener.name][entries]
    else:
        stored = {f for signal in listener.signals.values() for f in signal.fields}
        known = {"scores"} if "scores" in stored else node.represents(Needs("scores")).fields
        if "scores" not in node.provides or not known <= stored:
            return None
        batch = memory.recall(of_pairs(source, asked, rows.values))
        said = batch.stored[listener.name].to(node.device)
        with torch.no_grad():
            answered = said.scores
            if answered is None:
                answered = node.compare(said, batch.to(node.device), Needs("scores")).scores
        assert answered is not None
        scores = answered.float().cpu()[batch.mask]
    labels = None if source.judged.labels is None else source.judged.labels[entries].numpy()
    apart = source.judged.task == "pairs"  # each pair is for itself, whoever else was shown to the same user
    return Said(scores.numpy(), np.arange(len(entries)) if apart else asked.numpy(), labels)


def _warnings(graph: DistillationGraph, patients: Sequence[Patient]) -> Iterator[str]:
    """What is wrong with each teacher, with how it is heard, and between two of them."""
    of = {(one.teacher, one.data, one.split): one for one in patients}
    for (name, data, split), one in of.items():
        if split != "train":
            continue
        where = f"models.{name}" + (f" on {data}" if data != "data" else "")
        held_out = of.get((name, data, "dev"))
        for line in ailments(one.health, None if held_out is None else held_out.health):
            yield _sentence(f"{where}: {line}")
        for arrow in graph.arrows if one.health.in_list <= SHARP else ():
            temperature = getattr(arrow.objective, "teacher_temperature", None)
            hears = arrow.tail == name and (arrow.data is None or data in arrow.data)
            if hears and temperature is not None and "scores" in arrow.objective.teacher_needs:
                for line in misheard((held_out or one).health, temperature):
                    yield _sentence(f"losses.{arrow.name}: {where}: {line}")
    for pair in between(patients):
        names = f"models.{pair.one} and models.{pair.other}"
        if pair.luck < SURE and pair.agreement < OPPOSITE:
            yield f"{names} teach opposite orders (agreement {pair.agreement:+.2f}): one of them is wrong."
        elif pair.luck < SURE and pair.agreement > 0.995:
            yield (
                f"{names} put nearly all candidates in one order (agreement {pair.agreement:+.3f}): one adds "
                f"nothing."
            )


def between(patients: Sequence[Patient]) -> Iterator[Between]:
    """How far any two teachers agree on the lists of train that both were heard about."""
    for one, other in combinations([one for one in patients if one.split == "train"], 2):
        if one.data == other.data and np.array_equal(one.said.lists, other.said.lists):
            found = agreement_of(one.said, other.said.scores)
            if found.mean is not None and found.luck is not None:
                yield Between(one.teacher, other.teacher, one.data, found.mean, found.luck, len(found.lists))


def _sentence(line: str) -> str:
    return line if line.endswith("?") else f"{line}."
