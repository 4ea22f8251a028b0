"""``distill score``, and the store as a run, a check and a full disk meet it, through the command."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import json
import os
import re
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from distill.cli import main
from students import BiEncoder
from teachers import CrossEncoder

TOPICS = ["river water ship", "cell protein gene", "wing flow jet", "music book film", "cat dog bird"]


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Place:
    """A folder with lists of candidates, a recipe with a cross-encoder, a store, and counted calls."""

    def __init__(self, folder: Path, tiny_bert, monkeypatch):
        self.folder, self.store, self.calls = folder, folder / "store", []
        monkeypatch.setenv("DISTILL_STORE", str(self.store))
        represent = CrossEncoder.represent

        def counted(model, batch, needs):
            self.calls.append(int(batch.mask.sum()))
            return represent(model, batch, needs)

        monkeypatch.setattr(CrossEncoder, "represent", counted)
        self.measured: list[int] = []  # pairs that it is asked about outside training
        score_pairs = CrossEncoder.score_pairs

        def counted_pairs(model, queries, candidates, progress=False):
            self.measured.append(len(queries))
            return score_pairs(model, queries, candidates, progress)

        monkeypatch.setattr(CrossEncoder, "score_pairs", counted_pairs)
        rows = [
            {
                "query": f"what is {TOPICS[q % 5]} {q}",
                "candidate": f"{TOPICS[(q + c) % 5]} {c}",
                "label": c == 0,
            }
            for q in range(8)
            for c in range(3)
        ]
        self.rows = folder / "rows.jsonl"
        self.rows.write_text("".join(json.dumps({**row, "label": int(row["label"])}) + "\n" for row in rows))
        self.document: dict[str, Any] = {
            "name": "tiny",
            "data": {
                "type": "distill.data.Groups",
                "train": str(self.rows),
                "candidates": 5,
                "negatives": [{"type": "distill.data.RandomNegatives", "count": 2}],
            },
            "models": {
                "student": {"type": "students.BiEncoder", "checkpoint": str(tiny_bert(layers=1))},
                "cross": {
                    "type": "teachers.CrossEncoder",
                    "checkpoint": str(tiny_bert(layers=1, num_labels=1)),
                },
            },
            "losses": {
                "ranking": {"type": "distill.objectives.ScoreKL", "from": "cross", "to": "student"},
                "labels": {"type": "distill.objectives.SampledSoftmax", "to": "student"},
            },
            "train": {"steps": 6, "batch_size": 4, "mixed_precision": "no", "checkpoint_every": 2},
        }

    def __call__(self, command: str, *arguments: str) -> Done:
        self.calls.clear()
        path = self.folder / "recipe.yaml"
        path.write_text(json.dumps(self.document))  # JSON is YAML
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            main([command, str(path), *arguments, "--runs", str(self.folder / "runs")])
        return Done(end.value.code, out.getvalue(), err.getvalue())

    def blocks(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.store.rglob("*.arrow")}

    def weights(self, name: str = "tiny") -> dict[str, torch.Tensor]:
        return load_file(self.folder / "runs" / name / "student/model.safetensors")


@pytest.fixture
def here(tmp_path, tiny_bert, monkeypatch) -> Place:
    return Place(tmp_path, tiny_bert, monkeypatch)


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_scored_is_not_asked_again_by_a_run(here):
    done = here("score")
    assert done.code == 0 and here.calls[0] == 24
    assert re.search(r"cross +data +pairs +24 +0 +24 +\n", done.out)
    drawn = sum(here.calls[1:])
    assert drawn > 0 and re.search(rf"cross +pairs that samplers bring +{drawn} +\n", done.out)
    blocks = here.blocks()
    assert here("run").code == 0 and here.calls == [] and here.blocks() == blocks
    assert re.search(r"cross +data +pairs +24 +24 +0 +\n", here("score").out) and here.calls == []


def test_what_teachers_said_when_they_were_measured_is_not_asked_again(here, monkeypatch):
    encoded: list[int] = []
    encode = BiEncoder._encode

    def counted(model, texts, *others):
        encoded.append(len(texts) if not any(p.requires_grad for p in model.parameters()) else 0)
        return encode(model, texts, *others)

    monkeypatch.setattr(BiEncoder, "_encode", counted)
    checkpoint = here.document["models"]["student"]["checkpoint"]
    here.document["models"]["bi"] = {"type": "students.BiEncoder", "checkpoint": checkpoint, "max_length": 16}
    here.document["losses"]["vectors"] = {
        "type": "distill.objectives.EmbeddingMatch", "from": "bi", "to": "student"
    }  # fmt: skip
    here.document["data"] |= {"test": str(here.rows)}
    here.document["evaluate"] = {"split": "test", "metrics": ["MAP"]}

    def told(name: str) -> dict[str, Any]:
        return json.loads((here.folder / "runs" / name / "metrics.json").read_text())["models"]

    assert here("run").code == 0
    assert sum(here.measured) == told("tiny")["cross"]["asked"] == 24
    assert told("tiny")["bi"]["asked"] == 8 + 15 and told("tiny")["student"]["asked"] is None
    assert here("score", "--prune").out.startswith("nothing to remove")  # though it serves in bf16, maybe
    here.measured.clear(), encoded.clear()
    assert here("run", "name=again").code == 0 and here.measured == []
    assert set(encoded) == {0, 1, 8}  # the queries by which its speed is measured, together and one by one
    assert told("again")["cross"]["asked"] == told("again")["bi"]["asked"] == 0
    for model in ("cross", "bi", "student"):
        assert told("again")[model]["metrics"] == told("tiny")[model]["metrics"]
    here.document["models"]["cross"]["max_length"] = 8  # it reads less: another teacher
    assert here("run", "name=short").code == 0 and sum(here.measured) == 24


def test_a_second_run_asks_nothing_and_learns_the_same(here):
    assert here("run").code == 0 and here.calls
    assert here("run", "name=again").code == 0 and here.calls == []
    assert same(here.weights(), here.weights("again"))
    assert here("run", "name=half", "train.store=float16").code == 0 and here.calls
    assert not same(here.weights(), here.weights("half"))


@pytest.mark.parametrize("key", ["models.cross.max_length=40", "train.mixed_precision=bf16"])
def test_other_settings_of_a_teacher_are_a_miss(key, here):
    here("score")
    scored = sum(here.calls)
    assert here("score", key).code == 0 and sum(here.calls) == scored
    assert here("score", key).code == 0 and here.calls == []


def test_check_says_what_is_judged(here):
    nothing = ("--sample", "0")
    assert "about 24 pairs" in (out := here("check", *nothing).out) and "judged" not in out
    here("score", "models.cross.max_length=40")
    assert (
        "24 pairs, about" in (out := here("check", *nothing).out) and "; 0 of them are judged already" in out
    )
    here("score")
    path = next(iter(here.blocks()))
    assert "; 24 of them are judged already" in here("check", *nothing).out
    assert path.exists()


def test_prune_removes_what_the_same_checkpoint_said_with_other_settings_after_a_yes(here):
    assert here("score", "--prune").out.startswith("nothing to remove")
    for key in ("models.cross.max_length=40", "models.cross.query_max_length=7", "train.store=float16"):
        here("score", key)
    here("score")
    before = here.blocks()
    asked = here("score", "--prune")
    assert asked.code == 2 and "nothing is removed without a yes: add --yes" in asked.err
    assert here.blocks() == before and asked.out.count(str(here.store)[-20:]) == 3
    done = here("score", "--prune", "--yes")
    assert done.code == 0 and "removed 0.0 MB" in done.out and here.calls == []
    assert {path.parent for path in here.blocks()} < {path.parent for path in before}
    assert here("run").code == 0 and here.calls == []
    assert here("run", "train.store=float16", "name=half").code == 0 and here.calls


def test_ctrl_c_while_teachers_are_asked_keeps_their_answers(here, monkeypatch):
    """Before the first step; the handler lets the block at hand end."""
    monkeypatch.setattr("distill.store.PAIRS_AT_ONCE", 10)
    represent = CrossEncoder.represent

    def stopped(model, batch, needs):
        signal.raise_signal(signal.SIGINT)
        return represent(model, batch, needs)

    monkeypatch.setattr(CrossEncoder, "represent", stopped)
    done = here("run")
    assert done.code == 1 and here.calls == [10]
    assert "interrupted: the answers of the teachers so far are kept. The same command goes on" in done.err
    monkeypatch.setattr(CrossEncoder, "represent", represent)
    assert here("run").code == 0 and here.calls[:2] == [10, 4]


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_with_scores_is_one_message_and_the_run_goes_on_afterwards(here, monkeypatch):
    monkeypatch.setattr("distill.store.PAIRS_AT_ONCE", 10)
    assert here("run", "name=whole").code == 0
    expected = here.blocks()
    monkeypatch.setenv("DISTILL_STORE", str(here.folder / "other"))
    here.store = here.folder / "other"
    write, written = Path.write_bytes, []

    def fills(path, data):
        written.extend([path] if ".arrow" in path.name else [])
        if ".arrow" in path.name and len(written) == 5:
            write(path, memoryview(data)[:100])
            full()
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fills)
    failed = here("run")
    assert failed.code == 1
    last = failed.err.splitlines()[-1]
    assert "error: the disk is full" in last and "cannot write the teacher store" in last
    assert "Traceback" not in failed.err and len(here.blocks()) == 4
    assert not [path for path in here.store.rglob("*") if path.name.startswith(".")]
    assert here("run").code == 0
    assert sorted(here.blocks().values()) == sorted(expected.values())
    assert same(here.weights(), here.weights("whole"))


@pytest.mark.parametrize(
    "place", ["distill.checkpoint.save_file", "distill.checkpoint.save_parameters", "distill.paths.os.fsync"]
)
def test_a_disk_that_fills_with_checkpoints_costs_the_steps_since_the_last(place, here, monkeypatch):
    assert here("run", "name=whole").code == 0
    module, _, name = place.rpartition(".")
    owner = os if module.endswith(".os") else importlib.import_module(module)
    real, count = getattr(owner, name), []

    def fills(*arguments, **keywords):
        count.append(1)
        return full() if len(count) == 3 else real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, fills)
    failed = here("run")
    assert failed.code == 1 and "error: the disk is full" in failed.err.splitlines()[-1]
    left = [path for path in (here.folder / "runs/tiny").rglob("*") if path.name.startswith(".")]
    assert not left
    assert here("run").code == 0 and same(here.weights(), here.weights("whole"))


def test_a_store_of_another_teacher_under_this_name_is_refused(here):
    here("score")
    (about,) = here.store.rglob("teacher.json")
    about.write_text(about.read_text().replace('"max_length": 128', '"max_length": 99'))
    for command in ("score", "run", "check"):
        failed = here(command)
        assert failed.code == 2
        assert re.search(
            r"error: .*another teacher .*\(max_length is 99 there, 128 here\).*DISTILL_STORE", failed.err
        )


def test_a_damaged_block_is_said_and_asked_again(here):
    here("score")
    before = here.blocks()
    path = sorted(before)[0]
    path.write_bytes(before[path][:-1] + bytes([before[path][-1] ^ 1]))
    done = here("run")
    assert done.code == 0 and f"warning: {path}: this block of the teacher store is damaged" in done.err
    assert here.calls


# scores made elsewhere


def with_scores(here: Place, **changes: Any) -> None:
    """The rows with a column of scores, as the data of the recipe."""
    rows = [json.loads(line) for line in here.rows.read_text().splitlines()]
    for place, row in enumerate(rows):
        row["bge"] = 10.0 - place % 3
    here.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    here.document["data"] |= {"scores": {"cross": "bge"}, **changes}


def test_given_scores_are_taken_and_only_drawn_pairs_are_asked(here):
    with_scores(here)
    assert here("run").code == 0 and 0 < max(here.calls) < 24
    out = here("check").out
    assert "cross is not run on what is listed: its scores come with the data" in out
    assert "cross is asked up to 40 pairs an epoch as samplers draw them, each once" in out
    with_scores(here, negatives=[])
    assert here("run", "name=listed").code == 0 and here.calls == []
    assert "as samplers draw" not in here("check").out


def test_a_misspelt_teacher_of_given_scores_is_refused(here):
    with_scores(here, scores={"crss": "bge"})
    failed = here("check")
    assert failed.code == 2
    assert (
        "data: it brings scores of 'crss', and there is no such model; there are student, cross."
        in failed.err
    )
    assert "Did you mean 'cross'?" in failed.err


def test_nan_among_given_scores_is_refused_by_file_and_row(here):
    with_scores(here)
    lines = here.rows.read_text().splitlines()
    lines[4] = lines[4].replace('"bge": 9.0', '"bge": NaN')
    here.rows.write_text("\n".join(lines))
    failed = here("run")
    assert failed.code == 2
    assert f"{here.rows}, column 'bge', row 4 (counted from 0): nan is not a finite number" in failed.err


def test_a_student_is_taught_by_the_scores_of_a_teacher_that_is_not_here(here):
    lists = [
        {
            "query": f"what is {TOPICS[q % 5]}",
            "pos": [f"{TOPICS[q % 5]} {q}"],
            "neg": [f"{TOPICS[(q + i) % 5]} {q}" for i in (1, 2)],
            "pos_scores": [5.0],
            "neg_scores": [1, 0.5],
        }
        for q in range(8)
    ]
    path = here.folder / "lists.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lists))
    here.document["data"] = {"type": "distill.data.ScoredLists", "train": str(path), "teacher": "bge"}
    here.document["models"]["bge"] = {"type": "teachers.Recorded"}
    del here.document["models"]["cross"]
    here.document["losses"]["ranking"]["from"] = "bge"
    checked = here("check")
    assert checked.code == 0, checked.err
    assert "bge is not run on what is listed: its scores come with the data" in checked.out
    assert here("run").code == 0
    history = (here.folder / "runs/tiny/history.jsonl").read_text().splitlines()
    assert json.loads(history[0])["loss/ranking"] > 0
    sampled = [{"type": "distill.data.RandomNegatives", "count": 1}]
    here.document["data"]["negatives"] = sampled
    failed = here("check")
    assert failed.code == 2 and "samplers add negatives to the data set 'data'" in failed.err


def test_the_store_holds_vectors_too(here, tiny_bert):
    here.document["models"]["encoder"] = {"type": "students.BiEncoder", "checkpoint": str(tiny_bert(seed=4))}
    here.document["losses"]["vectors"] = {
        "type": "distill.objectives.EmbeddingMatch", "from": "encoder", "to": "student"
    }  # fmt: skip
    done = here("score")
    assert done.code == 0 and re.search(r"encoder +data +queries +8 +0 +8 +\n", done.out)
    assert re.search(r"encoder +data +candidates +\d+ +0 +\d+ +\n", done.out)
    assert {path.parent.name for path in here.blocks()} == {
        "scores.float32", "queries.float32", "candidates.float32"
    }  # fmt: skip
    assert isinstance(BiEncoder(tiny_bert(seed=4)).identity, dict)
