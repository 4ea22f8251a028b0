"""Teachers are asked about a sample, through the store, and warned of where a recipe is checked or run."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from distill.batch import Ragged
from distill.checkup import sample_of
from distill.cli import main
from distill.data import Judged, TextTable
from teachers import CrossEncoder

WORDS = ["wing", "heart", "ship", "city", "film", "tree", "fire", "blood", "sea", "music", "apple", "dog"]
KL = {"type": "distill.objectives.ScoreKL", "from": "cross", "to": "student"}


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Place:
    """A recipe whose cross-encoder says what it would know of a pair, changed by what a test plants."""

    def __init__(self, folder: Path, tiny_bert, monkeypatch):
        self.folder, self.asked = folder, 0
        monkeypatch.setenv("DISTILL_STORE", str(folder / "store"))
        self.change = lambda scores: scores
        represent = CrossEncoder.represent

        def planted(model, batch, needs):
            """Finds a relevant pair by the one word that both texts hold."""
            said, mask = represent(model, batch, needs), batch.mask
            self.asked += int(mask.sum())
            queries, candidates = (next(iter(side.values())) for side in (batch.queries, batch.candidates))
            scores = torch.zeros(mask.shape)
            for b, n in mask.nonzero().tolist():
                one, two = set(queries[b].tolist()), candidates[int(batch.index[b, n])].tolist()
                scores[b, n] = 2.0 * len(one & set(two)) + 0.01 * (sum(two) % 97)
            return said.with_(scores=self.change(scores))

        monkeypatch.setattr(CrossEncoder, "represent", planted)
        for split in ("train", "dev"):
            rows = [
                {"query": query, "candidate": f"{WORDS[(q + c) % 12]} {'and of in the'.split()[c]} {split}",
                 "label": int(c == 0)}
                for q, query in enumerate(WORDS) for c in range(4)
            ]  # fmt: skip
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        bert = str(tiny_bert(layers=1))
        self.document: dict[str, Any] = {
            "name": "tiny",
            "data": {
                "type": "distill.data.Groups",
                "path": str(folder),
                "train": "train.jsonl",
                "dev": "dev.jsonl",
            },
            "models": {
                "student": {"type": "students.BiEncoder", "checkpoint": bert},
                "cross": {"type": "teachers.CrossEncoder", "checkpoint": str(tiny_bert(1, num_labels=1))},
            },
            "losses": {"order": KL},
            "train": {"steps": 1, "batch_size": 4, "mixed_precision": "no"},
        }

    def __call__(self, command: str, *arguments: str) -> Done:
        self.asked = 0
        path = self.folder / "recipe.yaml"
        path.write_text(json.dumps(self.document))
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            main([command, str(path), *arguments, "--runs", str(self.folder / "runs")])
        return Done(end.value.code, out.getvalue(), err.getvalue())


@pytest.fixture
def here(tmp_path, tiny_bert, monkeypatch) -> Place:
    return Place(tmp_path, tiny_bert, monkeypatch)


def test_check_shows_the_figures_of_train_and_of_held_out_and_asks_once(here):
    done = here("check")
    assert done.code == 0, done.err
    rows = re.findall(r"^  cross +data +(train|dev) +48 .* (\S+) +\S+ *$", done.out, re.M)
    assert [split for split, _ in rows] == ["train", "dev"]
    assert all(float(agreement) == 1.0 for _, agreement in rows)
    assert "warning" not in done.out and here.asked == 96
    assert here("check").out.count("48") and here.asked == 0
    assert "; 48 of them are judged already" in here("check").out
    assert not (here.folder / "runs").exists()


def test_check_asks_about_a_sample_only_or_nothing(here):
    assert here("check", "--sample", "5").code == 0 and here.asked == 2 * 5 * 4
    assert "agreement" not in here("check", "--sample", "0").out and here.asked == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: torch.full_like(s, 2.0), "models.cross: it says the same of all candidates"),
        (lambda s: -s, "models.cross: it puts candidates in the wrong order"),
        (lambda s: 1000 * s, "inside a list: regression on them would diverge"),
        (lambda s: (20 * (s - 1)).sigmoid(), "squashed|ties"),
        (lambda s: 0.001 * s, "losses.order: models.cross: at temperature 1 its softmax is nearly even"),
    ],
)
def test_a_sick_teacher_is_warned_of_by_check_and_by_the_run(change, said, here):
    here.change = change
    assert re.search(rf"^warning: .*{said}", here("check").out, re.M)
    done = here("run")
    assert done.code == 0 and re.search(rf"warning: .*({said})", done.err)
    health = json.loads((here.folder / "runs/tiny/metrics.json").read_text())["health"]
    assert re.search(said, health["warnings"][0]) and health["teachers"][0]["pairs"] == 48


def test_a_run_asks_no_more_for_it_and_a_healthy_teacher_is_not_warned_of(here):
    done = here("run")
    assert done.code == 0 and here.asked == 48 and "warning" not in done.err
    health = json.loads((here.folder / "runs/tiny/metrics.json").read_text())["health"]
    assert health["warnings"] == [] and health["teachers"][0]["agreement"] == 1.0


def test_two_teachers_are_compared(here, tiny_bert):
    here.document["models"]["second"] = here.document["models"]["cross"]
    here.document["losses"]["second"] = {**KL, "from": "second"}
    done = here("check")
    assert "models.cross and models.second put nearly all candidates in one order" in done.out
    assert re.search(r"^cross and second on data: agreement \+1.000 over \d+ lists$", done.out, re.M)
    assert here("run").code == 0
    (pair,) = json.loads((here.folder / "runs/tiny/metrics.json").read_text())["health"]["between"]
    assert (pair["one"], pair["other"], pair["agreement"]) == ("cross", "second", 1.0)


def test_of_positives_alone_a_run_asks_a_few_and_finds_what_is_negated(here, tmp_path):
    """As of most retrieval data: beside candidates drawn at random, and once."""
    for name, key, texts in (("corpus", "_id", 40), ("queries", "_id", 12)):
        rows = [
            {key: str(i), "text": ("good " if i < 12 else "bad ") + f"text {name} {i}"} for i in range(texts)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    qrels = "query-id\tcorpus-id\tscore\n" + "".join(f"{i}\t{i}\t1\n" for i in range(12))
    (tmp_path / "qrels.tsv").write_text(qrels)
    here.document["data"] = {
        "type": "distill.data.Retrieval", "path": str(tmp_path), "corpus": "corpus.jsonl",
        "queries": "queries.jsonl", "qrels": {"train": "qrels.tsv"},
        "negatives": [{"type": "distill.data.RandomNegatives", "count": 2}],
    }  # fmt: skip
    here.change = lambda s: -s
    done = here("run")
    assert done.code == 0, done.err
    assert "models.cross: it puts candidates in the wrong order" in done.err
    health = json.loads((here.folder / "runs/tiny/metrics.json").read_text())["health"]
    assert health["teachers"][0]["lists"] == 12 and health["teachers"][0]["agreement"] < -0.8
    asked = here.asked
    assert here("run", "name=again").code == 0 and 12 < asked <= 12 * 8 + 12 + 8 and here.asked == 0


def test_scores_of_the_data_are_looked_at_without_asking(here, tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    scored = "".join(json.dumps({**row, "said": -row["label"]}) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(scored)
    here.document["data"] |= {"scores": {"cross": "said"}, "dev": None}
    here.document["models"]["cross"] = {"type": "teachers.Recorded"}
    done = here("check")
    assert done.code == 0, done.err
    assert "warning: models.cross: it puts candidates in the wrong order" in done.out and here.asked == 0


def test_recorded_scores_that_held_out_lists_lack_are_not_asked_for(here, tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    scored = "".join(json.dumps({**row, "said": row["label"] + 0.1 * i}) + "\n" for i, row in enumerate(rows))
    (tmp_path / "train.jsonl").write_text(scored)  # dev has no such column
    here.document["data"] |= {"scores": {"cross": "said"}}
    here.document["models"]["cross"] = {"type": "teachers.Recorded"}
    done = here("check")
    assert done.code == 0, done.err
    looked_at = [line.split()[2] for line in done.out.splitlines() if line.split()[:2] == ["cross", "data"]]
    assert looked_at == ["train"]


@pytest.mark.parametrize("what", ["scores", "vectors"])
def test_a_colbert_is_looked_at_by_its_scores_or_named(what, here, tiny_bert):
    bert = str(tiny_bert(layers=1))
    here.document["models"] = {
        "student": {"type": "teachers.ColBERT", "checkpoint": bert},
        "colbert": {"type": "teachers.ColBERT", "checkpoint": str(tiny_bert(layers=1, seed=2))},
    }
    order = {**KL, "from": "colbert"}
    tokens = ["query_tokens", "candidate_tokens"]
    words = {
        "type": "distill.objectives.EmbeddingMatch",
        "fields": tokens,
        "from": "colbert",
        "to": "student",
    }
    here.document["losses"] = {"order": order if what == "scores" else words}
    done = here("check", "baseline=false")
    assert done.code == 0, done.err
    if what == "scores":
        assert "colbert  data  train" in re.sub(" +", "  ", done.out)
    else:
        assert "colbert" in done.out and "no scores of listed candidates" in done.out


def test_a_teacher_that_is_not_made_yet_is_not_asked(here, tmp_path):
    (tmp_path / "large.yaml").write_text(json.dumps({
        **here.document, "name": "large", "keep": "cross",
        "models": {"cross": {**here.document["models"]["cross"], "train": True}},
        "losses": {"labels": {"type": "distill.objectives.SampledSoftmax", "to": "cross", "in_batch": False}},
    }))  # fmt: skip
    here.document["models"]["cross"] = {
        "type": "teachers.CrossEncoder", "checkpoint": {"run": str(tmp_path / "large.yaml")},
    }  # fmt: skip
    done = here("check")
    assert done.code == 0 and here.asked == 0 and "agreement" not in done.out


def test_lists_of_positives_are_filled_up_and_others_are_left_as_they_are():
    def judged(task, lists):
        labels = torch.tensor(
            [float(task == "retrieval" or i == 0) for row in lists for i in range(len(row))]
        )
        texts = [f"text {i}" for i in range(40)]
        return Judged(
            task,
            TextTable([str(i) for i in range(len(lists))], [f"query {i}" for i in range(len(lists))]),
            TextTable([str(i) for i in range(40)], texts),
            Ragged.of(lists),
            labels,
        )

    found = sample_of(judged("retrieval", [[0], [1, 2], []]), 10)
    assert found is not None and len(found.queries) == 2
    for query, relevant in ((0, {"0"}), (1, {"1", "2"})):
        labels = found.labels[found.listed.offsets[query] : found.listed.offsets[query + 1]]
        ids = [found.candidates.ids[row] for row in found.listed[query].tolist()]
        assert {one for one, label in zip(ids, labels, strict=True) if label > 0} == relevant
        assert len(ids) > 4 and not relevant & set(ids[len(relevant) :])
    plain = sample_of(judged("rerank", [[3, 4, 5], [6, 7]]), 10)
    assert plain.listed.lengths.tolist() == [3, 2] and plain.labels.tolist() == [1, 0, 0, 1, 0]
    assert [plain.candidates.ids[row] for row in plain.listed[1].tolist()] == ["6", "7"]
    assert sample_of(judged("rerank", [[], []]), 10) is None
