"""A study from end to end, on tiny models: what it shares, what it leaves, and what it does not do twice."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch

from distill.ablate import _why
from distill.cli import main
from distill.errors import RunError
from distill.evaluation import compare, holm
from distill.recipe import read_yaml
from distill.run import Runs
from distill.trainer import Trainer
from teachers import CrossEncoder

TOPICS = ["river water ship", "cell protein gene", "wing flow jet", "music book film", "cat dog bird"]
LISTED = {"type": "distill.objectives.SampledSoftmax", "in_batch": False, "temperature": 1.0}
CROSS = {"type": "distill.objectives.ScoreKL", "from": "cross", "to": "student"}


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Seen(NamedTuple):
    """What one training was given: its run, steps, first weights, and the queries of its batches."""

    name: str
    steps: int
    first: dict[str, torch.Tensor]
    queries: list[list[int]]


class Place:
    """A folder with data, a recipe, a study of it, and a teacher store of its own."""

    def __init__(self, folder: Path, tiny_bert):
        self.folder, self.runs = folder, folder / "runs"
        for split in ("train", "dev", "test"):
            rows = [
                {"query": f"what is {TOPICS[q % 5]} {q}", "candidate": f"{TOPICS[(q + c) % 5]} {split} {c}",
                 "label": int(c == 0)}
                for q in range(10) for c in range(4)
            ]  # fmt: skip
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts = "".join(json.dumps({"text": f"a {topic}"}) + "\n" for topic in TOPICS)
        (folder / "texts.jsonl").write_text(texts)
        bert = {"type": "students.BiEncoder", "checkpoint": str(tiny_bert(layers=1))}
        splits = {split: f"{split}.jsonl" for split in ("train", "dev", "test")}
        self.recipe: dict[str, Any] = {
            "name": "tiny",
            "data": {
                "lists": {"type": "distill.data.Groups", "path": str(folder), "candidates": 4, **splits},
                "texts": {"type": "distill.data.Texts", "path": str(folder), "train": "texts.jsonl"},
            },
            "models": {
                "student": {**bert, "dropout": 0.1},
                "bi": bert,
                "cross": {"type": "teachers.CrossEncoder", "checkpoint": str(tiny_bert(1, num_labels=1))},
            },
            "losses": {
                "labels": {"type": "distill.objectives.SampledSoftmax", "to": "student", "data": ["lists"]},
                "order": {**CROSS, "data": ["lists"]},
                "vectors": {"type": "distill.objectives.EmbeddingMatch", "from": "bi", "to": "student"},
            },
            "train": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "mixed_precision": "no"},
            "evaluate": {"metrics": ["nDCG@10", "MRR@10"]},
            "baseline": True,
        }
        self.study: dict[str, Any] = {
            "name": "mine/study",
            "recipe": str(folder / "tiny.yaml"),
            "seeds": [1, 2],
            "baseline": "alone",
            "variants": {
                "alone": {"drop": ["losses.order", "losses.vectors", "models.cross", "models.bi"]},
                "taught": {"drop": ["losses.vectors", "models.bi"]},
                "all": {},
            },
        }

    def __call__(self, command: str, *arguments: str) -> Done:
        (self.folder / "tiny.yaml").write_text(json.dumps(self.recipe))
        path = self.folder / "study.yaml"
        path.write_text(json.dumps(self.study))
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            main([command, str(path), *arguments, "--runs", str(self.runs)])
        return Done(end.value.code, out.getvalue(), err.getvalue())

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.runs / "mine/study/results.json").read_text())


def watch(monkeypatch, asked: list[int] | None = None) -> list[Seen]:
    """Each training that happens, and how many pairs the cross-encoder is asked about in training."""
    seen: list[Seen] = []
    fit, batch, represent = Trainer.fit, Trainer._batch, CrossEncoder.represent

    def watched_fit(self):
        student = self.graph.nodes[self.graph.keep]
        first = {name: p.detach().clone() for name, p in student.named_parameters()}
        seen.append(Seen("/".join(self.folder.parts[-2:]), self.progress.steps, first, []))
        return fit(self)

    def watched_batch(self, place):
        made = batch(self, place)
        if made.source == "lists":
            seen[-1].queries.append(made.query_ids.tolist())
        return made

    def watched_represent(model, given, needs):
        if asked is not None:
            asked.append(int(given.mask.sum()))
        return represent(model, given, needs)

    monkeypatch.setattr(Trainer, "fit", watched_fit)
    monkeypatch.setattr(Trainer, "_batch", watched_batch)
    monkeypatch.setattr(CrossEncoder, "represent", watched_represent)
    return seen


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_bert):
    place = Place(tmp_path_factory.mktemp("study"), tiny_bert)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("DISTILL_STORE", str(place.folder / "store"))
        monkeypatch.setitem(place.recipe["evaluate"], "teachers", False)
        asked: list[int] = []
        seen = watch(monkeypatch, asked)
        done = place("ablate")
    return place, done, seen, asked


@pytest.fixture
def here(tmp_path, tiny_bert, monkeypatch) -> Place:
    monkeypatch.setenv("DISTILL_STORE", str(tmp_path / "store"))
    place = Place(tmp_path, tiny_bert)
    place.recipe["train"]["steps"] = 1
    place.recipe["evaluate"]["teachers"] = False
    place.study["variants"].pop("all")
    return place


def test_every_cell_is_an_ordinary_run(finished):
    place, done, seen, _ = finished
    assert done.code == 0, done.err
    assert [one.name for one in seen] == [
        f"{variant}/seed{seed}" for seed in (1, 2) for variant in ("alone", "taught", "all")
    ]
    folder = place.runs / "mine/study"
    assert {path.name for path in folder.iterdir()} == {
        "alone", "taught", "all", "study.yaml", "results.json", "results.md", "per_query.parquet", "plot.png",
    }  # fmt: skip
    for cell in folder.glob("*/seed*"):
        assert (cell / "student/model.safetensors").exists() and not (cell / "baseline").exists()
    recipe = Runs(place.runs).load(folder / "all/seed2/recipe.yaml")
    assert recipe.name == "mine/study/all/seed2" and Runs(place.runs).is_finished(recipe)


def test_variants_share_first_weights_steps_and_order_and_ask_once(finished):
    _, _, seen, asked = finished
    assert {one.steps for one in seen} == {
        5
    }  # 3 of the lists and 2 of the texts, also where these are not heard
    for seed in (0, 3):
        alone, taught, everything = seen[seed : seed + 3]
        assert alone.queries == taught.queries and len(alone.queries) == 5
        assert everything.queries == alone.queries[: len(everything.queries)]
        for other in (taught, everything):
            assert all(torch.equal(other.first[name], first) for name, first in alone.first.items())
    assert seen[0].queries != seen[3].queries
    assert sum(asked) == 40  # the pairs that are listed, once for all variants and seeds


def test_the_results_are_those_of_the_runs(finished):
    place, done, _, _ = finished
    results = place.results["data"][""]
    runs = place.runs / "mine/study"

    def run(variant: str, seed: int) -> tuple[dict[str, Any], pd.DataFrame]:
        frame = pd.read_parquet(runs / f"{variant}/seed{seed}/per_query.parquet")
        measured = json.loads((runs / f"{variant}/seed{seed}/metrics.json").read_text())
        return measured, frame[frame["model"] == "student"].sort_values("query", ignore_index=True)

    values = [run("all", seed)[0]["models"]["student"]["metrics"]["nDCG@10"] for seed in (1, 2)]
    assert results["variants"]["all"]["metrics"]["nDCG@10"]["values"] == values
    dev = [run("all", seed)[0]["dev"]["nDCG@10"] for seed in (1, 2)]
    assert results["variants"]["all"]["dev"]["nDCG@10"]["values"] == dev
    means = []
    for variant in ("alone", "all"):
        one, two = (run(variant, seed)[1] for seed in (1, 2))
        means.append(one.assign(**{"nDCG@10": (one["nDCG@10"] + two["nDCG@10"]) / 2}))
    test = results["variants"]["all"]["tests"]["nDCG@10"]
    again = compare(*means, "nDCG@10")
    assert test["difference"] == pytest.approx(again.difference)
    assert test["low"] == pytest.approx(again.low, abs=0.02) and test["queries"] == 10
    best = max(results["variants"], key=lambda name: results["variants"][name]["dev"]["nDCG@10"]["mean"])
    assert results["winner"]["variant"] == best
    assert re.search(rf"^winner: {best}, the best of 3 on dev", done.out, re.M)
    row = re.search(r"^  all +nDCG@10 +(\S+) +(\S+) +([+-]\S+) ", done.out, re.M)
    assert row is not None and row[1] == f"{sum(values) / 2:.4f}" and row[3] == f"{test['difference']:+.4f}"
    text = (runs / "results.md").read_text()
    assert text.startswith("| variant | metric | mean |") and "winner: " in text


def test_the_cost_is_what_each_would_cost_alone(finished):
    """The second variant finds the store filled by the first; what it needs is still said."""
    found = finished[0].results["data"][""]["variants"]
    assert found["alone"]["cost"]["teacher_answers"] == 0
    assert found["taught"]["cost"]["teacher_answers"] == 40 and found["taught"]["cost"]["teacher_calls"] == 40
    answers = found["all"]["cost"]["teacher_answers"]
    assert answers > 40 and found["all"]["cost"]["teacher_calls"] == answers - 40
    assert found["alone"]["cost"]["tokens"] > 0 and found["alone"]["cost"]["seconds"] > 0


def test_progress_and_time_left_are_said(finished):
    err = finished[1].err
    assert "mine/study: 6 cells, 0 are finished" in err
    assert re.search(r"2 of 6 cells done \(taught, seed 1 took \d+ s\), about \d+ min left", err)


def test_a_finished_study_trains_nothing_and_says_the_same(finished, monkeypatch):
    place, first, _, _ = finished
    monkeypatch.setitem(place.recipe["evaluate"], "teachers", False)
    seen = watch(monkeypatch)
    again = place("ablate")
    assert again.code == 0 and seen == [] and again.out == first.out


def test_check_says_what_the_variants_do_and_what_is_done(finished, monkeypatch):
    place, _, _, _ = finished
    monkeypatch.setitem(place.recipe["evaluate"], "teachers", False)
    done = place("check", "seeds=[1, 2, 3]")
    assert done.code == 0, done.err
    assert re.search(r"all +alone +labels, order, vectors +cross, bi +lists, texts +5 ", done.out)
    assert re.search(r"alone +labels +lists +5 ", done.out)
    assert "9 trainings, seeds 1, 2, 3; 6 are finished" in done.out
    assert "cross is asked once about 40 pairs" in done.out


def test_an_interrupted_study_goes_on_without_repeating(here, monkeypatch):
    """Ctrl-C in the second cell: the first is kept, the second goes on, and the end is as if nothing was."""
    fit, count = Trainer.fit, []

    def interrupted(self):
        count.append(self.folder.name)
        if len(count) == 2:
            raise KeyboardInterrupt
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", interrupted)
    stopped = here("ablate", "seeds=[1]")
    assert stopped.code == 1 and "The same command goes on from there" in stopped.err
    assert not (here.runs / "mine/study/results.json").exists()
    monkeypatch.setattr(Trainer, "fit", fit)
    seen = watch(monkeypatch)
    done = here("ablate", "seeds=[1]")
    assert done.code == 0 and [one.name for one in seen] == ["taught/seed1"]
    assert "2 cells, 1 are finished" in done.err
    seen.clear()
    assert here("ablate").code == 0 and [one.name for one in seen] == ["alone/seed2", "taught/seed2"]


def test_a_cell_that_was_trained_elsewhere_is_not_trained_again(here, monkeypatch):
    assert here("ablate", "name=earlier", "seeds=[1]").code == 0
    first = json.loads((here.runs / "earlier/results.json").read_text())["data"]
    seen = watch(monkeypatch)
    assert "4 trainings, seeds 1, 2; 2 are finished" in here("check").out
    assert "mine/study/taught/seed1 is taken from" in here("check").out
    done = here("ablate", "seeds=[1]")
    assert done.code == 0 and seen == [] and here.results["data"] == first
    assert "mine/study/taught/seed1: " in done.err and "is a run of the same, and is taken for it" in done.err
    assert here.results["taken"].keys() == {"mine/study/alone/seed1", "mine/study/taught/seed1"}
    assert here("ablate", "seeds=[1]", "--overwrite").code == 0
    assert [one.name for one in seen] == ["alone/seed1", "taught/seed1"]


def test_a_run_with_a_baseline_is_taken_without_it(here, monkeypatch):
    """And what a cell leaves names its data sets in the order in which it heard them."""
    here.study["variants"]["whole"] = {}
    (here.folder / "tiny.yaml").write_text(json.dumps(here.recipe))
    all_runs = Runs(here.runs)
    all_runs.run(all_runs.load(here.folder / "tiny.yaml"))
    seen = watch(monkeypatch)
    assert here("ablate", "seeds=[1]").code == 0
    assert [one.name for one in seen] == ["alone/seed1", "taught/seed1"]
    assert list(here.results["taken"]) == ["mine/study/whole/seed1"]
    assert here.results["data"][""]["teachers"] == []
    assert list(read_yaml(here.runs / "mine/study/taught/seed1/recipe.yaml")["data"]) == ["lists", "texts"]


def teacher_by_a_run(here):
    """The study's cross-encoder is made by a recipe that is run first."""
    cross = {"name": "cross", **{key: here.recipe[key] for key in ("train", "evaluate")}}
    cross["data"] = {"lists": here.recipe["data"]["lists"]}
    cross["models"] = {"cross": {**here.recipe["models"]["cross"], "train": True}}
    cross |= {"keep": "cross", "losses": {"labels": {**LISTED, "to": "cross"}}}
    path = here.folder / "cross.yaml"
    path.write_text(json.dumps(cross))
    here.recipe["models"]["cross"]["checkpoint"] = {"run": str(path)}


