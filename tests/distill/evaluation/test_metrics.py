import math
import random

import ir_measures
import numpy as np
import pytest

from distill.errors import DataError, RecipeError
from distill.evaluation import (
    Catalogue,
    Qrels,
    Run,
    higher_is_better,
    merit,
    parse_metric,
    ranking,
)
from distill.evaluation.metrics import ranking_metric


def rank(scores: dict, labels: dict, *metrics: str) -> dict[str, float]:
    """Means over queries given as {query: {candidate: number}}."""
    return ranking(Run(*columns(scores)), Qrels(*columns(labels)), metrics).means


def columns(nested: dict) -> tuple[list, list, list]:
    rows = [(query, candidate, value) for query, of in nested.items() for candidate, value in of.items()]
    return tuple(map(list, zip(*rows, strict=True)))


def test_ranking_equals_the_formulas_worked_by_hand():
    # In order: b (gain 0), a (gain 2), d (not judged), c (gain 1); e (gain 1) is never found.
    scores = {"q": {"a": 0.8, "b": 0.9, "c": 0.1, "d": 0.5}}
    labels = {"q": {"a": 2, "b": 0, "c": 1, "e": 1}}
    gain = 2 / math.log2(3) + 1 / math.log2(5)
    ideal = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    means = rank(scores, labels, "nDCG@10", "nDCG@2", "RR@10", "AP", "R@2", "R@100", "P@2", "Success@1")
    assert means == pytest.approx(
        {
            "nDCG@10": gain / ideal,
            "nDCG@2": (2 / math.log2(3)) / (2 + 1 / math.log2(3)),
            "RR@10": 1 / 2,
            "AP": (1 / 2 + 2 / 4) / 3,
            "R@2": 1 / 3,
            "R@100": 2 / 3,
            "P@2": 1 / 2,
            "Success@1": 0.0,
        }
    )


def test_the_reciprocal_rank_ends_at_its_cutoff():
    scores = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}
    assert rank(scores, {"q": {"c": 1}}, "MRR@2", "MRR@3", "MRR") == pytest.approx(
        {"MRR@2": 0.0, "MRR@3": 1 / 3, "MRR": 1 / 3}
    )


def test_other_names_are_reported_as_written():
    scores, labels = {"q": {"a": 1.0, "b": 2.0}}, {"q": {"a": 1}}
    same = {"MRR@10": "RR@10", "Recall@100": "R@100", "MAP": "AP", "MAP@10": "AP@10", "Precision@1": "P@1"}
    means = rank(scores, labels, *same, *same.values())
    assert all(means[name] == means[other] for name, other in same.items())
    assert list(means) == [*same, *same.values()]


def test_means_are_over_judged_queries_with_a_positive():
    scores = {"found": {"a": 1.0}, "hopeless": {"a": 1.0}, "unknown": {"a": 1.0}}
    labels = {"found": {"a": 1}, "hopeless": {"a": 0, "b": -1}, "missing": {"a": 1}}
    result = ranking(Run(*columns(scores)), Qrels(*columns(labels)), ["RR@10"])
    assert result.means == {"RR@10": 0.5}  # found 1, missing from the run 0
    assert result.per_query["query"].tolist() == ["found", "missing"]
    assert result.per_query["RR@10"].tolist() == [1.0, 0.0]
    assert (result.without_positive, result.unjudged) == (1, 1)


@pytest.mark.parametrize("number", [False, True])
def test_ties_are_broken_by_id_whatever_the_order_of_the_input(number):
    """Libraries differ on ties: one puts the higher id first, one the lower, one whoever came first."""
    ids = [2, 10, 9, 1] if number else ["b", "d", "c", "a"]
    third = 9 if number else "c"
    for seed in range(5):
        order = random.Random(seed).sample(ids, len(ids))
        run = Run(["q"] * 4, order, [0.5] * 4)
        means = ranking(run, Qrels(["q"], [third], [1]), ["RR", "RR@10", "nDCG@10", "AP"]).means
        assert means == pytest.approx({"RR": 1 / 3, "RR@10": 1 / 3, "nDCG@10": 0.5, "AP": 1 / 3})


