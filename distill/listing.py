"""What there is to name in a recipe, one line each: what ``distill list`` prints."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from distill.hub.files import read_json
from distill.recipe import find_recipe, recipe_names, study_names
from distill.results import NOTHING

KINDS = ("recipes", "studies", "objectives", "models", "data", "metrics", "runs")
# Packages are named as text, as a recipe does: the framework imports neither teachers nor students.
PACKAGES = {
    "objectives": ("distill.objectives",),
    "models": ("students", "teachers"),
    "data": ("distill.data",),
}
METRICS = {
    "nDCG@10": "gain of the first 10, discounted by rank; any cutoff, as with the others",
    "MRR@10": "one over the rank of the first relevant candidate, 0 beyond the cutoff",
    "Recall@100": "share of the relevant candidates among the first 100",
    "MAP": "mean over the relevant candidates of the precision at their rank",
    "P@1": "share of relevant candidates among the first 1",
    "Success@5": "whether a relevant candidate is among the first 5; also HitRate@5",
    "Recall(cold=5)@10": "any of these, for candidates chosen at most 5 times in training",
    "Coverage@10": "share of the catalogue that is among the first 10 of some query",
    "AveragePopularity@10": "how often the first 10 were chosen in training, on average",
    "Spearman": "pairs: correlation of ranks with graded labels",
    "Pearson": "pairs: correlation with graded labels",
    "AUC": "pairs: how often a positive scores above a negative",
    "GAUC": "pairs: AUC within each user's pairs, weighted by how many they are",
    "Accuracy": "pairs: share decided rightly, by a threshold fitted on dev",
    "F1": "pairs: harmonic mean of precision and recall, by a threshold fitted on dev",
    "Logloss": "pairs: mean negative log-likelihood, scores read as logits",
    "ECE": "pairs: how far predicted probabilities are from shares of positives, in 15 bins",
    "Calibration": "pairs: predicted over observed positives; 1 is right on average",
}


def listed(kind: str, runs: Path) -> Iterator[tuple[str, str]]:
    """Name and one line about it, of everything of a kind."""
    if kind in ("recipes", "studies"):
        yield from _recipes(recipe_names() if kind == "recipes" else study_names())
    elif kind == "metrics":
        yield from METRICS.items()
    elif kind == "runs":
        yield from _runs(runs)
    else:
        for package in PACKAGES[kind]:
            yield from _classes(package, kind)


def _recipes(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        first = find_recipe(name).read_text(encoding="utf-8").partition("\n")[0]
        yield name, first.lstrip("# ") if first.startswith("#") else ""


def _classes(package: str, kind: str) -> Iterator[tuple[str, str]]:
    """The classes of a package that a recipe can name for this, by their import path."""
    from distill.data import DataSet, Negatives, Topics
    from distill.model import Model
    from distill.objectives import Objective

    bases: dict[str, tuple[type, ...]] = {
        "objectives": (Objective,),
        "models": (Model,),
        "data": (DataSet, Negatives, Topics),
    }
    module = importlib.import_module(package)
    for name in module.__all__:
        made = getattr(module, name)
        if inspect.isclass(made) and issubclass(made, bases[kind]) and not inspect.isabstract(made):
            yield f"{package}.{name}", (inspect.getdoc(made) or "").partition("\n")[0]


def _runs(folder: Path) -> Iterator[tuple[str, str]]:
    """Every run below the folder: what its kept model reached, or that it is not finished."""
    for recipe in sorted(folder.rglob("recipe.yaml")):
        run = recipe.parent
        name = str(run.relative_to(folder))
        if not (run / "metrics.json").exists():
            yield name, "not finished; the same `distill run` goes on with it"
            continue
        measured = read_json(run / "metrics.json")
        metrics = measured["models"][measured["keep"]].get("metrics", {})
        values = (f"{key} {NOTHING if value is None else f'{value:.4f}'}" for key, value in metrics.items())
        yield name, ", ".join(values) or json.dumps({"steps": measured["steps"]})
