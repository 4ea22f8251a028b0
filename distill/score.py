"""What ``distill score`` does: fills the teacher store as a training would, without the training."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from distill.build import Builder
from distill.data.dataset import DataSet
from distill.data.hard_negatives import HardNegatives
from distill.data.negatives import Negatives
from distill.nn.precision import autocast
from distill.paths import store_folder
from distill.plan import heard_by
from distill.processes import from_first, start, wait
from distill.settings import Recipe
from distill.store import PLURAL, RecalledBatches, TeacherMemory, fit_teachers, judged_sources
from distill.store_files import outdated, size_of
from distill.trainer import steps_of

log = logging.getLogger("distill")

Row = tuple[str, str, str, int | None, int | None, int]  # teacher, data, what; in all, known before, asked


class Scoring:
    """The frozen teachers of a recipe, its training data, and what the store knows of them.

    Args:
        recipe: Checked.
        builder: Finds the models of other recipes.
        data: The recipe's data sets, where they were read before.
        mend: Remove damaged blocks from the store.
    """

    def __init__(
        self,
        recipe: Recipe,
        builder: Builder,
        data: Mapping[str, DataSet] | None = None,
        mend: bool = True,
    ):
        from accelerate.state import PartialState

        start()
        self.recipe, self.store = recipe, store_folder()
        if data is None:
            data = builder.data(recipe)
        builder.known = dict(data)
        self.graph = builder.graph(recipe)
        self.source = builder.source(recipe, data, heard_by(self.graph, data))
        device = PartialState().device
        self.graph.to(device)
        self.graph.autocast = partial(autocast, recipe.train.mixed_precision, device)
        self.mend = mend
        self.memory = self._memory()

    def _memory(self) -> TeacherMemory:
        return TeacherMemory(self.graph, judged_sources(self.source), self.recipe.train.store, self.mend)

    def counts(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(data set, teacher) -> how many texts or listed pairs it is asked about, and how many are known."""
        found: dict[tuple[str, str], tuple[int, int]] = {}
        for listener in self.memory.listeners:
            counts = [self.memory.count(listener, axis) for axis in listener.signals]
            found[listener.data, listener.name] = (sum(n for n, _ in counts), sum(k for _, k in counts))
        return found

    def fill(self) -> None:
        """Ask what is not known yet of all texts and listed pairs."""
        self._prepare()
        self.memory.fill()

    def _prepare(self) -> None:
        self.source.prepare(*self.graph.columns())
        fit_teachers(self.graph, judged_sources(self.source))
        self.memory = self._memory()  # a teacher that is fitted is known by what it was fitted to

    def score(self) -> list[Row]:
        """Ask what is not known yet: all texts and listed pairs, then the pairs that samplers will bring."""
        self._prepare()
        rows: list[Row] = []
        for listener in self.memory.listeners:
            for axis in listener.signals:
                n, known = self.memory.count(listener, axis)
                asked = self.memory.fill_in(listener, axis)
                rows.append((listener.name, listener.data, PLURAL[axis], n, known, asked))
        return rows + self._score_sampled()

    def _score_sampled(self) -> list[Row]:
        """The pairs of all batches of the training, asked in the blocks in which it would ask them."""
        sampled = [
            listener
            for listener in self.memory.listeners
            if "pair" in listener.signals and listener.source.negatives
        ]
        if not sampled:
            return []
        learn = {name for listener in sampled for name in self._learning(listener.source.negatives)}
        if learn:
            log.info("what %s will find is not known before the training", " and ".join(sorted(learn)))
            return []
        train, epoch = self.recipe.train, self.source.steps(0)
        places = steps_of(train, epoch) * train.accumulate
        before, batches = self.memory.asked.copy(), RecalledBatches(self.memory, self.source)
        with tempfile.TemporaryDirectory() as folder:  # lists of frozen nodes are in the cache
            for place in tqdm(range(places), desc="pairs that samplers bring", disable=None, leave=False):
                if place % epoch == 0:
                    self.source.refresh(self.graph, place // epoch, Path(from_first(folder)))
                batches.batch(*divmod(place, epoch))
            wait()
        asked = self.memory.asked - before
        names = dict.fromkeys(listener.name for listener in sampled)
        return [(name, "", "pairs that samplers bring", None, None, asked[name]) for name in names]

    def _learning(self, samplers: Sequence[Negatives]) -> set[str]:
        """The nodes that samplers ask and that learn."""
        asked = {name for one in samplers if isinstance(one, HardNegatives) for name in one.nodes}
        return asked & self.graph.trained

    def outdated(self) -> list[tuple[str, Path, int]]:
        """Teacher, folder and bytes of what the store holds of these teachers under other settings."""
        found = {}
        for name, teacher in self.memory.teachers.items():
            if teacher is not None:
                signals = [
                    signal.folder
                    for listener in self.memory.listeners
                    if listener.name == name
                    for signal in listener.signals.values()
                ]
                for folder in outdated(teacher, [folder for folder in signals if folder is not None]):
                    found[folder] = (name, folder, size_of(folder))
        ours = {teacher.folder for teacher in self.memory.teachers.values() if teacher is not None}
        return [row for folder, row in found.items() if folder not in ours]
