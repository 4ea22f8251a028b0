"""Model folders of sentence-transformers and transformers, read: text encoders and cross-encoders.

One encoder is a transformer, a pooling, dense layers and perhaps a normalisation. Two encoders (queries
and candidates apart) are two such pipelines behind a router. What does not open is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from distill.errors import RecipeError
from distill.hub.checkpoint import check_checkpoint, local_folder, read_config, read_max_length
from distill.hub.files import read_json
from distill.hub.layouts import (
    IDENTITY,
    POOLINGS,
    SETTINGS,
    SIGMOID,
    CrossEncoderLayout,
    Dense,
    EncoderLayout,
    Encoders,
)
from distill.hub.modules import Part, read_pipelines

# What a transformer's own settings may say without changing what text becomes here.
_PLAIN = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
_REFUSED = ("query_expansion", "processing_kwargs", "tokenizer_name_or_path")


def read_encoders(spec: str | Path) -> Encoders:
    """The encoders of a folder, a ``package:`` or a Hub name; twice the same layout for one encoder.

    A folder of transformers without modules.json is read as mean pooling, normalised.
    """
    folder = local_folder(spec)
    check_checkpoint(folder)
    if not (folder / "modules.json").is_file():
        layout = EncoderLayout(max_length=read_max_length(folder), transformer_folder=folder)
        return Encoders(layout, layout)
    settings = read_json(folder / SETTINGS, {})
    if (kind := settings.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
        raise RecipeError(f"{folder} holds a {kind} of sentence-transformers, not an encoder of one vector.")
    if settings.get("truncate_dim"):
        raise RecipeError(
            f"{folder / SETTINGS}: truncate_dim cuts vectors after the last module; set it to null."
        )
    queries, candidates = read_pipelines(folder)
    layout = _layout(folder, queries, settings)
    return Encoders(layout, layout if candidates is queries else _layout(folder, candidates, settings))


def read_encoder(spec: str | Path) -> EncoderLayout:
    """The encoder of a folder, a ``package:`` or a Hub name that has one for both sides."""
    queries, candidates = read_encoders(spec)
    if queries is not candidates:
        raise RecipeError(
            f"{spec} has two encoders, one for queries and one for candidates; one is asked for here."
        )
    return queries


def read_cross_encoder(spec: str | Path) -> CrossEncoderLayout:
    """The settings of a cross-encoder: a folder, a ``package:`` or a Hub name.

    A folder whose transformer has no classifier yet (any encoder) has ``num_labels`` 1.
    """
    folder = local_folder(spec)
    check_checkpoint(folder)
    settings = read_json(folder / SETTINGS, {})
    transformer, query_length = folder, None
    own: dict[str, Any] = {}
    if (folder / "modules.json").is_file():
        parts, _ = read_pipelines(folder)
        if settings.get("model_type") == "CrossEncoder" and len(parts) > 1:
            raise RecipeError(
                f"{folder}: the module '{parts[1].kind}' after the classifier does not open here."
            )
        transformer = parts[0].folder
        own = read_json(transformer / "sentence_bert_config.json", {})
        query_length = own.get("query_length") if settings.get("model_type") == "CrossEncoder" else None
        task = own.get("transformer_task", "sequence-classification")
        if settings.get("model_type") == "CrossEncoder" and task != "sequence-classification":
            raise RecipeError(f"{folder}: a cross-encoder by {task} does not open here, only a classifier.")
    config = read_config(transformer)
    labels = _num_labels(config)
    return CrossEncoderLayout(
        max_length=read_max_length(transformer, own.get("max_seq_length")),
        num_labels=labels,
        activation=_activation(config, settings, labels),
        transformer_folder=transformer,
        query_length=query_length,
    )


def _layout(folder: Path, parts: list[Part], settings: dict[str, Any]) -> EncoderLayout:
    transformer, *rest = parts
    if transformer.kind != "Transformer":
        raise RecipeError(
            f"{folder}: the module '{transformer.kind}' does not open here; a Transformer comes first."
        )
    pooling, dense, normalize = None, [], False
    for place, part in enumerate(rest):
        if part.kind == "Pooling" and place == 0:
            pooling = _read_pooling(part.folder, settings)
        elif part.kind == "Dense" and pooling and not normalize:
            dense.append(read_dense(part.folder))
        elif part.kind == "Normalize" and pooling:
            _refuse_other_inputs(part.folder, read_json(part.folder / "config.json", {}))
            normalize = True
        else:
            raise RecipeError(
                f"{folder}: the module '{part.kind}' (number {place + 1}) does not open here; what does is "
                f"Transformer, Pooling, any Dense, and Normalize, in this order."
            )
    if pooling is None:
        raise RecipeError(f"{folder / 'modules.json'} lists no Pooling, so it gives no vector per text.")
    own = _read_transformer_settings(transformer.folder)
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        raise RecipeError(f"{folder / SETTINGS}: vectors compared by '{similarity}' cannot be searched here.")
    prompts = settings.get("prompts") or {}
    return EncoderLayout(
        pooling=pooling,
        normalize=normalize,
        dense=tuple(dense),
        max_length=read_max_length(transformer.folder, own.get("max_seq_length")),
        query_length=own.get("query_length"),
        candidate_length=own.get("document_length"),
        prompts={side: prompts.get(side) or "" for side in ("query", "document")},
        similarity=similarity,
        transformer_folder=transformer.folder,
    )


def _read_transformer_settings(folder: Path) -> dict[str, Any]:
    names = sorted(
        folder.glob("sentence_*_config.json")
    )  # sentence_bert_config.json; once also _roberta_ ...
    settings = read_json(names[0]) if names else {}
    for key, plain in _PLAIN.items():
        if settings.get(key, plain) != plain:
            raise RecipeError(f"{names[0]}: {key} '{settings[key]}' does not open here, only '{plain}'.")
    for key in _REFUSED:
        if settings.get(key):
            raise RecipeError(f"{names[0]}: {key} is set, which does not open here.")
    if "message" in settings.get("modality_config", {}):
        raise RecipeError(f"{names[0]}: texts go through a chat template, which does not open here.")
    if settings.get("do_lower_case") and "owercase" not in _normalizer(folder):
        raise RecipeError(
            f"{names[0]}: do_lower_case is set, but the tokenizer keeps upper case. "
            f"Put a lower-casing normalizer into {folder / 'tokenizer.json'}."
        )
    return settings


def _normalizer(folder: Path) -> str:
    """The tokenizer's normalizer, as far as it changes case."""
    found = read_json(folder / "tokenizer.json", {}).get("normalizer") or {}
    return str([n for n in found.get("normalizers", [found]) if n.get("lowercase", True)])


