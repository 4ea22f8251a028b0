"""Whether one model is better than another, or was lucky with its queries."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy

from distill.errors import DataError

CONFIDENCE = 0.95  # of an interval
POWER = 0.8  # how likely the smallest detectable difference is to be detected


class Comparison(NamedTuple):
    """The mean difference b - a of a metric, its bootstrap interval and its permutation p-value."""

    difference: float
    low: float
    high: float
    p_value: float  # two-sided
    queries: int
    spread: float  # standard deviation of the queries' differences


def compare(
    a: pd.DataFrame,
    b: pd.DataFrame,
    metric: str,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = 9999,
    seed: int = 0,
) -> Comparison:
    """Compare two models on the same queries: ``per_query`` of their evaluations.

    The interval is the percentile bootstrap of the mean difference over queries. The p-value is of the
    paired permutation test, which swaps the two models' values of a query at random. Where rows are users
    with a column ``weight`` (impressions), means are weighted, and whole users are drawn and swapped. A row
    without a value for either model (a user whose labels are all alike) is left out.

    Example:
        >>> a = pd.DataFrame({"query": ["x", "y"], "RR@10": [0.5, 0.25]})
        >>> compare(a, a.assign(**{"RR@10": [1.0, 0.75]}), "RR@10").difference
        0.5
    """
    first, second, weight = _aligned(a, b, metric)
    if len(weight) < 2:
        raise DataError(f"a comparison needs at least 2 queries, got {len(weight)}.")
    weighted = weight * (second - first)
    batch = max(1, 2**22 // len(weighted))
    equal = bool((weight == weight[0]).all())

    def mean(weighted: np.ndarray, weight: np.ndarray, axis: int = -1) -> np.ndarray:
        return weighted.sum(axis=axis) / weight.sum(axis=axis)

    interval = scipy.stats.bootstrap(
        (second - first,) if equal else (weighted, weight),
        np.mean if equal else mean,
        paired=not equal,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        batch=batch,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    # Swapping a query's two values flips the sign of its difference; the sum of weights stays.
    test = scipy.stats.permutation_test(
        (weighted,),
        np.mean,
        permutation_type="samples",
        n_resamples=resamples,
        batch=batch,
        rng=np.random.default_rng(seed),
    )
    return Comparison(
        float(mean(weighted, weight)),
        float(interval.low),
        float(interval.high),
        float(test.pvalue),
        len(weighted),
        float((weighted / weight.mean()).std(ddof=1)),
    )


def mean_over_seeds(frames: Sequence[pd.DataFrame], metric: str) -> pd.DataFrame:
    """A metric's value per query, averaged over trainings that were measured on the same queries.

    A test on it says what holds for these trainings on other queries; how much another seed would change is
    the spread over seeds, which belongs beside it.
    """
    known = [frame.dropna(subset=[metric]) if metric in frame else frame for frame in frames]
    first = known[0]
    values = [_aligned(first, frame, metric)[1] for frame in known]
    return first[["query", *({"weight"} & set(first))]].assign(**{metric: np.mean(values, axis=0)})


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests, corrected by Holm's step-down rule, in the order given.

    At most one in twenty such families holds a difference below 0.05 that is none, whatever depends on what.

    References:
        Holm, 1979. A simple sequentially rejective multiple test procedure. Scandinavian Journal of
        Statistics 6(2).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = steps.clip(max=1.0)
    return corrected.tolist()


def power(difference: float, spread: float, queries: int, alpha: float = 1 - CONFIDENCE) -> float:
    """How likely a two-sided paired test on ``queries`` is to find a true mean difference.

    Computed for the t-test, to which the permutation test of a mean comes close from a few dozen queries on.

    Args:
        spread: Standard deviation of the queries' differences.
    """
    if spread == 0:
        return alpha if difference == 0 else 1.0
    return _found(abs(difference) * math.sqrt(queries) / spread, queries, alpha)


def detectable(spread: float, queries: int, alpha: float = 1 - CONFIDENCE, likely: float = POWER) -> float:
    """The smallest true difference that the test would find with a probability of ``likely``."""
    return _shift_found(queries, alpha, likely) * spread / math.sqrt(queries)


def _found(shift: float, queries: int, alpha: float) -> float:
    """The power for a difference of ``shift`` standard errors."""
    freedom = queries - 1
    limit = scipy.stats.t.ppf(1 - alpha / 2, freedom)
    wrong_side = np.nan_to_num(scipy.stats.nct.cdf(-limit, freedom, shift))  # scipy: nan where it is tiny
    return float(scipy.stats.nct.sf(limit, freedom, shift) + wrong_side)


@functools.lru_cache
def _shift_found(queries: int, alpha: float, likely: float) -> float:
    most = 4.0
    while _found(most, queries, alpha) < likely:
        most *= 2  # few queries: the limit of the test is far out
    return float(scipy.optimize.brentq(lambda shift: _found(shift, queries, alpha) - likely, 0.0, most))


def _aligned(a: pd.DataFrame, b: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The metric's two columns [n] with equal queries in equal rows, and the weight of each."""
    for frame in (a, b):
        if metric not in frame:
            other = ("query", "candidate", "score", "label", "weight")
            known = [name for name in frame if name not in other]
            raise DataError(
                f"there is no value per query of '{metric}'; there is {', '.join(known) or 'none'}."
            )
    if not np.array_equal(a["query"].to_numpy(), b["query"].to_numpy()):
        if (
            a["query"].duplicated().any()
            or b["query"].duplicated().any()
            or set(a["query"]) != set(b["query"])
        ):
            raise DataError(
                f"the two models were measured on different queries ({len(a)} and {len(b)}); "
                f"evaluate both on the same split."
            )
        b = b.set_index("query").loc[a["query"]]
    first, second = a[metric].to_numpy(np.float64), b[metric].to_numpy(np.float64)
    weight = a["weight"].to_numpy(np.float64) if "weight" in a else np.ones(len(a))
    there = ~np.isnan(first) & ~np.isnan(second)
    return first[there], second[there], weight[there]
