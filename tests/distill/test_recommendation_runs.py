"""Recommendation through the command: trained, measured, saved, opened, indexed and searched; and refused."""

import json
import re

import pytest
import torch
from ruamel.yaml import YAML

from distill.open import open_model
from distill.paths import recipes_folder
from distill.recipe import load_recipe
from distill.run import Runs
from tests.distill.workplace import distill

pytest.importorskip("lightgbm")
FEW = {"train": 300, "test": 300, "dim": 4}
FILMS = {"type": "distill.data.MovieLens"}


def recipe_of(name: str, **changes) -> dict:
    """One of ours, changed."""
    document = YAML(typ="safe").load((recipes_folder() / f"{name}.yaml").read_text())
    return {"name": "mine", **document, **changes}


def written(folder, document) -> str:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(document))
    return str(path)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DISTILL_STORE", str(tmp_path / "store"))
    return tmp_path


def test_a_ranker_and_gradient_boosting_teach_one_two_tower(place):
    """`recsys/simulated` with a second teacher: one more node, one more arrow."""
    document = recipe_of("recsys/simulated")
    document["data"] |= FEW
    document["models"]["boosting"] = {
        "type": "teachers.GradientBoosting",
        "features": {"data": "data"},
        "trees": 5,
    }
    document["losses"]["trees"] = {**document["losses"]["soft"], "from": "boosting"}
    document["train"] |= {"epochs": 2, "evaluate_every": 1}
    scoring = Runs(place / "runs").scoring(load_recipe(written(place, document)))
    scoring.fill()  # as a study does before it starts several trainings: the boosting is fitted first
    assert scoring.memory.asked["boosting"] > 0
    done = distill("run", written(place, document), "--runs", place / "runs")
    assert done.code == 0, done.err
    said = json.loads((place / "runs/mine/metrics.json").read_text())
    assert {"student", "ranker", "boosting", "baseline"} == set(said["models"])
    assert all(0 <= model["metrics"]["AUC"] <= 1 for model in said["models"].values())
    history = [json.loads(line) for line in (place / "runs/mine/history.jsonl").read_text().splitlines()]
    assert {"loss/soft", "loss/trees", "loss/ranker_labels"} <= set().union(*history)
    again = distill("evaluate", "mine", place / "recipe.yaml", "--runs", place / "runs", "--json")
    found = json.loads(again.out)["metrics"]
    assert found == pytest.approx(said["models"]["student"]["metrics"], abs=1e-6)
    assert open_model("mine", place / "runs").encode_users([{f"x{i:02}": 0.5 for i in range(4)}]).shape == (
        1,
        8,
    )


def test_check_asks_a_frozen_ranker_and_says_whom_it_does_not_ask(place):
    document = recipe_of("recsys/simulated")
    document["data"] |= FEW | {"c": 3.0}
    teacher = {key: part for key, part in document.items() if key not in ("baseline", "evaluate")} | {
        "name": "teacher",
        "keep": "ranker",
        "models": {"ranker": document["models"]["ranker"]},
        "losses": {"ranker_labels": document["losses"]["ranker_labels"]},
        "train": {**document["train"], "epochs": 20, "evaluate_every": 20},
    }
    (place / "teacher.yaml").write_text(json.dumps(teacher))
    made = {"checkpoint": {"run": str(place / "teacher.yaml")}, "train": False}
    document["models"]["ranker"] = document["models"]["ranker"] | made
    document["models"]["boosting"] = {"type": "teachers.GradientBoosting", "features": {"data": "data"}}
    document["losses"] = {
        "soft": document["losses"]["soft"],
        "trees": {**document["losses"]["soft"], "from": "boosting"},
    }
    path = written(place, document)
    done = distill("check", path, "--runs", place / "runs")
    assert done.code == 0, done.err
    assert "ranker was not asked: the run that makes it comes first" in done.out
    assert "boosting was not asked: it is fitted when the recipe is run" in done.out
    assert distill("run", place / "teacher.yaml", "--runs", place / "runs").code == 0
    done = distill("check", path, "--runs", place / "runs")
    assert done.code == 0, done.err
    ((pairs, agreement),) = re.findall(r"^ +ranker +data +train +(\d+) .* (\S+) +\S+ *$", done.out, re.M)
    assert pairs == "300" and float(agreement) > 0.5 and "ranker was not asked" not in done.out


