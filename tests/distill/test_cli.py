"""The command, from its arguments to exit code, messages and files; models and data are tiny."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.cli import _left_out
from distill.lock import only_run_in
from tests.distill.workplace import DOCUMENTS, Done, Workplace, distill, mined

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def here(tmp_path, tiny_bert) -> Workplace:
    return Workplace(tmp_path, tiny_bert)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_bert) -> tuple[Workplace, Done]:
    """A run with a baseline and sample queries, to its end. Nobody may change it."""
    place = Workplace(tmp_path_factory.mktemp("finished"), tiny_bert)
    done = place("run", place.recipe({"baseline": True, "search": ["river [bold] water", "cat"]}))
    return place, done


# run


def test_a_run_ends_with_one_table_the_folder_and_answers(finished):
    place, done = finished
    assert done.code == 0
    rows = re.findall(
        r"^  (cross|student|student without teachers) +(\S+) +(\S+) +(\S+) +(\S+) +(\S+) *$", done.out, re.M
    )
    assert [row[0] for row in rows] == ["cross", "student", "student without teachers"]
    measured = json.loads((place.runs / "tiny/metrics.json").read_text())["models"]
    for (_, ndcg, recall, size, speed, alone), name in zip(
        rows, ("cross", "student", "baseline"), strict=True
    ):
        assert ndcg == f"{measured[name]['metrics']['nDCG@10']:.4f}"
        assert recall == f"{measured[name]['metrics']['Recall@100']:.4f}"
        assert float(size) == pytest.approx(measured[name]["size_mb"], abs=0.06)
        assert (speed == "—") == (alone == "—") == (name == "cross")  # a cross-encoder cannot be indexed
    assert str(place.runs / "tiny") in done.out
    answers = done.out.partition("river [bold] water\n")[2]
    assert re.match(r"(   [123]  -?\d\.\d{4}  d\d+  \S.*\n){3}cat\n", answers)


def test_a_run_says_at_the_start_what_will_happen(finished):
    said = finished[1].err
    assert "train: 8 queries, 20 candidates, 8 pairs listed" in said
    assert "student: students.BiEncoder, trained" in said
    assert "cross: teachers.CrossEncoder, frozen" in said
    assert "ranking: cross -> student, ScoreKL" in said
    assert "2 steps of 4 queries" in said
    assert "Loading weights" not in said and "Writing model shards" not in said


def test_a_finished_run_prints_its_table_again_and_does_nothing_else(finished):
    place, first = finished
    before = (place.runs / "tiny/metrics.json").stat().st_mtime_ns
    again = place("run", place.folder / "recipe.yaml")
    assert (again.code, again.out) == (0, first.out)
    assert "nothing is done again" in again.err
    assert (place.runs / "tiny/metrics.json").stat().st_mtime_ns == before


def test_the_table_is_left_as_markdown(finished):
    text = (finished[0].runs / "tiny/results.md").read_text()
    header, rule, *rows = text.splitlines()
    assert header == "| model | nDCG@10 | Recall@100 | size in MB | queries/s | ms/query |"
    assert rule == "|:--|--:|--:|--:|--:|--:|"
    assert rows[2].startswith("| student without teachers | ")


def test_another_recipe_under_the_name_of_a_run_needs_overwrite(here):
    assert here("run", here.recipe({"evaluate": None})).code == 0
    other = here.recipe({"evaluate": None, "train.steps": 3})
    refused = here("run", other)
    assert refused.code == 2
    assert "another recipe (other: train)" in refused.err and "--overwrite" in refused.err
    wrong = here.recipe({"evaluate": None, "train.steps": 3, "data.corpus": "nowhere.jsonl"})
    assert here("run", wrong, "--overwrite").code == 2
    assert (here.runs / "tiny/metrics.json").exists()  # a recipe that cannot run replaces nothing
    here.recipe({"evaluate": None, "train.steps": 3})
    assert here("run", other, "--overwrite").code == 0
    assert json.loads((here.runs / "tiny/metrics.json").read_text())["steps"] == 3


# check, and what is wrong with the input


def test_check_says_what_a_run_will_do_and_cost(here):
    done = here("check", here.recipe(), "train.steps=null", "train.epochs=3")
    assert done.code == 0
    assert re.search(r"data +train +8 +20 +8 +8 ", done.out)
    assert re.search(r"cross +teachers.CrossEncoder +frozen +.*pair_vectors, scores ", done.out)
    assert re.search(r"ranking +cross -> student +ScoreKL +1.0", done.out)
    assert "6 steps of 4 queries (3 epochs)" in done.out  # 8 queries, 4 at a time, 3 times
    assert "cross is asked once about 8 pairs" in done.out
    assert (
        "cross is asked up to 24 pairs an epoch as samplers draw" in done.out
    )  # 8 queries with 3 candidates
    assert not here.runs.exists()
    again = here("check", here.recipe(), "train.steps=null", "train.epochs=3", "data.repeat=2").out
    assert "12 steps of 4 queries" in again and "cross is asked up to 48 pairs an epoch" in again
    ids = [int(re.search(r"student reads about ([\d,]+) ids", out)[1]) for out in (done.out, again)]
    own = here("check", here.recipe(), "train.steps=null", "train.epochs=1", "data.batch_size=2").out
    assert "4 steps of 2 queries" in own  # the data set's own, not train.batch_size
    assert ids[1] == pytest.approx(2 * ids[0], abs=1)


def test_check_refuses_batches_too_small_for_a_geometry(here):
    """Of one query there are no neighbours: the loss would be 0 all along."""
    model = {"type": "teachers.CrossEmbedding", "checkpoint": str(here.encoder)}
    geometry = {"type": "distill.objectives.GeometryAlignment", "from": "joint", "to": "student"}
    recipe = here.recipe({"models.joint": model, "losses.geometry": geometry, "train.batch_size": 1})
    done = here("check", recipe)
    assert done.code == 2 and "losses.geometry: GeometryAlignment compares the queries" in done.err
    assert "at least 2, and a batch of data set 'data' holds 1" in " ".join(done.err.split())
    assert here("check", recipe, "train.batch_size=2").code == 0


def test_a_student_of_several_teachers_that_opens_here_alone_is_run_kept_and_measured(here):
    """Vectors of pairs pass through the teacher store; what was saved says by itself what it is."""
    match = {"type": "distill.objectives.EmbeddingMatch", "from": "cross", "to": "student"}
    changes = {
        "models.student": {"type": "students.TwoRankers", "checkpoint": str(here.encoder)},
        "models.joint": {"type": "teachers.CrossEmbedding", "checkpoint": str(here.encoder)},
        "losses.ranking": {**match, "fields": ["pair_vectors"], "distance": "mse", "weight": 0.01},
        "losses.geometry": {
            "type": "distill.objectives.GeometryAlignment",
            "from": "joint",
            "to": "student",
        },
    }
    recipe = here.recipe(changes)
    assert here("run", recipe).code == 0
    folder = here.runs / "tiny"
    measured = json.loads((folder / "metrics.json").read_text())["models"]
    assert measured.keys() == {"student", "cross", "joint"}
    last = json.loads((folder / "history.jsonl").read_text().splitlines()[-1])
    assert {"loss/geometry/C|Q", "loss/geometry/Q|C", "loss/geometry/Q|Q", "loss/geometry/C|C"} < last.keys()
    assert "from students import TwoRankers" in (folder / "student" / "README.md").read_text()
    done = here("evaluate", "tiny", recipe)
    assert done.code == 0
    assert f"{measured['student']['metrics']['nDCG@10']:.4f}" in done.out
    refused = here("index", "tiny", here.corpus, "--output", here.folder / "index")
    assert refused.code == 2 and "compares query and candidate by more than a product" in " ".join(
        refused.err.split()
    )
    refused = here("check", recipe, "search=[wing]")
    assert refused.code == 2 and "so it has no index; remove" in " ".join(refused.err.split())


def test_check_says_what_a_cached_gradient_costs(here):
    done = here("check", here.recipe(), "train.gradient_cache=3")
    assert "student caches its gradient: up to 6 chunks of 3 texts a batch, each read twice" in done.out
    refused = here("check", here.recipe(), "train.gradient_cache=0")
    assert refused.code == 2 and "train.gradient_cache" in refused.err


def test_a_second_run_in_a_folder_is_refused(here):
    with only_run_in(here.runs / "tiny"):
        done = here("run", here.recipe())
    assert done.code == 2
    said = f"tiny is in use: process {os.getpid()} on "
    assert said in done.err and "give this run a name of its own (name=...)" in done.err


def test_a_launcher_that_starts_one_process_of_several_is_named(monkeypatch):
    """``accelerate launch --cpu --num_processes 2`` starts one, and says nothing."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert distill("list", "recipes").err == ""
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "accelerate launch --multi_gpu --num_processes N" in distill("list", "recipes").err


