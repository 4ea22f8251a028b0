"""Splits as Judged: searches, sampled lists, impressions. Part of ``interactions.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from distill.batch import Ragged
from distill.data.feature_schema import Feature
from distill.data.feature_table import FeatureTable, Visits, Windows, content_keys
from distill.data.interaction_log import (
    DEV,
    PARTS,
    TRAIN,
    Log,
    histories,
    shuffled_rings,
    starts_of,
    windows,
)
from distill.data.judged import Judged
from distill.errors import DataError

LONGEST = 2**31  # of a history without a limit


@dataclass(frozen=True)
class Events:
    """What histories are made of, in order of (user, time): E rows."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """Interactions in order, with encoded users and items, from which every split is made."""

    log: Log
    users: FeatureTable
    items: FeatureTable
    remembered: Mapping[str, tuple[Feature, Tensor]]  # history feature -> itself, its ids by item row [items]
    labels: np.ndarray | None = None  # [T] float32; None: every interaction is a positive
    pair: Mapping[str, Tensor] = field(default_factory=dict)  # context feature -> values [T]
    before: Events | None = None  # what is known from before the log
    exposed: Ragged | None = None  # item rows that each user saw and did not take, in train
    seed: int = 0

    @property
    def longest(self) -> int:
        return max((f.max_length or LONGEST for f, _ in self.remembered.values()), default=0)

    def events(self, kept: np.ndarray) -> Events:
        """The kept rows of the log, after what is known from before it."""
        assert self.log.times is not None
        found = Events(self.log.users[kept], self.log.items[kept], self.log.times[kept])
        if self.before is None:
            return found
        users = np.concatenate([self.before.users, found.users])
        times = np.concatenate([self.before.times, found.times])
        order = np.argsort(users, kind="stable")  # what was before comes first
        items = np.concatenate([self.before.items, found.items])
        return Events(users[order], items[order], times[order])

    def remember(self, items: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> dict[str, Windows]:
        """The history columns: windows over ``items``, rows of the item table."""
        columns = {}
        for name, (feature, ids) in self.remembered.items():
            cut = np.minimum(lengths, feature.max_length or LONGEST)
            columns[name] = windows(ids.numpy()[items], starts + lengths - cut, cut)
        return columns


def retrieval(data: Prepared, name: str, where: str) -> Judged:
    """Train: a query per interaction, which lists what was taken. Else one per user, with all the part's."""
    rows = data.log.rows(PARTS[name])
    _not_empty(rows, where)
    queries = np.arange(len(rows)) if name == "train" else starts_of(data.log.users[rows])
    lengths = np.diff(np.append(queries, len(rows)))
    asked = rows[queries]  # a query stands at the time of its first row
    users = data.log.users[asked]
    groups = _long(users)
    listed = Ragged.of_lengths(_long(data.log.items[rows]), torch.from_numpy(lengths))
    return Judged(
        task="retrieval",
        queries=Visits(
            data.users,
            groups,
            _histories(data, name, asked),
            _long(asked) if name == "train" else None,
            exposed=data.exposed,
        ),
        candidates=data.items,
        listed=listed,
        labels=torch.ones(len(rows)),
        name=where,
        seen=None if name == "train" else _seen(data, name, users, listed),
        groups=groups,
    )


def _histories(data: Prepared, name: str, asked: np.ndarray) -> dict[str, Windows]:
    """Histories of the rows ``asked``: of what the part may know, strictly before the row's time."""
    log = data.log
    if not data.remembered:
        return {}
    if log.times is not None:
        kept = log.part == TRAIN if name != "test" else log.part <= DEV
        events = data.events(kept)
        return data.remember(
            events.items,
            *histories(events.users, events.times, log.users[asked], log.times[asked], data.longest),
        )
    train = log.rows(TRAIN)
    rings, own, starts, counts = shuffled_rings(
        log.users[train], log.items[train], len(data.users), data.longest, data.seed
    )
    if name == "train":
        return data.remember(rings, own, np.minimum(counts[log.users[asked]] - 1, data.longest))
    users = log.users[asked]
    return data.remember(rings, starts[users], np.minimum(counts[users], data.longest))


