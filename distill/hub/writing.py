"""Text encoders and cross-encoders, written so that sentence-transformers opens them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import save_file
from torch import nn

from distill.hub.checkpoint import read_config
from distill.hub.files import atomic_folder, read_json, write_json
from distill.hub.layouts import IDENTITY, SETTINGS, Dense, EncoderLayout, plain
from distill.hub.modules import pipeline_entries, router_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Side(NamedTuple):
    """One encoder to write: the transformer, its tokenizer, and what follows it."""

    backbone: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: EncoderLayout


def write_encoder(
    folder: str | Path,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layout: EncoderLayout,
) -> None:
    """Write one encoder so that ``SentenceTransformer(folder)`` gives its vectors. Replaces the folder."""
    with atomic_folder(folder) as new:
        _write_transformer(new, Side(backbone, tokenizer, layout))
        parts = [("Transformer", "")]
        for kind, dense in _after(layout):
            parts.append((kind, f"{len(parts)}_{kind}"))
            _write_part(new / parts[-1][1], kind, layout, dense, backbone.config.hidden_size)
        write_json(new / "modules.json", pipeline_entries(parts))
        write_json(new / SETTINGS, _settings(layout))


def write_two_encoders(folder: str | Path, queries: Side, candidates: Side) -> None:
    """Write an encoder of queries and one of candidates, behind a router. Replaces the folder.

    ``SentenceTransformer(folder)`` answers ``encode_query`` with the one, ``encode_document`` with the
    other. Sides with one transformer object have it written once, with the lengths of the queries' layout.
    """
    shared = queries.backbone is candidates.backbone
    with atomic_folder(folder) as new:
        routes: dict[str, list[str]] = {}
        for name, side in (("query", queries), ("document", candidates)):
            first = f"{'query' if shared else name}_0_Transformer"
            if first not in routes.get("query", ()):
                _write_transformer(new / first, side)
            routes[name] = [first]
            for kind, dense in _after(side.layout):
                routes[name].append(f"{name}_{len(routes[name])}_{kind}")
                _write_part(
                    new / routes[name][-1], kind, side.layout, dense, side.backbone.config.hidden_size
                )
        write_json(new / "router_config.json", router_config(routes["query"], routes["document"]))
        write_json(new / "modules.json", pipeline_entries([("Router", "")]))
        write_json(new / SETTINGS, _settings(queries.layout))


def write_cross_encoder(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    query_length: int | None = None,
) -> None:
    """Write a sequence classifier so that ``CrossEncoder(folder).predict`` gives its logits.

    The activation is Identity: the score that is served is the logit. Of a pair that is too long the longer
    text is cut there, which is the candidate as long as the query takes less than half; ``query_length``,
    the most ids of a query, is known here alone. Replaces the folder.
    """
    with atomic_folder(folder) as new:
        model.save_pretrained(new)
        _write_tokenizer(new, tokenizer, max_length)
        config = read_config(new)  # releases 4 and 5 look for the activation here
        write_json(new / "config.json", {**config, "sentence_transformers": {"activation_fn": IDENTITY}})
        write_json(new / "modules.json", pipeline_entries([("Transformer", "")]))
        lengths = {"max_seq_length": max_length, "query_length": query_length}
        write_json(
            new / "sentence_bert_config.json",
            {
                "transformer_task": "sequence-classification",
                "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
                "module_output_name": "scores",
                **{key: length for key, length in lengths.items() if length is not None},
            },
        )
        write_json(
            new / SETTINGS,
            {
                "model_type": "CrossEncoder",
                "activation_fn": IDENTITY,
                "prompts": {},
                "default_prompt_name": None,
            },
        )


def _write_transformer(folder: Path, side: Side) -> None:
    layout = side.layout
    side.backbone.save_pretrained(folder)
    _write_tokenizer(folder, side.tokenizer, layout.max_length)
    lengths = {
        "max_seq_length": layout.max_length,
        "query_length": layout.query_length,
        "document_length": layout.candidate_length,
    }
    given = {key: length for key, length in lengths.items() if length is not None}
    write_json(folder / "sentence_bert_config.json", {**given, "do_lower_case": False})


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
    """Save a tokenizer that cuts at ``max_length``; the tokenizer in hand stays as it is."""
    tokenizer.save_pretrained(folder)
    if max_length is not None:
        config = read_json(folder / "tokenizer_config.json")
        write_json(folder / "tokenizer_config.json", {**config, "model_max_length": max_length})


def _after(layout: EncoderLayout) -> list[tuple[str, Dense | None]]:
    """What follows the transformer, in order."""
    end: list[tuple[str, Dense | None]] = [("Normalize", None)] if layout.normalize else []
    return [("Pooling", None), *(("Dense", dense) for dense in layout.dense), *end]


def _write_part(folder: Path, kind: str, layout: EncoderLayout, dense: Dense | None, size: int) -> None:
    config: dict[str, Any] = {}
    if kind == "Pooling":
        config = {"embedding_dimension": size, "pooling_mode": layout.pooling, "include_prompt": True}
    if dense is not None:
        activation = getattr(nn, dense.activation)
        config = {
            "in_features": dense.weight.shape[1],
            "out_features": dense.weight.shape[0],
            "bias": dense.bias is not None,
            "activation_function": f"{activation.__module__}.{activation.__name__}",
        }
    write_json(folder / "config.json", config)
    if dense is not None:
        tensors = {"linear.weight": dense.weight, "linear.bias": dense.bias}
        save_file({k: plain(v) for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def _settings(layout: EncoderLayout) -> dict[str, Any]:
    return {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "", "document": "", **layout.prompts},
        "default_prompt_name": None,
        "similarity_fn_name": layout.similarity,
    }
