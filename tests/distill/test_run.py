"""A run leaves what it promises, does nothing twice, and compares a student with its like."""

import copy
import json
from dataclasses import dataclass, field
from importlib import metadata

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data import Groups
from distill.errors import RecipeError
from distill.evaluation import evaluate_model
from distill.one_run import OneRun
from distill.recipe import check_recipe, read_yaml
from distill.results import results
from distill.run import Runs, as_yaml
from distill.settings import BaselineTrain
from distill.trainer import Trainer
from students import BiEncoder

QUERIES = ["wing", "heart", "ship", "city", "film", "tree", "fire", "blood", "sea", "music", "apple", "dog"]
METRICS = ["nDCG@10", "MRR@10"]


@dataclass
class Seen:
    """What one training was given: its folder, its first weights, and the queries of its batches."""

    folder: str
    settings: object
    steps: int
    first: dict
    queries: list = field(default_factory=list)


@pytest.fixture
def trainings(monkeypatch):
    """Each training that happens, as it happens."""
    seen = []
    watch(monkeypatch, seen)
    return seen


def watch(monkeypatch, seen):
    fit, batch = Trainer.fit, Trainer._batch

    def watched_fit(self):
        student = self.graph.nodes[self.graph.keep]
        first = {name: p.detach().clone() for name, p in student.named_parameters()}
        seen.append(Seen(self.folder.name, self.settings, self.progress.steps, first))
        return fit(self)

    def watched_batch(self, place):
        made = batch(self, place)
        seen[-1].queries.append(made.query_ids.tolist())
        return made

    monkeypatch.setattr(Trainer, "fit", watched_fit)
    monkeypatch.setattr(Trainer, "_batch", watched_batch)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder with a table per split: each query lists a passage that names it, and two that do not."""
    folder = tmp_path_factory.mktemp("rows")
    for split, offset in (("train", 0), ("dev", 1), ("test", 2)):
        lines = []
        for place, query in enumerate(QUERIES):
            for step in range(3):
                topic = QUERIES[(place + step * (offset + 1)) % len(QUERIES)]
                row = {
                    "query": f"what is a {query}",
                    "candidate": f"{topic} of {split}",
                    "label": int(step == 0),
                }
                lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def document(rows, tiny_bert):
    bert = {"type": "students.BiEncoder", "checkpoint": str(tiny_bert())}
    cross = {"type": "teachers.CrossEncoder", "checkpoint": str(tiny_bert(num_labels=1))}
    return {
        "name": "group/mine",
        "data": {"type": "distill.data.Groups", "path": str(rows)}
        | {split: f"{split}.jsonl" for split in ("train", "dev", "test")},
        "models": {
            "student": {**bert, "layers": 1, "dim": 8, "dropout": 0.1},
            "peer": {**bert, "train": True},
            "cross": cross,
        },
        "losses": {
            "labels": {"type": "distill.objectives.SampledSoftmax", "to": "student"},
            "peer_labels": {"type": "distill.objectives.SampledSoftmax", "to": "peer"},
            "scores": {"type": "distill.objectives.ScoreKL", "from": "cross", "to": "student"},
            "vectors": {"type": "distill.objectives.EmbeddingMatch", "from": "peer", "to": "student"},
        },
        "train": {"epochs": 2, "batch_size": 5, "learning_rate": 1e-3, "mixed_precision": "no", "seed": 3},
        "evaluate": {"metrics": METRICS, "references": ["random"]},
        "baseline": True,
        "search": ["what is a wing"],
    }


def recipe_of(document, **changes):
    """A recipe with dotted keys (``__`` for a dot) changed; None takes a key away."""
    document = copy.deepcopy(document)
    for key, value in changes.items():
        *path, last = key.split("__")
        at = document
        for part in path:
            at = at[part]
        at[last] = value
        if value is None:
            del at[last]
    return check_recipe(document, "")


@pytest.fixture(scope="module")
def small(document):
    """The quickest recipe: labels alone, one step, nothing beside the student."""

    def make(**changes):
        models = {"student": document["models"]["student"]}
        losses = {"labels": document["losses"]["labels"]}
        quick = {**document, "models": models, "losses": losses, "baseline": False, "search": []}
        quick["train"] = {**document["train"], "steps": 1}
        return recipe_of(quick, **changes)

    return make


@pytest.fixture(scope="module")
def finished(document, tmp_path_factory):
    """One whole run, its folder and its trainings."""
    runs, seen = Runs(tmp_path_factory.mktemp("runs")), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch(monkeypatch, seen)
        return runs.run(recipe_of(document)), seen


def files(folder):
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


# what a run leaves


def test_a_run_leaves_the_files_it_promises(finished):
    folder, _ = finished
    assert folder.parts[-2:] == ("group", "mine")
    there = {path.name for path in folder.iterdir()}
    promised = {"recipe.yaml", "environment.json", "student", "teachers", "metrics.json", "per_query.parquet"}
    assert promised | {"history.jsonl", "README.md", "baseline", "index"} == there
    assert [path.name for path in (folder / "teachers").iterdir()] == ["peer"]  # what was trained beside it
    assert not [path for path in files(folder) if path.endswith((".pt", ".bin", ".pkl", ".tmp"))]
    for model in ("student", "teachers/peer", "baseline/student"):
        assert BiEncoder(folder / model).encode_queries(["a wing"]).isfinite().all()


def test_the_recipe_is_stored_resolved(finished, document):
    folder, _ = finished
    stored = read_yaml(folder / "recipe.yaml")
    assert check_recipe(stored, "") == recipe_of(document)
    assert stored["train"]["weight_decay"] == 0.01  # what was not said too


def test_the_environment_is_stored(finished):
    environment = json.loads((finished[0] / "environment.json").read_text())
    assert environment["packages"]["torch"] == metadata.version("torch")
    assert {"python", "machine", "threads", "device", "packages"} <= environment.keys()


def test_all_models_are_measured_on_the_test_split(finished, rows):
    folder, _ = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["models"].keys() == {"student", "peer", "cross", "baseline"}
    judged = Groups(test=str(rows / "test.jsonl")).split("test")
    for name, place in (("student", "student"), ("peer", "teachers/peer"), ("baseline", "baseline/student")):
        again = evaluate_model(BiEncoder(folder / place), judged, METRICS).means
        assert metrics["models"][name]["metrics"] == pytest.approx(again, abs=1e-6)
    assert metrics["seed"] == 3 and metrics["steps"] == 6
    assert metrics["dev"].keys() == set(METRICS)


def test_per_query_figures_average_to_the_metrics(finished):
    folder, _ = finished
    metrics = json.loads((folder / "metrics.json").read_text())["models"]
    table = pd.read_parquet(folder / "per_query.parquet")
    assert (
        set(table["model"]) == {*metrics, "random"} and (table.groupby("model").size() == len(QUERIES)).all()
    )
    metrics |= json.loads((folder / "metrics.json").read_text())["references"]
    for name, part in table.groupby("model"):
        assert part["nDCG@10"].mean() == pytest.approx(metrics[name]["metrics"]["nDCG@10"])
    rows = results(json.loads((folder / "metrics.json").read_text())).rows
    assert [row[0] for row in rows] == ["random", "peer", "cross", "student", "student without teachers"]


def test_the_student_is_compared_with_its_baseline_query_by_query(finished):
    folder, _ = finished
    measured = json.loads((folder / "metrics.json").read_text())
    found, models = measured["comparison"], measured["models"]
    metric = found["metric"]
    student, alone = (models[name]["metrics"][metric] for name in ("student", "baseline"))
    assert found["difference"] == pytest.approx(student - alone)
    assert found["low"] <= found["difference"] <= found["high"] and 0 < found["p_value"] <= 1


def test_the_card_names_models_and_figures(finished):
    folder, _ = finished
    card = (folder / "README.md").read_text()
    assert card == (folder / "student" / "README.md").read_text()
    score = json.loads((folder / "metrics.json").read_text())["models"]["student"]["metrics"]["nDCG@10"]
    assert "nDCG@10" in card and "cross" in card and f"{score:.4f}" in card


def test_the_history_is_of_the_arrows(finished):
    lines = [json.loads(line) for line in (finished[0] / "history.jsonl").read_text().splitlines()]
    assert {"loss/labels", "loss/peer_labels", "loss/scores", "loss/vectors"} <= set().union(*lines)
    assert {"dev/nDCG@10", "dev/MRR@10"} <= set().union(*lines)


def test_the_baseline_differs_by_its_teachers_alone(finished):
    """Equal data in equal order, steps, seed and first weights: what differs is what the teachers did."""
    _, (student, baseline) = finished
    assert (student.folder, baseline.folder) == ("mine", "baseline")
    assert student.settings == baseline.settings and student.steps == baseline.steps == 6
    assert student.queries == baseline.queries and len(student.queries) == 6
    assert student.first.keys() == baseline.first.keys()
    assert all(torch.equal(baseline.first[name], weight) for name, weight in student.first.items())


def test_the_baseline_may_be_trained_at_settings_of_its_own(small, tmp_path, trainings):
    own = {"learning_rate": 3.0e-5, "evaluate_every": 0.5}
    recipe = small(name="x", baseline=True, train__patience=7)
    Runs(tmp_path).run(recipe.model_copy(update={"baseline_train": BaselineTrain(**own)}))
    student, baseline = (seen.settings for seen in trainings)
    assert student == recipe.train
    assert baseline == student.model_copy(update=own)


def test_a_run_is_a_function_of_its_recipe(small, tmp_path):
    """Equal files from equal recipes, another model from another seed."""
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = Runs(tmp_path).run(small(name=name, train__seed=seed))
        weights.append((folder / "student" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


# what is not done twice


def test_a_finished_run_is_not_repeated(finished, document, trainings):
    folder, _ = finished
    before = files(folder)
    assert Runs(folder.parent.parent).run(recipe_of(document)) == folder
    assert trainings == [] and files(folder) == before


def test_a_changed_recipe_is_refused_unless_it_may_overwrite(small, tmp_path, trainings):
    """A run must not end up half of one recipe and half of another."""
    runs = Runs(tmp_path)
    folder = runs.run(small(name="x"))
    before = files(folder)
    with pytest.raises(RecipeError, match=r"holds a run of another recipe \(other: train\).* --overwrite"):
        runs.run(small(name="x", train__learning_rate=0.5))
    assert len(trainings) == 1 and files(folder) == before
    Runs(tmp_path, overwrite=True).run(small(name="x", train__learning_rate=0.5))
    assert len(trainings) == 2
    assert read_yaml(folder / "recipe.yaml")["train"]["learning_rate"] == 0.5


@pytest.mark.parametrize("left", ["checkpoints", "metrics.json"])
def test_a_run_whose_recipe_is_lost_is_not_gone_on_with(small, tmp_path, trainings, left):
    """Nobody can tell what the rest of it was made with."""
    (tmp_path / "x" / left).mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"other: recipe.yaml is not there"):
        Runs(tmp_path).run(small(name="x"))
    assert trainings == []


def test_overwriting_begins_anew(small, tmp_path, monkeypatch):
    folder = Runs(tmp_path).run(small(name="x"))
    (folder / "old").touch()
    Runs(tmp_path, overwrite=True).run(small(name="x", train__learning_rate=0.5))
    assert not (folder / "old").exists()


def test_what_an_interrupted_run_did_is_kept(document, tmp_path, trainings, monkeypatch):
    """Stopped after its trainings, before its measures were written: it goes on, and trains no step again."""
    recipe = recipe_of(document, search=[])
    write = OneRun._write

    def stopped(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(OneRun, "_write", stopped)
    with pytest.raises(KeyboardInterrupt):
        Runs(tmp_path).run(recipe)
    monkeypatch.setattr(OneRun, "_write", write)
    folder = tmp_path / "group" / "mine"
    history = (folder / "history.jsonl").read_bytes()
    saved = (folder / "student" / "model.safetensors").read_bytes()
    assert not (folder / "metrics.json").exists()
    Runs(tmp_path).run(recipe)
    assert [(seen.folder, len(seen.queries)) for seen in trainings] == [
        ("mine", 6), ("baseline", 6), ("mine", 0), ("baseline", 0),
    ]  # fmt: skip
    assert (folder / "history.jsonl").read_bytes() == history
    assert (folder / "student" / "model.safetensors").read_bytes() == saved
    assert (folder / "metrics.json").exists() and not (folder / "checkpoints").exists()


# models of other recipes


def written(recipe, path):
    path.write_text(as_yaml(recipe))
    return str(path)


def test_the_model_of_another_recipe_is_trained_first_and_once(small, tiny_bert, tmp_path, trainings):
    cross = {"type": "teachers.CrossEncoder", "checkpoint": str(tiny_bert()), "layers": 1}
    loss = {"type": "distill.objectives.SampledSoftmax", "to": "cross", "in_batch": False}
    teacher = small(name="cross", keep="cross", models={"cross": cross}, losses={"labels": loss})
    path = written(teacher, tmp_path / "cross.yaml")
    from_teacher = {"type": "distill.objectives.ScoreKL", "from": "cross", "to": "student"}

    def student(name):
        node = {"type": "teachers.CrossEncoder", "checkpoint": {"run": path}}
        return small(name=name, models__cross=node, losses__scores=from_teacher)

    runs = Runs(tmp_path / "runs")
    runs.check(student("one"))
    assert trainings == []  # the check needs no weights
    folder = runs.run(student("one"))
    assert [seen.folder for seen in trainings] == ["cross", "one"]
    assert (tmp_path / "runs" / "cross" / "cross" / "model.safetensors").exists()  # `keep: cross`
    before = files(tmp_path / "runs" / "cross")
    runs.run(student("two"))
    assert [seen.folder for seen in trainings] == ["cross", "one", "two"]
    assert files(tmp_path / "runs" / "cross") == before
    metrics = [
        json.loads((path / "metrics.json").read_text())["models"]
        for path in (tmp_path / "runs" / "cross", folder)
    ]
    assert metrics[0]["cross"]["metrics"] == pytest.approx(metrics[1]["cross"]["metrics"])


def test_a_teacher_that_is_not_made_yet_is_checked_as_it_will_be(small, tiny_bert, tmp_path):
    """By its recipe's layers and classes, not those of the checkpoint that it starts from."""
    cross = {"type": "teachers.CrossEncoder", "checkpoint": str(tiny_bert()), "layers": 1, "classes": 2}
    loss = {"type": "distill.objectives.CrossEntropy", "to": "cross"}
    path = written(
        small(name="cross", keep="cross", models={"cross": cross}, losses={"labels": loss}),
        tmp_path / "cross.yaml",
    )
    student = {"type": "students.VirtualInteraction", "checkpoint": str(tiny_bert()), "classes": 2}
    recipe = small(
        models={
            "student": {**student, "layers": 1},
            "cross": {"type": "teachers.CrossEncoder", "checkpoint": {"run": path}},
        },
        losses={
            "soft": {"type": "distill.objectives.CrossEntropy", "from": "cross", "to": "student"},
            "maps": {"type": "distill.objectives.AttentionMSE", "from": "cross", "to": "student"},
        },
    )
    plan = Runs(tmp_path / "runs").check(recipe)
    assert plan.graph.nodes["cross"].classes == 2 and plan.graph.nodes["cross"].sizes["layers"] == 1
    assert not (tmp_path / "runs").exists()