@pytest.mark.parametrize("kind", [RunError, torch.OutOfMemoryError])
def test_a_cell_that_fails_is_told_and_the_others_are_compared(kind, here, monkeypatch):
    fit = Trainer.fit

    def failing(self):
        if self.folder.parts[-2:] == ("taught", "seed1"):
            raise kind("step 1: the loss of losses.order became nan.")
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", failing)
    done = here("ablate")
    assert done.code == 1 and "1 trainings failed, see above" in done.err
    assert "failed: taught, seed 1: step 1: the loss of losses.order became nan" in done.out
    test = here.results["data"][""]["variants"]["taught"]["tests"]["nDCG@10"]
    assert test["seeds"] == 1
    monkeypatch.setattr(Trainer, "fit", fit)
    seen = watch(monkeypatch)
    assert here("ablate").code == 0 and [one.name for one in seen] == ["taught/seed1"]


def test_a_teacher_that_fails_takes_its_own_cells_alone(here, monkeypatch):
    teacher_by_a_run(here)
    fit = Trainer.fit

    def failing(self):
        if self.folder.name == "cross":
            raise MemoryError
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", failing)
    done = here("ablate", "seeds=[1]")
    assert done.code == 1 and re.search(r"failed: taught, seed 1: its teacher \S+: MemoryError", done.out)
    assert list(here.results["data"][""]["variants"]) == ["alone"]


