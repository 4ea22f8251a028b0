"""Metrics of a ranking, as plain functions. Next: ``ranked.py``, their arithmetic; ``pair_metrics.py``."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ir_measures
import numpy as np
import pandas as pd

from distill.errors import DataError, RecipeError
from distill.evaluation.ranked import Ranked

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


class Catalogue(NamedTuple):
    """All that could be ranked, as columns, for the metrics of a catalogue."""

    candidates: Column  # [n] ids, each once
    popularity: Column | None = None  # [n] how often each was chosen in training


class RankingResult(NamedTuple):
    """Means, and the values they are means of."""

    means: dict[str, float]  # by the metric's name as it was asked for
    per_query: (
        pd.DataFrame
    )  # column query, then one per metric; queries in the order of the qrels. Not defined: nan
    without_positive: int  # judged queries with no relevant candidate: left out
    unjudged: int  # queries of the run that the qrels do not know: left out


class RankingMetric(NamedTuple):
    """What a name stands for: a measure of ir_measures, or one of the catalogue."""

    measure: ir_measures.Measure | None  # None: of the catalogue
    kind: str  # as ir_measures prints it, or of OF_CATALOGUE
    cutoff: int | None
    cold: int | None = None  # only what was chosen at most so often in training counts as relevant

    @property
    def needs_popularity(self) -> bool:
        return self.cold is not None or self.kind == "AveragePopularity"

    @property
    def needs_catalogue(self) -> bool:
        return self.kind == "Coverage" or self.needs_popularity


OF_CATALOGUE = ("Coverage", "AveragePopularity")
OTHER_NAMES = {"HitRate": "Success"}  # besides those that ir_measures knows


def parse_metric(name: str) -> ir_measures.Measure:
    """The measure a name stands for: as ir_measures prints it, or by one of its other names there.

    >>> parse_metric("nDCG@10"), parse_metric("MRR@10"), parse_metric("Recall@100"), parse_metric("MAP")
    (nDCG@10, RR@10, R@100, AP)
    >>> parse_metric("HitRate@10")
    Success@10
    """
    try:
        word = re.match(r"\w*", name)[0]  # type: ignore[index]  # it matches any text
        measure = ir_measures.parse_measure(OTHER_NAMES.get(word, word) + name[len(word) :])
        measure.validate_params()
        assert measure.params.get("cutoff", 1) > 0
    except (ValueError, NameError, AssertionError, TypeError):
        raise RecipeError(f"'{name}' is not a ranking metric. {_nearest_ranking_metric(name)}") from None
    if not ir_measures.DefaultPipeline.supports(measure):
        raise RecipeError(f"'{name}' cannot be computed here. {_nearest_ranking_metric('')}")
    return measure


def ranking_metric(name: str) -> RankingMetric:
    """What a name stands for: of ``parse_metric``, of the catalogue, or of cold candidates (``cold=``).

    >>> ranking_metric("Recall(cold=5)@10")
    RankingMetric(measure=R@10, kind='R', cutoff=10, cold=5)
    >>> ranking_metric("Coverage@10")
    RankingMetric(measure=None, kind='Coverage', cutoff=10, cold=None)
    """
    kind, _, cutoff = name.partition("@")
    if kind in OF_CATALOGUE:
        if not cutoff.isdecimal() or int(cutoff) < 1:
            raise RecipeError(f"'{name}' needs a cutoff, as {kind}@10.")
        return RankingMetric(None, kind, int(cutoff))
    cold = None
    if found := re.search(r"(?<=[(,])\s*cold=(\d+)\s*(,|(?=\)))", name):
        cold = int(found[1])
        name = (name[: found.start()] + name[found.end() :]).replace("()", "").replace(",)", ")")
    measure = parse_metric(name)
    return RankingMetric(measure, str(measure.NAME), measure.params.get("cutoff"), cold)


def _nearest_ranking_metric(name: str) -> str:
    """What to write instead of a name that says nothing."""
    names = ("nDCG", "MRR", "Recall", "MAP", "P", "Success", "HitRate", "RR", "AP", "R", *OF_CATALOGUE)
    known = {known.lower(): known for known in names}
    word, _, cutoff = name.partition("@")
    if guess := difflib.get_close_matches(word.lower(), known, n=1):
        return f"Did you mean '{known[guess[0]]}@{cutoff if cutoff.isdecimal() else 10}'?"
    return "Write one such as nDCG@10, MRR@10, Recall@100, MAP, P@1 or Success@5."


def cutoff(metrics: Iterable[str], default: int) -> int:
    """How deep a ranking must go for these metrics; ``default`` for one without a cutoff.

    >>> cutoff(["nDCG@10", "Recall@100"], default=1000)
    100
    """
    return max((ranking_metric(name).cutoff or default for name in metrics), default=default)


def higher_is_better(metric: str) -> bool:
    """All rise as a model gets better but Logloss, ECE and AveragePopularity; Calibration: see ``merit``."""
    return metric not in ("Logloss", "ECE") and not metric.startswith("AveragePopularity@")


def merit(metric: str, value: float) -> float:
    """A number that rises as a model gets better: the value, its negative, or how near a ratio is to 1.

    >>> merit("AUC", 0.8), merit("Logloss", 0.5)
    (0.8, -0.5)
    >>> merit("Calibration", 0.5) == merit("Calibration", 2.0) < merit("Calibration", 1.1)
    True
    """
    if metric == "Calibration":
        return -abs(math.log(value)) if value > 0 else -math.inf
    return value if higher_is_better(metric) else -value


def ranking(
    run: Run, qrels: Qrels, metrics: Sequence[str], catalogue: Catalogue | None = None
) -> RankingResult:
    """Measure a ranking against judgements.

    Entries are ordered by float32 score; equal scores by candidate id, ascending (numbers as numbers, text
    as text), so the order of the input changes nothing. A judged query that the run lacks counts 0; one
    without a relevant candidate is left out, as no ranking could do better or worse on it.

    ``Coverage@k`` is the share of the catalogue that is among the first k of some query,
    ``AveragePopularity@k`` how often, on average, the first k were chosen in training (Yin et al. 2012,
    arXiv:1205.6700). With ``cold=c``, as in ``Recall(cold=5)@10``, only candidates that were chosen at most
    c times are relevant, and queries without one of those are left out of that mean (nan per query).

    Example:
        >>> run = Run(["q", "q", "q"], ["a", "b", "c"], [0.1, 0.9, 0.5])
        >>> ranking(run, Qrels(["q"], ["c"], [1]), ["RR@10", "P@1"]).means
        {'RR@10': 0.5, 'P@1': 0.0}
    """
    asked = {name: ranking_metric(name) for name in metrics}
    check_catalogue(asked, catalogue)
    _check_scores(run)
    wanted = any(metric.needs_catalogue for metric in asked.values())
    ranked = Ranked.of(run, qrels, _whole(qrels), catalogue if wanted else None)
    columns, means = {}, {}
    for name, metric in asked.items():
        if metric.measure is None:
            assert metric.cutoff is not None
            if metric.kind == "Coverage":
                means[name] = ranked.coverage(metric.cutoff)
                continue
            columns[name] = ranked.average_popularity(metric.cutoff)
        else:
            judged = ranked if metric.cold is None else ranked.cold(metric.cold)
            columns[name] = judged.values(metric.measure)
        means[name] = float(np.nanmean(columns[name])) if not np.isnan(columns[name]).all() else math.nan
    names = dict(zip(map(str, qrels.queries), qrels.queries, strict=True))
    per_query = pd.DataFrame({"query": [names[query] for query in ranked.query_names], **columns})
    return RankingResult(means, per_query, ranked.without_positive, ranked.unjudged)


def check_catalogue(asked: dict[str, RankingMetric], catalogue: Catalogue | None) -> None:
    """Refuse metrics of a catalogue that is not known."""
    for name, metric in asked.items():
        if metric.kind == "Coverage" and catalogue is None:
            raise RecipeError(f"'{name}' needs the catalogue: all candidates that could be ranked.")
        if metric.needs_popularity and (catalogue is None or catalogue.popularity is None):
            raise RecipeError(
                f"'{name}' needs how often each candidate was chosen in training, and these data do not say; "
                f"take the metric out."
            )


def _whole(qrels: Qrels) -> np.ndarray:
    """The labels [T] as whole numbers."""
    labels = np.asarray(qrels.labels, dtype=np.float64)
    if not np.array_equal(labels, whole := np.nan_to_num(labels).round()):
        row = int(np.flatnonzero(labels != whole)[0])
        raise DataError(
            f"the label of query '{qrels.queries[row]}' and candidate '{qrels.candidates[row]}' is "
            f"{labels[row]}; ranking metrics need whole numbers: 0 for not relevant, 1 or more for relevant."
        )
    return whole.astype(np.int64)


def _check_scores(run: Run) -> None:
    scores = np.asarray(run.scores, dtype=np.float32)
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise DataError(
            f"the score of query '{run.queries[row]}' and candidate '{run.candidates[row]}' is "
            f"{scores[row]}; scores must be finite."
        )
