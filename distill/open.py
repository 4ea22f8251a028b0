"""Open a saved model without saying what it is: a run, a folder, an installed package or the Hub."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.hub import check_checkpoint, local_folder
from distill.hub.feature_models import saved_type
from distill.hub.files import read_json
from distill.hub.layouts import SETTINGS
from distill.hub.multi_vector import is_multi_vector
from distill.hub.own import opens
from distill.model import Model

# Named as text, as a recipe does: the framework imports neither package.
ENCODER, CROSS_ENCODER, COLBERT = "students.BiEncoder", "teachers.CrossEncoder", "teachers.ColBERT"
OVER_FEATURES = ("students.TwoTower", "teachers.PrivilegedRanker", "teachers.GradientBoosting")
BUILT = {"Concatenation": "teachers.Concatenation", "Ensemble": "teachers.Ensemble"}  # from other models


def open_model(spec: str | Path, runs: str | Path = "runs") -> Model:
    """The model of a run, a folder, a ``package:NAME/FOLDER`` or a Hub name: what it is, its folder says.

    Args:
        spec: Where it is; a run by its name or its folder gives the model it kept.
        runs: The folder of all runs.
    """
    folder = model_folder(spec, runs)
    module, _, name = class_of(folder).rpartition(".")
    return getattr(importlib.import_module(module), name).from_pretrained(folder)


def model_folder(spec: str | Path, runs: str | Path = "runs") -> Path:
    """The folder of a model on this machine; a Hub name is downloaded where it must be."""
    for folder in (Path(spec).expanduser(), Path(runs) / spec):
        if (folder / "recipe.yaml").is_file():
            return _kept(folder)
        if (folder / "config.json").is_file() or (folder / "modules.json").is_file():
            return folder
    return local_folder(spec)


def class_of(folder: Path) -> str:
    """Which class opens a model folder.

    A model over features, or built from other models, or that opens here only, says so itself. An encoder
    of a vector per token (a MultiVectorEncoder of sentence-transformers, a ColBERT) is a ColBERT, a
    classifier (an architecture ``...ForSequenceClassification``, or a CrossEncoder of sentence-transformers)
    is a cross-encoder, all else an encoder.
    """
    if (saved := saved_type(read_json(folder / "config.json", {}))) is not None:
        if saved not in OVER_FEATURES:
            raise UserError(f"{folder} holds a {saved}, and this version of Distill opens none.")
        return saved
    check_checkpoint(folder)
    if (named := opens(folder)) is not None:
        return named
    if is_multi_vector(folder):
        return COLBERT
    if (folder / SETTINGS).is_file():
        return CROSS_ENCODER if read_json(folder / SETTINGS).get("model_type") == "CrossEncoder" else ENCODER
    if (folder / "modules.json").is_file():
        return ENCODER
    architectures = read_json(folder / "config.json").get("architectures") or []
    if architectures and architectures[0] in BUILT:
        return BUILT[architectures[0]]
    return CROSS_ENCODER if any("SequenceClassification" in name for name in architectures) else ENCODER


def _kept(run: Path) -> Path:
    from distill.recipe import read_yaml

    recipe: dict[str, Any] = read_yaml(run / "recipe.yaml")
    folder = run / str(recipe.get("keep", "student"))
    if not folder.is_dir():
        raise UserError(f"{run} has no model yet: the run was not finished. Go on with it by `distill run`.")
    return folder