def test_a_variant_that_changed_is_refused_before_anything_runs_unless_it_may_overwrite(here, monkeypatch):
    assert here("ablate", "seeds=[1]").code == 0
    here.study["variants"]["taught"]["set"] = {"losses.order.temperature": 2}
    seen = watch(monkeypatch)
    refused = here("ablate", "seeds=[1]")
    assert refused.code == 2 and seen == []
    assert "taught/seed1 holds a run of another recipe (other: losses)" in refused.err
    assert here("ablate", "seeds=[1]", "--overwrite").code == 0
    assert [one.name for one in seen] == ["taught/seed1"]


def test_what_only_the_graph_shows_is_found_before_the_first_training(here, monkeypatch):
    """And said once, of the recipe, where no variant is to blame."""
    here.study["variants"]["bad"] = {"set": {"losses.order.type": "distill.objectives.EmbeddingMatch"}}
    seen = watch(monkeypatch)
    done = here("ablate")
    assert done.code == 2 and seen == []
    assert "variants.bad: losses.order: EmbeddingMatch needs" in done.err
    here.recipe["data"]["lists"]["test"] = "nowhere.jsonl"
    said = here("ablate").err
    assert said.count("nowhere.jsonl") == 1


def test_without_matplotlib_there_is_everything_but_the_plot(here, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = here("ablate", "seeds=[1]")
    assert done.code == 0 and "pip install 'distill-search[plots]'" in done.err
    assert {path.name for path in (here.runs / "mine/study").glob("*.*")} == {
        "study.yaml", "results.json", "results.md", "per_query.parquet",
    }  # fmt: skip


def test_as_many_run_at_a_time_as_memory_holds_once_it_is_known_what_one_takes(here, monkeypatch):
    """Nothing is known before the first has ended; who has not run yet may take twice the most so far."""
    here.study["variants"]["third"] = {}
    fitted: list[list[bool]] = []

    def looked_at(jobs, fits, finished, environment):
        alone, taught, third = (
            next(job for job in jobs if job.about.variant == variant) for variant in here.study["variants"]
        )

        def look():
            beside = [(alone, [alone]), (taught, [alone]), (taught, [taught]), (third, [alone, alone])]
            fitted.append([fits(job, running) for job, running in beside])

        look()
        for job, peak in ((alone, 400), (taught, 1300)):
            folder = here.runs / job.about.recipe.name
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps({"cost": {"peak_memory_mb": peak}}))
            finished(job, 0, 1.0)
            look()
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.ablate.run_jobs", looked_at)
    assert here("ablate", "--jobs", "4", "--memory", "2.5").code == 1
    assert fitted == [[False] * 4, [True, True, True, True], [True, True, False, False]]


