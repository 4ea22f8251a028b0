"""What a study's tests are worth: how often they see what is not there, and what is."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from distill.errors import UserError
from distill.evaluation import detectable, holm, power
from distill.evaluation.significance import mean_over_seeds
from distill.study_plot import plot
from distill.study_table import Measured, lines, table, tabulate

ALONE = {"none": None, "kl": "none"}


def cell(values, dev=0.5, metric="MAP", **cost) -> Measured:
    """A run that reached these values, a query each."""
    frame = pd.DataFrame({"query": [f"q{row}" for row in range(len(values))], metric: values})
    mean = float(np.mean(values))
    return Measured({metric: mean}, {metric: dev}, frame, {"seconds": 2.0, "tokens": 1000, **cost}, 100.0)


def study(draw, gain, queries=40, seeds=3, spread=0.2):
    """Two variants over the same hard and easy queries; each training has luck of its own with each query."""
    hard = draw.uniform(size=queries)
    return {
        ("", name, seed): cell(hard + mean + draw.normal(0, spread, queries))
        for name, mean in (("none", 0.0), ("kl", gain))
        for seed in range(seeds)
    }


def p_values(gain, repeats=1000, **kinds):
    draw = np.random.default_rng(7)
    found = []
    for _ in range(repeats):
        results = tabulate("s", ALONE, {"": ["MAP"]}, study(draw, gain, **kinds), resamples=199)
        found.append(results["data"][""]["variants"]["kl"]["tests"]["MAP"]["p_value"])
    return np.array(found)


def test_a_study_of_equals_rejects_as_often_as_it_says():
    """1,000 studies; 5 % of them may, and three standard errors of that are 2 %."""
    p = p_values(0.0)
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.021)
    assert (p <= 0.5).mean() == pytest.approx(0.5, abs=0.05)


def test_a_planted_difference_is_found_at_the_power_computed():
    spread = 0.2 * np.sqrt(2 / 3)  # of a query's difference, each side a mean of three trainings
    gain = detectable(spread, 40)
    assert power(gain, spread, 40) == pytest.approx(0.8)
    assert (p_values(gain, repeats=400) <= 0.05).mean() == pytest.approx(0.8, abs=0.06)


def test_power_is_that_of_the_t_test():
    """The numbers of a power table: 34 pairs for half a standard deviation, at 0.05 and 80 %."""
    assert power(0.5, 1.0, 34) == pytest.approx(0.808, abs=0.001)
    assert power(0.0, 1.0, 34) == pytest.approx(0.05)
    assert detectable(2.0, 34, likely=0.808) == pytest.approx(1.0, abs=0.002)
    assert detectable(0.0, 34) == 0.0 and detectable(1.0, 2) > 5


def test_differences_that_never_vary_are_always_found():
    assert power(0.1, 0.0, 20) == 1.0 and power(0.0, 0.0, 20) == pytest.approx(0.05)


def test_holm_is_that_of_a_worked_example():
    """Four tests: 0.005 counts 4 times, 0.01 3 times, 0.03 twice; 0.04 is no better than the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]


def test_seeds_are_averaged_query_by_query_whatever_their_order():
    one, two = cell([0.0, 0.5, 1.0]).per_query, cell([1.0, 0.5, 0.5]).per_query
    shuffled = two.iloc[[2, 0, 1]].reset_index(drop=True)
    assert mean_over_seeds([one, shuffled], "MAP")["MAP"].tolist() == [0.5, 0.5, 0.75]


def test_a_variant_is_compared_over_the_seeds_that_both_have():
    measured = {
        ("", "none", 1): cell([0.0, 0.0, 0.0, 0.0]),
        ("", "none", 2): cell([0.5, 0.5, 0.5, 0.5]),
        ("", "kl", 2): cell([0.75, 0.75, 0.75, 0.5]),
        ("", "kl", 3): cell([9.0, 9.0, 9.0, 9.0]),
    }
    kl = tabulate("s", ALONE, {"": ["MAP"]}, measured)["data"][""]["variants"]["kl"]
    assert kl["tests"]["MAP"]["difference"] == pytest.approx(0.1875)
    assert (kl["tests"]["MAP"]["seeds"], kl["tests"]["MAP"]["better"]) == (1, 1)
    assert kl["metrics"]["MAP"]["values"] == [0.6875, 9.0] and kl["metrics"]["MAP"]["spread"] > 5


