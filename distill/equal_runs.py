"""Finished runs found by what they trained and measured, so that studies do not train a thing twice.

Two runs are equal if the same models heard the same data by the same losses for as many steps, and were
measured on the same split; names, baselines and sample queries may differ. They must have been made with the
same packages on the same kind of device, and after the models that they took from other runs. Recipes are
compared, not versions of this code or the contents of the files they name, as where a finished run is called
again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill.errors import UserError
from distill.hub.files import read_json
from distill.one_run import FINISHED
from distill.recipe import load_recipe, read_yaml
from distill.settings import Recipe

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
OF_ITS_OWN = {"name", "baseline", "baseline_train", "search"}  # keys that change no kept model


class EqualRuns:
    """The finished runs below a folder, as they are now.

    Args:
        folder: Of all runs.
        environment: What the figures of a run of today depend on besides its recipe.
    """

    def __init__(self, folder: Path, environment: Mapping[str, Any]):
        self.folder = folder
        self._found: dict[str, list[tuple[Path, bool]]] = {}  # and whether teachers were measured
        for run in _finished(folder):
            with suppress(UserError, ValidationError, LookupError, OSError):  # of another time, or damaged
                if _that_matters(read_json(run / ENVIRONMENT)) != _that_matters(environment):
                    continue
                recipe = Recipe.model_validate(read_yaml(run / RECIPE))
                key = trained_and_measured(recipe, read_json(run / FINISHED)["steps"])
                self._found.setdefault(key, []).append((run, recipe.evaluate.teachers))

    def find(self, recipe: Recipe) -> Path | None:
        """A run equal to that of a recipe with ``train.steps``; it measures its teachers too if that does."""
        assert recipe.train.steps is not None
        for run, teachers in self._found.get(trained_and_measured(recipe, recipe.train.steps), ()):
            measures = teachers or not recipe.evaluate.teachers
            if measures and not made_again_since(run, recipe, self.folder):
                return run
        return None


def made_again_since(run: Path, recipe: Recipe, folder: Path) -> list[str]:
    """The models of other runs that are newer than a finished run that used them, or gone."""
    made = (run / FINISHED).stat().st_mtime
    asked = {name: folder / _run_of(name) / FINISHED for name in runs_in(recipe.models)}
    return [name for name, path in asked.items() if not path.exists() or path.stat().st_mtime >= made]


def _run_of(asked: str) -> str:
    """The name of the run of a recipe that is asked for by its name or file."""
    with suppress(UserError):
        return load_recipe(asked).name
    return asked


def trained_and_measured(recipe: Recipe, steps: int) -> str:
    """All of a recipe that its kept model and the figures of that depend on."""
    said = recipe.model_dump(mode="json", exclude=OF_ITS_OWN)
    said["train"] |= {"steps": steps, "epochs": None}
    for key in ("teachers", "references"):  # are measured beside it
        said["evaluate"].pop(key)
    return json.dumps([list(recipe.data_sets), said], sort_keys=True)  # data sets take turns in their order


def runs_in(node: Any) -> Iterator[str]:
    """The recipes whose models a recipe's nodes ask for (``run:``)."""
    if isinstance(node, Mapping):
        if set(node) == {"run"}:
            yield node["run"]
        else:
            yield from (name for value in node.values() for name in runs_in(value))


def _finished(folder: Path) -> Iterator[Path]:
    for path, below, files in os.walk(folder):
        if FINISHED in files:
            below.clear()
            yield Path(path)
        below.sort()


def _that_matters(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {key: environment.get(key) for key in ("machine", "device", "processes", "packages")}
