"""The layout of sentence-transformers on disk: modules.json, and routers for two encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import RecipeError
from distill.hub.files import read_json

# Where release 6 keeps the classes; older folders say `sentence_transformers.models.NAME`, which is read too.
TYPES = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    "MultiVectorMask": "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
    "Router": "sentence_transformers.base.modules.router.Router",
}


class Part(NamedTuple):
    """One module of a pipeline: what it is, and the folder of its configuration and weights."""

    kind: str
    folder: Path


def read_pipelines(folder: Path) -> tuple[list[Part], list[Part]]:
    """The modules that a query passes through, and those of a candidate; the same list for one encoder."""
    parts = [_part(folder, entry["type"], entry["path"]) for entry in _entries(folder)]
    if not parts:
        raise RecipeError(f"{folder / 'modules.json'} lists no modules.")
    if parts[0].kind not in ("Router", "Asym"):
        return parts, parts
    queries, candidates = _routes(parts[0].folder)
    return queries + parts[1:], candidates + parts[1:]


def transformer_folders(folder: Path) -> list[Path]:
    """The folders of the transformers that modules.json names, each once."""
    pipelines = read_pipelines(folder)
    return list({part.folder: None for parts in pipelines for part in parts if part.kind == "Transformer"})


def pipeline_entries(parts: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """modules.json for (kind, path) of each module."""
    return [
        {"idx": i, "name": str(i), "path": path, "type": TYPES[kind]} for i, (kind, path) in enumerate(parts)
    ]


def router_config(queries: list[str], candidates: list[str]) -> dict[str, Any]:
    """router_config.json for the module folders of each side; a folder of both sides is loaded once.

    A folder is named ``<side>_<place>_<kind>``.
    """
    return {
        "types": {name: TYPES[name.rsplit("_", 1)[-1]] for name in dict.fromkeys(queries + candidates)},
        "structure": {"query": queries, "document": candidates},
        "parameters": {"default_route": "document", "allow_empty_key": True, "route_mappings": {}},
    }


def _entries(folder: Path) -> list[dict[str, Any]]:
    return sorted(read_json(folder / "modules.json"), key=lambda entry: entry["idx"])


def _part(folder: Path, kind: str, path: str) -> Part:
    package, name = kind.split(".", 1)[0], kind.rsplit(".", 1)[-1]
    inside = (folder / path).resolve()
    if package != "sentence_transformers":
        raise RecipeError(
            f"{folder}: the module '{kind}' is code of its own, and no remote code is run. "
            f"Modules that open here: {', '.join(TYPES)}."
        )
    if not inside.is_relative_to(folder.resolve()):
        raise RecipeError(f"{folder}: the module '{kind}' points outside its folder: '{path}'.")
    return Part(name, folder / path if path else folder)


def _routes(folder: Path) -> tuple[list[Part], list[Part]]:
    current = folder / "router_config.json"
    config = read_json(current if current.exists() else folder / "config.json")  # the latter before 5.0
    routes, mappings = config["structure"], config.get("parameters", {}).get("route_mappings")
    if set(routes) != {"query", "document"} or mappings:
        raise RecipeError(
            f"{folder}: its Router has the routes {', '.join(sorted(routes))}"
            + (" with route_mappings" if mappings else "")
            + "; two encoders open here as the routes 'query' and 'document' alone."
        )
    kinds = config["types"]
    queries, candidates = (
        [_part(folder, kinds[name], name) for name in routes[route]] for route in ("query", "document")
    )
    return queries, candidates