def _seen(data: Prepared, name: str, users: np.ndarray, listed: Ragged) -> Ragged:
    """Per query the items that its user took in earlier parts, without those that it lists."""
    n = len(data.items)
    place = np.full(len(data.users), -1)
    place[users] = np.arange(len(users))
    earlier = data.log.part < PARTS[name]
    keys = place[data.log.users[earlier]] * n
    keys += data.log.items[earlier]
    keys = np.sort(keys[keys >= 0])
    keys = keys[np.diff(keys, prepend=-1) > 0]
    wanted = np.repeat(np.arange(len(users)), listed.lengths.numpy()) * n + listed.values.numpy()
    found = np.searchsorted(keys, wanted)
    there = found[keys[np.minimum(found, len(keys) - 1)] == wanted] if len(keys) else found[:0]
    keys = np.delete(keys, there)
    return Ragged.of_lengths(_long(keys % n), torch.from_numpy(np.bincount(keys // n, minlength=len(users))))


def sampled(
    data: Prepared, full: Judged, count: int, where: str, given: Mapping[int, np.ndarray] | None = None
) -> Judged:
    """The queries of ``full`` with their positives and ``count`` items that their users never took.

    Args:
        given: User row -> item rows to list as negatives; drawn by the seed where not given.
    """
    assert isinstance(full.queries, Visits)
    users, n = full.queries.rows.numpy(), len(data.items)
    bounds = np.searchsorted(data.log.users, np.stack([users, users + 1]))
    random = np.random.default_rng((data.seed, count))
    lists, labels = [], []
    for query, user in enumerate(users.tolist()):
        targets = full.listed[query].numpy()
        if given is not None:
            negatives = given[user]
        else:
            known = data.log.items[bounds[0, query] : bounds[1, query]]
            negatives = _unknown(random, known, n, count)
        lists.append(np.concatenate([targets, negatives]))
        labels.append(np.concatenate([np.ones(len(targets)), np.zeros(len(negatives))]))
    return Judged(
        task="rerank",
        queries=full.queries,
        candidates=data.items,
        listed=Ragged.of_lengths(
            _long(np.concatenate(lists)), torch.tensor([len(items) for items in lists], dtype=torch.int64)
        ),
        labels=torch.from_numpy(np.concatenate(labels)).float(),
        name=where,
        groups=full.groups,
    )


def _unknown(random: np.random.Generator, known: np.ndarray, n: int, count: int) -> np.ndarray:
    """``count`` distinct items out of n that are not known; fewer where there are no more."""
    drawn = random.integers(n, size=4 * count)
    drawn = drawn[~np.isin(drawn, known)]
    drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    if len(drawn) < count:
        rest = np.setdiff1d(np.arange(n), known)
        drawn = random.permutation(rest)
    return drawn[:count]


def pairs(data: Prepared, name: str, width: int, where: str) -> Judged:
    """Impressions with their labels: those of one user with one history are one query, up to ``width``.

    An item that comes twice with one history is listed by two queries.
    """
    log, rows = data.log, data.log.rows(PARTS[name])
    _not_empty(rows, where)
    assert data.labels is not None and log.times is not None
    events = data.events(data.labels > 0)
    users = log.users[rows]
    starts, lengths = histories(events.users, events.times, users, log.times[rows], max(data.longest, 1))
    ends = starts + lengths if data.remembered else np.zeros(len(rows), np.int64)
    new = np.ones(len(rows), bool)
    new[1:] = (users[1:] != users[:-1]) | (ends[1:] != ends[:-1])
    run = new.cumsum() - 1
    again = _occurrence(run * len(data.items) + log.items[rows])
    within = _occurrence(run * (int(again.max()) + 1) + again)
    order = np.lexsort((within, again, run))
    parts = np.stack([run, again, within // width])[:, order]
    begins = np.ones(len(rows), bool)
    begins[1:] = (parts[:, 1:] != parts[:, :-1]).any(axis=0)
    query = begins.cumsum() - 1
    order = order[np.lexsort((-data.labels[rows[order]], query))]  # positives first
    first = np.flatnonzero(begins)
    rows, queries = rows[order], order[first]
    pair = {key: values[torch.from_numpy(rows)] for key, values in data.pair.items()}
    return Judged(
        task="pairs",
        queries=Visits(
            data.users,
            _long(users[queries]),
            data.remember(events.items, starts[queries], lengths[queries]),
            _long(rows[first]),
            _beside(pair, log.items[rows], first),
        ),
        candidates=data.items,
        listed=Ragged.of_lengths(
            _long(log.items[rows]), torch.from_numpy(np.diff(np.append(first, len(rows))))
        ),
        labels=torch.from_numpy(data.labels[rows]).float(),
        name=where,
        pair=pair,
        groups=_long(users[queries]),
    )


def _beside(pair: Mapping[str, Tensor], items: np.ndarray, first: np.ndarray) -> np.ndarray | None:
    """A hash of the pair features of each query: what a teacher says of an item depends on them too."""
    if not pair:
        return None
    keys = content_keys({**pair, "": _long(items)}, len(items))[:, 0]
    return np.add.reduceat(keys, first)


def _occurrence(keys: np.ndarray) -> np.ndarray:
    """How many equal keys stand further left: [n]."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = np.ones(len(keys), bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    start = np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))
    found = np.empty(len(keys), np.int64)
    found[order] = np.arange(len(keys)) - start
    return found


def _not_empty(rows: np.ndarray, where: str) -> None:
    if not len(rows):
        raise DataError(f"{where}: no interaction is left for this split. Give it a larger share or a table.")


def _long(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