def test_check_says_how_little_is_left_to_samplers(here):
    rows = [
        {"query": f"q{i}", "candidate": f"c{i + j}", "label": int(j == 0)} for i in range(8) for j in range(3)
    ]
    table = here.folder / "listed.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    data = {"type": "distill.data.Groups", "train": str(table), "dev": 0.25, "candidates": 4}
    data["negatives"] = [{"type": "distill.data.RandomNegatives", "count": 3}]
    changes = {"data": data, "evaluate": {}, "baseline": False}
    done = here("check", here.recipe(changes))
    assert "of a query's 3 negatives 2.0 are its own listed ones, and samplers bring the others" in done.out
    data["listed_negatives"] = 1
    done = here("check", here.recipe(changes))
    assert "of a query's 3 negatives 1.0 are its own listed ones, and samplers bring the others" in done.out
    data["listed_negatives"] = 0
    assert "samplers bring" not in here("check", here.recipe(changes)).out
    data["listed_negatives"] = -1
    refused = here("check", here.recipe(changes))
    assert refused.code == 2 and "data: listed_negatives must be 0 or more, got -1" in refused.err
    del data["negatives"]
    data["listed_negatives"] = 0
    refused = here("check", here.recipe(changes | {"losses.labels.in_batch": False}))
    assert refused.code == 2 and "lists positives only and draws no negatives" in refused.err
    order = {"type": "distill.objectives.RankNet", "from": "labels", "to": "student"}
    refused = here("check", here.recipe(changes | {"losses.labels": order}))
    assert refused.code == 2 and "losses.labels: RankNet compares the candidates of a list" in refused.err
    shop = {"type": "distill.data.SimulatedPrivileged", "listed_negatives": 0}
    refused = here("check", here.recipe({"data": shop, "evaluate": {}, "baseline": False}))
    assert refused.code == 2 and "listed_negatives: SimulatedPrivileged has no such setting" in refused.err


