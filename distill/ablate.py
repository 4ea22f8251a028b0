"""What ``distill ablate`` does: every cell of a study is a run, then one table. Next: ``study_table.py``."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from distill.console import markdown_table
from distill.equal_runs import RECIPE, EqualRuns, made_again_since, runs_in
from distill.errors import Mistakes, RecipeError, RunError, UserError
from distill.hub.files import atomic_write_text
from distill.jobs import Job, run_jobs
from distill.lock import only_run_in
from distill.one_run import environment
from distill.plan import Plan, heard_by
from distill.processes import from_first, is_first, world
from distill.recipe import read_yaml
from distill.room import Room
from distill.run import Runs, as_yaml
from distill.settings import Recipe, Study
from distill.study import Cell, cells_of, compared_with, has_own_steps, metrics_of, recipes_of
from distill.study_plot import plot
from distill.study_table import RESULTS, Measured, lines, measured_in, table, tabulate

log = logging.getLogger("distill")
ENDS = (UserError, RunError, MemoryError, torch.OutOfMemoryError)  # of one cell, not of those behind it


@dataclass(frozen=True)
class VariantPlan:
    """What one variant on one data set will do, in words."""

    data: str
    variant: str
    against: str | None
    losses: tuple[str, ...]
    teachers: tuple[str, ...]  # frozen, and heard
    hears: tuple[str, ...]  # data sets of the recipe
    steps: int
    costs: tuple[str, ...]


@dataclass
class Ablation:
    """A study in a folder of runs.

    Args:
        runs: Where its cells are run, as ``STUDY/[DATA/]VARIANT/seedN``.
        study: Loaded, hence with recipes that are right as far as names go.
        jobs: How many cells run at a time, each in a process of its own; 1: here, one after the other.
        memory: GB that these may take together; None: what is free at the start.
    """

    runs: Runs
    study: Study
    jobs: int = 1
    memory: float | None = None
    failed: dict[str, str] = field(default_factory=dict)  # cell -> why

    @property
    def folder(self) -> Path:
        return self.runs.folder / self.study.name

    def check(self) -> tuple[list[Cell], list[VariantPlan]]:
        """All cells, and what each variant does: all that can be known before the first training.

        Raises:
            UserError: All mistakes of data and graphs; else folders of cells that hold other recipes' runs.
        """
        if self.jobs > 1 and world() > 1:
            raise RecipeError("--jobs starts processes of its own; leave `accelerate launch` out.")
        study, recipes, mistakes = self.study, recipes_of(self.study), Mistakes()
        known: set[str] = set()
        steps: dict[str, int | None] = {}
        epochs: dict[str, int] = {}  # steps of an epoch
        for data, recipe in recipes.plain.items():
            plan = None if recipe.train.steps else self._plan(recipe, study.recipe, mistakes, known)
            steps[data] = recipe.train.steps if plan is None else plan.steps
            if plan is not None:
                epochs[data] = plan.source.steps(0)
        plans, shares = [], dict[tuple[str, str], float]()
        for (data, name), recipe in recipes.variants.items():
            if (plan := self._plan(recipe, f"variants.{name}", mistakes, known)) is not None:
                taken = plan.steps if has_own_steps(study, name) else steps[data]
                plans.append(self._described(plan, data, name, taken or 0))
                if data in epochs:
                    shares[data, name] = epochs[data] / plan.source.steps(0)
        mistakes.report()
        taken_by = {(plan.data, plan.variant): plan.steps for plan in plans}
        cells = cells_of(study, recipes, taken_by, shares)
        cells = [self._as_begun(cell) for cell in cells]
        for cell in cells:
            with mistakes:
                self.runs.is_finished(cell.recipe)
        mistakes.report()
        return cells, plans

    def _plan(self, recipe: Recipe, where: str, mistakes: Mistakes, known: set[str]) -> Plan | None:
        """The plan of a recipe; None: it has mistakes, of which those not known yet are told."""
        try:
            return self.runs.check(recipe)
        except UserError as error:
            for line in str(error).splitlines():
                if line not in known:
                    mistakes.add(f"{where}: {line}")
                known.add(line)
            return None

    def _as_begun(self, cell: Cell) -> Cell:
        """The cell, measuring teachers if its run does: which seed's runs do is no reason to train again."""
        with suppress(UserError, LookupError, TypeError):
            before = read_yaml(self.runs.folder / cell.recipe.name / RECIPE)["evaluate"]["teachers"]
            evaluate = cell.recipe.evaluate.model_copy(update={"teachers": bool(before)})
            return replace(cell, recipe=cell.recipe.model_copy(update={"evaluate": evaluate}))
        return cell

    def _described(self, plan: Plan, data: str, name: str, steps: int) -> VariantPlan:
        heard = dict.fromkeys(arrow.tail for arrow in plan.graph.arrows if arrow.tail is not None)
        return VariantPlan(
            data,
            name,
            compared_with(self.study, name),
            tuple(plan.recipe.losses),
            tuple(tail for tail in heard if tail not in plan.graph.trained),
            tuple(heard_by(plan.graph, plan.data)),
            steps,
            tuple(plan.costs(self.runs.judged(plan))),
        )

    def run(self, train: bool = True) -> dict[str, Any]:
        """Run the cells that are not finished and compare all that are; returns what ``results.json`` says.

        Without ``train`` those that are finished are compared; while others are missing there is no winner.

        A run of another name that trained and measured the same is taken, unless ``runs.overwrite``.

        A cell that fails, or whose teacher does, is told in ``failed``, and the others go on.
        """
        cells, _ = self.check()
        with only_run_in(self.folder) if train and is_first() else nullcontext():
            if is_first():
                atomic_write_text(self.folder / "study.yaml", as_yaml(self.study))
            finished = self.finished(cells)
            waiting = [cell for cell in cells if train and cell.recipe.name not in finished]
            log.info("%s: %d cells, %d are finished", self.study.name, len(cells), len(finished))
            for name, folder in self.taken(finished).items():
                log.info("%s: %s is a run of the same, and is taken for it", name, folder)
            for name, teachers in self.outdated(cells, finished).items():
                log.warning(
                    "%s was trained before %s was made again (or removed since), and is compared with runs "
                    "that heard the new one. Remove its folder to train it anew.",
                    name, " and ".join(teachers),
                )  # fmt: skip
            waiting = self._with_teachers(waiting)
            clock = _Clock(len(waiting))
            if self.jobs == 1:
                self._one_by_one(waiting, clock)
            elif waiting:
                self._several(cells, finished, waiting, clock)
            log.info("comparing what %d cells reached: minutes, if over thousands of pairs", len(cells))
            made = [cell.recipe for cell in waiting if self.runs.is_finished(cell.recipe)]
            return self._compare(cells, finished | {one.name: self.runs.folder / one.name for one in made})

    def finished(self, cells: Sequence[Cell]) -> dict[str, Path]:
        """Cells that need not be trained, by name, and their folders: their own, or that of an equal run."""
        found: dict[str, Path] = {}
        others: EqualRuns | None = None
        for cell in cells:
            if self.runs.is_finished(cell.recipe):
                found[cell.recipe.name] = self.runs.folder / cell.recipe.name
            elif not self.runs.overwrite:
                if others is None and is_first():
                    others = EqualRuns(self.runs.folder, environment())
                equal = from_first(None if others is None else others.find(cell.recipe))
                if equal is not None:
                    found[cell.recipe.name] = equal
        return found

    def outdated(self, cells: Sequence[Cell], finished: Mapping[str, Path]) -> dict[str, list[str]]:
        """Finished cells whose teachers were trained anew since, by name, and these."""
        found = {}
        for cell in cells:
            folder = finished.get(cell.recipe.name)
            if folder and (teachers := made_again_since(folder, cell.recipe, self.runs.folder)):
                found[cell.recipe.name] = teachers
        return found

    def taken(self, finished: Mapping[str, Path]) -> dict[str, Path]:
        """Those of the finished cells that lie elsewhere."""
        return {name: folder for name, folder in finished.items() if folder != self.runs.folder / name}

    def _with_teachers(self, waiting: Sequence[Cell]) -> list[Cell]:
        """Train the teachers that are not there yet; the cells whose teachers are. The others have failed."""
        why: dict[str, str] = {}
        for name in dict.fromkeys(name for cell in waiting for name in runs_in(cell.recipe.models)):
            try:
                self.runs.model_of(name)
            except ENDS as error:
                if world() > 1:
                    raise
                why[name] = f"its teacher {name}: {_said(error)}"
        for cell in waiting:
            for name in why.keys() & set(runs_in(cell.recipe.models)):
                self._fail(cell, why[name])
        return [cell for cell in waiting if str(cell) not in self.failed]

    def _one_by_one(self, waiting: Sequence[Cell], clock: _Clock) -> None:
        for cell in waiting:
            began = time.monotonic()
            try:
                self.runs.run(cell.recipe)
            except ENDS as error:
                if world() > 1:
                    raise  # the others may not know of it
                self._fail(cell, _said(error))
            clock.finished(cell, time.monotonic() - began)

    def _several(
        self, cells: Sequence[Cell], finished: Mapping[str, Path], waiting: Sequence[Cell], clock: _Clock
    ) -> None:
        """Run cells in processes of their own; their teachers are asked about what is listed before, once."""
        for first in {(cell.data, cell.variant): cell for cell in reversed(waiting)}.values():
            with suppress(*ENDS):  # its own cells will fail of it, and be told
                self.runs.scoring(first.recipe).fill()
        room = Room.free(self.jobs, self.memory)
        for cell in cells:
            room.learn(cell, finished.get(cell.recipe.name, self.runs.folder / cell.recipe.name))
        at_once = 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

        def fits(job: Job, running: Sequence[Job]) -> bool:
            nonlocal at_once
            at_once = max(1, len(running))
            return room.holds([*(one.about for one in running), job.about])

        def ended(job: Job, code: int, seconds: float) -> None:
            if code:
                self._fail(job.about, _why(code, job.log))
            room.learn(job.about, self.runs.folder / job.about.recipe.name)
            clock.finished(job.about, seconds, at_once)

        with tempfile.TemporaryDirectory() as folder:
            run_jobs(
                [self._job(cell, Path(folder) / f"{place}.yaml") for place, cell in enumerate(waiting)],
                fits,
                ended,
                {
                    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // self.jobs)),
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                },
            )

    def _job(self, cell: Cell, file: Path) -> Job:
        file.write_text(as_yaml(cell.recipe), encoding="utf-8")
        trusted = [word for package in self.runs.trusted for word in ("--trust", package)]
        more = [*trusted, *(["--overwrite"] if self.runs.overwrite else [])]
        command = [sys.executable, "-m", "distill", "run", str(file), "--runs", str(self.runs.folder), *more]
        place = Path(cell.recipe.name).relative_to(self.study.name)
        return Job(command, self.folder / "logs" / f"{'-'.join(place.parts)}.txt", cell)

    def _fail(self, cell: Cell, why: str) -> None:
        self.failed[str(cell)] = why
        log.warning("%s failed: %s", cell, why)

    def _compare(self, cells: Sequence[Cell], finished: Mapping[str, Path]) -> dict[str, Any]:
        recipes, found = recipes_of(self.study), dict[tuple[str, str, int], Measured]()
        for cell in cells:
            if (folder := finished.get(cell.recipe.name)) is not None:
                found[cell.data, cell.variant, cell.seed] = measured_in(folder)
        missing = len(cells) - len(found) - len(self.failed)
        results = tabulate(
            self.study.name,
            {name: compared_with(self.study, name) for name in self.study.variants},
            {data: metrics_of(self.study, recipe) for data, recipe in recipes.plain.items()},
            found,
            chosen_on_tested=[data for data, r in recipes.plain.items() if r.evaluate.split == "dev"],
            choose=not missing,
        )
        taken = {name: str(folder) for name, folder in self.taken(finished).items()}
        results |= {"seeds": self.study.seeds, "jobs": self.jobs, "failed": self.failed, "taken": taken}
        results["outdated"] = self.outdated(cells, finished)
        results |= {"cells": len(cells), "missing": missing}
        if is_first():
            _per_query(found).to_parquet(self.folder / "per_query.parquet", index=False)
            atomic_write_text(self.folder / RESULTS, json.dumps(results, indent=1) + "\n")
            text = markdown_table(*table(results), text_columns=2 + (len(results["data"]) > 1))
            atomic_write_text(self.folder / "results.md", "\n\n".join([text, *lines(results)]) + "\n")
            try:
                plot(results, self.folder / "plot.png")
            except UserError as error:
                log.warning("%s", error)
        return results


