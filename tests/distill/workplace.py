"""The command on a folder with tiny data, models and recipes; for several test files."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distill.cli import main

TOPICS = ["river water ship", "cell protein gene", "wing flow jet", "music book film", "cat dog bird"]
DOCUMENTS = [{"_id": f"d{i}", "text": f"{TOPICS[i % 5]} number {i}"} for i in range(20)]
QUERIES = [{"_id": f"q{i}", "text": f"what is {TOPICS[i % 5]} {i}"} for i in range(12)]


class Done(NamedTuple):
    code: int
    out: str
    err: str


def distill(*arguments: object) -> Done:
    """What the command prints, and its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return Done(end.value.code, out.getvalue(), err.getvalue())


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def qrels(path: Path, rows: list[tuple[str, str, Any]]) -> str:
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


class Workplace:
    """A folder with data, checkpoints and recipes."""

    def __init__(self, folder: Path, tiny_bert: Callable[..., Path]):
        self.folder, self.runs = folder, folder / "runs"
        self.encoder = tiny_bert(layers=1)
        self.reranker = tiny_bert(layers=1, num_labels=1)
        self.corpus = jsonl(folder / "corpus.jsonl", DOCUMENTS)
        self.document = {
            "name": "tiny",
            "data": {
                "type": "distill.data.Retrieval",
                "corpus": self.corpus,
                "queries": jsonl(folder / "queries.jsonl", QUERIES),
                "qrels": qrels(folder / "train.tsv", [(f"q{i}", f"d{i}", 1) for i in range(8)]),
                "test": qrels(folder / "test.tsv", [(f"q{i}", f"d{i}", 1) for i in range(8, 12)]),
                "candidates": 3,
                "negatives": [{"type": "distill.data.RandomNegatives", "count": 2}],
            },
            "models": {
                "student": {"type": "students.BiEncoder", "checkpoint": str(self.encoder)},
                "cross": {"type": "teachers.CrossEncoder", "checkpoint": str(self.reranker)},
            },
            "losses": {
                "ranking": {"type": "distill.objectives.ScoreKL", "from": "cross", "to": "student"},
                "labels": {"type": "distill.objectives.SampledSoftmax", "to": "student"},
            },
            "train": {"steps": 2, "batch_size": 4},
            "evaluate": {"metrics": ["nDCG@10", "Recall@100"]},
        }

    def recipe(self, changes: dict[str, Any] | None = None) -> Path:
        """The recipe with other values, by keys with dots; None takes a key out. JSON is YAML."""
        document = json.loads(json.dumps(self.document))
        for key, value in (changes or {}).items():
            *path, last = key.split(".")
            at = document
            for part in path:
                at = at[part]
            if value is None:
                del at[last]
            else:
                at[last] = value
        path = self.folder / "recipe.yaml"
        path.write_text(json.dumps(document))
        return path

    def __call__(self, command: str, *arguments: object) -> Done:
        return distill(command, *arguments, "--runs", self.runs)


def mined(by: str = "student", **arguments: Any) -> dict[str, Any]:
    """A recipe's change: hard negatives, of the student unless said otherwise."""
    return {"data.negatives": [{"type": "distill.data.NearestNegatives", "by": by, "count": 2, **arguments}]}
