"""The README.md of a saved model, and the way to the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from distill.errors import UserError

Kind = Literal["encoder", "multi_vector", "cross_encoder", "own", "recommender", "combined"]
# library_name, pipeline_tag, further tags
_HUB_WORDS: dict[str, tuple[str, str | None, list[str]]] = {
    "encoder": (
        "sentence-transformers",
        "sentence-similarity",
        ["sentence-transformers", "sentence-similarity", "feature-extraction"],
    ),
    "multi_vector": (
        "sentence-transformers",
        "sentence-similarity",
        ["sentence-transformers", "multi-vector", "ColBERT", "feature-extraction"],
    ),
    "cross_encoder": ("sentence-transformers", "text-ranking", ["sentence-transformers", "cross-encoder"]),
    "own": ("distill", "text-ranking", []),
    "recommender": ("distill", None, ["recommendation"]),
    "combined": ("distill", None, []),
}
_USE_ELSEWHERE = {
    "encoder": """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{path}")
queries = model.encode_query(["what is distillation?"])
documents = model.encode_document(["A small model learns from a large one."])
print(model.similarity(queries, documents))""",
    "multi_vector": """\
from sentence_transformers import MultiVectorEncoder

model = MultiVectorEncoder("{path}")
queries = model.encode_query(["what is distillation?"])
documents = model.encode_document(["A small model learns from a large one."])
print(model.similarity(queries, documents))""",
    "cross_encoder": """\
from sentence_transformers import CrossEncoder

model = CrossEncoder("{path}")
print(model.predict([("what is distillation?", "A small model learns from a large one.")]))""",
}
_USE_HERE = {
    "recommender": """\
# rows: a DataFrame or a list of dictionaries, with the columns of model.user_features, model.item_features
users = model.encode_users(rows)
items = model.encode_items(rows_of_items)
print(users @ items.T)""",
    "encoder": """\
vectors = model.encode_queries(["what is distillation?"])
candidates = model.encode_candidates(["A small model learns from a large one."])
print(vectors @ candidates.T)""",
    "multi_vector": """\
print(model.score_pairs(["what is distillation?"], ["A small model learns from a large one."]))""",
}


def model_card(
    name: str,
    kind: Kind,
    recipe: Mapping[str, Any],
    student: str,
    metrics: Mapping[str, Mapping[str, float]],
    *,
    command: str = "",
    dataset: str = "",
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    language: str | Sequence[str] | None = None,
    license: str | None = None,
) -> str:
    """The text of README.md: metadata for the Hub, then what the model is and how it came to be.

    Args:
        name: The model's name: a Hub name, or the folder it is saved in.
        kind: What it is, hence how others open it.
        recipe: The resolved recipe; ``models`` and ``losses`` are told.
        student: The student's name among ``recipe["models"]``.
        metrics: Metrics of each model by name, e.g. ``{"student": {"nDCG@10": 0.65}, "baseline": ...}``.
            Those of ``student`` enter the metadata.
        command: The command that made it.
        dataset: What the metrics were measured on.
        base_model: Where the student started from; told in the metadata if it is a Hub name.
        datasets: Data sets; those with a Hub name are told in the metadata.
        language, license: As the Hub spells them; left out if None.
    """
    library, pipeline, tags = _HUB_WORDS[kind]
    measured = [
        EvalResult(
            task_type=pipeline or ("recommendation" if kind == "recommender" else "text-ranking"),
            dataset_type=_hub_name(dataset) or _slug(dataset) or "unknown",
            dataset_name=dataset or "unknown",
            metric_type=_slug(metric),
            metric_value=round(float(value), 4),
            metric_name=metric,
        )
        for metric, value in metrics.get(student, {}).items()
    ]
    data = ModelCardData(
        library_name=library,
        pipeline_tag=pipeline,
        tags=[*tags, "knowledge-distillation"],
        base_model=_hub_name(base_model),
        datasets=list(dict.fromkeys(hub for name in datasets if (hub := _hub_name(name)))) or None,
        language=list(language) if language is not None and not isinstance(language, str) else language,
        license=license,
        model_name=name.rstrip("/").rsplit("/", 1)[-1] if measured else None,
        eval_results=measured or None,
    )
    body = [
        f"# {name}",
        _what_it_is(kind, recipe, student, base_model),
        "## How it was taught",
        _arrows(recipe),
        "## What it reaches" + (f" on {dataset}" if dataset else ""),
        _table(metrics) if metrics else "No metrics were measured.",
        "## Use",
        *_usage(name, kind, recipe, student),
    ]
    if command:
        body += ["## How to make it again", f"```bash\n{command}\n```"]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"))


def push_to_hub(folder: str | Path, repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Upload a saved model to the Hub, into a repository made if it is not there; returns its address."""
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(
            f"{folder} is not a folder with a saved model, so there is nothing to push to {repo_id}."
        )
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message="Upload the distilled model",
            ignore_patterns=[".*", "**/.*"],
        )
    except HFValidationError as error:
        raise UserError(
            f"'{repo_id}' is not a name for a repository on the Hub (owner/name): {error}"
        ) from error
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise UserError(
            f"{folder} could not be pushed to {repo_id}: {error}. "
            f"Log in with `hf auth login` (a token that may write), or check the name and the network."
        ) from error
    return str(address)