def test_a_teacher_whose_recipe_has_changed_since_is_used_and_said(small, tiny_bert, tmp_path, caplog):
    """The student would otherwise hear an old teacher without a word."""
    node = {"type": "students.BiEncoder", "checkpoint": str(tiny_bert()), "layers": 1}
    runs, path = Runs(tmp_path / "runs"), tmp_path / "bi.yaml"
    taught = {"type": "distill.objectives.ScoreKL", "from": "bi", "to": "student"}
    bi = {"type": "students.BiEncoder", "checkpoint": {"run": str(path)}}
    for name, rate in (("one", 1.0e-3), ("two", 1.0e-4)):
        written(small(name="bi", models={"student": node}, train__learning_rate=rate), path)
        runs.run(small(name=name, models__bi=bi, losses__scores=taught))
        assert ("(other: train)" in caplog.text) == (name == "two")


def test_recipes_that_need_each_other_are_refused(small, tmp_path):
    for one, other in (("a", "b"), ("b", "a")):
        recipe = small(name=one, models__student={
            "type": "students.BiEncoder", "checkpoint": {"run": str(tmp_path / f"{other}.yaml")},
        })  # fmt: skip
        written(recipe, tmp_path / f"{one}.yaml")
    runs = Runs(tmp_path / "runs")
    with pytest.raises(RecipeError, match=r"a\.yaml.*b\.yaml.* need each other"):
        runs.run(runs.load(tmp_path / "a.yaml"))


