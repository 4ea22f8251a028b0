"""What frozen teachers said, so that each is asked once about each text and each pair, whoever asks.

Kept on disk (``store_files.py``). Next: ``trainer.py``, which reads it for every batch.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distill.batch import Batch
from distill.data.mixture import Mixture
from distill.data.source import JudgedSource, Source
from distill.errors import RunError
from distill.graph import DistillationGraph
from distill.model import Model
from distill.outputs import AXES, JOINT, STORABLE, Needs, Outputs
from distill.paths import store_folder
from distill.processes import any_of, gather, is_first, of_each, rank, world
from distill.store_files import Precision, Signal, Teacher, pair_keys, signal_folder

log = logging.getLogger("distill")

TEXTS_AT_ONCE = 4096
PAIRS_AT_ONCE = 4096
PLURAL = {"query": "queries", "candidate": "candidates", "pair": "pairs"}
NONE = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Question:
    """What a teacher is asked at once: its answer is one block of the store.

    ``queries`` and ``candidates`` are rows of the source: of pairs n each, side by side; else one is empty.
    """

    listener: Listener
    axis: str
    queries: Tensor
    candidates: Tensor

    def __len__(self) -> int:
        return max(len(self.queries), len(self.candidates))


@dataclass(frozen=True)
class Listener:
    """A frozen node on one source: what is asked of it there, and where its answers are."""

    name: str
    node: Model
    data: str  # the source's name
    source: JudgedSource
    signals: Mapping[str, Signal]  # axis -> what is asked on it

    @property
    def given(self) -> bool:
        """Whether its scores of listed pairs come with the data, and no more is asked about a pair."""
        return self.name in self.source.scored and self.signals["pair"].fields == ("scores",)


class TeacherMemory:
    """Asks each frozen teacher once about every text and every listed pair, and recalls what it said.

    A teacher is asked in blocks of what is not known yet, in the order of the data. The last bits of an
    answer depend on its neighbours in a block, and a block is kept whole or not at all: who is stopped and
    goes on asks in the same blocks and hears the same. What a sampler brings is asked with its batch. Scores
    that come with the data are heard instead of the teacher's own.

    Nodes that are trained, built ``of`` others, or asked about a whole batch (``in_batch``) are not asked.

    Args:
        graph: On its device, with its autocast set.
        sources: The sources by name; to ask, their columns must be prepared.
        precision: In which answers are kept.
        mend: Remove damaged blocks from the store.

    Raises:
        DataError: A store that another teacher wrote.
    """

    def __init__(
        self,
        graph: DistillationGraph,
        sources: Mapping[str, JudgedSource],
        precision: Precision = "float32",
        mend: bool = True,
    ):
        self.graph, self.sources, self.precision, self.mend = graph, dict(sources), precision, mend
        self.asked: Counter[str] = Counter()  # about how many texts and pairs, by teacher
        self.seconds = 0.0  # that asking took
        self._heard: dict[tuple[str, int], np.ndarray] = {}  # which rows of a signal somebody heard
        self.teachers: dict[str, Teacher | None] = {}
        self._signals: dict[Path | tuple[str, ...], Signal] = {}
        self._keys: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.listeners = [
            listener for name, source in self.sources.items() for listener in self._listeners(name, source)
        ]

    def _listeners(self, source_name: str, source: JudgedSource) -> Iterator[Listener]:
        graph = self.graph
        arrows = [arrow for arrow in graph.arrows if arrow.data is None or source_name in arrow.data]
        for name, needs in graph.asked(arrows).items():
            node = graph.nodes[name]
            if name in graph.trained or node.of:
                continue
            if name in source.scored and not source.negatives:  # then every score comes with the data
                needs = needs.only(needs.fields - {"scores"})
            wanted = _stored_of(node, needs)
            if wanted is not None:
                yield Listener(name, node, source_name, source, self._signals_of(name, node, wanted))

    def _signals_of(self, name: str, node: Model, wanted: Needs) -> dict[str, Signal]:
        if wanted and name not in self.teachers:
            self.teachers[name] = Teacher.of(node, self._autocast_dtype(node.device.type), store_folder())
        signals = {}
        for axis in PLURAL:
            if fields := tuple(sorted(f for f in wanted.fields if AXES[f] == axis)):
                teacher = self.teachers[name]
                place = (name, *fields) if teacher is None else signal_folder(teacher, fields, self.precision)
                if place not in self._signals:
                    self._signals[place] = Signal(teacher, fields, self.precision, self.mend)
                signals[axis] = self._signals[place]
        return signals

    def _autocast_dtype(self, device: str) -> str:
        """In which precision the heavy half runs there."""
        with self.graph.autocast():
            on = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if on else torch.float32
        return str(dtype).removeprefix("torch.")

    # Asking

    def fill(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Ask what is not known yet about all texts and listed pairs.

        Raises:
            KeyboardInterrupt: ``stopped`` became true; what was answered until then is kept.
        """
        for listener in self.listeners:
            for axis in listener.signals:
                self.fill_in(listener, axis, stopped)

    def fill_in(self, listener: Listener, axis: str, stopped: Callable[[], bool] = lambda: False) -> int:
        """``fill`` for one teacher, source and axis; returns about how many texts or pairs it was asked."""
        questions = self.unknown(listener, axis)
        n, what = sum(map(len, questions)), PLURAL[axis]
        with tqdm(total=n, desc=f"{listener.name}: {what}", disable=None, leave=False) as bar:
            for at_once in _in_turns(questions):
                self.ask(at_once)
                bar.update(sum(map(len, at_once)))
                if any_of(stopped())[0]:
                    raise KeyboardInterrupt("the answers of the teachers so far are kept")
        if n:
            log.info("%s answered %s %s", listener.name, f"{n:,}", what)
        keys = self._keys_of(listener.source, axis, *self._rows(listener, axis))
        self._mark(listener, axis, listener.signals[axis].find(keys))
        return n

    @property
    def answers(self) -> Counter[str]:
        """How many texts and pairs were filled in or recalled, each once, by teacher."""
        heard: Counter[str] = Counter()
        for (name, _), rows in self._heard.items():
            heard[name] += int(rows.sum())
        return heard

    def _mark(self, listener: Listener, axis: str, rows: np.ndarray) -> None:
        signal = listener.signals[axis]
        place = (listener.name, id(signal))
        heard = np.zeros(len(signal), dtype=bool)
        before = self._heard.get(place, heard[:0])
        heard[: len(before)] = before
        heard[rows] = True
        self._heard[place] = heard

    def unknown(self, listener: Listener, axis: str) -> list[Question]:
        """What the store does not know of a source's texts or listed pairs, cut into blocks."""
        return self._questions(listener, axis, *self._rows(listener, axis))

    def count(self, listener: Listener, axis: str) -> tuple[int, int]:
        """How many distinct texts or listed pairs a teacher is asked about, and how many it has answered."""
        keys = self._keys_of(listener.source, axis, *self._rows(listener, axis))
        keys = keys[np.unique(keys[:, 0], return_index=True)[1]]
        return len(keys), int((listener.signals[axis].find(keys) >= 0).sum())

    def ask(self, questions: Sequence[Question]) -> None:
        """Ask one question in each process, and keep the answers: all hear all of them, the first writes."""
        start = time.monotonic()
        mine = self._answer(questions[rank()]) if rank() < len(questions) else {}
        for question, values in zip(questions, of_each(mine), strict=False):
            source, axis = question.listener.source, question.axis
            keys = self._keys_of(source, axis, question.queries, question.candidates)
            try:
                question.listener.signals[axis].append(keys, values, on_disk=is_first())
            except RunError as error:
                raise RunError(f"models.{question.listener.name}: {error}") from error
            self.asked[question.listener.name] += len(question)
        self.seconds += time.monotonic() - start

    @torch.no_grad()
    def _answer(self, question: Question) -> dict[str, Tensor]:
        listener, axis, source = question.listener, question.axis, question.listener.source
        node, signal = listener.node, listener.signals[axis]
        if axis == "pair":
            batch = of_pairs(source, question.queries, question.candidates)
        else:
            batch = source.gather(question.queries, question.candidates)
        batch = batch.to(node.device).view(*node.reads.keys)
        with self.graph.autocast():
            answer = node.represent(batch, Needs(*signal.fields))
        if missing := set(signal.fields) - dict(answer.given()).keys():
            answer = node.compare(answer, batch, Needs(*missing))
        values = {f: getattr(answer, f).float() for f in signal.fields}
        if axis == "pair":
            values = {f: value[batch.mask] for f, value in values.items()}
        return {f: value.cpu() for f, value in values.items()}

    def _rows(self, listener: Listener, axis: str) -> tuple[Tensor, Tensor]:
        """The queries and candidates of all texts, or pairs side by side, that a teacher is asked about."""
        source = listener.source
        if axis == "query":
            return source.query_rows, NONE
        if axis == "candidate":
            return NONE, source.candidate_rows
        if listener.given:
            return NONE, NONE
        listed = source.lists.rows.select(source.query_rows)
        return source.query_rows.repeat_interleave(listed.lengths), listed.values

    def _questions(
        self, listener: Listener, axis: str, queries: Tensor, candidates: Tensor
    ) -> list[Question]:
        keys = self._keys_of(listener.source, axis, queries, candidates)
        unknown = torch.from_numpy(listener.signals[axis].find(keys) < 0)
        missing = gather(unknown[None]).any(dim=0).numpy().nonzero()[0]  # to any process
        _, first = np.unique(keys[missing, 0], return_index=True)
        rows = torch.from_numpy(missing[np.sort(first)])  # each once, in the order of the data
        return [
            Question(
                listener,
                axis,
                queries[part] if len(queries) else NONE,
                candidates[part] if len(candidates) else NONE,
            )
            for part in rows.split(PAIRS_AT_ONCE if axis == "pair" else TEXTS_AT_ONCE)
            if len(part)
        ]

    def _keys_of(self, source: JudgedSource, axis: str, queries: Tensor, candidates: Tensor) -> np.ndarray:
        if id(source) not in self._keys:
            self._keys[id(source)] = (source.queries.keys(), source.candidates.keys())
        of_query, of_candidate = self._keys[id(source)]
        if axis == "query":
            return of_query[queries.numpy()]
        if axis == "candidate":
            return of_candidate[candidates.numpy()]
        return pair_keys(of_query[queries.numpy()], of_candidate[candidates.numpy()])

    # Recalling

    def recall(self, batch: Batch) -> Batch:
        """The batch, with what the frozen teachers say of it in ``stored``."""
        return self.recall_all([batch])[0]

    def recall_all(self, batches: Sequence[Batch]) -> list[Batch]:
        """``recall`` of several batches: what none of them is known to hold is asked together."""
        for listener in self.listeners:
            heard = [batch for batch in batches if batch.source == listener.data]
            for axis in listener.signals:
                rows = [self._rows_in(listener, axis, batch) for batch in heard]
                if rows:
                    queries, candidates = map(torch.cat, zip(*rows, strict=True))
                    for at_once in _in_turns(self._questions(listener, axis, queries, candidates)):
                        self.ask(at_once)
        return [self._recalled(batch) for batch in batches]

    @property
    def at_once(self) -> int:
        """How many batches are asked about together: their pairs that samplers bring fill one block."""
        asked = [one.source for one in self.listeners if "pair" in one.signals and one.source.negatives]
        most = max((source.batch_size * source.width for source in asked), default=PAIRS_AT_ONCE)
        return max(1, PAIRS_AT_ONCE // max(1, most))

    def _rows_in(self, listener: Listener, axis: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """The rows of a batch that a teacher is asked about; of pairs only those without a given score."""
        if axis == "query":
            return batch.query_ids, NONE
        if axis == "candidate":
            return NONE, batch.candidate_ids
        wanted = batch.mask
        if listener.given and (given := batch.stored.get(listener.name)) is not None:
            wanted = wanted & ~given.known if given.known is not None else torch.zeros_like(wanted)
        queries = batch.query_ids[:, None].expand_as(batch.index)
        return queries[wanted], batch.candidate_ids[batch.index[wanted]]

    def _recalled(self, batch: Batch) -> Batch:
        stored = dict(batch.stored)
        for listener in self.listeners:
            if batch.source == listener.data:
                said = Outputs()
                for axis in listener.signals:
                    said = said.with_(**self._answers(listener, axis, batch))
                stored[listener.name] = _with_given(listener, said, batch)
        return replace(batch, stored=stored)

    def _answers(self, listener: Listener, axis: str, batch: Batch) -> dict[str, Tensor]:
        signal, mask = listener.signals[axis], batch.mask
        if axis != "pair":
            found = signal.find(self._keys_of(listener.source, axis, *self._rows_in(listener, axis, batch)))
            if not len(found):  # a batch of texts only has no queries, and the store no shape of them
                return {f: torch.zeros(0, listener.node.sizes.get(f, 0)) for f in signal.fields}
            self._mark(listener, axis, found)
            return signal.read(found)
        queries = batch.query_ids[:, None].expand_as(batch.index)[mask]
        keys = self._keys_of(listener.source, axis, queries, batch.candidate_ids[batch.index[mask]])
        found = signal.find(keys)
        self._mark(listener, axis, found[found >= 0])
        place = mask.nonzero()[torch.from_numpy(found >= 0)]
        answers = {}
        for f, values in signal.read(found[found >= 0]).items():
            answers[f] = values.new_zeros(*mask.shape, *values.shape[1:])
            answers[f][place[:, 0], place[:, 1]] = values
        return answers


class RecalledBatches:
    """A source's batches by their place, each with what the frozen teachers say of it.

    Batches are made, and teachers asked, for a few steps of an epoch at once: always the same ones, so that
    a resumed run asks in the same blocks.
    """

    def __init__(self, memory: TeacherMemory, source: Source):
        self.memory, self.source = memory, source
        self._made: dict[tuple[int, int], Batch] = {}

    def batch(self, epoch: int, step: int) -> Batch:
        if (epoch, step) not in self._made:
            first = step - step % self.memory.at_once
            steps = range(first, min(first + self.memory.at_once, self.source.steps(epoch)))
            batches = self.memory.recall_all([self.source.batch(epoch, s) for s in steps])
            self._made = {(epoch, s): batch for s, batch in zip(steps, batches, strict=True)}
        return self._made[epoch, step]


def _stored_of(node: Model, needs: Needs) -> Needs | None:
    """Which answers of a node are kept: what it represents, or where that is too large, what follows from it.

    None: all is asked with its batch, as nothing would be saved.
    """
    heavy = node.represents(needs)
    if heavy.fields <= STORABLE:
        return heavy
    if "in_batch" in needs or (needs.fields & JOINT and needs.first is None):
        return None
    return needs.only(needs.fields & STORABLE) or None


def _in_turns(questions: Sequence[Question]) -> Iterator[Sequence[Question]]:
    """As many questions at once as there are processes."""
    for start in range(0, len(questions), world()):
        yield questions[start : start + world()]


def _with_given(listener: Listener, said: Outputs, batch: Batch) -> Outputs:
    """What a teacher said, with the scores in their places that came with the data."""
    given = batch.stored.get(listener.name)
    if given is None or given.scores is None:
        return said
    scores = given.scores
    if given.known is not None:
        own = said
        if own.scores is None:
            device = listener.node.device
            own = listener.node.compare(said.to(device), batch.to(device), Needs("scores")).to("cpu")
        assert own.scores is not None
        scores = torch.where(given.known, scores, own.scores)
    return said.with_(scores=scores)


def of_pairs(source: JudgedSource, queries: Tensor, candidates: Tensor) -> Batch:
    """A batch that lists n pairs of rows, in their order; pairs of one query stand together."""
    asked, counts = queries.unique_consecutive(return_counts=True)
    distinct, place = candidates.unique(return_inverse=True)
    mask = torch.arange(int(counts.max())) < counts[:, None]
    index = torch.zeros(mask.shape, dtype=torch.int64)
    index[mask] = place
    return source.gather(asked, distinct, index, mask)


def fit_teachers(graph: DistillationGraph, sources: Mapping[str, JudgedSource]) -> None:
    """Let frozen nodes learn what no gradient teaches, each from the first source it is heard on."""
    fitted: set[str] = set()
    for source_name, source in sources.items():
        arrows = [arrow for arrow in graph.arrows if arrow.data is None or source_name in arrow.data]
        for name in graph.asked(arrows):
            if name not in graph.trained and name not in fitted:
                graph.nodes[name].fit(source)
                fitted.add(name)


def judged_sources(source: Source) -> dict[str, JudgedSource]:
    """The judged sources inside a source, by the name their batches carry."""
    if isinstance(source, Mixture):
        return {name: part for name, part in source.sources.items() if isinstance(part, JudgedSource)}
    return {source.name: source} if isinstance(source, JudgedSource) else {}