def test_check_says_what_mining_will_cost(here):
    changes = mined(top=10, every=1, checked_by="cross", margin=0.1) | {"baseline": True}
    done = here("check", here.recipe(changes))
    assert done.code == 0, done.err
    assert "student encodes 20 candidates and 8 queries for negatives, each epoch" in done.out
    assert (
        "cross is asked about up to 88 pairs for negatives, each epoch" in done.out
    )  # 8 x (10 and 1 positive)
    assert "samplers bring" not in done.out  # the data lists positives alone: all negatives are theirs
    teacher = {"type": "students.BiEncoder", "checkpoint": str(here.encoder)}
    done = here("check", here.recipe(mined("teacher") | {"models.teacher": teacher}))
    assert "teacher encodes 20 candidates and 8 queries for negatives, once" in done.out


def test_a_run_mines_at_each_epoch_and_its_baseline_mines_too(here):
    teacher = {"type": "students.BiEncoder", "checkpoint": str(here.encoder)}
    negatives = [
        mined(top=5, every=1, checked_by="cross", strata=2)["data.negatives"][0],
        mined("teacher", top=5)["data.negatives"][0],
    ]
    changes = {"data.negatives": negatives, "models.teacher": teacher, "baseline": True, "train.steps": 4}
    done = here("run", here.recipe(changes))
    assert done.code == 0, done.err
    for folder in (here.runs / "tiny", here.runs / "tiny" / "baseline"):  # `teacher` has no arrow at all
        found = sorted(path.relative_to(folder / "mined").as_posix() for path in folder.glob("mined/*/*"))
        assert found == [
            "negatives-0/epoch-0000.arrow",
            "negatives-0/epoch-0001.arrow",
            "negatives-1/epoch-0000.arrow",
        ]
    history = (here.runs / "tiny" / "history.jsonl").read_text()
    assert history.count("negatives[0]/rank") == 2 and history.count("negatives[1]/rank") == 1


def test_a_margin_that_removes_every_negative_ends_the_run_in_one_message(here):
    done = here("run", here.recipe(mined(top=5, margin=3.0)))
    assert done.code == 2 and not (here.runs / "tiny" / "checkpoints").exists()
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert re.search(
        r"data.negatives\[0\]: margin 3 removes every negative: all 8 queries, whose positives score .*, "
        r"lost all that student found, 40 candidates. Take a smaller margin .* top is 5, skip 0.$",
        line,
    )


