"""Models that open here only: beside a transformer lies what opens it, its settings and its heads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from distill.errors import RecipeError
from distill.hub.files import read_json, write_json
from distill.hub.layouts import plain

OWN, WEIGHTS = "distill.json", "distill.safetensors"


def write_own(folder: Path, opens: str, settings: Mapping[str, Any], heads: nn.Module | None = None) -> None:
    """Add to a model folder which class ``opens`` it, its settings, and the weights of its heads."""
    write_json(folder / OWN, {"opens": opens, **settings})
    if heads is not None:
        save_file({name: plain(value) for name, value in heads.state_dict().items()}, folder / WEIGHTS)


def opens(folder: Path) -> str | None:
    """The class that opens a folder, where it says so; a class of ours, as a folder may be a stranger's."""
    name = read_json(folder / OWN, {}).get("opens")
    if name is not None and str(name).partition(".")[0] not in ("students", "teachers"):
        raise RecipeError(f"{folder / OWN}: '{name}' is no model of ours, and no remote code is run.")
    return name


def read_own(folder: Path, opens: str) -> dict[str, Any]:
    """The settings of a folder that this class saved; none where another did, or nobody."""
    settings = read_json(folder / OWN, {})
    return settings if settings.get("opens") == opens else {}


def load_heads(folder: Path, heads: nn.Module) -> None:
    """Fill heads with the weights that were saved beside the transformer."""
    try:
        heads.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise RecipeError(
            f"{folder / WEIGHTS} does not hold the weights that {folder / OWN} tells of "
            f"({str(error).splitlines()[0]}); save, copy or download the folder again."
        ) from error