def test_all_comparisons_of_a_metric_count_and_the_winners_alone_does_not():
    """c is best on dev: it is compared with a in the table, and with the baseline as the winner."""
    variants = {"none": None, "a": "none", "b": "none", "c": "a"}
    draw = np.random.default_rng(0)
    measured = {
        (data, name, 1): cell(draw.normal(0.1 * place, 1, 50), dev=dev)
        for data in ("x", "y")
        for place, (name, dev) in enumerate(zip(variants, (0.4, 0.3, 0.2, 0.8), strict=True))
    }
    results = tabulate("s", variants, {"x": ["MAP"], "y": ["MAP"]}, measured, resamples=999)
    assert [row[:2] for row in table(results)[1]] == [[d, name] for d in ("x", "y") for name in variants]
    found = results["data"]
    tests = [found[d]["variants"][name]["tests"]["MAP"] for d in ("x", "y") for name in ("a", "b", "c")]
    assert [test["p_holm"] for test in tests] == holm([test["p_value"] for test in tests])
    winners = [found[data]["winner"] for data in ("x", "y")]
    assert [winner["variant"] for winner in winners] == ["c", "c"]
    gains = [
        found[d]["variants"]["c"]["metrics"]["MAP"]["mean"]
        - found[d]["variants"]["none"]["metrics"]["MAP"]["mean"]
        for d in ("x", "y")
    ]
    assert [winner["test"]["difference"] for winner in winners] == pytest.approx(gains)
    assert [winner["test"]["p_holm"] for winner in winners] == holm(
        [winner["test"]["p_value"] for winner in winners]
    )
    alone, both = winners[0]["test"], tests[0]
    assert alone["detectable"] == pytest.approx(detectable(alone["spread"], 50, 0.025))
    assert both["detectable"] == pytest.approx(detectable(both["spread"], 50))


def test_where_the_baseline_is_best_on_dev_nothing_is_tested():
    """A variant that dev advises against is not announced."""
    measured = {("", "none", 1): cell([0.1, 0.2], dev=0.6), ("", "kl", 1): cell([0.8, 0.9], dev=0.4)}
    results = tabulate("s", ALONE, {"": ["MAP"]}, measured, resamples=99)
    assert results["data"][""]["winner"]["test"] is None
    (won,) = [line for line in lines(results) if line.startswith("winner")]
    assert won == "winner: none, the best of 2 on dev (MAP 0.6000): the baseline itself, so nothing is tested"


def test_what_was_chosen_on_the_split_that_is_measured_is_not_said_to_be_tested_once():
    """The best of eight that are alike would be "significant" more than twice as often as it says."""
    measured = study(np.random.default_rng(3), 0.3)
    results = tabulate("s", ALONE, {"": ["MAP"]}, measured, resamples=99, chosen_on_tested=[""])
    assert results["data"][""]["winner"]["test"] is None
    assert results["data"][""]["variants"]["kl"]["tests"]["MAP"]["p_holm"] < 0.05
    (won,) = [line for line in lines(results) if line.startswith("winner")]
    assert "which is what is measured here" in won and "tested once" not in won


@pytest.mark.parametrize("gone", [None, float("nan")])
def test_a_metric_that_is_undefined_for_one_cell_leaves_the_others(gone):
    """As a correlation is where a student has collapsed."""
    measured = study(np.random.default_rng(3), 0.3)
    measured["", "kl", 1] = replace(measured["", "kl", 1], metrics={"MAP": gone}, dev={"MAP": 0.9})
    results = json.loads(json.dumps(tabulate("s", ALONE, {"": ["MAP"]}, measured, resamples=99)))
    assert results["data"][""]["variants"]["kl"]["tests"] == {} and len(table(results)[1]) == 2
    assert "no test of MAP" in "\n".join(lines(results))


def test_a_variant_that_was_measured_on_other_queries_leaves_the_others():
    draw = np.random.default_rng(3)
    measured = study(draw, 0.3)
    for seed in range(3):
        other = cell(draw.uniform(size=40), dev=0.9)
        named = other.per_query.assign(query=[f"z{row}" for row in range(40)])
        measured["", "odd", seed] = replace(other, per_query=named)
    variants = {**ALONE, "odd": "none"}
    results = tabulate("s", variants, {"": ["MAP"]}, measured, resamples=99)
    found = results["data"][""]["variants"]
    assert found["kl"]["tests"]["MAP"]["seeds"] == 3 and found["odd"]["tests"] == {}
    said = "\n".join(lines(results))
    assert "odd is not compared with none: the two models were measured on different queries" in said
    assert "winner: odd" in said and "no test of MAP: the two models were measured on different" in said


def test_a_metric_that_is_better_when_lower_wins_low():
    measured = {
        ("", name, 1): cell(values, dev, "Logloss")
        for name, values, dev in (
            ("none", [2.0, 1.0], 2.0), ("a", [1.0, 0.5], 0.5), ("b", [3.0, 2.0], 3.0),
        )
    }  # fmt: skip
    variants = {"none": None, "a": "none", "b": "none"}
    found = tabulate("s", variants, {"": ["Logloss"]}, measured)["data"][""]
    assert found["winner"]["variant"] == "a"
    assert [found["variants"][name]["tests"]["Logloss"]["better"] for name in ("a", "b")] == [1, 0]


def test_a_ratio_that_is_best_at_one_wins_near_one():
    measured = {
        ("", name, seed): cell([1.0, 1.0], dev, "Calibration")
        for name, values in (("none", (1.1, 1.1)), ("a", (3.0, 3.0)), ("b", (0.2, 1.8)))
        for seed, dev in enumerate(values)
    }
    variants = {"none": None, "a": "none", "b": "none"}
    found = tabulate("s", variants, {"": ["Calibration"]}, measured)["data"][""]
    assert found["winner"]["variant"] == "none" and found["winner"]["dev"] == pytest.approx(1.1)