def _per_query(found: Mapping[tuple[str, str, int], Measured]) -> pd.DataFrame:
    """What every cell reached on every query, user or pair: enough to compare any two variants anew."""
    frames = [
        cell.per_query.drop(columns="model", errors="ignore").assign(data=data, variant=variant, seed=seed)
        for (data, variant, seed), cell in found.items()
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"data": []})


class _Clock:
    """Says how many cells are finished, and how long the others will take if they are like these."""

    def __init__(self, cells: int):
        self.cells, self.seconds = cells, list[float]()

    def finished(self, cell: Cell, seconds: float, at_once: int = 1) -> None:
        self.seconds.append(seconds)
        done, mean = len(self.seconds), sum(self.seconds) / len(self.seconds)
        left = mean * (self.cells - done) / max(1, at_once)
        words = f", about {max(1, round(left / 60))} min left" if done < self.cells else ""
        log.info("%d of %d cells done (%s took %.0f s)%s", done, self.cells, cell, seconds, words)


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _why(code: int, log: Path) -> str:
    """Why a run failed: what it said last, and what ended it if it did not end itself."""
    if code < 0:
        killed = "; the system may have been out of memory (--memory)" if code == -signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{killed}; last it said: {_last_line(log)}"
    return _last_line(log)


def _last_line(log: Path) -> str:
    """What a run that failed said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = lines[-1].partition("error: ")[2] or lines[-1] if lines else "it was killed before it said a word"
    return f"{said} (all of it is in {log})"