def test_scores_that_differ_only_beyond_float32_are_tied():
    run = Run(["q", "q"], ["a", "b"], [1.0, 1.0 + 1e-12])
    assert ranking(run, Qrels(["q"], ["b"], [1]), ["RR"]).means == {"RR": 0.5}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ndcg@10", "'ndcg@10' is not a ranking metric. Did you mean 'nDCG@10'?"),
        ("Recal@100", "Did you mean 'Recall@100'?"),
        ("R", "Did you mean 'R@10'?"),
        ("nDCG@ten", "Did you mean 'nDCG@10'?"),
        ("nDCG@0", "is not a ranking metric"),
        ("beauty", "such as nDCG@10"),
        ("nDCG 10", "is not a ranking metric"),
    ],
)
def test_an_unknown_metric_is_named_with_the_nearest(name, message):
    with pytest.raises(RecipeError) as error:
        rank({"q": {"a": 1.0}}, {"q": {"a": 1}}, name)
    assert message in str(error.value)


def test_a_ranking_that_cannot_be_measured_is_refused():
    """A NaN sorts anywhere, a second score for one candidate hides the first, half a gain is cut to 0."""
    with pytest.raises(DataError, match="query 'q' and candidate 'b' is nan"):
        rank({"q": {"a": 1.0, "b": math.nan}}, {"q": {"a": 1}}, "AP")
    with pytest.raises(DataError, match="candidate 'a' twice"):
        ranking(Run(["q", "q"], ["a", "a"], [1, 2]), Qrels(["q"], ["a"], [1]), ["AP"])
    with pytest.raises(DataError, match="whole numbers"):
        rank({"q": {"a": 1.0}}, {"q": {"a": 0.5}}, "AP")


FAST = ["nDCG", "nDCG@5", "RR", "MRR@5", "Recall@5", "P@5", "AP", "AP@5", "Success@5", "HitRate@5"]
OF_LIBRARY = ["AP(rel=2)", "nDCG(judged_only=True)@5", "Judged@5", "Bpref"]


@pytest.mark.parametrize("seed", range(5))
def test_ranking_equals_ir_measures_on_random_rankings(seed):
    """Graded labels, labels of 0, ties, queries that find nothing and candidates that are not judged."""
    draw = np.random.default_rng(seed)
    scores = {
        f"q{q}": {f"c{c}": float(draw.integers(-4, 5)) for c in draw.permutation(40)[: draw.integers(0, 30)]}
        for q in range(30)
    }
    labels = {
        f"q{q}": {f"c{c}": int(draw.integers(-1, 4)) for c in draw.permutation(40)[: draw.integers(1, 9)]}
        for q in draw.permutation(35)
    }
    relevant = {q: of for q, of in labels.items() if any(label > 0 for label in of.values())}
    ordered = {  # ties by id: made strict before the library sees them
        q: {c: -float(rank) for rank, c in enumerate(sorted(of, key=lambda c: (-of[c], c)))}
        for q, of in scores.items()
    }
    names = FAST + OF_LIBRARY
    result = ranking(Run(*columns(scores)), Qrels(*columns(labels)), names)
    assert result.per_query["query"].tolist() == list(relevant)
    for name in names:
        measure = parse_metric(name)
        expected = {
            m.query_id: m.value
            for m in ir_measures.iter_calc(
                [measure],
                {q: {c: max(label, 0) for c, label in of.items()} for q, of in relevant.items()},
                {q: of for q, of in ordered.items() if q in relevant and of},
            )
        }
        assert result.per_query[name].tolist() == pytest.approx([expected.get(q, 0.0) for q in relevant]), (
            name
        )


def test_6040_users_at_depth_100():
    draw = np.random.default_rng(0)
    users, depth = 6040, 100
    run = Run(
        np.repeat(np.arange(users), depth),
        np.concatenate([draw.permutation(3706)[:depth] for _ in range(users)]),
        draw.standard_normal(users * depth),
    )
    qrels = Qrels(np.arange(users), draw.integers(0, 3706, users), np.ones(users))
    result = ranking(run, qrels, ["nDCG@10", "Recall@100", "MRR", "HitRate@10"])
    assert result.means["Recall@100"] == pytest.approx(100 / 3706, abs=0.006)


CATALOGUE = Catalogue(["a", "b", "c", "d"], [5, 1, 0, 10])


