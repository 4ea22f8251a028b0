"""Encoders of a vector per token on disk: as sentence-transformers keeps them, and ColBERT v2's own layout.

The former is a MultiVectorEncoder of sentence-transformers: a transformer, a Dense without bias, the mask of
what is scored, and a normalisation. The latter is a transformer with a ``linear.weight`` among its weights
and an ``artifact.metadata`` beside them.
"""

from __future__ import annotations

import copy
import string
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.errors import RecipeError
from distill.hub.checkpoint import WEIGHTS, check_checkpoint, local_folder, read_max_length
from distill.hub.files import atomic_folder, read_json, write_json
from distill.hub.layouts import SETTINGS, plain
from distill.hub.modules import pipeline_entries, read_pipelines
from distill.hub.reading import read_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KIND = "MultiVectorEncoder"
STANFORD = "HF_ColBERT"
PUNCTUATION = tuple(string.punctuation)


@dataclass(frozen=True, eq=False)
class MultiVectorLayout:
    """How the tokens of a transformer become vectors to compare by MaxSim.

    Args:
        projection: [D, hidden]; None: the checkpoint has none.
        prompts: What stands before a query, and before a candidate; for ColBERT a marker and a space.
        prompts_are_markers: They are, though the tokenizer on disk does not leave them whole.
        query_length: Ids of a query, special ones included; the length it is filled to with ``augment``.
        candidate_length: The most ids of a candidate.
        augment: Queries are filled up with mask tokens, which are scored.
        attend: The other tokens attend to the mask tokens.
        skip: Words whose tokens are not scored in candidates.
        max_length: The longest input of the transformer; None: no limit known.
        transformer_folder: Where it and its tokenizer lie, when read from disk.
    """

    projection: Tensor | None = None
    prompts: tuple[str, str] | None = None
    prompts_are_markers: bool = False
    query_length: int | None = None
    candidate_length: int | None = None
    augment: bool | None = None
    attend: bool = False
    skip: tuple[str, ...] | None = None
    max_length: int | None = None
    transformer_folder: Path | None = None


def is_multi_vector(folder: Path) -> bool:
    """Whether a checked model folder holds an encoder of a vector per token."""
    if (folder / SETTINGS).is_file():
        return read_json(folder / SETTINGS).get("model_type") == KIND
    config = read_json(folder / "config.json", {})
    return STANFORD in (config.get("architectures") or [])


def read_multi_vector(spec: str | Path) -> MultiVectorLayout:
    """The layout of a folder, a ``package:`` or a Hub name; of another text encoder only where it lies."""
    folder = local_folder(spec)
    check_checkpoint(folder)
    if not is_multi_vector(folder):
        transformer = folder
        if (folder / "modules.json").is_file():
            transformer = read_pipelines(folder)[1][0].folder
        return MultiVectorLayout(max_length=read_max_length(transformer), transformer_folder=transformer)
    return _stanford(folder) if not (folder / SETTINGS).is_file() else _pipeline(folder)


def _stanford(folder: Path) -> MultiVectorLayout:
    """As the authors' code writes it; what its ``artifact.metadata`` leaves out is its default."""
    said = read_json(folder / "artifact.metadata", {})
    index = read_json(folder / WEIGHTS[1], {}).get("weight_map", {})
    with safe_open(folder / index.get("linear.weight", WEIGHTS[0]), "pt") as weights:
        if "linear.weight" not in weights.keys():  # noqa: SIM118, not a mapping
            raise RecipeError(f"{folder}: a ColBERT without linear.weight; its projection is missing.")
        projection = weights.get_tensor("linear.weight")
    if said.get("similarity", "cosine") != "cosine":
        raise RecipeError(
            f"{folder / 'artifact.metadata'}: similarity '{said['similarity']}' does not open here."
        )
    markers = (said.get("query_token_id") or "[unused0]", said.get("doc_token_id") or "[unused1]")
    return MultiVectorLayout(
        projection=projection,
        prompts=markers,
        prompts_are_markers=True,
        query_length=said.get("query_maxlen") or 32,
        candidate_length=said.get("doc_maxlen") or 220,
        augment=True,
        attend=bool(said.get("attend_to_mask_tokens")),
        skip=PUNCTUATION if said.get("mask_punctuation", True) else (),
        max_length=read_max_length(folder),
        transformer_folder=folder,
    )