# what goes wrong while it runs


def test_a_type_of_a_strangers_package_needs_trust_and_a_loss_that_is_not_finite_is_named(here, monkeypatch):
    (here.folder / "stranger.py").write_text(
        "import torch\n"
        "from distill.objectives import Objective\n"
        "from distill.outputs import Needs\n"
        "class Broken(Objective):\n"
        "    def __init__(self):\n"
        "        super().__init__(student_needs=Needs('scores'))\n"
        "    def count(self, batch):\n"
        "        return torch.ones(len(batch.query_ids))\n"
        "    def loss(self, student, teacher, batch):\n"
        "        return student.scores.sum(dim=-1) * float('nan')\n"
    )
    monkeypatch.syspath_prepend(str(here.folder))
    recipe = here.recipe({"losses.strange": {"type": "stranger.Broken", "to": "student"}})
    refused = here("run", recipe)
    assert refused.code == 2 and "pass --trust stranger" in refused.err
    failed = here("run", recipe, "--trust", "stranger")
    assert failed.code == 1
    assert re.search(r"error: step 1: the loss of losses.strange became nan. No checkpoint", failed.err)


def test_a_training_that_diverges_stops_and_says_so(here):
    failed = here("run", here.recipe({"evaluate": None}), "train.learning_rate=1e30", "train.steps=20")
    assert failed.code == 1
    assert re.search(
        r"error: step \d+: the loss of losses.\w+ became nan.*Lower train.learning_rate", failed.err
    )
    dev = str(here.folder / "test.tsv")  # where it is measured before the loss is nan
    recipe = here.recipe({"data.dev": dev, "name": "measured", "train.evaluate_every": 0.5})
    failed = here("run", recipe, "train.learning_rate=1e30")
    assert failed.code == 1 and re.search(r"error: .*cannot be measured", failed.err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_message(here):
    (here.runs / "tiny").mkdir(parents=True)
    (here.runs / "tiny/history.jsonl").symlink_to("/dev/full")
    failed = here("run", here.recipe({"evaluate": None}))
    assert failed.code == 1
    assert failed.err.splitlines()[-1].startswith("error: the disk is full")


def test_an_unexpected_error_is_one_line_and_debug_shows_where(here, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("the moon\nis full")

    monkeypatch.setattr("distill.run.Runs.run", fail)
    recipe = here.recipe()
    assert here("run", recipe) == Done(1, "", "error: RuntimeError: the moon is full (--debug shows where)\n")
    shown = here("run", recipe, "--debug")
    assert shown.code == 1 and "Traceback" in shown.err and "in fail" in shown.err


PATIENT = """
import os, time
from pathlib import Path
import torch
from distill.objectives import Objective
from distill.outputs import Needs

class Patient(Objective):
    def __init__(self):
        super().__init__(student_needs=Needs("scores"))
        self.steps = 0

    def count(self, batch):
        return torch.ones(len(batch.query_ids))

    def loss(self, student, teacher, batch):
        self.steps += 1
        if self.steps == 3 and "PATIENT" in os.environ:  # until the signal was sent
            folder = Path(os.environ["PATIENT"])
            (folder / "ready").touch()
            while not (folder / "sent").exists():
                time.sleep(0.01)
        return (student.scores - 1).square().sum(dim=-1)
"""


def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_weights(here, tmp_path, monkeypatch):
    """Started as users start it; what the interrupted run ends with is compared bit by bit."""
    (tmp_path / "patient.py").write_text(PATIENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    losses = {"patient": {"type": "patient.Patient", "to": "student"}}
    train = {"steps": 7, "batch_size": 2, "log_every": 1}
    models = {"student": here.document["models"]["student"]}
    recipe = here.recipe({"evaluate": None, "train": train, "losses": losses, "models": models})
    arguments = ["run", str(recipe), "--trust", "patient", "--runs"]
    environment = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}",
        "PATIENT": str(tmp_path),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "distill", *arguments, str(here.runs)],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None and not (tmp_path / "ready").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        (tmp_path / "sent").touch()
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 1, err
    assert "interrupted: stopped after step 3 of 7; a checkpoint is saved. The same command goes on" in err
    assert "Traceback" not in err

    resumed = distill(*arguments, here.runs)
    assert resumed.code == 0 and "going on from step 3 of 7" in resumed.err
    assert distill(*arguments, tmp_path / "whole").code == 0
    files = [folder / "tiny/student/model.safetensors" for folder in (here.runs, tmp_path / "whole")]
    interrupted, whole = map(load_file, files)
    assert interrupted.keys() == whole.keys()
    assert all(torch.equal(interrupted[name], whole[name]) for name in whole)
    history = (here.runs / "tiny/history.jsonl").read_text()
    assert [json.loads(line)["step"] for line in history.splitlines()] == [1, 2, 3, 4, 5, 6, 7]


def test_python_m_distill_has_the_exit_code_and_nothing_on_stdout(tmp_path):
    command = [sys.executable, "-m", "distill", "check", "nowhere.yaml"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no recipe file nowhere.yaml.\n"


# list, evaluate, index, search


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("recipes", r"quickstart +A 2-layer"),
        ("objectives", r"distill.objectives.ScoreKL +Teach the student to rank"),
        ("models", r"teachers.CrossEncoder +A transformer over"),
        ("data", r"distill.data.Retrieval +A corpus, queries, and judgements"),
        ("metrics", r"nDCG@10 +\w+"),
        ("runs", r"tiny +nDCG@10 \d\.\d{4}, Recall@100"),
    ],
)
def test_list_says_one_line_each(finished, kind, line):
    place, _ = finished
    one = place("list", kind)
    assert one.code == 0 and re.search(f"^{line}", one.out, re.M)
    assert re.search(f"^{kind}:\n(  .*\n)*  {line}", place("list").out, re.M)


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("no judgement", "left out: 1,200 queries with no judgement"),
        ("users with labels of one kind, of GAUC", "left out of GAUC: 1,200 users with labels of one kind"),
    ],
)
def test_what_was_left_out_reads_as_a_sentence(reason, line):
    assert _left_out(reason, 1200) == line