def test_a_student_that_reads_what_only_training_knows_is_refused(place):
    document = recipe_of("recsys/simulated")
    document["data"] |= FEW
    document["models"] = {"student": {"type": "teachers.PrivilegedRanker", "features": {"data": "data"}}}
    document["losses"] = {"labels": {"type": "distill.objectives.BinaryCrossEntropy", "to": "student"}}
    document["baseline"] = False
    done = distill("check", written(place, document))
    assert done.code == 2 and "models.student reads what only training knows: z" in done.err
    document["models"]["student"]["privileged"] = False
    assert distill("check", written(place, document)).code == 0


@pytest.fixture
def films(place):
    """Sixty users who rate ten of twenty films, each at a time of its own."""
    draw = torch.Generator().manual_seed(0)
    rows = [
        (user, film + 1, 4, 1000 * user + place)
        for user in range(1, 61)
        for place, film in enumerate(torch.randperm(20, generator=draw)[:10].tolist())
    ]
    folder = place / "films"
    folder.mkdir()
    (folder / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    )
    (folder / "movies.csv").write_text(
        "movieId,title,genres\n"
        + "".join(f"{film},Film {film} (19{film + 50}),Drama\n" for film in range(1, 21))
    )
    return folder


def test_films_are_learnt_indexed_and_a_user_is_answered(place, films):
    document = recipe_of("recsys/dssm_movielens")
    document["data"] = {**document["data"], "path": str(films), "negatives": []}
    document["losses"]["labels"].pop("log_q")
    document["train"] = {"steps": 3, "batch_size": 32}
    path = written(place, document)
    done = distill("run", path, "--runs", place / "runs")
    assert done.code == 0, done.err
    said = json.loads((place / "runs/mine/metrics.json").read_text())
    assert set(said["references"]) == {"popularity", "random"}
    done = distill("index", "mine", path, "--runs", place / "runs", "--output", place / "index")
    assert done.code == 0 and "20 candidates, 64 dimensions" in done.out, done.err
    user = {"user_id": 7, "hist_movie_id": [3, 4]}
    done = distill("search", place / "index", "--user", json.dumps(user), "-k", 3)
    assert done.code == 0 and len(done.out.splitlines()) == 4, done.err
    done = distill("index", "mine", films / "movies.csv", "evaluate.split=dev", "--runs", place / "runs")
    assert done.code == 2 and "evaluate.split=dev: keys of a recipe, but" in done.err


def test_a_frozen_two_tower_is_asked_about_films_drawn_beside_those_taken(place, films):
    document = recipe_of("recsys/dssm_movielens")
    document["data"] = {**document["data"], "path": str(films), "negatives": []}
    document["losses"]["labels"].pop("log_q")
    document["train"] = {"steps": 2, "batch_size": 32}
    (place / "teacher.yaml").write_text(json.dumps({**document, "name": "teacher"}))
    assert distill("run", place / "teacher.yaml", "--runs", place / "runs").code == 0
    made = {"checkpoint": {"run": str(place / "teacher.yaml")}, "train": False}
    document["models"]["teacher"] = document["models"]["student"] | made
    kl = {"type": "distill.objectives.ScoreKL", "from": "teacher", "to": "student", "in_batch": True}
    document["losses"]["order"] = kl
    path = written(place, document)
    done = distill("check", path, "--runs", place / "runs")
    assert done.code == 0, done.err
    (pairs,) = re.findall(r"^ +teacher +data +train +([\d,]+) .* [+-]0\.\d+ +\S+ *$", done.out, re.M)
    assert int(pairs.replace(",", "")) > 2 * 64  # each of 64 moments with what was taken there, and others
    assert distill("run", path, "--runs", place / "runs").code == 0
    health = json.loads((place / "runs/mine/metrics.json").read_text())["health"]
    assert health["teachers"][0]["lists"] == 32 and health["teachers"][0]["pairs"] > 2 * 32


def test_a_correction_that_the_samplers_cannot_tell_is_refused(place, films):
    document = recipe_of("recsys/dssm_movielens")
    mined = {"type": "distill.data.NearestNegatives", "by": "student", "count": 2, "top": 5}
    document["data"] = {**document["data"], "path": str(films), "candidates": 3, "negatives": [mined]}
    done = distill("check", written(place, document))
    assert done.code == 2
    assert (
        "losses.labels.log_q: in the data set 'data' negatives[0] (NearestNegatives) cannot say" in done.err
    )
    document["data"]["negatives"] = [{"type": "distill.data.RandomNegatives", "count": 2}]
    assert distill("check", written(place, document)).code == 0
