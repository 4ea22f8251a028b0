import numpy as np
import pandas as pd
import pytest

from distill.errors import DataError
from distill.evaluation import compare


def frame(values, queries=None) -> pd.DataFrame:
    return pd.DataFrame({"query": queries or [f"q{row}" for row in range(len(values))], "RR@10": values})


def test_the_p_value_counts_the_sign_flips_that_do_as_well():
    """Four queries, all better by the same: of 16 ways to flip signs, two are as far from 0."""
    result = compare(frame([0.25, 0.5, 0.25, 0.5]), frame([0.5, 0.75, 0.5, 0.75]), "RR@10")
    assert result.p_value == pytest.approx(2 / 16)
    assert (result.difference, result.low, result.high, result.queries) == (0.25, 0.25, 0.25, 4)


def test_the_interval_holds_the_normal_one_and_the_seed_decides():
    draw = np.random.default_rng(0)
    a = draw.uniform(size=400)
    gain = draw.normal(0.02, 0.1, size=400)
    result = compare(frame(a), frame(a + gain), "RR@10", seed=1)
    error = 1.96 * gain.std() / 20
    assert result.low == pytest.approx(gain.mean() - error, abs=0.002)
    assert result.high == pytest.approx(gain.mean() + error, abs=0.002)
    assert result == compare(frame(a), frame(a + gain), "RR@10", seed=1)


def test_equal_models_do_not_differ():
    result = compare(frame([0.0, 0.5, 1.0]), frame([0.0, 0.5, 1.0]), "RR@10")
    assert (result.difference, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_queries_are_paired_by_name():
    a, b = frame([0.0, 0.75, 0.5], ["x", "y", "z"]), frame([0.75, 0.25, 1.0], ["z", "x", "y"])
    result = compare(a, b, "RR@10")
    assert (result.low, result.difference, result.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("other", "metric", "message"),
    [
        (frame([1.0, 2.0], ["x", "y"]), "RR@10", "measured on different queries"),
        (frame([1.0, 2.0]), "nDCG@10", "no value per query of 'nDCG@10'; there is RR@10"),
    ],
)
def test_what_cannot_be_paired_is_refused(other, metric, message):
    with pytest.raises(DataError, match=message):
        compare(frame([1.0, 2.0]), other, metric)
    with pytest.raises(DataError, match="at least 2 queries"):
        compare(frame([1.0]), frame([1.0]), "RR@10")


def users(weights, values) -> pd.DataFrame:
    names = [f"u{row}" for row in range(len(values))]
    return pd.DataFrame({"query": names, "weight": weights, "GAUC": values})


def test_users_count_by_their_impressions():
    """Means are weighted; of four ways to flip the signs of 0.5 * 3 and 0.1 * 1, two are as far from 0."""
    result = compare(users([3, 1], [0.25, 0.5]), users([3, 1], [0.75, 0.6]), "GAUC")
    assert result.difference == pytest.approx((3 * 0.5 + 0.1) / 4)
    assert result.p_value == pytest.approx(2 / 4)
    assert (result.low, result.high) == pytest.approx((0.1, 0.5))


def test_the_weighted_interval_is_that_of_a_ratio():
    draw = np.random.default_rng(0)
    weights, gain = draw.integers(1, 50, 400), draw.normal(0.02, 0.1, 400)
    a = draw.uniform(size=400)
    result = compare(users(weights, a), users(weights, a + gain), "GAUC")
    mean = np.average(gain, weights=weights)
    error = 1.96 * np.sqrt(np.sum((weights * (gain - mean)) ** 2)) / weights.sum()
    assert result.difference == pytest.approx(mean)
    assert (result.low, result.high) == pytest.approx((mean - error, mean + error), abs=0.003)


def test_a_user_without_a_value_is_left_out():
    a, b = users([3, 1, 9], [0.25, 0.5, np.nan]), users([3, 1, 9], [0.75, 0.6, np.nan])
    assert compare(a, b, "GAUC") == compare(a[:2], b[:2], "GAUC")
    assert compare(a, b, "GAUC").queries == 2
    with pytest.raises(DataError, match="at least 2 queries, got 0"):
        compare(a.assign(GAUC=np.nan), b, "GAUC")


def test_equal_weights_change_nothing():
    a, b = [0.0, 0.75, 0.5, 0.1], [0.25, 0.75, 0.75, 0.0]
    plain = compare(frame(a), frame(b), "RR@10")
    weighed = compare(frame(a).assign(weight=7), frame(b).assign(weight=7), "RR@10")
    assert weighed == pytest.approx(plain)