def _what_it_is(kind: Kind, recipe: Mapping[str, Any], student: str, base_model: str | None) -> str:
    words = {
        "encoder": "A text encoder for search: queries and passages become vectors to compare",
        "multi_vector": "A text encoder for search by late interaction: each token becomes a vector",
        "cross_encoder": "A cross-encoder for ranking: it scores a query and a passage read together",
        "own": "A model for ranking, or for telling classes of pairs of texts, which Distill opens",
        "recommender": "A recommender: users and items become vectors to compare",
        "combined": "Several models as one: the folder says by which rule, and where they are",
    }
    teachers = [name for name in recipe.get("models", {}) if name != student]
    lines = [f"{words[kind]}."]
    if base_model:
        lines.append(f"It started from `{base_model}`.")
    if teachers:
        lines.append("It learnt from:\n")
        lines += [f"- {_node(name, recipe['models'][name])}" for name in teachers]
    return "\n".join(lines)


def _node(name: str, node: Any) -> str:
    """One model of the recipe in words."""
    if not isinstance(node, Mapping):
        return f"**{name}**"
    kind = str(node.get("type", "")).rsplit(".", 1)[-1]
    rest = {key: value for key, value in node.items() if key != "type"}
    return f"**{name}**: {kind}{_arguments(rest)}"


def _arguments(values: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{key}: `{value}`' for key, value in values.items())})" if values else ""


def _arrows(recipe: Mapping[str, Any]) -> str:
    lines = []
    for name, arrow in recipe.get("losses", {}).items():
        rest = {key: value for key, value in arrow.items() if key not in ("type", "from", "to")}
        kind = str(arrow.get("type", "")).rsplit(".", 1)[-1]
        ends = f"from {arrow.get('from') or 'labels'} to {arrow.get('to', '')}"
        lines.append(f"- **{name}**: {kind}, {ends}{_arguments(rest)}")
    return "\n".join(lines) or "The recipe lists no losses."


def _table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """One row per model, one column per metric; a dash where a model was not measured."""
    columns = list(dict.fromkeys(metric for row in metrics.values() for metric in row))
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for model, row in metrics.items():
        cells = [f"{row[metric]:.4f}" if metric in row else "-" for metric in columns]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _usage(name: str, kind: Kind, recipe: Mapping[str, Any], student: str) -> list[str]:
    texts = []
    if kind in _USE_ELSEWHERE:
        texts += ["With sentence-transformers:", f"```python\n{_USE_ELSEWHERE[kind].format(path=name)}\n```"]
    package, _, used = str(recipe.get("models", {}).get(student, {}).get("type", "")).rpartition(".")
    if kind == "combined":
        lines = ["from distill.open import open_model", "", f'model = open_model("{name}")']
        texts += ["With Distill:", "```python\n" + "\n".join(lines) + "\n```"]
    elif package:
        opened = f'{used}.from_pretrained("{name}")'
        lines = [f"from {package} import {used}", "", f"model = {opened}"]
        if kind in _USE_HERE:
            lines.append(_USE_HERE[kind])
        texts += ["With Distill:", "```python\n" + "\n".join(lines) + "\n```"]
    return texts or ["Open it with the class that made it."]


def _hub_name(text: str | None) -> str | None:
    """``owner/name`` of what a recipe calls ``owner/name:part``; None for a path or anything else."""
    found = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::[\w.-]+)?", text or "")
    return found.group(1) if found and not Path(text or "").exists() else None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