def _pipeline(folder: Path) -> MultiVectorLayout:
    parts, candidates = read_pipelines(folder)
    kinds = [part.kind for part in parts]
    if parts is not candidates or sorted(kinds[1:]) != ["Dense", "MultiVectorMask", "Normalize"]:
        raise RecipeError(
            f"{folder}: of a {KIND} what opens here is Transformer, Dense, MultiVectorMask and Normalize; it "
            f"has {', '.join(kinds)}."
        )
    by_kind = {part.kind: part.folder for part in parts}
    settings = read_json(folder / SETTINGS)
    if (kind := settings.get("similarity_fn_name") or "maxsim") != "maxsim":
        raise RecipeError(
            f"{folder / SETTINGS}: tokens compared by '{kind}' do not open here, only by maxsim."
        )
    dense = read_dense(by_kind["Dense"], of="token_embeddings")
    if dense.bias is not None or dense.activation != "Identity":
        raise RecipeError(f"{by_kind['Dense']}: a projection with bias or activation does not open here.")
    mask = read_json(by_kind["MultiVectorMask"] / "config.json", {})
    if mask.get("keep_only_token_ids") or mask.get("skiplist_tasks", ["document"]) != ["document"]:
        raise RecipeError(f"{by_kind['MultiVectorMask']}: only skiplist_words of documents open here.")
    transformer = by_kind["Transformer"]
    own = read_json(transformer / "sentence_bert_config.json", {})
    filled = own.get("query_expansion")
    if filled and (filled.get("strategy") != "fixed" or filled.get("token") is not None):
        raise RecipeError(f"{transformer}: query_expansion opens here by mask tokens to a fixed length only.")
    prompts = settings.get("prompts") or {}
    longest = read_max_length(transformer, own.get("max_seq_length"))
    return MultiVectorLayout(
        projection=dense.weight,
        prompts=(prompts.get("query") or "", prompts.get("document") or ""),
        query_length=filled["length"] if filled else own.get("query_length"),
        candidate_length=own.get("document_length"),
        augment=bool(filled),
        attend=bool(filled and filled.get("attend")),
        skip=tuple(mask.get("skiplist_words") or ()),
        max_length=longest,
        transformer_folder=transformer,
    )


def write_multi_vector(
    folder: str | Path,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layout: MultiVectorLayout,
    markers: tuple[str, ...] = (),
) -> None:
    """Write it so that ``MultiVectorEncoder(folder)`` gives its vectors. Replaces the folder.

    Args:
        markers: Words that are the prompts, and that the tokenizer must leave whole.
    """
    assert layout.projection is not None and layout.prompts is not None
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(list(markers), special_tokens=True)
    prompts = [_as_prompt(tokenizer, word) for word in markers] or layout.prompts
    lengths: dict[str, Any] = {"document_length": layout.candidate_length}
    if layout.augment:
        filled = {"strategy": "fixed", "attend": layout.attend, "token": None, "length": layout.query_length}
        lengths["query_expansion"] = filled
    else:
        lengths["query_length"] = layout.query_length
    kinds = ["Transformer", "Dense", "MultiVectorMask", "Normalize"]
    parts = [(kind, f"{i}_{kind}" if i else "") for i, kind in enumerate(kinds)]
    size, hidden = layout.projection.shape
    tokens = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    configs = {
        "Dense": {
            "in_features": hidden,
            "out_features": size,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
            **tokens,
        },
        "MultiVectorMask": {
            "skiplist_words": list(layout.skip or ()),
            "skiplist_tasks": ["document"],
            "keep_only_token_ids": None,
        },
        "Normalize": tokens,
    }
    with atomic_folder(folder) as new:
        backbone.save_pretrained(new)
        tokenizer.save_pretrained(new)
        write_json(new / "sentence_bert_config.json", {**lengths, "do_lower_case": False})
        for kind, path in parts[1:]:
            write_json(new / path / "config.json", configs[kind])
        save_file({"linear.weight": plain(layout.projection)}, new / "1_Dense" / "model.safetensors")
        write_json(new / "modules.json", pipeline_entries(parts))
        write_json(
            new / SETTINGS,
            {
                "model_type": KIND,
                "prompts": dict(zip(("query", "document"), prompts, strict=True)),
                "default_prompt_name": None,
                "similarity_fn_name": "maxsim",
            },
        )


def _as_prompt(tokenizer: PreTrainedTokenizerBase, marker: str) -> str:
    """A prompt that gives the marker's id and then the text's own ids, which a space may change."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    whole = [tokenizer.convert_tokens_to_ids(marker), *ids("a text")]
    return next((p for p in (f"{marker} ", marker) if ids(f"{p}a text") == whole), marker)
