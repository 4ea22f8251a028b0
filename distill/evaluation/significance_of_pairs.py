"""``significance.py`` for metrics of all pairs at once, without a value per query: correlations and AUC."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import scipy

from distill.errors import DataError
from distill.evaluation.significance import CONFIDENCE, Comparison, compare, mean_over_seeds

WHOLE = ("Spearman", "Pearson", "AUC")
BOOTSTRAPS = 1999  # of the interval: each ranks all pairs again
AT_ONCE = 2**22  # scores


def compare_trainings(
    a: Sequence[pd.DataFrame], b: Sequence[pd.DataFrame], metric: str, resamples: int = 9999
) -> Comparison | None:
    """Two models, each by one or more trainings: over queries, or by a metric of all pairs over pairs.

    None: neither can be told from ``per_query`` of their evaluations.
    """
    frames = [*a, *b]
    if all(metric in frame and frame[metric].notna().sum() > 1 for frame in frames):
        return compare(mean_over_seeds(a, metric), mean_over_seeds(b, metric), metric, resamples=resamples)
    if metric in WHOLE and all({"score", "label"} <= set(frame) and len(frame) > 1 for frame in frames):
        return compare_pairs(a, b, metric, resamples=resamples)
    return None


def unit(per_query: pd.DataFrame) -> str:
    """What a row of an evaluation's ``per_query`` is: what is drawn and swapped in a comparison."""
    return "users" if "weight" in per_query else "pairs" if "score" in per_query else "queries"


def compare_pairs(
    a: Sequence[pd.DataFrame],
    b: Sequence[pd.DataFrame],
    metric: str,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = 9999,
    seed: int = 0,
) -> Comparison:
    """Compare two models, of one or more trainings each, by a metric of all pairs.

    The difference is that of the means over trainings. The interval is the percentile bootstrap over pairs,
    of which ``spread`` is the standard error times the root of their number. The p-value is of the paired
    permutation test, which swaps what the two models said of a pair, in all trainings, at random. As models
    have scales of their own, what is swapped is the rank among a model's scores (Spearman, AUC), or the
    score less their mean and over their deviation (Pearson).

    Args:
        a: ``per_query`` of the evaluation of each training, with a score and a label per pair.
        b: The same of the other model.
        metric: One of ``WHOLE``.

    Raises:
        DataError: The two were measured on different pairs.
    """
    first, second, labels = _aligned(a, b)
    n = len(labels)
    of_ranks = metric != "Pearson"
    measure: Callable[..., np.ndarray] = _auc if metric == "AUC" else _correlation

    def reader(values: np.ndarray, ranked: bool = of_ranks) -> Callable[[np.ndarray], np.ndarray]:
        """What a draw of rows [R, m] reads of values [n]: their ranks in the draw, or themselves."""
        return _Ranks(values) if ranked else values.__getitem__

    goal = reader(labels, metric == "Spearman")  # AUC reads labels as they are
    trainings = [[reader(scores) for scores in model] for model in (first, second)]

    def drawn(rows: np.ndarray, axis: int = -1) -> np.ndarray:
        chosen = goal(rows)
        a, b = (np.mean([measure(read(rows), chosen) for read in model], axis=0) for model in trainings)
        return b - a

    batch = max(1, AT_ONCE // first.size)
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", scipy.stats.DegenerateDataWarning
        )  # a draw may have labels of one kind
        found = scipy.stats.bootstrap(
            (np.arange(n),),
            drawn,
            n_resamples=min(resamples, BOOTSTRAPS),
            confidence_level=confidence,
            method="percentile",
            batch=batch,
            vectorized=True,
            rng=np.random.default_rng(seed),
        )
        draws = found.bootstrap_distribution
        interval = np.nanquantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
        spread = float(np.nanstd(draws, ddof=1)) * math.sqrt(n)
    both = np.concatenate([_of_one_scale(first, of_ranks), _of_one_scale(second, of_ranks)], axis=1)
    truth = goal(np.arange(n))

    def swapped(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return measure(both[:, y], truth).mean(0) - measure(both[:, x], truth).mean(0)

    test = scipy.stats.permutation_test(
        (np.arange(n), np.arange(n, 2 * n)),
        swapped,
        permutation_type="samples",
        n_resamples=resamples,
        batch=batch,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    difference = float(drawn(np.arange(n)))
    low, high = (float(end) for end in interval)
    return Comparison(difference, low, high, float(test.pvalue), n, spread)


class _Ranks:
    """Ranks of values [n] among those that are drawn with them, without sorting them again.

    Called with rows [..., m] it returns what ``scipy.stats.rankdata`` says of the values there: of equal ones
    their mean rank, from 1.
    """

    def __init__(self, values: np.ndarray):
        distinct, self.codes = np.unique(values, return_inverse=True)
        self.size = len(distinct)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        codes = self.codes[rows].reshape(-1, rows.shape[-1])
        places = codes + np.arange(len(codes))[:, None] * self.size
        counts = np.bincount(places.ravel(), minlength=len(codes) * self.size).reshape(-1, self.size)
        ranks = counts.cumsum(axis=1) - (counts - 1) / 2
        return ranks.ravel()[places].reshape(rows.shape)


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's, along the last axis; of ranks it is Spearman's."""
    x, y = x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True)
    xy, xx, yy = (np.einsum("...n,...n->...", *pair) for pair in ((x, y), (x, x), (y, y)))
    return xy / np.sqrt(xx * yy)


def _auc(ranks: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """By how far positives rank above negatives on average, along the last axis."""
    n, positives = labels.shape[-1], labels.sum(axis=-1)
    of_positives = (ranks * labels).sum(axis=-1)
    of_negatives = ranks.sum(axis=-1) - of_positives
    return 0.5 + (of_positives / positives - of_negatives / (n - positives)) / n


def _of_one_scale(scores: np.ndarray, of_ranks: bool) -> np.ndarray:
    if of_ranks:
        return scipy.stats.rankdata(scores, axis=-1)
    spread = scores.std(axis=-1, keepdims=True)
    return (scores - scores.mean(axis=-1, keepdims=True)) / np.where(spread > 0, spread, 1.0)


def _aligned(
    a: Sequence[pd.DataFrame], b: Sequence[pd.DataFrame]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores [trainings, n] of both models, labels [n]."""
    first = a[0]
    for frame in (*a, *b):
        if any(not np.array_equal(frame[c], first[c]) for c in ("query", "candidate", "label")):
            raise DataError(
                f"the two models were measured on different pairs ({len(first)} and {len(frame)}); "
                f"evaluate both on the same split."
            )
    if len(first) < 2:
        raise DataError(f"a comparison needs at least 2 pairs, got {len(first)}.")
    scores = [np.stack([frame["score"].to_numpy(np.float64) for frame in frames]) for frames in (a, b)]
    return scores[0], scores[1], first["label"].to_numpy(np.float64)