def test_a_process_that_the_system_killed_is_told_as_such(tmp_path):
    (tmp_path / "log.txt").write_text("step 3 of 8")
    why = _why(-signal.SIGKILL, tmp_path / "log.txt")
    assert "SIGKILL" in why and "out of memory" in why and "step 3 of 8" in why
    assert _why(1, tmp_path / "log.txt").startswith("step 3 of 8")


def test_a_study_over_two_data_sets_has_a_table_a_winner_and_folders_of_each(here):
    here.study["data"] = {"four": {}, "two": {"set": {"data.lists.candidates": 2}}}
    done = here("ablate", "seeds=[1]")
    assert done.code == 0, done.err
    study = here.runs / "mine/study"
    recipes = {
        (data, variant): read_yaml(study / data / variant / "seed1/recipe.yaml")
        for data in ("four", "two") for variant in ("alone", "taught")
    }  # fmt: skip
    width = {place: recipe["data"]["lists"]["candidates"] for place, recipe in recipes.items()}
    assert width == {place: 4 if place[0] == "four" else 2 for place in recipes}
    assert [*here.results["data"]] == ["four", "two"]
    assert all(found["winner"]["of"] == 2 for found in here.results["data"].values())
    assert re.search(r"^two: winner: ", done.out, re.M)
    assert "| data | variant | metric |" in (study / "results.md").read_text()
    p = [here.results["data"][d]["variants"]["taught"]["tests"]["nDCG@10"] for d in ("four", "two")]
    assert [test["p_holm"] for test in p] == holm([test["p_value"] for test in p])


