"""Metrics of scored pairs, as plain functions. Next: ``evaluate.py``, which feeds them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import numpy as np
import scipy

from distill.errors import DataError, RecipeError
from distill.evaluation.metrics import Column

PAIR_METRICS = ("Spearman", "Pearson", "AUC", "Accuracy", "F1", "Logloss")
_NEED_THRESHOLD = frozenset({"Accuracy", "F1"})


def needs_threshold(metrics: Iterable[str]) -> bool:
    """Whether one of these pair metrics counts decisions, not scores."""
    return not _NEED_THRESHOLD.isdisjoint(metrics)


def check_pair_metrics(metrics: Iterable[str]) -> None:
    for name in metrics:
        if name not in PAIR_METRICS:
            by_case = {known.lower(): known for known in PAIR_METRICS}
            guess = difflib.get_close_matches(name.lower(), by_case, n=1)
            hint = f" Did you mean '{by_case[guess[0]]}'?" if guess else ""
            raise RecipeError(
                f"'{name}' is not a metric of pairs; there are {', '.join(PAIR_METRICS)}.{hint}"
            )


def pairs(
    scores: Column, labels: Column, metrics: Sequence[str], threshold: float | None = None
) -> dict[str, float]:
    """Measure one score per pair against one label per pair.

    Spearman and Pearson take graded labels; AUC, Accuracy, F1 and Logloss take 0 and 1. Accuracy and F1
    say yes where score >= ``threshold``, which ``fit_threshold`` finds on a development split. Logloss
    reads scores as logits. A correlation with constant scores is not defined: nan.

    Example:
        >>> pairs([0.9, 0.8, 0.1], [1, 0, 0], ["AUC", "Accuracy"], threshold=0.5)
        {'AUC': 1.0, 'Accuracy': 0.6666666666666666}
    """
    check_pair_metrics(metrics)
    said, true = _columns(scores, labels)
    decided = None
    for name in metrics:
        if name not in ("Spearman", "Pearson"):
            _check_binary(true, name)
        if name in _NEED_THRESHOLD and threshold is None:
            raise RecipeError(f"{name} needs a threshold; fit one on a development split with fit_threshold.")
    if threshold is not None:
        decided = (said >= threshold).astype(np.int64)
    return {name: _pair_metric(name, said, true, decided) for name in metrics}


def _pair_metric(name: str, said: np.ndarray, true: np.ndarray, decided: np.ndarray | None) -> float:
    if name in ("Spearman", "Pearson"):
        if len(said) < 2 or said.min() == said.max() or true.min() == true.max():
            return float("nan")
        correlate = scipy.stats.spearmanr if name == "Spearman" else scipy.stats.pearsonr
        return float(correlate(said, true).statistic)
    if name == "Logloss":  # -log sigmoid(score) of a positive, -log sigmoid(-score) of a negative
        return float(np.logaddexp(0.0, np.where(true > 0, -said, said)).mean())
    from sklearn import metrics  # here, as it takes a second to import

    if name == "AUC":
        return float(metrics.roc_auc_score(true, said))
    if name == "F1":
        return float(metrics.f1_score(true, decided, zero_division=0.0))
    return float(metrics.accuracy_score(true, decided))


def fit_threshold(scores: Column, labels: Column) -> float:
    """The threshold that decides most pairs rightly: halfway between two neighbouring scores.

    Every cut between sorted scores is tried; the lowest of the best wins. The lowest score itself says
    yes to all, a threshold above the highest says no to all.

    >>> fit_threshold([0.0, 0.25, 0.75, 1.0], [0, 0, 1, 1])
    0.5
    """
    said, true = _columns(scores, labels)
    _check_binary(true, "a threshold")
    order = np.argsort(said, kind="stable")
    said, true = said[order], true[order]
    right = np.concatenate([[0], np.cumsum(true == 0)]) + np.concatenate([np.cumsum(true[::-1])[::-1], [0]])
    cuts = np.concatenate(
        [[0], np.flatnonzero(said[1:] > said[:-1]) + 1, [len(said)]]
    )  # first pair said yes to
    cut = int(cuts[right[cuts].argmax()])
    if cut == 0:
        return float(said[0])
    return float(said[-1] + 1.0 if cut == len(said) else (said[cut - 1] + said[cut]) / 2)


def _columns(scores: Column, labels: Column) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 columns, the scores rounded to float32 first: a midpoint of two is then exact."""
    said = np.asarray(scores, dtype=np.float32).astype(np.float64)
    true = np.asarray(labels, dtype=np.float64)
    if said.shape != true.shape or said.ndim != 1 or not len(said):
        raise DataError(f"scores {[*said.shape]} and labels {[*true.shape]} must be one of each per pair.")
    for what, column in (("score", said), ("label", true)):
        if not np.isfinite(column).all():
            row = int(np.flatnonzero(~np.isfinite(column))[0])
            raise DataError(f"the {what} of pair {row} is {column[row]}; it must be finite.")
    return said, true


def _check_binary(true: np.ndarray, name: str) -> None:
    if not np.isin(true, (0.0, 1.0)).all():
        row = int(np.flatnonzero(~np.isin(true, (0.0, 1.0)))[0])
        raise DataError(
            f"{name} needs labels 0 and 1, but the label of pair {row} is {true[row]:g}; "
            f"for graded labels choose Spearman or Pearson."
        )
    if name == "AUC" and true.min() == true.max():
        raise DataError(f"AUC needs labels of both kinds, but all {len(true)} labels are {true[0]:g}.")