def in_catalogue(*metrics, catalogue=CATALOGUE):
    """q finds d, a, b and wants b; r finds d, c and wants d and c; s finds nothing and wants a."""
    scores = {"q": {"d": 3.0, "a": 2.0, "b": 1.0}, "r": {"d": 2.0, "c": 1.0}}
    labels = {"q": {"b": 1}, "r": {"d": 1, "c": 1}, "s": {"a": 1}}
    return ranking(Run(*columns(scores)), Qrels(*columns(labels)), metrics, catalogue)


def test_coverage_is_the_share_of_the_catalogue_that_anybody_sees():
    assert in_catalogue("Coverage@1", "Coverage@2", "Coverage@9").means == {
        "Coverage@1": 1 / 4, "Coverage@2": 3 / 4, "Coverage@9": 1.0
    }  # fmt: skip


def test_average_popularity_is_over_what_each_query_sees():
    result = in_catalogue("AveragePopularity@2")
    assert result.per_query["AveragePopularity@2"].tolist()[:2] == [7.5, 5.0]
    assert math.isnan(result.per_query["AveragePopularity@2"][2])  # it sees nothing
    assert result.means == {"AveragePopularity@2": 6.25}


def test_the_cold_slice_looks_for_what_was_rarely_chosen():
    """q wants b (chosen once, at rank 3), r wants c (never chosen, rank 2), s wants what is not cold."""
    result = in_catalogue("Recall(cold=1)@2", "MRR(cold=1)", "RR(cold=0)", "Recall@2")
    assert result.per_query["Recall(cold=1)@2"].tolist()[:2] == [0.0, 1.0]
    assert result.per_query["MRR(cold=1)"].tolist()[:2] == [pytest.approx(1 / 3), 0.5]
    assert math.isnan(result.per_query["RR(cold=0)"][0]) and math.isnan(result.per_query["MRR(cold=1)"][2])
    assert result.means == pytest.approx(
        {"Recall(cold=1)@2": 0.5, "MRR(cold=1)": (1 / 3 + 0.5) / 2, "RR(cold=0)": 0.5, "Recall@2": 1 / 3}
    )


def test_without_any_cold_target_the_slice_is_not_defined():
    known = Catalogue(["a", "b", "c", "d"], [9, 9, 9, 9])
    assert math.isnan(in_catalogue("Recall(cold=1)@2", catalogue=known).means["Recall(cold=1)@2"])


@pytest.mark.parametrize(
    ("name", "catalogue", "message"),
    [
        ("Coverage@10", None, "needs the catalogue"),
        ("AveragePopularity@10", Catalogue(["a"]), "needs how often each candidate was chosen in training"),
        ("nDCG(cold=3)@10", Catalogue(["a"]), "needs how often"),
        ("Coverage", CATALOGUE, "needs a cutoff, as Coverage@10"),
        ("Covrage@10", CATALOGUE, "Did you mean 'Coverage@10'?"),
        ("Hitrate@20", CATALOGUE, "Did you mean 'HitRate@20'?"),
        ("Recall(cold=x)@10", CATALOGUE, "is not a ranking metric"),
    ],
)
def test_a_metric_that_the_data_cannot_give_is_refused(name, catalogue, message):
    with pytest.raises(RecipeError) as error:
        in_catalogue(name, catalogue=catalogue)
    assert message in str(error.value)


def test_cold_stands_beside_other_parameters():
    assert ranking_metric("AP(rel=2, cold=3)@5") == (parse_metric("AP(rel=2)@5"), "AP", 5, 3)
    assert ranking_metric("AP(cold=3,rel=2)@5") == (parse_metric("AP(rel=2)@5"), "AP", 5, 3)


def test_what_a_better_model_has_more_of():
    assert merit("nDCG@10", 0.3) == 0.3 and merit("Coverage@10", 0.3) == 0.3
    assert merit("ECE", 0.3) == merit("Logloss", 0.3) == merit("AveragePopularity@10", 0.3) == -0.3
    assert merit("Calibration", 0.0) == -math.inf < merit("Calibration", 0.9) < merit("Calibration", 1.0) == 0
    assert not higher_is_better("ECE") and higher_is_better("GAUC")
