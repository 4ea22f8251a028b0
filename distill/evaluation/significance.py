"""Whether one model is better than another, or was lucky with its queries."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy

from distill.errors import DataError

CONFIDENCE = 0.95  # of an interval


class Comparison(NamedTuple):
    """The mean difference b - a of a metric, its bootstrap interval and its permutation p-value."""

    difference: float
    low: float
    high: float
    p_value: float  # two-sided
    queries: int


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
    )


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
