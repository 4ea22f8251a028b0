"""A study: variants of a recipe over seeds and data sets, each a recipe of its own. Next: ``ablate.py``."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill.errors import RecipeError
from distill.recipe import (
    STUDIES,
    Look,
    check_recipe,
    explain,
    find_recipe,
    nearest,
    read_override,
    read_recipe,
    recipe_names,
    set_key,
)
from distill.settings import Changes, DataSet, Recipe, Study

OWN_STEPS = frozenset({"train", "train.steps", "train.epochs"})  # who sets one of these decides for itself
OWN_EVALUATIONS = OWN_STEPS | {"train.evaluate_every"}


@dataclass(frozen=True)
class Cell:
    """One training of a study; its recipe's name says where it lies below the runs."""

    data: str  # "" where the study names no data sets
    variant: str
    seed: int
    recipe: Recipe

    def __str__(self) -> str:
        return f"{f'{self.data}: ' if self.data else ''}{self.variant}, seed {self.seed}"


@dataclass(frozen=True)
class Recipes:
    """By data set the recipe that all variants change, and by (data set, variant) what becomes of it."""

    plain: Mapping[str, Recipe]
    variants: Mapping[tuple[str, str], Recipe]


def is_study(spec: str | Path) -> bool:
    """Whether a name or file is of a study, not of a recipe."""
    return "variants" in read_recipe(spec, find_recipe(spec))


def load_study(spec: str | Path, overrides: Sequence[str] = (), look: Look | None = None) -> Study:
    """The study of a file, or of a name below ``recipes/studies``, with overrides.

    Args:
        spec: A YAML file, or a name; ``studies/`` before it may be left out.
        overrides: ``key=value``; a key of the recipe stands behind ``set.``, for all variants or for one
            (``variants.NAME.set.train.epochs=3``).
        look: Finds further mistakes in a variant's recipe, as in :func:`distill.recipe.load_recipe`.

    Raises:
        RecipeError: All mistakes at once: of the study's keys, else of its variants.
    """
    ours = Path(spec).suffix not in (".yaml", ".yml")
    if ours and str(spec) in recipe_names():
        raise RecipeError(f"{spec} is a recipe, not a study of several; run it by `distill run {spec}`.")
    if ours and not str(spec).startswith(f"{STUDIES}/"):
        spec = f"{STUDIES}/{spec}"
    document = read_recipe(spec, find_recipe(spec))
    if "models" in document and "variants" not in document:
        raise RecipeError(f"{spec} is a recipe, not a study of several; run it by `distill run {spec}`.")
    for override in overrides:
        _override(document, *read_override(override))
    try:
        study = Study.model_validate(document)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(str(spec), one, Study) for one in error.errors())) from error
    _, problems = _recipes(study, look)
    if problems:
        raise RecipeError("\n".join(f"{spec}: {problem}" for problem in problems))
    return study


def recipes_of(study: Study) -> Recipes:
    """The recipes of a study that was checked."""
    return _recipes(study, None)[0]


def cells_of(
    study: Study,
    recipes: Recipes,
    steps: Mapping[tuple[str, str], int],
    shares: Mapping[tuple[str, str], float] | None = None,
) -> list[Cell]:
    """All trainings of a study, seed by seed, so that what there is early can be compared.

    Args:
        steps: How many of them each (data set, variant) takes.
        shares: Epochs of one that are as many steps as an epoch of the recipe that it changes, 1 if not said:
            it is measured on dev after as many steps as the others, not after as many of its epochs.
    """

    def made(data: str, name: str, seed: int) -> Cell:
        recipe = recipes.variants[data, name]
        train: dict[str, Any] = {"seed": seed, "steps": steps[data, name]}
        every, share = recipe.train.evaluate_every, (shares or {}).get((data, name), 1.0)
        if every is not None and share != 1.0 and OWN_EVALUATIONS.isdisjoint(study.variants[name].set):
            train["evaluate_every"] = every * share
        teachers = recipe.evaluate.teachers and seed == study.seeds[0]  # they say the same every time
        changes = {
            "name": "/".join(part for part in (study.name, data, name, f"seed{seed}") if part),
            "train": recipe.train.model_copy(update=train),
            "evaluate": recipe.evaluate.model_copy(update={"teachers": teachers}),
        }
        return Cell(data, name, seed, recipe.model_copy(update=changes))

    return [
        made(data, name, seed) for data in recipes.plain for seed in study.seeds for name in study.variants
    ]


def has_own_steps(study: Study, variant: str) -> bool:
    """Whether a variant says itself how long it trains; else as long as the recipe that it changes."""
    return not OWN_STEPS.isdisjoint(study.variants[variant].set)


def compared_with(study: Study, variant: str) -> str | None:
    """The variant that another is compared with; None: it is the baseline itself."""
    return None if variant == study.baseline else study.variants[variant].against or study.baseline


def metrics_of(study: Study, recipe: Recipe) -> list[str]:
    """The metrics of a study on the data set of a recipe, the one that decides first."""
    return study.metrics or list(recipe.evaluate.metrics)