def test_what_is_finished_is_compared_without_training(here, monkeypatch):
    assert here("ablate", "seeds=[1]").code == 0
    seen = watch(monkeypatch)
    done = here("ablate", "--finished")
    assert done.code == 0 and not seen
    assert "2 of 4 trainings are not finished; no winner is named" in " ".join(done.out.split())
    assert here.results["data"][""]["variants"]["taught"]["tests"]["nDCG@10"]["seeds"] == 1
    assert here.results["missing"] == 2 and here.results["data"][""]["winner"] is None
    assert here("ablate").code == 0 and len(seen) == 2 and here.results["missing"] == 0
    assert here.results["data"][""]["winner"] is not None
    here.study["variants"]["taught"]["set"] = {"losses.order.temperature": 2}
    assert here("ablate", "--finished", "--overwrite").code == 0
    assert here.results["missing"] == 2 and list(here.results["data"][""]["variants"]) == ["alone"]


def test_all_are_measured_on_dev_after_as_many_steps_whatever_an_epoch_of_theirs_is(here):
    """Else the one that hears the fewest texts would have the most chances."""
    here.recipe["train"] |= {"epochs": 2, "steps": None}
    here.study["variants"]["often"] = {"set": {"train.evaluate_every": 0.4}, "drop": ["losses.vectors"]}
    assert here("ablate", "seeds=[1]").code == 0
    measured = {}
    for variant in here.study["variants"]:
        history = (here.runs / f"mine/study/{variant}/seed1/history.jsonl").read_text().splitlines()
        said = [json.loads(line) for line in history]
        measured[variant] = [one["step"] for one in said if "dev/nDCG@10" in one]
    assert measured == {"alone": [5, 10], "taught": [5, 10], "often": [*range(1, 11)]}


