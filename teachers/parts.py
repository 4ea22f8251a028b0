"""Models built from others: what a saved one says of its parts, and how these are found again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.errors import DataError, RecipeError
from distill.hub import atomic_folder
from distill.hub.checkpoint import read_config
from distill.hub.files import write_json
from distill.model import Model
from distill.open import open_model
from distill.store_files import weights_hash


def write_parts(
    folder: str | Path,
    kind: str,
    parts: Mapping[str, Model],
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write the folder of a ``kind`` of model that is built from ``parts``, which it only refers to."""
    referred = {
        name: {"checkpoint": getattr(part, "checkpoint", None), "weights": weights_hash(part)}
        for name, part in parts.items()
    }
    with atomic_folder(folder) as path:
        write_json(path / "config.json", {"architectures": [kind], **settings, "of": referred})
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path / "model.safetensors")


def read_parts(folder: str | Path, kind: str, names: list[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of such a folder.

    Raises:
        RecipeError: It is of another kind, or of other parts than ``names``, in this order.
    """
    config = read_config(Path(folder))
    if config.get("architectures") != [kind]:
        raise RecipeError(f"checkpoint {folder} holds no {kind}.")
    if list(config["of"]) != names:
        raise RecipeError(
            f"checkpoint {folder} was made of {', '.join(config['of'])}, not of {', '.join(names)}: "
            f"name those nodes, in their order, in `of`."
        )
    settings = {key: value for key, value in config.items() if key not in ("architectures", "of")}
    return settings, load_file(Path(folder) / "model.safetensors")


def open_parts(folder: str | Path) -> dict[str, Model]:
    """The models that a saved folder refers to.

    Raises:
        DataError: One has no checkpoint of its own, or its weights are no longer those it was saved with.
    """
    parts: dict[str, Model] = {}
    for name, said in read_config(Path(folder))["of"].items():
        if said["checkpoint"] is None:
            raise DataError(f"{folder}: its part '{name}' came from no checkpoint; use it in a recipe.")
        parts[name] = open_model(said["checkpoint"])
        if weights_hash(parts[name]) != said["weights"]:
            raise DataError(
                f"{folder}: its part '{name}' has other weights than {said['checkpoint']} has now. It was "
                f"trained in the same run, or made anew since: use it in a recipe, `of` the right nodes."
            )
    return parts


def check_parts(of: Mapping[str, Model], field: str) -> dict[str, Model]:
    """The nodes that something is built of, each of which must provide ``field``."""
    if not isinstance(of, Mapping) or not of:
        raise ValueError("of: name one node at least.")
    for name, part in of.items():
        if field not in part.provides:
            raise ValueError(
                f"of: '{name}' ({type(part).__name__}) provides no {field}; it provides "
                f"{', '.join(sorted(part.provides))}."
            )
    return dict(of)


@torch.no_grad()
def score_texts(part: Any, queries: list[str], candidates: list[str], progress: bool) -> Tensor:
    """A part's scores [n] float32 of n raw pairs."""
    if hasattr(part, "score_pairs"):
        return part.score_pairs(queries, candidates, progress)
    vectors = part.encode_queries(queries, progress), part.encode_candidates(candidates, progress)
    return (vectors[0] * vectors[1]).sum(dim=-1) * torch.as_tensor(part.scale()).cpu()