def _read_pooling(folder: Path, settings: dict[str, Any]) -> str:
    config = read_json(folder / "config.json")
    modes = config.get("pooling_mode")
    if modes is None:  # folders before release 6: one flag per mode
        names = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "lasttoken"}
        flags = [key.removeprefix("pooling_mode_") for key, on in config.items() if on is True]
        modes = [names.get(flag, flag) for flag in flags if f"pooling_mode_{flag}" in config] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise RecipeError(
            f"{folder / 'config.json'}: pooling by {' and '.join(modes)} does not open here, "
            f"only by one of {', '.join(POOLINGS)}."
        )
    if config.get("include_prompt") is False and any((settings.get("prompts") or {}).values()):
        raise RecipeError(f"{folder / 'config.json'}: pooling that leaves out the prompt does not open here.")
    return modes[0]


def read_dense(folder: Path, of: str = "sentence_embedding") -> Dense:
    """A Dense module that reads and writes ``of``."""
    config = read_json(folder / "config.json")
    _refuse_other_inputs(folder, config, of)
    if config.get("use_residual"):
        raise RecipeError(f"{folder / 'config.json'}: a Dense with use_residual does not open here.")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise RecipeError(
            f"{folder} has no model.safetensors; pickled weights are not opened. Save the model again."
        )
    tensors = load_file(weights)
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    name = activation.rsplit(".", 1)[-1]
    if not activation.startswith("torch.nn.") or not hasattr(nn, name):
        raise RecipeError(f"{folder / 'config.json'}: the activation '{activation}' is not one of torch.nn.")
    return Dense(tensors["linear.weight"], tensors.get("linear.bias"), name)


def _refuse_other_inputs(folder: Path, config: dict[str, Any], of: str = "sentence_embedding") -> None:
    for key in ("module_input_name", "module_output_name"):
        if (name := config.get(key) or of) != of:
            raise RecipeError(f"{folder / 'config.json'}: {key} '{name}' does not open here.")


def _num_labels(config: dict[str, Any]) -> int:
    architectures = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        return 1
    if "id2label" in config:
        return len(config["id2label"])
    return config.get("num_labels", 2)  # what transformers takes when nothing is said


def _activation(config: dict[str, Any], settings: dict[str, Any], labels: int) -> str:
    said = [
        settings.get("activation_fn") if settings.get("model_type") == "CrossEncoder" else None,
        (config.get("sentence_transformers") or {}).get("activation_fn"),
        config.get("sbert_ce_default_activation_function"),  # before release 4
    ]
    return next((name for name in said if name), SIGMOID if labels == 1 else IDENTITY)
