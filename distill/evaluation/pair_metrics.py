"""Metrics of scored pairs, as plain functions. Next: ``evaluate.py``, which feeds them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import scipy

from distill.errors import DataError, RecipeError
from distill.evaluation.metrics import Column

PAIR_METRICS = (
    "Spearman",
    "Pearson",
    "AUC",
    "GAUC",
    "Accuracy",
    "F1",
    "Logloss",
    "ECE",
    "Calibration",
)
BLIND_TO_SCALE = ("AUC", "GAUC", "Spearman")  # they read only the order of scores
_GRADED = ("Spearman", "Pearson")
_NEED_THRESHOLD = frozenset({"Accuracy", "F1"})
BINS = 15  # of ECE


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
    scores: Column,
    labels: Column,
    metrics: Sequence[str],
    threshold: float | None = None,
    groups: Column | None = None,
) -> dict[str, float]:
    """Measure one score per pair against one label per pair.

    Spearman and Pearson take graded labels, the others 0 and 1. Accuracy and F1 say yes where score >=
    ``threshold``, which ``fit_threshold`` finds on a development split. Logloss, ECE and Calibration read
    scores as logits. A correlation with constant scores is not defined: nan.

    GAUC is the mean over users of the AUC among a user's own pairs, weighted by how many pairs it has
    (impressions); users whose labels are all alike are left out. ``groups`` says which user each pair
    belongs to. ECE is the expected calibration error: the mean over pairs of how far the predicted
    probability of a pair's bin is from its share of positives, in 15 bins of equal width (Guo et al. 2017,
    arXiv:1706.04599). Calibration is the sum of predicted probabilities over the number of positives: 1 is
    right on average, 2 promises twice too much.

    Example:
        >>> pairs([0.9, 0.8, 0.1], [1, 0, 0], ["AUC", "Accuracy"], threshold=0.5)
        {'AUC': 1.0, 'Accuracy': 0.6666666666666666}
        >>> pairs([0.9, 0.8, 0.3, 0.4, 0.1], [1, 0, 1, 0, 0], ["GAUC"], groups=[7, 7, 8, 8, 8])
        {'GAUC': 0.7}
    """
    check_pair_metrics(metrics)
    said, true = _columns(scores, labels)
    for name in metrics:
        if name not in _GRADED:
            _check_binary(true, name)
        if name in _NEED_THRESHOLD and threshold is None:
            raise RecipeError(f"{name} needs a threshold; fit one on a development split with fit_threshold.")
        if name == "GAUC" and groups is None:
            raise RecipeError("GAUC needs groups: the user that each pair belongs to.")
    found = {}
    for name in metrics:
        if name == "GAUC":
            users = per_user(said, true, ["GAUC"], groups)
            known = users[users["GAUC"].notna()]
            if not len(known):
                raise DataError(
                    f"GAUC needs a user with labels of both kinds, and none of {len(users):,} has them."
                )
            found[name] = float(np.average(known["GAUC"], weights=known["weight"]))
        else:
            found[name] = _pair_metric(name, said, true, threshold)
    return found


def per_user(
    scores: Column,
    labels: Column,
    metrics: Iterable[str],
    groups: Column | None,
    threshold: float | None = None,
) -> pd.DataFrame:
    """What of these metrics is a mean over users: columns query (the user), weight (its pairs), metrics.

    A user's GAUC is its AUC, nan where its labels are all alike; its Logloss and Accuracy are means over
    its pairs. Weighted means over users are then the metrics of all pairs.
    """
    said, true = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    user, names = pd.factorize(np.asarray(groups), sort=True)
    weight = np.bincount(user, minlength=len(names))
    columns: dict[str, np.ndarray] = {"query": np.array([str(name) for name in names]), "weight": weight}
    for metric in metrics:
        if metric == "GAUC":
            columns[metric] = _auc(said, true, user, len(names))
        elif metric == "Logloss":
            columns[metric] = np.bincount(user, _logloss(said, true), len(names)) / weight
        elif metric == "Accuracy" and threshold is not None:
            right = ((said >= threshold) == (true > 0)).astype(np.float64)
            columns[metric] = np.bincount(user, right, len(names)) / weight
    return pd.DataFrame(columns)


def _pair_metric(name: str, said: np.ndarray, true: np.ndarray, threshold: float | None) -> float:
    if name in _GRADED:
        if len(said) < 2 or said.min() == said.max() or true.min() == true.max():
            return float("nan")
        correlate = scipy.stats.spearmanr if name == "Spearman" else scipy.stats.pearsonr
        return float(correlate(said, true).statistic)
    if name == "AUC":
        return float(_auc(said, true, np.zeros(len(said), dtype=np.int64), 1)[0])
    if name == "Logloss":
        return float(_logloss(said, true).mean())
    if name in ("ECE", "Calibration"):
        chance = scipy.special.expit(said)
        if name == "Calibration":
            return float(chance.sum() / true.sum()) if true.any() else float("nan")
        bins = np.minimum((chance * BINS).astype(np.int64), BINS - 1)
        return float(np.abs(np.bincount(bins, chance - true)).sum() / len(said))
    decided = said >= threshold
    if name == "Accuracy":
        return float((decided == (true > 0)).mean())
    said_yes_or_is = decided.sum() + true.sum()
    return float(2 * true[decided].sum() / said_yes_or_is) if said_yes_or_is else 0.0


def _logloss(said: np.ndarray, true: np.ndarray) -> np.ndarray:
    """-log sigmoid(score) of a positive, -log sigmoid(-score) of a negative: [T]."""
    return np.logaddexp(0.0, np.where(true > 0, -said, said))


def _auc(said: np.ndarray, true: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """How often a positive scores above a negative of its group, ties half: [groups], nan with one kind only.

    By ranks: what the positives' ranks sum to, less what they would sum to at the bottom (Mann and Whitney).
    """
    order = np.lexsort((said, group))
    group, said, true = group[order], said[order], true[order]
    place = np.arange(len(said))
    new = np.ones(len(said), dtype=bool)
    new[1:] = (said[1:] != said[:-1]) | (group[1:] != group[:-1])
    tied = np.cumsum(new) - 1
    rank = (np.bincount(tied, place) / np.bincount(tied))[tied]  # of equal scores their mean
    sizes = np.bincount(group, minlength=groups)
    rank += 1 - (np.cumsum(sizes) - sizes)[group]
    positives = np.bincount(group, true, groups)
    pairs = positives * (sizes - positives)
    above = np.bincount(group, rank * true, groups) - positives * (positives + 1) / 2
    return np.divide(above, pairs, out=np.full(groups, np.nan), where=pairs > 0)


CLASS_METRICS = ("Accuracy", "F1", "Logloss")


def several_classes(labels: Column) -> bool:
    """Whether labels are the numbers of more than two classes."""
    true = np.asarray(labels, dtype=np.float64)
    return bool(len(true) and true.max() > 1 and true.min() >= 0 and np.array_equal(true, true.round()))


def check_class_metrics(metrics: Iterable[str]) -> None:
    """Refuse metrics that more than two classes do not have."""
    for name in metrics:
        if name not in CLASS_METRICS:
            raise RecipeError(
                f"{name} is not defined for pairs of more than two classes; there are "
                f"{', '.join(CLASS_METRICS)}."
            )


def classified(logits: np.ndarray, labels: Column, metrics: Sequence[str]) -> dict[str, float]:
    """Measure logits [n, C] of C classes against one class per pair; F1 is the mean over classes (macro).

    Example:
        >>> classified(np.array([[2.0, 0.0, 0.0], [0.0, 0.0, 9.0]]), [0, 1], ["Accuracy"])
        {'Accuracy': 0.5}
    """
    check_pair_metrics(metrics)
    check_class_metrics(metrics)
    said, true = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if not np.isfinite(said).all():
        row = int(np.flatnonzero(~np.isfinite(said).all(axis=1))[0])
        raise DataError(f"the logits of pair {row} are {said[row].tolist()}; they must be finite.")
    wrong = (true != true.round()) | (true < 0) | (true >= said.shape[1])
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"the label of pair {row} is {true[row]:g}, and the model's classes are 0 to {said.shape[1] - 1}."
        )
    return {name: _class_metric(name, said, true.astype(np.int64)) for name in metrics}


def _class_metric(name: str, said: np.ndarray, true: np.ndarray) -> float:
    if name == "Logloss":
        log_probabilities = scipy.special.log_softmax(said, axis=1)
        return float(-log_probabilities[np.arange(len(true)), true].mean())
    from sklearn import metrics

    if name == "F1":
        return float(metrics.f1_score(true, said.argmax(axis=1), average="macro", zero_division=0.0))
    return float(metrics.accuracy_score(true, said.argmax(axis=1)))


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
