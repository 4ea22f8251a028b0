"""A run is taken for another only if it trained and measured the same."""

import json
import os
from pathlib import Path

import pytest

from distill.equal_runs import EqualRuns
from distill.one_run import environment
from distill.recipe import check_recipe
from distill.run import as_yaml


def recipe(**changes):
    document = {
        "name": "study/cell/seed1",
        "data": {"type": "distill.data.Groups", "path": "lists", "train": "train.jsonl"},
        "models": {
            "student": {"type": "students.BiEncoder", "checkpoint": "bert"},
            "teacher": {"type": "teachers.CrossEncoder", "checkpoint": {"run": "large"}},
        },
        "losses": {"scores": {"type": "distill.objectives.ScoreKL", "from": "teacher", "to": "student"}},
        "train": {"steps": 20},
        "evaluate": {"metrics": ["MAP"], "teachers": False},
    }
    return check_recipe(document | changes, "")


def leave(folder, made, at, steps=20, where=None):
    """A finished run as ``distill run`` leaves it, at a time in seconds."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(as_yaml(made))
    (folder / "environment.json").write_text(json.dumps(where or environment()))
    (folder / "metrics.json").write_text(json.dumps({"steps": steps}))
    os.utime(folder / "metrics.json", (at, at))


def found(runs, wanted=None):
    equal = EqualRuns(runs, environment()).find(wanted or recipe())
    return None if equal is None else equal.relative_to(runs)


@pytest.fixture
def runs(tmp_path):
    """Runs among which is the teacher's."""
    leave(tmp_path / "large", recipe(name="large"), 1000)
    return tmp_path


@pytest.mark.parametrize(
    "same",
    [
        {},
        {"train": {"epochs": 3}},  # these were 20 steps
        {"baseline": True, "baseline_train": {"patience": 2}, "search": ["a query"]},
        {"evaluate": {"metrics": ["MAP"], "teachers": True}},
    ],
)
def test_an_equal_run_is_found_whatever_its_name_and_baseline(runs, same):
    leave(runs / "any/name", recipe(name="any/name", **same), 2000)
    assert found(runs) == Path("any/name")


@pytest.mark.parametrize(
    "other",
    [
        {"train": {"steps": 20, "seed": 2}},
        {"train": {"minutes": 1, "epochs": 3}},
        {"evaluate": {"metrics": ["MAP"], "split": "dev", "teachers": False}},
        {"losses": {"scores": {"type": "distill.objectives.RankNet", "from": "teacher", "to": "student"}}},
        {"data": {"type": "distill.data.Groups", "path": "lists", "train": "more.jsonl"}},
    ],
)
def test_another_run_is_not_taken(runs, other):
    leave(runs / "any/name", recipe(name="any/name", **other), 2000)
    assert found(runs) is None


def test_nor_is_one_of_other_steps_packages_or_of_an_earlier_teacher(runs):
    there = environment()
    leave(runs / "a", recipe(name="a"), 2000, steps=19)
    leave(
        runs / "b", recipe(name="b"), 2000, where=there | {"packages": there["packages"] | {"torch": "1.0"}}
    )
    leave(runs / "c", recipe(name="c"), 500)  # then the teacher was made anew
    assert found(runs) is None
    leave(runs / "d", recipe(name="d"), 2000, where=there | {"threads": 99})
    assert found(runs) == Path("d")


def test_one_that_measured_no_teachers_does_not_do_where_they_are_wanted(runs):
    leave(runs / "a", recipe(name="a"), 2000)
    wanted = recipe(evaluate={"metrics": ["MAP"], "teachers": True})
    assert found(runs, wanted) is None
    leave(runs / "b", recipe(name="b", evaluate={"metrics": ["MAP"], "teachers": True}), 2000)
    assert found(runs, wanted) == Path("b")


def test_what_is_not_finished_or_not_of_today_is_passed_over(runs):
    leave(runs / "a", recipe(name="a"), 2000)
    (runs / "a/metrics.json").unlink()
    leave(runs / "b", recipe(name="b"), 2000)
    (runs / "b/recipe.yaml").write_text("name: b\nlosess: {}\n")
    leave(runs / "c", recipe(name="c"), 2000)
    (runs / "c/recipe.yaml").write_text("name: [")
    leave(runs / "d", recipe(name="d"), 2000)
    (runs / "d/metrics.json").write_text("{")
    leave(runs / "e", recipe(name="e"), 2000)
    (runs / "e/environment.json").write_text("{")
    assert found(runs) is None


def test_data_sets_in_another_order_are_other_batches(runs):
    one = {"type": "distill.data.Groups", "path": "lists", "train": "train.jsonl"}
    leave(runs / "a", recipe(name="a", data={"x": one, "y": one}), 2000)
    assert found(runs, recipe(data={"x": one, "y": one})) == Path("a")
    assert found(runs, recipe(data={"y": one, "x": one})) is None