# several data sets, no measures


def test_texts_and_judgements_train_together(small, document, rows, tmp_path):
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"a {word}"}) for word in QUERIES))
    texts = {"type": "distill.data.Texts", "path": str(tmp_path), "train": "texts.jsonl"}
    labels = {**document["losses"]["labels"], "data": ["judged"]}
    vectors = {"type": "distill.objectives.EmbeddingMatch", "from": "teacher", "to": "student"}
    recipe = small(
        name="mixed",
        data={"judged": document["data"], "texts": texts},
        models__teacher={
            "type": "students.BiEncoder",
            "checkpoint": document["models"]["student"]["checkpoint"],
        },
        losses={"labels": labels, "vectors": vectors},
        train__steps=6,
        train__log_every=1,
        evaluate__metrics=[],
    )
    folder = Runs(tmp_path / "runs").run(recipe)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert (
        0 < sum("loss/labels" in line for line in lines) < sum("loss/vectors" in line for line in lines) == 6
    )
    assert not (folder / "per_query.parquet").exists()
    assert (folder / "metrics.json").exists() and BiEncoder(folder / "student").dim == 8


# what is written is what was said

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp")), max_size=8)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS
ODD = [
    "on",
    "2e-5",
    "null",
    "~",
    "12:30",
    "0o7",
    "010",
    "a: b",
    "- x",
    "#",
    "é\n\t",
    " ",
    "true",
    "1_0",
    "",
    "=",
    "<<",
]
VALUES = PLAIN | st.sampled_from(ODD)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(WORDS | st.sampled_from(ODD), VALUES | st.lists(VALUES, max_size=3), max_size=4))
def test_a_stored_recipe_says_what_was_said(tmp_path_factory, arguments):
    """Else a finished run would look changed, and be refused."""
    parts = {"models": {"student": arguments}, "losses": {"a": {}}, "data": {"type": "x", "more": arguments}}
    recipe = check_recipe({"name": "x", **parts}, "")
    path = tmp_path_factory.mktemp("yaml") / "recipe.yaml"
    path.write_text(as_yaml(recipe), encoding="utf-8")
    assert read_yaml(path) == recipe.model_dump(mode="json")
