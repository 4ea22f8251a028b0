"""Whether a teacher is worth listening to: what its scores look like, and what is wrong with them, in words.

Next: ``checkup.py``, which asks teachers about a sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy

SURE = 0.01  # how unlikely luck must be before something is said of agreement
LEAST = 5  # lists that are needed to say it
USEFUL = 0.35  # an agreement that a teacher must not have, surely, to be called one that knows nothing
OPPOSITE = -0.2  # from this agreement on two orders are opposite: mined candidates alone bring it below 0
FLAT, SHARP = (
    0.05,
    50.0,
)  # spread in a list, over the temperature, at which a softmax says nothing or one thing
LARGE = 15.0  # spread in a list at which regression diverges: logits have 10 at most, cosines a twentieth
GRADES = 20  # so few different scores are grades, whose ends are no ends of a scale that goes on


@dataclass(frozen=True)
class Said:
    """What a teacher said of a split: n scores, the list each is in, and its label.

    Args:
        scores: [n]
        lists: [n] which query's list; a list of one is compared with nothing.
        labels: [n]; None: the data has none.
    """

    scores: np.ndarray
    lists: np.ndarray
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Health:
    """Figures of one teacher on one split.

    Args:
        pairs: How many scores there are.
        mean: Of all scores.
        spread: Their standard deviation.
        in_list: The standard deviation inside lists: what a student can learn of an order. Where lists are of
            one, that of all.
        ties: Share of comparisons inside lists in which both scores are equal.
        saturation: Share of scores at the very ends of the scale, within a thousandth of the whole range; of
            grades 0, and without the zeros of a score that counts what is there (BM25's, of other words).
        agreement: How much more often two candidates with different labels are ordered rightly than wrongly:
            1 always, 0 as a coin, -1 never. Mean over lists; where no list has two labels, over all pairs.
        luck: How likely an agreement so far from 0 is if the teacher knows nothing; None: it is not known.
        error: The standard error of the agreement; None: it is not known.
        lists: How many lists the agreement is over.
        temperature: At which the teacher's softmax over a list is as sure as it is right; without labels, or
            where it is always right, at which its scores spread by 1. None: at none, as it is never right.
    """

    pairs: int
    mean: float
    spread: float
    in_list: float
    ties: float
    saturation: float
    agreement: float | None
    luck: float | None
    error: float | None
    lists: int
    temperature: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def order(self) -> str | None:
        """``right``, ``wrong``, or ``random`` where it surely is not useful; None: too little is known."""
        if self.agreement is None or self.luck is None or self.error is None:
            return None
        if self.luck < SURE and not OPPOSITE < self.agreement < 0:
            return "right" if self.agreement > 0 else "wrong"
        return "random" if self.agreement + 2 * self.error < USEFUL else None


def examine(said: Said) -> Health:
    """The figures of what a teacher said."""
    scores = said.scores.astype(np.float64)
    rows = _rows(said.lists)
    longer = [row for row in rows if len(row) > 1] or [np.arange(len(scores))]
    inside = math.sqrt(np.mean([scores[row].var() for row in longer]))
    with_labels = Agreement(np.empty(0)) if said.labels is None else agreement_of(said, said.labels)
    return Health(
        pairs=len(scores),
        mean=float(scores.mean()),
        spread=float(scores.std()),
        in_list=inside,
        ties=float(np.mean([_ties(scores[row]) for row in longer])),
        saturation=_saturation(scores),
        agreement=with_labels.mean,
        luck=with_labels.luck,
        error=with_labels.error,
        lists=len(with_labels.lists),
        temperature=_temperature(scores, rows, said.labels, inside),
    )


class Agreement(NamedTuple):
    """How far two orders agree in each list, how likely a mean so far from 0 is by luck, and its error."""

    lists: np.ndarray
    luck: float | None = None
    error: float | None = None

    @property
    def mean(self) -> float | None:
        return float(self.lists.mean()) if len(self.lists) else None


def agreement_of(said: Said, others: np.ndarray) -> Agreement:
    """How far scores and ``others`` (labels, another teacher's scores) order candidates alike, list by list.

    Of the lists in which the others differ; of all pairs as one list, where there is no such list.
    """
    found = np.array([
        _concordance(said.scores[row], others[row]) for row in _rows(said.lists) if np.ptp(others[row]) > 0
    ])  # fmt: skip
    if len(found):
        if len(found) < LEAST:
            return Agreement(found)
        if np.ptp(found) == 0:  # as so many coins that fall on one side
            luck = 1.0 if found[0] == 0 else 2.0 * 0.5 ** len(found)
            return Agreement(found, luck, abs(float(found[0])) / math.sqrt(len(found)))
        luck = float(scipy.stats.ttest_1samp(found, 0.0).pvalue)
        return Agreement(found, luck, float(found.std(ddof=1)) / math.sqrt(len(found)))
    n = len(others)
    if n < LEAST or np.ptp(others) == 0:
        return Agreement(found)
    whole = _concordance(said.scores, others)
    known = np.ptp(said.scores) > 0
    luck = float(scipy.stats.kendalltau(said.scores, others).pvalue) if known else 1.0
    return Agreement(np.array([whole]), luck, _error_of_pairs(said.scores, others))


def ailments(train: Health, held_out: Health | None = None) -> Iterator[str]:
    """What is wrong with a teacher, in words; nothing, where it is healthy.

    Args:
        train: On the split whose pairs the student hears it about.
        held_out: On one that it was not trained on, where there is one.
    """
    if train.in_list <= 1e-6 * max(1e-30, abs(train.mean)) or train.spread == 0:
        yield "it says the same of all candidates of a list, so there is nothing to learn from it"
        return
    best = held_out if held_out is not None and held_out.order is not None else train
    if best.order is not None:
        over = f"{best.lists:,} lists" if best.lists > 1 else f"{best.pairs:,} pairs"
        told = f"agreement {best.agreement:+.2f} with the labels, over {over}"
        if best.order == "wrong":
            yield f"it puts candidates in the wrong order ({told}): is its score a distance, or negated?"
        elif best.order == "random":
            yield (
                f"its order cannot be told from a random one ({told}): do its scores belong to these pairs, "
                f"and its checkpoint to this task?"
            )
    if train.ties > 0.5:
        yield f"{train.ties:.0%} of its comparisons inside lists are ties"
    elif train.saturation > 0.3:
        yield (
            f"{train.saturation:.0%} of its scores stand at the ends of their range: they were squashed (a "
            f"sigmoid, a cut); give its raw logits"
        )
    if train.in_list > LARGE:
        yield (
            f"its scores spread by {train.in_list:,.0f} inside a list: regression on them would diverge, and "
            f"a softmax say one candidate; divide them{_suggested(train, ', or use a temperature near {}')}"
        )
    if held_out is not None and _learnt_by_heart(train, held_out):
        yield (
            f"it knows the training labels ({train.agreement:+.2f}) far better than others "
            f"({held_out.agreement:+.2f}): it repeats what it was trained on; out-of-fold scores teach more"
        )


def misheard(health: Health, temperature: float) -> Iterator[str]:
    """What is wrong with hearing a teacher's softmax over a list at a temperature."""
    ratio = health.in_list / temperature
    near = _suggested(health, "; a temperature near {} suits it")
    if 0 < ratio < FLAT:
        yield f"at temperature {temperature:.2g} its softmax is nearly even over a list{near}"
    elif ratio > SHARP:
        yield f"at temperature {temperature:.2g} its softmax is nearly one candidate{near}"


def _learnt_by_heart(train: Health, held_out: Health) -> bool:
    """Whether agreement falls by more than a fifth and more than luck."""
    if train.agreement is None or held_out.agreement is None:
        return False
    if train.error is None or held_out.error is None or (train.lists == 1) != (held_out.lists == 1):
        return False
    sure = scipy.stats.norm if train.lists == 1 else scipy.stats.t(min(train.lists, held_out.lists) - 1)
    luck = float(sure.isf(SURE / 2)) * math.hypot(train.error, held_out.error)
    return train.agreement - held_out.agreement > max(0.2, luck)


def _rows(lists: np.ndarray) -> Sequence[np.ndarray]:
    """The places of each list."""
    order = np.argsort(lists, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(lists[order])) + 1)


def _concordance(scores: np.ndarray, others: np.ndarray) -> float:
    """(right - wrong) / all, over the pairs of places in which ``others`` differ."""
    if len(scores) > 128:  # Kendall's tau-b counts the same without listing all pairs
        tau = scipy.stats.kendalltau(scores, others).statistic
        differ = (1 - _ties(scores)) / (1 - _ties(others))
        return 0.0 if math.isnan(tau) else float(tau * math.sqrt(differ))
    one, two = np.triu_indices(len(scores), 1)
    direction = np.sign(others[one] - others[two])
    return float((np.sign(scores[one] - scores[two]) * direction).sum() / np.abs(direction).sum())


def _error_of_pairs(scores: np.ndarray, others: np.ndarray) -> float:
    """The standard error of the concordance of n scores with others that they have nothing to do with.

    References:
        Kendall, 1970. Rank Correlation Methods, with ties on both sides.
    """
    n = len(scores)
    t, u = (np.unique(one, return_counts=True)[1].astype(np.float64) for one in (scores, others))
    (pairs_t, triples_t), (pairs_u, triples_u) = (
        ((c * (c - 1)).sum(), (c * (c - 1) * (c - 2)).sum()) for c in (t, u)
    )
    variance = n * (n - 1) * (2 * n + 5) - sum((c * (c - 1) * (2 * c + 5)).sum() for c in (t, u))
    variance = variance / 18 + pairs_t * pairs_u / (2 * n * (n - 1))
    variance += triples_t * triples_u / (9 * n * (n - 1) * (n - 2))
    return 2 * math.sqrt(variance) / (n * (n - 1) - pairs_u)


def _saturation(scores: np.ndarray) -> float:
    """See :class:`Health`."""
    low, high = scores.min(), scores.max()
    if len(np.unique(scores)) <= min(GRADES, len(scores) // 5):
        return 0.0
    at_the_ends = np.minimum(scores - low, high - scores) <= 1e-3 * (high - low)
    return float((at_the_ends & ((scores != 0) | (low < 0))).mean())


def _ties(scores: np.ndarray) -> float:
    counts = np.unique(scores, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (len(scores) * (len(scores) - 1)))


def _temperature(
    scores: np.ndarray, rows: Sequence[np.ndarray], labels: np.ndarray | None, inside: float
) -> float | None:
    """The temperature whose softmax gives the labels the highest likelihood; see :class:`Health`.

    References:
        Guo et al., 2017. On Calibration of Modern Neural Networks. arXiv:1706.04599
    """
    if inside == 0:
        return None
    told = (
        [] if labels is None else [row for row in rows if np.ptp(labels[row]) > 0 and labels[row].min() >= 0]
    )
    if not told or labels is None:
        return inside
    places = np.concatenate(told)
    starts = np.cumsum([0, *map(len, told[:-1])])
    wanted = np.concatenate([labels[row] / labels[row].sum() for row in told])

    def loss(log_temperature: float) -> float:
        logits = scores[places] / math.exp(log_temperature)
        return float(np.logaddexp.reduceat(logits, starts).sum() - (wanted * logits).sum())

    middle = math.log(inside)
    found = scipy.optimize.minimize_scalar(loss, bounds=(middle - 5, middle + 5), method="bounded")
    if found.fun < 1e-3 * len(told):  # always right: the colder the likelier, without end
        return inside
    return math.exp(found.x) if found.x < middle + 4.5 else None  # at the end of the search: never right


def _suggested(health: Health, words: str) -> str:
    """Words about the temperature that suits a teacher; nothing, where none does."""
    return "" if health.temperature is None else words.format(f"{health.temperature:.2g}")
