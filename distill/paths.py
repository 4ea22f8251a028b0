"""Where things lie on this machine: the recipes that come with Distill, and its cache."""

from __future__ import annotations

import os
from pathlib import Path

from distill.errors import DataError


def recipes_folder() -> Path:
    """The folder of the recipes that come with Distill.

    An installed package carries it inside ``distill``; in a checkout it lies beside ``distill``.
    """
    package = Path(__file__).resolve().parent
    places = (package / "recipes", package.parent / "recipes")
    for folder in places:
        if folder.is_dir():
            return folder
    raise DataError(
        f"The recipes that come with Distill are missing: there is neither {places[0]} nor {places[1]}. "
        f"Install Distill again, or name a recipe by the path of its YAML file."
    )


def cache_folder() -> Path:
    """Where work that other runs can use again is kept: ``$DISTILL_CACHE``, else ``~/.cache/distill``.

    The folder need not exist yet: who writes there makes it.
    """
    return Path(os.environ.get("DISTILL_CACHE") or "~/.cache/distill").expanduser()
