"""Intervals and tests of metrics that have no value per query, beside the same done by hand."""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy
from sklearn.metrics import roc_auc_score

from distill.errors import DataError
from distill.evaluation.significance_of_pairs import WHOLE, compare_pairs


def frame(scores, labels) -> pd.DataFrame:
    names = [f"q{row}" for row in range(len(scores))]
    return pd.DataFrame({"query": names, "candidate": names, "score": scores, "label": labels})


def by_hand(metric, scores, labels) -> float:
    if metric == "AUC":
        return roc_auc_score(labels, scores)
    return (scipy.stats.spearmanr if metric == "Spearman" else scipy.stats.pearsonr)(scores, labels).statistic


def drawn(n, noise, seed, metric="Spearman"):
    """Labels, and the scores of a model that sees them through noise."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2 if metric == "AUC" else 6, n).astype(float)
    return labels, [np.round(labels + draw.normal(0, one, n), 1) for one in noise]


@pytest.mark.parametrize("metric", WHOLE)
def test_the_difference_is_that_of_the_metric_and_the_interval_that_of_a_plain_bootstrap(metric):
    labels, (worse, better, other) = drawn(300, [4.0, 1.0, 1.0], 0, metric)
    found = compare_pairs(
        [frame(worse, labels), frame(worse, labels)], [frame(better, labels), frame(other, labels)], metric
    )
    of = [by_hand(metric, scores, labels) for scores in (worse, better, other)]
    assert found.difference == pytest.approx((of[1] + of[2]) / 2 - of[0])
    assert found.queries == 300 and found.p_value < 0.002
    draw, differences = np.random.default_rng(1), []
    for _ in range(400):
        rows = draw.integers(0, 300, 300)
        one, two, three = (by_hand(metric, scores[rows], labels[rows]) for scores in (worse, better, other))
        differences.append((two + three) / 2 - one)
    low, high = np.quantile(differences, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.25 * (high - low))
    assert found.high == pytest.approx(high, abs=0.25 * (high - low))
    assert found.spread / np.sqrt(300) == pytest.approx(np.std(differences), rel=0.15)


@pytest.mark.parametrize("metric", WHOLE)
def test_the_p_value_counts_the_swaps_that_do_as_well(metric):
    """All 2^8 of them; what is swapped is a rank, or a score on a common scale."""
    labels, (a, b) = drawn(8, [2.0, 0.5], 3, metric)
    b = 10 * b - 7  # another scale is no difference
    x, y = (scipy.stats.rankdata(s) if metric != "Pearson" else (s - s.mean()) / s.std() for s in (a, b))

    def difference(one, two):
        if metric == "AUC":  # of ranks among one model's, which a swap may make uneven
            more = two - one
            return (more[labels == 1].mean() - more[labels == 0].mean()) / 8
        goal = scipy.stats.rankdata(labels) if metric == "Spearman" else labels
        return np.corrcoef(two, goal)[0, 1] - np.corrcoef(one, goal)[0, 1]

    seen = difference(x, y)
    swaps = [np.array(swap) for swap in itertools.product([False, True], repeat=8)]
    all_of_them = np.array([difference(np.where(s, y, x), np.where(s, x, y)) for s in swaps])
    high, low = (all_of_them >= seen - 1e-12).mean(), (all_of_them <= seen + 1e-12).mean()
    found = compare_pairs([frame(a, labels)], [frame(b, labels)], metric)
    assert found.p_value == pytest.approx(min(1.0, 2 * min(high, low)))


def test_two_models_as_good_are_told_apart_one_time_in_twenty():
    rejected = 0
    for seed in range(300):
        labels, (a, b) = drawn(60, [1.5, 1.5], seed)
        rejected += (
            compare_pairs([frame(a, labels)], [frame(b, labels)], "Spearman", resamples=199).p_value <= 0.05
        )
    assert 5 <= rejected <= 27  # 15 expected


def test_equal_models_do_not_differ():
    labels, (a,) = drawn(40, [1.0], 0)
    found = compare_pairs([frame(a, labels)], [frame(a, labels)], "Spearman")
    assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_a_draw_with_labels_of_one_kind_is_left_out_of_an_interval():
    labels, (a, b) = np.array([1.0] + [0.0] * 9), (np.arange(10.0), -np.arange(10.0))
    found = compare_pairs([frame(b, labels)], [frame(a, labels)], "AUC")
    assert found.difference == -1 and np.isfinite([found.low, found.high, found.spread]).all()


def test_other_pairs_are_refused():
    labels, (a,) = drawn(5, [1.0], 0)
    with pytest.raises(DataError, match=r"measured on different pairs \(5 and 4\)"):
        compare_pairs([frame(a, labels)], [frame(a[:4], labels[:4])], "AUC")
    with pytest.raises(DataError, match="different pairs"):
        compare_pairs([frame(a, labels)], [frame(a, labels + 1)], "AUC")
    with pytest.raises(DataError, match="at least 2 pairs"):
        compare_pairs([frame(a[:1], labels[:1])], [frame(a[:1], labels[:1])], "AUC")