def test_evaluate_measures_what_the_run_measured(finished):
    place, _ = finished
    recipe = place.folder / "recipe.yaml"
    measured = json.loads((place.runs / "tiny/metrics.json").read_text())["models"]
    for model, name in (("tiny", "student"), (place.reranker, "cross")):
        done = place("evaluate", model, recipe, "--json")
        assert done.code == 0
        assert json.loads(done.out)["metrics"] == pytest.approx(measured[name]["metrics"], abs=1e-6)
    table = place(
        "evaluate", place.runs / "tiny/student", recipe, "--split", "train", "evaluate.metrics=[P@1]"
    )
    assert "train.tsv (train): exact search over all candidates, 8 queries" in table.out
    assert re.search(r"model +P@1 +size in MB +queries/s", table.out)
    assert place("evaluate", "tiny", recipe, "--split", "tset").code == 2
    assert place("evaluate", "nowhere/model", recipe).code == 2


def test_an_index_remembers_its_model_and_answers_queries(finished, monkeypatch, tmp_path):
    place, _ = finished
    index = tmp_path / "index"
    made = place("index", "tiny", place.corpus, "--output", index)
    assert made.code == 0 and "20 candidates, 32 dimensions, Flat" in made.out
    one = place("search", index, DOCUMENTS[7]["text"], "-k", "2")
    assert one.code == 0
    assert re.match(
        rf"{DOCUMENTS[7]['text']}\n   1  1\.00\d\d  d7  {DOCUMENTS[7]['text']}\n   2  .*\n$", one.out
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{DOCUMENTS[7]['text']}\n\ncat\n"))
    several = place("search", index, "-k", "2")
    assert several.out.startswith(one.out) and several.out.count("\n") == 6


def test_what_cannot_be_indexed_or_searched_is_refused(finished, tmp_path, monkeypatch):
    place, _ = finished
    unable = place("index", place.reranker, place.corpus, "--output", tmp_path / "index")
    assert unable.code == 2 and "cannot be indexed" in unable.err
    precious = place("index", "tiny", place.corpus, "--output", place.folder)
    assert precious.code == 2 and "is no index" in precious.err and Path(place.corpus).exists()
    column = place("index", "tiny", place.corpus, "--output", tmp_path / "index", "--text-column", "txet")
    assert column.code == 2 and "Did you mean 'text'?" in column.err
    assert place("search", tmp_path / "nothing", "a").code == 2
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "no query" in place("search", place.runs / "tiny/index").err
