import math
import random

import numpy as np
import pytest

from distill.errors import DataError, RecipeError
from distill.evaluation import Qrels, Run, classified, fit_threshold, pairs, ranking


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


def test_pairs_equal_the_formulas_worked_by_hand():
    scores, labels = [2.0, -1.0, 0.0, 1.0], [1, 0, 1, 0]
    measured = pairs(scores, labels, ["AUC", "Accuracy", "F1", "Logloss"], threshold=0.5)

    def logistic(x):
        return 1 / (1 + math.exp(-x))

    right = [logistic(2), 1 - logistic(-1), logistic(0), 1 - logistic(1)]
    assert measured == pytest.approx(
        {"AUC": 3 / 4, "Accuracy": 2 / 4, "F1": 1 / 2, "Logloss": -sum(map(math.log, right)) / 4}
    )
    graded = pairs([1.0, 2.0, 3.0, 10.0], [1.0, 2.0, 4.0, 3.0], ["Spearman", "Pearson"])
    assert graded["Spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert graded["Pearson"] == pytest.approx(np.corrcoef([1, 2, 3, 10], [1, 2, 4, 3])[0, 1])


def test_a_score_at_the_threshold_says_yes():
    assert pairs([0.5], [1], ["Accuracy"], threshold=0.5) == {"Accuracy": 1.0}


def test_constant_scores_have_no_correlation():
    assert math.isnan(pairs([1.0, 1.0], [1.0, 2.0], ["Spearman"])["Spearman"])


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_best_there_is(seed):
    draw = np.random.default_rng(seed)
    scores = draw.integers(0, 8, size=12) / 4.0  # with ties
    labels = draw.integers(0, 2, size=12)
    tried = np.concatenate([[-1.0], np.unique(scores), [9.0]])
    best = max(((scores >= threshold) == labels).mean() for threshold in tried)
    assert pairs(scores, labels, ["Accuracy"], fit_threshold(scores, labels)) == {"Accuracy": best}


def test_a_threshold_may_say_yes_or_no_to_all():
    assert pairs([1.0, 2.0], [1, 1], ["Accuracy"], fit_threshold([1.0, 2.0], [1, 1])) == {"Accuracy": 1.0}
    assert pairs([1.0, 2.0], [0, 0], ["Accuracy"], fit_threshold([1.0, 2.0], [0, 0])) == {"Accuracy": 1.0}


@pytest.mark.parametrize(
    ("labels", "metric", "error", "message"),
    [
        ([0, 1], "AUCC", RecipeError, "Did you mean 'AUC'?"),
        ([0, 1], "nDCG@10", RecipeError, "not a metric of pairs; there are Spearman"),
        ([0, 1], "F1", RecipeError, "needs a threshold"),
        ([0, 2.5], "AUC", DataError, "the label of pair 1 is 2.5; for graded labels choose Spearman"),
        ([1, 1], "AUC", DataError, "labels of both kinds"),
        ([0, math.nan], "Spearman", DataError, "label of pair 1 is nan"),
        ([0, 1, 1], "Spearman", DataError, "one of each per pair"),
    ],
)
def test_pairs_that_cannot_be_measured_are_refused(labels, metric, error, message):
    with pytest.raises(error) as raised:
        pairs([0.1, 0.2], labels, [metric])
    assert message in str(raised.value)


def test_several_classes_are_told_by_the_largest_logit():
    logits = np.array([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 9.0]])
    found = classified(logits, [0, 1, 2, 2], ["Accuracy", "F1", "Logloss"])
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(probabilities[range(4), [0, 1, 2, 2]]).mean()
    assert found["Accuracy"] == 0.75 and found["Logloss"] == pytest.approx(expected)
    assert found["F1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)  # the mean over classes
    with pytest.raises(DataError, match="the label of pair 1 is 3, and the model's classes are 0 to 2"):
        classified(logits[:2], [0, 3], ["Accuracy"])
    with pytest.raises(RecipeError, match="AUC is not defined for pairs of more than two classes"):
        classified(logits, [0, 1, 2, 2], ["AUC"])
    with pytest.raises(DataError, match="the logits of pair 0"):
        classified(logits * np.nan, [0, 1, 2, 2], ["Accuracy"])
