"""Folders of models over features: weights, settings, and the features they read; nothing is pickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.errors import DataError, UserError
from distill.hub.checkpoint import local_folder
from distill.hub.files import atomic_folder, read_json, write_json

if TYPE_CHECKING:
    from distill.data.features import Features
    from distill.nn.mlp import Tower

CONFIG, WEIGHTS, FEATURES = "config.json", "model.safetensors", "features"
FORMAT = 1  # of config.json


def write_feature_model(
    folder: str | Path,
    type_name: str,
    arguments: Mapping[str, Any],
    features: Features,
    weights: Mapping[str, Tensor] | None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a model so that ``open_model`` opens it. Replaces the folder.

    Args:
        type_name: Its class, as a recipe names it.
        arguments: What its class was called with, as plain data.
        features: Schema, vocabularies and statistics.
        weights: By name; None: it has none of torch's.
        texts: Further files, by name.
    """
    with atomic_folder(folder) as new:
        features.save(new / FEATURES)
        write_json(
            new / CONFIG,
            {"model_type": "distill", "type": type_name, "format": FORMAT, "arguments": arguments},
        )
        if weights is not None:
            plain = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
            save_file(plain, new / WEIGHTS)
        for name, text in (texts or {}).items():
            (new / name).write_text(text, encoding="utf-8")


def read_feature_model(spec: str | Path, type_name: str) -> tuple[Path, dict[str, Any], Features]:
    """A saved model's folder on this machine, its arguments and its features.

    Raises:
        DataError: It is none of that type, of a newer format, or not whole.
    """
    from distill.data.features import Features

    folder = local_folder(spec)
    config = read_json(folder / CONFIG)
    if (found := saved_type(config)) != type_name:
        raise DataError(
            f"{folder} holds {f'a {found}' if found else 'no model over features'}, not a {type_name}."
        )
    if config.get("format") != FORMAT:
        raise DataError(
            f"{folder / CONFIG}: the format is {config.get('format')}, and this version of Distill reads "
            f"{FORMAT}. Open it with the version that wrote it, or train the model again."
        )
    return folder, config["arguments"], Features.load(folder / FEATURES)


def saved_type(config: Mapping[str, Any]) -> str | None:
    """Which class of ours wrote a config.json; None: another library."""
    return config.get("type") if config.get("model_type") == "distill" else None


def tower_spec(tower: Tower) -> dict[str, Any]:
    """A tower as a recipe would write it."""
    kind = type(tower)
    return {"type": f"{kind.__module__}.{kind.__qualname__}", **tower.arguments}


def built_arguments(saved: Mapping[str, Any], folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Saved arguments, their towers made again; but for those that are given."""
    from distill.build import Builder

    builder = Builder()
    try:
        return {
            name: builder.build(value, f"arguments.{name}")
            for name, value in saved.items()
            if name not in given
        }
    except UserError as error:
        raise DataError(
            f"{folder / CONFIG}: {error} Where the class is yours, pass the object: "
            f"from_pretrained(folder, user_tower=...)."
        ) from error


def check_same_features(features: Features, saved: Features, folder: Path) -> None:
    """Refuse a checkpoint whose ids mean something else."""
    if features.fingerprint != saved.fingerprint:
        raise DataError(
            f"checkpoint {folder}: its features are not those of the data: schema, vocabularies or "
            f"statistics differ, so the ids of both would not mean the same. Train on the data that it was "
            f"trained on, or without `checkpoint`."
        )


def load_weights(module: nn.Module, folder: Path) -> None:
    """Put saved weights into a module of the same shape."""
    try:
        weights: dict[str, Tensor] = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{folder / WEIGHTS} cannot be read ({error}). It was not saved, copied or downloaded whole; do "
            f"so again."
        ) from error
    there = module.state_dict()
    different = sorted(
        name
        for name in weights.keys() | there.keys()
        if name not in weights or name not in there or weights[name].shape != there[name].shape
    )
    if different:
        raise DataError(
            f"{folder / WEIGHTS}: {different[0]} is missing or of another shape than in this model. Its "
            f"settings or features are not those that it was saved with."
        )
    module.load_state_dict(weights)
