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
    paired permutation test, which swaps the two models' values of a query at random.

    Example:
        >>> a = pd.DataFrame({"query": ["x", "y"], "RR@10": [0.5, 0.25]})
        >>> compare(a, a.assign(**{"RR@10": [1.0, 0.75]}), "RR@10").difference
        0.5
    """
    first, second = _aligned(a, b, metric)
    difference = second - first
    if len(difference) < 2:
        raise DataError(f"a comparison needs at least 2 queries, got {len(difference)}.")
    batch = max(1, 2**22 // len(difference))
    interval = scipy.stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        batch=batch,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    # Swapping a query's two values flips the sign of its difference.
    test = scipy.stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        n_resamples=resamples,
        batch=batch,
        rng=np.random.default_rng(seed),
    )
    return Comparison(
        float(difference.mean()),
        float(interval.low),
        float(interval.high),
        float(test.pvalue),
        len(difference),
    )


def _aligned(a: pd.DataFrame, b: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The metric's two columns [n] with equal queries in equal rows."""
    for frame in (a, b):
        if metric not in frame:
            known = [name for name in frame if name not in ("query", "candidate", "score", "label")]
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
    return a[metric].to_numpy(np.float64), b[metric].to_numpy(np.float64)