def _override(document: dict[str, Any], key: str, value: Any) -> None:
    root = key.partition(".")[0]
    if root in Recipe.model_fields and root not in Study.model_fields:
        raise RecipeError(f"'{root}' is a key of the recipe; for all variants it is set by set.{key}=...")
    inside = re.fullmatch(r"((?:.+?\.)?set)\.(.+)", key)  # below `set` a key is one word, dots and all
    if inside is None:
        set_key(document, key, value)
        return
    at = document
    for part in inside[1].split("."):
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise RecipeError(f"'{key}': '{part}' is not a mapping in this study, so it has no keys.")
    at[inside[2]] = value


def _recipes(study: Study, look: Look | None) -> tuple[Recipes, list[str]]:
    """The recipes of a study, and what is wrong with it."""
    plain: dict[str, Recipe] = {}
    variants: dict[tuple[str, str], Recipe] = {}
    problems = list(_names_that_are_not_there(study))
    for data, own in (study.data or {"": DataSet()}).items():
        where = f"data.{data}." if own.recipe else ""
        try:
            spec = own.recipe or study.recipe
            document = read_recipe(spec, find_recipe(spec))
            if "variants" in document:
                raise RecipeError(f"{spec} is a study itself; name a recipe.")
        except RecipeError as error:
            problems.append(f"{where}recipe: {error}")
            continue
        document |= {"baseline": False, "baseline_train": {}, "search": []}  # the study has a baseline
        problems += _change(document, study)
        problems += [f"data.{data}.{problem}" for problem in _change(document, own)]
        recipe, wrong = _checked(document, study, look)
        problems += [f"{spec}: {problem}" for problem in wrong]
        if recipe is not None:
            plain[data] = recipe
        for name, variant in study.variants.items():
            changed = copy.deepcopy(document)
            problems += [f"variants.{name}.{problem}" for problem in _change(changed, variant)]
            recipe, its_own = _checked(changed, study, look)
            problems += [f"variants.{name}: {problem}" for problem in its_own if problem not in wrong]
            if recipe is not None:
                variants[data, name] = recipe
    return Recipes(plain, variants), list(dict.fromkeys(problems))


def _names_that_are_not_there(study: Study) -> Iterator[str]:
    names = list(study.variants)
    asked = [("baseline", study.baseline)]
    asked += [
        (f"variants.{name}.against", one.against) for name, one in study.variants.items() if one.against
    ]
    for key, name in asked:
        if name not in names:
            yield f"{key}: there is no variant '{name}'; there are {', '.join(names)}.{nearest(name, names)}"
    for name, one in study.variants.items():
        if one.against == name:
            yield f"variants.{name}.against: a variant cannot be compared with itself."
        elif one.against is not None and name == study.baseline:
            yield f"variants.{name}.against: the baseline is compared with nothing; name another `baseline`."


def _change(document: dict[str, Any], changes: Changes | Study) -> list[str]:
    """Change a recipe's document; returns what could not be changed."""
    problems = []
    for key in changes.drop:
        *path, last = key.split(".")
        at: Any = document
        for part in path:
            at = at.get(part) if isinstance(at, dict) else None
        if isinstance(at, dict) and last in at:
            del at[last]
            continue
        known = [".".join([*path, name]) for name in at] if isinstance(at, dict) else list(document)
        problems.append(
            f"drop: there is no '{key}' in the recipe; there are {', '.join(known) or 'none'}."
            f"{nearest(key, known)}"
        )
    for key, value in changes.set.items():
        try:
            set_key(document, key, copy.deepcopy(value))
        except RecipeError as error:
            problems.append(f"set: {error}")
    return problems


def _checked(document: Mapping[str, Any], study: Study, look: Look | None) -> tuple[Recipe | None, list[str]]:
    """A recipe of the study, and what is wrong with it."""
    try:
        recipe = check_recipe(document, "", look)
    except RecipeError as error:
        return None, [line.removeprefix(": ") for line in str(error).splitlines()]
    return recipe, list(_unfair(study, recipe))


def _unfair(study: Study, recipe: Recipe) -> Iterator[str]:
    """Why a variant cannot be measured, or not be compared with others."""
    measured = recipe.evaluate.metrics
    for metric in study.metrics:
        if metric not in measured:
            there = ", ".join(measured) or "none"
            yield (
                f"the metric '{metric}' of the study is not measured; evaluate.metrics are {there}."
                f"{nearest(metric, measured)}"
            )
    if not measured and not study.metrics:
        yield "evaluate.metrics: none are named, so there is nothing to compare."
    if recipe.train.minutes is not None:
        yield (
            "train.minutes cuts the steps by the speed of each run, so variants would differ in steps; "
            "give train.steps, and set train.minutes to null."
        )
    if recipe.train.patience is not None:
        yield (
            "train.patience ends a training that no longer gets better on dev, so variants would differ in "
            "steps; set train.patience to null (the best step on dev is kept anyway)."
        )
