"""Metrics of a ranking and of scored pairs, as plain functions. Next: ``evaluate.py``, which feeds them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ir_measures
import numpy as np
import pandas as pd
import scipy

from distill.errors import DataError, RecipeError

Column = Sequence[Any] | np.ndarray


class Run(NamedTuple):
    """What a model ranked, as columns: T entries, each a query, a candidate and its score."""

    queries: Column  # [T] ids, text or numbers
    candidates: Column  # [T] ids, text or numbers
    scores: Column  # [T] read as float32, higher is better


class Qrels(NamedTuple):
    """What is known, as columns: T judgements; a label above 0 means relevant and is the gain of nDCG."""

    queries: Column  # [T]
    candidates: Column  # [T]
    labels: Column  # [T] whole numbers


class RankingResult(NamedTuple):
    """Means, and the values they are means of."""

    means: dict[str, float]  # by the metric's name as it was asked for
    per_query: pd.DataFrame  # column query, then one column per metric; queries in the order of the qrels
    without_positive: int  # judged queries with no relevant candidate: left out
    unjudged: int  # queries of the run that the qrels do not know: left out


def parse_metric(name: str) -> ir_measures.Measure:
    """The measure a name stands for: as ir_measures prints it, or by one of its other names there.

    >>> parse_metric("nDCG@10"), parse_metric("MRR@10"), parse_metric("Recall@100"), parse_metric("MAP")
    (nDCG@10, RR@10, R@100, AP)
    """
    try:
        measure = ir_measures.parse_measure(name)
        measure.validate_params()
        assert measure.params.get("cutoff", 1) > 0
    except (ValueError, NameError, AssertionError, TypeError):
        raise RecipeError(f"'{name}' is not a ranking metric. {_nearest_ranking_metric(name)}") from None
    if not ir_measures.DefaultPipeline.supports(measure):
        raise RecipeError(f"'{name}' cannot be computed here. {_nearest_ranking_metric('')}")
    return measure


def _nearest_ranking_metric(name: str) -> str:
    """What to write instead of a name that says nothing."""
    known = {
        known.lower(): known for known in ("nDCG", "MRR", "Recall", "MAP", "P", "Success", "RR", "AP", "R")
    }
    word, _, cutoff = name.partition("@")
    if guess := difflib.get_close_matches(word.lower(), known, n=1):
        return f"Did you mean '{known[guess[0]]}@{cutoff if cutoff.isdecimal() else 10}'?"
    return "Write one such as nDCG@10, MRR@10, Recall@100, MAP, P@1 or Success@5."


def cutoff(metrics: Iterable[str], default: int) -> int:
    """How deep a ranking must go for these metrics; ``default`` for one without a cutoff.

    >>> cutoff(["nDCG@10", "Recall@100"], default=1000)
    100
    """
    return max((parse_metric(name).params.get("cutoff", default) for name in metrics), default=default)


def ranking(run: Run, qrels: Qrels, metrics: Sequence[str]) -> RankingResult:
    """Measure a ranking against judgements.

    Entries are ordered by float32 score; equal scores by candidate id, ascending (numbers as numbers, text
    as text), so the order of the input changes nothing. A judged query that the run lacks counts 0; one
    without a relevant candidate is left out, as no ranking could do better or worse on it.

    Example:
        >>> run = Run(["q", "q", "q"], ["a", "b", "c"], [0.1, 0.9, 0.5])
        >>> ranking(run, Qrels(["q"], ["c"], [1]), ["RR@10", "P@1"]).means
        {'RR@10': 0.5, 'P@1': 0.0}
    """
    measures = {name: parse_metric(name) for name in metrics}
    gains = _gains(qrels)
    relevant = {query: labels for query, labels in gains.items() if any(labels.values())}
    ranked = _ranked(run)
    values: dict[tuple[str, Any], float] = {}
    evaluator = ir_measures.evaluator(set(measures.values()), relevant) if relevant and measures else None
    if evaluator is not None:
        for query, measure, value in evaluator.iter_calc({q: ranked[q] for q in relevant if q in ranked}):
            values[query, measure] = float(value)
    names = dict(zip(map(str, qrels.queries), qrels.queries, strict=True))
    columns = {name: [values[q, measure] for q in relevant] for name, measure in measures.items()}
    per_query = pd.DataFrame({"query": [names[query] for query in relevant], **columns})
    return RankingResult(
        means={name: float(per_query[name].mean()) for name in measures},
        per_query=per_query,
        without_positive=len(gains) - len(relevant),
        unjudged=len(ranked.keys() - gains.keys()),
    )


def _gains(qrels: Qrels) -> dict[str, dict[str, int]]:
    """Labels by query and candidate; of two labels of one pair, the higher; below 0 counts as 0."""
    labels = np.asarray(qrels.labels, dtype=np.float64)
    if not np.array_equal(labels, whole := np.nan_to_num(labels).round()):
        row = int(np.flatnonzero(labels != whole)[0])
        raise DataError(
            f"the label of query '{qrels.queries[row]}' and candidate '{qrels.candidates[row]}' is "
            f"{labels[row]}; ranking metrics need whole numbers: 0 for not relevant, 1 or more for relevant."
        )
    gains: dict[str, dict[str, int]] = {}
    triples = zip(map(str, qrels.queries), map(str, qrels.candidates), whole.tolist(), strict=True)
    for query, candidate, label in triples:
        of_query = gains.setdefault(query, {})
        of_query[candidate] = max(int(label), of_query.get(candidate, 0))
    return gains


def _ranked(run: Run) -> dict[str, dict[str, float]]:
    """By query and candidate the rank, negated: scores without ties, whatever the library does with ties."""
    scores = np.asarray(run.scores, dtype=np.float32)
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise DataError(
            f"the score of query '{run.queries[row]}' and candidate '{run.candidates[row]}' is "
            f"{scores[row]}; scores must be finite."
        )
    queries, query_names = pd.factorize(np.asarray(run.queries))
    names, candidates = np.unique(np.asarray(run.candidates), return_inverse=True)
    order = np.lexsort((candidates, -scores, queries))
    starts = np.searchsorted(queries[order], np.arange(len(query_names) + 1))
    ranked = {}
    for query, start, stop in zip(query_names, starts, starts[1:], strict=False):
        listed = [str(name) for name in names[candidates[order[start:stop]]].tolist()]
        ranked[str(query)] = dict(zip(listed, map(float, range(0, -len(listed), -1)), strict=True))
        if len(ranked[str(query)]) < len(listed):
            twice = next(name for name in listed if listed.count(name) > 1)
            raise DataError(f"query '{query}' ranks candidate '{twice}' twice; keep one score for it.")
    return ranked


PAIR_METRICS = ("Spearman", "Pearson", "AUC", "Accuracy", "F1", "Logloss")
_NEED_THRESHOLD = frozenset({"Accuracy", "F1"})


def needs_threshold(metrics: Iterable[str]) -> bool:
    """Whether one of these pair metrics counts decisions, not scores."""
    return not _NEED_THRESHOLD.isdisjoint(metrics)


def higher_is_better(metric: str) -> bool:
    """All but Logloss rise as a model gets better."""
    return metric != "Logloss"


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
