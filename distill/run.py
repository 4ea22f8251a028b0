"""What ``distill run`` does: teachers first, then the student, its baseline, their measures, the model.

A run is a folder. What is finished in it is not done again: an interrupted run goes on by the same command.
Next: ``one_run.py``.
"""

from __future__ import annotations

import atexit
import io
import json
import logging
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from distill.build import Builder
from distill.checkup import Checkup, checkup
from distill.data.judged import Table
from distill.errors import RecipeError
from distill.hub.files import atomic_write_text
from distill.lock import LOCK, only_run_in
from distill.measure import entry_of, measure
from distill.model import Model
from distill.nn.text_encoder import without_weights
from distill.one_run import FINISHED, OneRun, environment
from distill.paths import store_folder
from distill.plan import (
    Plan,
    check_measures,
    plan_of,
    split_to_measure,
)
from distill.processes import from_first, is_first, wait
from distill.recipe import load_recipe, read_yaml
from distill.score import Scoring
from distill.settings import Recipe, Study
from distill.study import load_study

log = logging.getLogger("distill")


@dataclass(frozen=True)
class Runs:
    """The folder of all runs, and whom a recipe may name in them.

    Args:
        folder: Each run is a folder below it, by the recipe's name.
        trusted: Packages that a recipe's ``type`` may name, besides ours.
        overwrite: Remove what a run of another recipe left under the same name.
        asked_by: The recipes whose ``run:`` led here.
    """

    folder: Path = Path("runs")
    trusted: Collection[str] = ()
    overwrite: bool = False
    asked_by: tuple[str, ...] = ()
    _untrained: dict[str, Path] = field(default_factory=dict, compare=False)

    def load(self, spec: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """A recipe with overrides; all mistakes of its keys, types and names are in one error."""
        return load_recipe(spec, overrides, self._builder(None).mistakes)

    def load_study(self, spec: str | Path, overrides: Sequence[str] = ()) -> Study:
        """A study with overrides; all mistakes of its keys and of its variants' recipes are in one error."""
        return load_study(spec, overrides, self._builder(None).mistakes)

    def run(self, recipe: Recipe) -> Path:
        """Run a recipe to its end, or go on with it; returns the run's folder."""
        folder = self.folder / recipe.name
        if self._is_done(recipe, folder):
            return folder
        plan = self.check(recipe)
        with only_run_in(folder) if is_first() else nullcontext():
            if self._is_done(recipe, folder):  # by another process, meanwhile
                return folder
            if is_first():
                if self._changed(recipe, folder):
                    _empty(folder)
                before = "going on with " if (folder / "recipe.yaml").exists() else ""
                log.info("%s%s", before, "\n".join([recipe.name, *plan.lines()]))
                atomic_write_text(folder / "recipe.yaml", as_yaml(recipe))
                atomic_write_text(folder / "environment.json", json.dumps(environment(), indent=1))
            wait()
            OneRun(recipe, folder, self._builder(self.model_of)).run()
        return folder

    def is_finished(self, recipe: Recipe) -> bool:
        """Whether this run is there, finished; refuses a folder that holds that of another recipe."""
        folder = self.folder / recipe.name
        changed = from_first(self._changed(recipe, folder))
        if changed and not self.overwrite:
            raise RecipeError(
                f"{folder} holds a run of another recipe (other: {', '.join(changed)}). "
                f"Give this one a name of its own (name=...), or pass --overwrite to replace it."
            )
        return not changed and from_first((folder / FINISHED).exists())

    def _is_done(self, recipe: Recipe, folder: Path) -> bool:
        if done := self.is_finished(recipe):
            log.info("%s is finished; its recipe has not changed, so nothing is done again.", folder)
        return done

    def check(self, recipe: Recipe) -> Plan:
        """Everything that can be checked without weights: names, data, measures, the graph, its baseline's.

        Raises:
            UserError: All mistakes of names; where there are none, all of data, measures and graph.
        """
        return plan_of(recipe, self._builder(self._configuration_of))

    def candidates(self, recipe: Recipe) -> Table:
        """What is searched where a recipe is measured: the candidates of that split."""
        data = self._builder(None).data(recipe)
        if (measured := split_to_measure(recipe, data)) is None:
            raise RecipeError(f"{recipe.name} measures nothing, so it has no split to take candidates of.")
        return data[measured[0]].split(measured[1]).candidates

    def evaluate(self, model: Model, recipe: Recipe) -> dict[str, Any]:
        """A model's metrics on the split that the recipe measures, its size and speed."""
        data = self._builder(None).data(recipe)
        check_measures(recipe, data)
        if (measured := split_to_measure(recipe, data)) is None:
            raise RecipeError(
                "evaluate.metrics: none are named; add some, such as evaluate.metrics=[nDCG@10]."
            )
        part, split = data[measured[0]], measured[1]
        dev = part.split("dev") if "dev" in part.splits else None
        evaluation = measure(model, part.split(split), recipe.evaluate, dev, progress=sys.stderr.isatty())
        return entry_of(model, evaluation, part.split(split))

    def scoring(self, recipe: Recipe) -> Scoring:
        """The teacher store as this recipe uses it; teachers that other recipes make are made first."""
        self.check(recipe)
        return Scoring(recipe, self._builder(self.model_of))

    def judged(self, plan: Plan) -> dict[tuple[str, str], int]:
        """How many texts or pairs of each (data set, teacher) the store knows before this recipe is run."""
        unmade = self._unmade(plan.recipe)
        if not store_folder().is_dir():
            return {}
        scoring = Scoring(plan.recipe, self._builder(self._configuration_of), plan.data, mend=False)
        return {place: 0 if place[1] in unmade else known for place, (_, known) in scoring.counts().items()}

    def checkup(self, plan: Plan, queries: int) -> Checkup:
        """The health of the frozen teachers that are there, asked about the lists of so many queries."""
        if not set(plan.graph.nodes) - plan.graph.trained:
            return Checkup([], [], [], {})
        builder, unmade = self._builder(self._configuration_of), self._unmade(plan.recipe)
        scoring = Scoring(plan.recipe, builder, plan.data, mend=False)
        return checkup(scoring.graph, plan.data, plan.recipe.train.store, queries, unmade)

    def _unmade(self, recipe: Recipe) -> set[str]:
        """The models that are to come from runs that are not finished."""
        return {
            name
            for name, node in recipe.models.items()
            if isinstance(made := node.get("checkpoint"), Mapping)
            and "run" in made
            and not (self.folder / load_recipe(made["run"]).name / FINISHED).exists()
        }

    def model_of(self, name: str) -> Path:
        """The model that another recipe leaves; it is run first if no finished run is there."""
        runs, recipe = self._asked(name), load_recipe(name)
        folder = self.folder / recipe.name
        if not from_first((folder / FINISHED).exists()):
            log.info("%s is needed and not there yet: it is run first.", recipe.name)
            runs.run(recipe)
        elif changed := self._changed(recipe, folder):
            log.warning(
                "%s was run with another recipe than %s is now (other: %s); its model is used as it is. "
                "`distill run %s --overwrite` makes it anew.",
                folder, name, ", ".join(changed), name,
            )  # fmt: skip
        return folder / recipe.keep

    def _configuration_of(self, name: str) -> str | Path | None:
        """The model that another recipe leaves; where that is not made yet, what it will be made from.

        None: it will be there, but is made from no checkpoint.
        """
        runs, recipe = self._asked(name), load_recipe(name)
        folder = self.folder / recipe.name / recipe.keep
        if (folder / "config.json").exists() or (folder / "modules.json").exists():
            return folder
        node, where = recipe.models.get(recipe.keep, {}), f"{name}: models.{recipe.keep}"
        builder = self._builder(runs._configuration_of)
        if (checkpoint := builder.build(node.get("checkpoint"), where)) is None:
            return None
        own = {key: value for key, value in node.items() if key != "train"} | {"checkpoint": checkpoint}
        asks_others = "of" in own or any(isinstance(value, Mapping) for value in own.values())
        if asks_others or set(own) == {"type", "checkpoint"}:
            return checkpoint
        if name not in self._untrained:  # its layers, classes, sizes are not the checkpoint's
            with without_weights(False):
                model = builder.build(own, where)
            above = mkdtemp()
            atexit.register(shutil.rmtree, above, ignore_errors=True)
            model.save_pretrained(Path(above) / recipe.keep)
            self._untrained[name] = Path(above) / recipe.keep
        return self._untrained[name]

    def _asked(self, name: str) -> Runs:
        """These runs, as a recipe sees them that asks for the model of another."""
        if name in self.asked_by:
            path = " -> ".join((*self.asked_by, name))
            raise RecipeError(f"{path} need each other's models (`run:`), so none can be trained first.")
        return replace(self, asked_by=(*self.asked_by, name))

    def _builder(self, run_folder: Callable[[str], str | Path | None] | None) -> Builder:
        return Builder(self.trusted, run_folder)

    def _changed(self, recipe: Recipe, folder: Path) -> list[str]:
        """Which keys of the recipe differ from what the run in the folder was made with."""
        if not (folder / "recipe.yaml").exists():
            began = any((folder / name).exists() for name in ("checkpoints", FINISHED))
            return ["recipe.yaml is not there"] if began else []
        before, now = read_yaml(folder / "recipe.yaml"), recipe.model_dump(mode="json")
        with suppress(ValidationError):  # keys that came later have their defaults
            before = Recipe.model_validate(before).model_dump(mode="json")
        return [key for key in now if before.get(key) != now[key]]


def _empty(folder: Path) -> None:
    """Remove what a run has left in its folder, but for the lock of who now runs there."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def as_yaml(settings: Recipe | Study) -> str:
    """A recipe or a study as it is stored: with all its keys, the defaults too."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.representer.sort_base_mapping_type_on_output = False  # batches come in the order of the data sets
    yaml.dump(settings.model_dump(mode="json"), stream)
    return stream.getvalue()
