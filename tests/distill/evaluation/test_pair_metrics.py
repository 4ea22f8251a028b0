import math

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

from distill.errors import DataError, RecipeError
from distill.evaluation import classified, fit_threshold, pairs
from distill.evaluation.pair_metrics import per_user


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


def test_four_pairs_of_a_click_log():
    scores = logit([0.9, 0.8, 0.3, 0.1])
    measured = pairs(scores, [1, 0, 1, 0], ["AUC", "Logloss"])
    assert measured == pytest.approx({"AUC": 0.75, "Logloss": 0.756033}, abs=1e-6)


USERS = dict(  # A: AUC 1; B: 0.5; C has one positive and nothing else
    scores=logit([0.9, 0.8, 0.3, 0.4, 0.1, 0.2]), labels=[1, 0, 1, 0, 0, 1], groups=list("AABBBC")
)


def test_gauc_weighs_users_by_impressions_and_leaves_out_those_of_one_class():
    assert pairs(**USERS, metrics=["GAUC"])["GAUC"] == pytest.approx(0.7)
    assert pairs(**USERS, metrics=["AUC"])["AUC"] == pytest.approx(0.555556, abs=1e-6)
    users = per_user(**USERS, metrics=["GAUC", "Logloss"])
    assert users["query"].tolist() == ["A", "B", "C"] and users["weight"].tolist() == [2, 3, 1]
    assert users["GAUC"].tolist()[:2] == [1.0, 0.5] and math.isnan(users["GAUC"][2])
    whole = pairs(**USERS, metrics=["Logloss"])["Logloss"]
    assert np.average(users["Logloss"], weights=users["weight"]) == pytest.approx(whole)


def test_gauc_of_one_user_is_the_auc():
    measured = pairs(USERS["scores"], USERS["labels"], ["AUC", "GAUC"], groups=[7] * 6)
    assert measured["AUC"] == measured["GAUC"]


@pytest.mark.parametrize("seed", range(5))
def test_areas_equal_those_of_scikit_learn_with_ties(seed):
    draw = np.random.default_rng(seed)
    scores, labels = draw.integers(-3, 4, 200) / 2.0, draw.integers(0, 2, 200)
    groups = draw.integers(0, 40, 200)
    assert pairs(scores, labels, ["AUC"])["AUC"] == pytest.approx(roc_auc_score(labels, scores))
    weights, areas = [], []
    for user in np.unique(groups):
        mine = groups == user
        if 0 < labels[mine].sum() < mine.sum():
            weights.append(mine.sum())
            areas.append(roc_auc_score(labels[mine], scores[mine]))
    expected = np.average(areas, weights=weights)
    assert 5 < len(areas) < 40  # some have one class only
    assert pairs(scores, labels, ["GAUC"], groups=groups)["GAUC"] == pytest.approx(expected)


def test_calibration_equals_the_formulas_written_out_in_numpy():
    draw = np.random.default_rng(1)
    scores, labels = draw.normal(0, 2, 500), draw.integers(0, 2, 500)
    p = expit(scores.astype(np.float32).astype(np.float64))
    ece = 0.0
    for low in np.arange(15) / 15:
        mine = (p >= low) & (p < low + 1 / 15)
        if mine.any():
            ece += mine.mean() * abs(p[mine].mean() - labels[mine].mean())
    measured = pairs(scores, labels, ["ECE", "Calibration"])
    assert measured == pytest.approx({"ECE": ece, "Calibration": p.sum() / labels.sum()}, rel=1e-6)


def test_calibration_of_few_pairs():
    """Both in the bin of one half: 1 of 2 is positive, as was said. Certainty is wrong half the time."""
    assert pairs([0.0, 0.0], [1, 0], ["ECE", "Calibration"]) == {"ECE": 0.0, "Calibration": 1.0}
    assert pairs([50.0, 50.0], [1, 0], ["ECE", "Calibration"]) == {"ECE": 0.5, "Calibration": 2.0}
    assert math.isnan(pairs([0.0], [0], ["Calibration"])["Calibration"])


def test_what_gauc_cannot_read_is_refused():
    with pytest.raises(RecipeError, match="GAUC needs groups"):
        pairs([0.1, 0.2], [0, 1], ["GAUC"])
    with pytest.raises(DataError, match="needs a user with labels of both kinds, and none of 2 has them"):
        pairs([0.1, 0.2], [0, 1], ["GAUC"], groups=[1, 2])
    with pytest.raises(DataError, match=r"GAUC needs labels 0 and 1, but the label of pair 1 is 0\.5"):
        pairs([0.1, 0.2], [0, 0.5], ["GAUC"], groups=[1, 1])


def test_half_a_million_pairs():
    draw = np.random.default_rng(0)
    n = 500_000
    said, true, user = draw.normal(size=n), draw.integers(0, 2, n), draw.integers(0, 25_000, n)
    assert pairs(said, true, ["AUC", "GAUC", "Logloss", "ECE"], groups=user)["AUC"] == pytest.approx(
        0.5, abs=0.01
    )


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