def test_other_seeds_first_keep_what_is_finished(here, monkeypatch):
    """The first seed's runs measure the teachers too; to be the first is no reason to be trained again.

    Nor is it that the weights are gone, as where a cell comes from another machine.
    """
    here.recipe["evaluate"]["teachers"] = True
    assert here("ablate", "seeds=[1,2]").code == 0
    for weights in (here.runs / "mine/study").glob("*/*/student"):
        shutil.rmtree(weights)
    seen = watch(monkeypatch)
    done = here("ablate", "seeds=[3,2,1]")
    assert done.code == 0, done.err
    assert sorted(one.name for one in seen) == ["alone/seed3", "taught/seed3"]
    assert [one["teacher"] for one in here.results["data"][""]["teachers"]] == ["cross"]


def test_who_learnt_from_a_teacher_that_was_made_again_is_told(here, monkeypatch):
    teacher_by_a_run(here)
    for _ in range(2):
        assert here("ablate", "seeds=[1]").code == 0
        assert here.results["outdated"] == {}
    later = (here.runs / "mine/study/taught/seed1/metrics.json").stat().st_mtime + 5
    os.utime(here.runs / "cross/metrics.json", (later, later))
    done = here("ablate", "seeds=[1]")
    assert "mine/study/taught/seed1 was trained before" in done.err
    assert list(here.results["outdated"]) == ["mine/study/taught/seed1"]


def test_every_value_is_kept_so_that_any_two_can_be_compared_anew(finished):
    place, *_ = finished
    kept = pd.read_parquet(place.runs / "mine/study/per_query.parquet")
    assert set(kept["variant"]) == {"alone", "taught", "all"} and set(kept["seed"]) == {1, 2}
    means = kept.groupby(["variant", "seed"])["nDCG@10"].mean()
    for variant, entry in place.results["data"][""]["variants"].items():
        assert means[variant].tolist() == pytest.approx(entry["metrics"]["nDCG@10"]["values"])


@pytest.mark.slow
def test_cells_run_side_by_side_end_as_one_after_the_other(here):
    """In processes of their own: equal losses, the teacher asked before, a failure told from its log."""
    assert here("ablate", "name=alone", "seeds=[1]").code == 0
    (here.runs / "alone/taught/seed1/environment.json").unlink()  # else the study would take it as it is
    here.study["variants"].pop("alone")
    here.study["baseline"] = "taught"
    here.study["variants"]["late"] = {"set": {"losses.order.weight": 1e38, "train.learning_rate": 1e30}}
    done = here("ablate", "seeds=[1]", "--jobs", "2", "--memory", "64")
    assert done.code == 1, done.err
    assert re.search(r"failed: late, seed 1: step \d+: .* \(all of it is in .*late-seed1.txt\)", done.out)
    one, two = (
        json.loads((here.runs / study / "taught/seed1/history.jsonl").read_text().splitlines()[0])
        for study in ("alone", "mine/study")
    )
    speed = {"tokens_per_second": 0}
    assert {**one, **speed} == pytest.approx({**two, **speed}, rel=1e-4)
    cost = json.loads((here.runs / "mine/study/taught/seed1/metrics.json").read_text())["cost"]
    assert cost["teacher_calls"] == {} and cost["teacher_answers"] == {"cross": 40}
    assert "2 trainings ran at a time" in done.out
