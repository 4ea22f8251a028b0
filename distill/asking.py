"""What ``distill index`` and ``distill search`` read and print: corpora, items, users, hits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.console import one_line, say
from distill.errors import DataError, UserError


def user_of(text: str) -> dict[str, Any]:
    """A user as the command line gives it."""
    try:
        user = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--user: this is no JSON ({error}): {text}") from error
    if not isinstance(user, dict):
        raise UserError(f'--user: a user is a JSON object, such as {{"user_id": 7}}, got {text}')
    return user


def index_folder(spec: Path, runs: Path) -> Path:
    """The folder of an index: named itself, or inside or beside the run or model that is named."""
    from distill.index import ABOUT

    named = (spec, spec / "index", runs / spec / "index", spec.parent / "index")
    return next((folder for folder in named if (folder / ABOUT).is_file()), spec)


def answer(folder: Path, queries: Sequence[Any], k: int, model: str | None, runs: Path) -> None:
    """Print the hits of each query, a text or a user: score, id and the start of the text."""
    from distill.index import Index

    index = Index.load(folder)
    if not (name := model or index.about.get("model")):
        raise UserError(f"{folder} does not say which model made it; name it with --model.")
    beside = model is None and (folder / name).is_dir()  # the model of a run lies beside its index
    encoder = encoder_of(str(folder / name) if beside else name, runs)
    if hasattr(encoder, "encode_users") != isinstance(queries[0], dict):
        raise UserError("a two-tower is asked with --user JSON, an encoder of texts with a text.")
    vectors = encoder.encode_queries(list(queries))
    for query, hits in zip(queries, index.search(vectors, k), strict=True):
        print(json.dumps(query, ensure_ascii=False) if isinstance(query, dict) else query)
        for hit in hits:
            print(f"{hit.rank:>4}  {hit.score:.4f}  {hit.id}  {one_line(hit.text or '')}".rstrip())


def encoder_of(name: str, runs: Path) -> Any:
    """The model of a run, a folder or the Hub, where it can be indexed."""
    from distill.model import Encoder
    from distill.open import open_model

    model = open_model(name, runs)
    if not isinstance(model, Encoder) or model.search == "own":
        raise UserError(
            f"{name} ({type(model).__name__}) compares query and candidate by more than a product of "
            f"vectors, so it cannot be indexed or searched."
        )
    return model


def encoded_items(
    encoder: Any, spec: str, id_column: str, title_column: str | None
) -> tuple[list[str], list[str] | None, Any]:
    """Ids, what is shown, and vectors of a table of items; other columns than the model's are not read."""
    from distill.data.frames import collect, require, scan

    frame = scan(spec, "CORPUS")
    read = [feature.source for feature in encoder.item_features]
    wanted = list(dict.fromkeys([id_column, *read, *([title_column] if title_column else [])]))
    require(frame, wanted, "CORPUS")
    rows = collect(frame.select(wanted), "CORPUS")
    say(f"encoding {len(rows):,} items")
    vectors = encoder.encode_items(rows.select(read), progress=True)
    shown = None if title_column is None else [str(title) for title in rows[title_column].to_list()]
    return [str(name) for name in rows[id_column].to_list()], shown, vectors


def read_corpus(
    spec: str, id_column: str, text_column: str, title_column: str | None
) -> tuple[list[str], list[str]]:
    """Ids and texts of a corpus, none of them empty."""
    from distill.data import read_table

    table = read_table(spec, {"id": id_column, "text": text_column, "title": title_column}, where="CORPUS")
    if title_column is None:
        return table.ids("id", unique=True), table.texts("text")
    pairs = zip(table.strings("title"), table.strings("text"), strict=True)
    texts = [f"{title} {text}".strip() for title, text in pairs]
    if "" in texts:
        raise DataError(f"{table.where('text', texts.index(''))}: neither title nor text. Remove the row.")
    return table.ids("id", unique=True), texts
