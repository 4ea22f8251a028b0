"""A recipe: read from YAML, overridden, checked against the schema. Next: ``build.py``."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from distill.errors import RecipeError
from distill.paths import recipes_folder
from distill.settings import Recipe

Look = Callable[[Recipe], Sequence[str]]

STUDIES = "studies"  # their folder, among the recipes


def load_recipe(spec: str | Path, overrides: Sequence[str] = (), look: Look | None = None) -> Recipe:
    """The recipe of a file, or of a name below ``recipes/`` (``text/wikiqa_student``), with overrides.

    Args:
        spec: A YAML file, or the name of a recipe that comes with the package.
        overrides: ``key=value``, the key with dots, the value in YAML.
        look: Finds further mistakes in a recipe, which are told along with those of the schema.

    Raises:
        RecipeError: All mistakes of the file at once, each with its key and what is allowed.
    """
    path = find_recipe(spec)
    document = read_recipe(spec, path)
    if "variants" in document:
        raise RecipeError(f"{spec} is a study of several variants; run it by `distill ablate {spec}`.")
    for override in overrides:
        set_key(document, *read_override(override))
    return check_recipe(document, str(spec), look)


def read_recipe(spec: str | Path, path: Path) -> dict[str, Any]:
    """What the file of a recipe or a study says; one without a name is called what it was asked for by."""
    document = read_yaml(path)
    ours = Path(spec).suffix not in (".yaml", ".yml")
    document.setdefault("name", str(spec) if ours else path.stem)
    return document


def find_recipe(spec: str | Path) -> Path:
    if Path(spec).suffix in (".yaml", ".yml"):
        if Path(spec).is_file():
            return Path(spec)
        raise RecipeError(f"there is no recipe file {spec}.")
    folder = recipes_folder()
    path = folder / f"{spec}.yaml"
    if not path.is_file():
        kind = "study" if str(spec).startswith(f"{STUDIES}/") else "recipe"
        names, kinds = (study_names(), STUDIES) if kind == "study" else (recipe_names(), "recipes")
        raise RecipeError(
            f"there is no {kind} '{spec}'.{nearest(str(spec), names)} `distill list {kinds}` shows all."
        )
    return path


def recipe_names() -> list[str]:
    return [name for name in _names() if not name.startswith(f"{STUDIES}/")]


def study_names() -> list[str]:
    return [name for name in _names() if name.startswith(f"{STUDIES}/")]


def _names() -> list[str]:
    folder = recipes_folder()
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML 1.2 mapping, by a safe loader: ``on`` is a word, ``2e-5`` a number, keys are not repeated."""
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise RecipeError(f"{path}{line}: not valid YAML: {error.problem or error.context}.") from error
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{path} must be a mapping with the keys {', '.join(Recipe.model_fields)}.")
    return document


def check_recipe(document: Mapping[str, Any], where: str, look: Look | None = None) -> Recipe:
    problems: list[str] = []
    try:
        recipe: Recipe | None = Recipe.model_validate(document)
    except ValidationError as error:
        problems = [explain(where, problem, Recipe) for problem in error.errors()]
        recipe = _without(document, [problem["loc"] for problem in error.errors()])
    if look is not None and recipe is not None:
        problems += look(recipe)
    if problems or recipe is None:
        raise RecipeError("\n".join(problems))
    return recipe


def _without(document: Mapping[str, Any], places: Iterable[Sequence[str | int]]) -> Recipe | None:
    """The recipe without what is wrong in it, so that the rest can be looked at; None: too little is left."""
    rest = copy.deepcopy(dict(document))
    for place in places:
        at: Any = rest
        for part in place[:-1]:
            at = at.get(part) if isinstance(at, dict) else None
        if isinstance(at, dict) and place:
            at.pop(place[-1], None)
    try:
        return Recipe.model_validate(rest)
    except ValidationError:
        return None


def nearest(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?``, or nothing."""
    guess = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{guess[0]}'?" if guess else ""


def explain(where: str, problem: Mapping[str, Any], schema: type[BaseModel]) -> str:
    """A mistake that pydantic found, in words: the key, what is wrong, what is allowed."""
    place = ".".join(str(part) for part in problem["loc"])
    key = f"{where}: {place}" if place else where
    if problem["type"] == "extra_forbidden":
        known = _keys_at(problem["loc"][:-1], schema)
        last = str(problem["loc"][-1])
        return f"{key}: there is no such key; known are {', '.join(known)}.{nearest(last, known)}"
    if problem["type"] == "missing":
        return f"{key}: this key is required."
    said = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {said}" + (f", got {problem['input']!r}." if place else ".")


def _keys_at(place: Sequence[str | int], schema: Any) -> list[str]:
    """The keys that a schema knows at a place; of a mapping by name, those of its values."""
    for part in place:
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            field = schema.model_fields.get(str(part))
            schema = None if field is None else field.annotation
        else:
            schema = next(iter(get_args(schema)[1:]), None)
    is_model = isinstance(schema, type) and issubclass(schema, BaseModel)
    return list(schema.model_fields) if is_model else []


def read_override(override: str) -> tuple[str, Any]:
    """Key and value of a ``key=value``, the value in YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"'{override}' is not an override; write key=value, such as train.epochs=3.")
    try:
        value = YAML(typ="safe", pure=True).load(text) if text.strip() else None
    except YAMLError as error:
        raise RecipeError(f"the value of '{override}' is not valid YAML: {error}") from error
    return key, value


def set_key(document: dict[str, Any], key: str, value: Any) -> None:
    """Set a key, with dots for keys inside keys, to a value."""
    *path, last = key.split(".")
    at = document
    for part in path:
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise RecipeError(f"'{key}': '{part}' is not a mapping in this recipe, so it has no keys.")
    at[last] = value