@pytest.mark.parametrize("lost", ["failed", "collapsed"])
def test_a_variant_that_is_not_there_for_every_seed_cannot_win_by_the_others(lost):
    measured = {("", name, seed): cell([0.5, 0.6], 0.5) for name in ("none", "kl") for seed in (1, 2)}
    measured["", "kl", 1] = cell([0.5, 0.6], 0.9)
    measured["", "kl", 2] = cell([0.5, 0.6], np.nan)
    if lost == "failed":
        del measured["", "kl", 2]
    results = tabulate("s", ALONE, {"": ["MAP"]}, measured)
    winner = results["data"][""]["winner"]
    assert (winner["variant"], winner["of"], winner["left_out"]) == ("none", 1, ["kl"])
    assert any("without kl, whose dev is not known for all seeds" in line for line in lines(results))
    json.dumps(results, allow_nan=False)  # which JSON does not know


def test_a_teacher_that_differs_between_variants_is_told_for_each():
    def run(**teachers):
        return replace(cell([0.5, 0.6]), teachers={n: {"MAP": value} for n, value in teachers.items()})

    of = {"none": run(bi=0.8), "kl": run(bi=0.8, ranker=0.7), "wide": run(bi=0.8, ranker=0.9)}
    measured = {("", name, seed): cell for seed in (1, 2) for name, cell in of.items()}
    variants = {"none": None, "kl": "none", "wide": "none"}
    told = [line for line in lines(tabulate("s", variants, {"": ["MAP"]}, measured)) if "teacher " in line]
    assert told == [
        "teacher bi: MAP 0.8000",
        "teacher ranker in kl: MAP 0.7000",
        "teacher ranker in wide: MAP 0.9000",
    ]


def test_without_values_per_query_or_dev_there_are_means_and_no_test():
    bare = Measured({"Spearman": 0.8}, {}, pd.DataFrame({"query": ["a", "b"]}), {})
    results = tabulate("s", ALONE, {"": ["Spearman"]}, {("", name, 1): bare for name in ALONE})
    assert results["data"][""]["variants"]["kl"]["tests"] == {} and results["data"][""]["winner"] is None
    header, rows = table(results)
    assert rows[1][header.index("mean")] == "0.8000" and rows[1][header.index("p")] == "—"
    assert "no winner: dev was not measured" in "\n".join(lines(results))


def test_a_correlation_is_tested_over_pairs():
    def run(noise, seed):
        draw = np.random.default_rng(seed)
        labels = np.arange(60) % 6
        rows = {"query": range(60), "candidate": range(60), "label": labels}
        frame = pd.DataFrame({**rows, "score": labels + draw.normal(0, noise, 60)})
        spearman = frame["score"].corr(frame["label"], method="spearman")
        return Measured({"Spearman": spearman}, {"Spearman": spearman}, frame, {})

    measured = {
        ("", name, seed): run(noise, [seed, place])
        for seed in (1, 2)
        for place, (name, noise) in enumerate({"none": 4.0, "kl": 0.5}.items())
    }
    results = tabulate("s", ALONE, {"": ["Spearman"]}, measured, resamples=999)
    test = results["data"][""]["variants"]["kl"]["tests"]["Spearman"]
    means = [results["data"][""]["variants"][name]["metrics"]["Spearman"]["mean"] for name in ("none", "kl")]
    assert test["difference"] == pytest.approx(means[1] - means[0])
    assert test["low"] > 0 and test["p_value"] < 0.01 and (test["better"], test["of"]) == (2, "pairs")
    assert f"60 pairs). With 80% power this test would find {test['detectable']:.4f}" in "\n".join(
        lines(results)
    ).replace("a difference of ", "")


def test_the_table_and_the_lines_say_what_the_figures_are(tmp_path):
    measured = study(np.random.default_rng(1), 0.2)
    answers = {"teacher_answers": {"bi": 700, "cross": 300}, "teacher_calls": {"bi": 700}}
    measured["", "kl", 0] = cell(measured["", "kl", 0].per_query["MAP"], dev=0.9, **answers)
    results = json.loads(json.dumps(tabulate("s", ALONE, {"": ["MAP"]}, measured, resamples=999)))
    header, rows = table(results)
    none, kl = (dict(zip(header, row, strict=True)) for row in rows)
    test = results["data"][""]["variants"]["kl"]["tests"]["MAP"]
    assert kl["difference"] == f"{test['difference']:+.4f}" and kl["seeds better"] == "3 of 3"
    assert (none["difference"], none["p (Holm)"], none["answers"], kl["answers"]) == ("—", "—", "0", "333")
    (won,) = [line for line in lines(results) if line.startswith("winner: kl, the best of 2 on dev")]
    assert f"would find a difference of {test['detectable']:.4f}" in won
    plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_plot_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'distill-search\[plots\]'"):
        plot({}, tmp_path / "plot.png")
