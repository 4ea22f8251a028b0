"""Who took what when, in order: filters, splits in time, histories. Next: ``interactions.py``.

Everything here is arrays: a log of 100 million rows is four of them, and no row is an object.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from distill.data.feature_table import Windows

TRAIN, DEV, TEST = 0, 1, 2  # parts of a split
PARTS = {"train": TRAIN, "dev": DEV, "test": TEST}


@dataclass(frozen=True)
class Log:
    """T interactions in order of (user, time, item): rows of the users' and of the items' tables.

    Equal times of a user are put in order of the item's row, so what comes last never depends on the file.
    """

    users: np.ndarray  # [T] int32
    items: np.ndarray  # [T] int32
    times: np.ndarray | None  # [T] int64; None: nobody knows
    part: np.ndarray  # [T] uint8, of PARTS

    def __len__(self) -> int:
        return len(self.users)

    def rows(self, part: int) -> np.ndarray:
        return np.flatnonzero(self.part == part)


def in_order(users: np.ndarray, items: np.ndarray, times: np.ndarray | None) -> np.ndarray:
    """The rows in order of (user, time, item): [T] int64. Rows may come in any order."""
    (keys,) = _moments((users, items if times is None else times))
    order = np.argsort(keys)  # of one key: many times faster than of three
    again = np.diff(keys[order]) == 0
    tied = np.flatnonzero(np.append(again, False) | np.append(False, again))
    rows = order[tied]
    order[tied] = rows[np.lexsort((rows, items[rows], keys[rows]))]
    return order


def _moments(*logs: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    """One number per row of each log (users, times) that grows with user, then time: int64."""
    there = [(users, times) for users, times in logs if len(users)]
    low = min((int(times.min()) for _, times in there), default=0)
    span = max((int(times.max()) for _, times in there), default=0) - low + 1
    most = max((int(users.max()) for users, _ in there), default=0) + 1
    if span * most >= 2**62:  # ranks are smaller than the times
        ranks = np.unique(np.concatenate([times for _, times in logs]), return_inverse=True)[1]
        cuts = np.cumsum([len(users) for users, _ in logs])[:-1]
        logs = tuple((users, part) for (users, _), part in zip(logs, np.split(ranks, cuts), strict=True))
        low, span = 0, len(ranks)
    keys = []
    for users, times in logs:
        key = users.astype(np.int64)
        key *= span
        key += times
        key -= low
        keys.append(key)
    return keys


def k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Which rows [T] remain when users and items with less than ``k`` rows are removed until none is left."""
    kept = np.ones(len(users), bool)
    while True:
        few = np.zeros(len(users), bool)
        for ids in (users, items):
            counts = np.bincount(ids[kept], minlength=ids.max(initial=-1) + 1)
            few |= counts[ids] < k
        if not (kept & few).any():
            return kept
        kept &= ~few


def leave_last_out(users: np.ndarray) -> np.ndarray:
    """Parts [T] of ordered rows: each user's last is test, the one before dev, the rest train.

    A user with less than three rows has no dev row, one with a single row only trains.
    """
    begins = starts_of(users)
    counts = np.diff(np.append(begins, len(users)))
    ends = begins + counts
    part = np.full(len(users), TRAIN, np.uint8)
    part[ends[counts > 1] - 1] = TEST
    part[ends[counts > 2] - 2] = DEV
    return part


def starts_of(keys: np.ndarray) -> np.ndarray:
    """Where each stretch of equal keys begins: [distinct]."""
    begins = np.ones(len(keys), bool)
    begins[1:] = keys[1:] != keys[:-1]
    return np.flatnonzero(begins)


def by_time(times: np.ndarray, dev: float, test: float) -> np.ndarray:
    """Parts [T]: the latest share ``test`` of the rows, the share ``dev`` before it, and the rest.

    Cuts lie between two times: rows of one time are never in two parts.
    """
    ordered = np.sort(times)

    def after(share: float) -> np.ndarray:
        if share <= 0:
            return np.zeros(len(times), bool)
        return times >= ordered[min(len(ordered) - 1, round(len(ordered) * (1 - share)))]

    return np.where(after(test), TEST, np.where(after(dev + test), DEV, TRAIN)).astype(np.uint8)


@dataclass(frozen=True)
class Leaks:
    """How far a split lets training see what came after what it is measured on."""

    share: float  # of the train rows that are later than the first measured one
    own: int  # users with a train row later than one of their own measured rows

    def words(self, name: str) -> str:
        told = [f"{name}: {self.share:.1%} of the train rows are later than the first row that is measured"]
        if self.own:
            told.append(f"{self.own:,} users are measured on rows earlier than some they train on")
        return "; ".join(told) + ". Only a split by time keeps the future out of training."


def time_leaks(log: Log) -> Leaks | None:
    """Whether the split leaks time; None: it does not, or there are no times or nothing is measured."""
    measured = (log.part == DEV) | (log.part == TEST)
    train = log.part == TRAIN
    if log.times is None or not measured.any() or not train.any():
        return None
    share = float((log.times[train] > log.times[measured].min()).mean())
    n = int(log.users.max()) + 1
    last, first = np.full(n, np.iinfo(np.int64).min), np.full(n, np.iinfo(np.int64).max)
    np.maximum.at(last, log.users[train], log.times[train])
    np.minimum.at(first, log.users[measured], log.times[measured])
    own = int((last > first).sum())
    return Leaks(share, own) if share or own else None


def histories(
    event_users: np.ndarray,
    event_times: np.ndarray,
    users: np.ndarray,
    times: np.ndarray,
    longest: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Where the history of each (user, time) [n] lies in the ordered events [T]: starts and lengths [n].

    It is the last ``longest`` events of that user that are strictly earlier: never one of the same time.
    """
    events, asked = _moments((event_users, event_times), (users, times))
    ends = np.searchsorted(events, asked, side="left")
    begins = np.searchsorted(event_users, users, side="left")
    starts = np.maximum(begins, ends - longest)
    return starts, ends - starts


def shuffled_rings(
    users: np.ndarray, items: np.ndarray, n: int, longest: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Histories where no time is known: each row's is others of its user's items, as many as fit.

    A user's items are put in an order drawn by ``seed`` and closed to a ring; what follows a row on the ring
    is its history, so each target sees a different part of the set and never itself.

    Args:
        users: Users of the rows, in order [T].
        items: Their items [T], distinct for each user.
        n: How many users there are.

    Returns:
        The rings laid end to end [R]; where each row's history starts in it [T]; each user's own start [n]
        and number of items [n].
    """
    counts = np.bincount(users, minlength=n)
    begins = np.cumsum(counts) - counts
    order = np.lexsort((np.random.default_rng(seed).random(len(users)), users))
    place = np.empty(len(users), np.int64)
    place[order] = np.arange(len(users))
    more = np.minimum(counts, longest)  # the beginning again, so that a window may run over the end
    starts = np.cumsum(counts + more) - (counts + more)
    owner = np.repeat(np.arange(n), counts + more)
    within = np.arange(len(owner)) - starts[owner]
    rings = items[order][begins[owner] + within % np.maximum(counts, 1)[owner]]
    own = starts[users] + (place - begins[users]) + 1
    return rings, own, starts, counts


def windows(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Windows:
    """Windows of arrays."""
    starts, lengths = starts.astype(np.int64), lengths.astype(np.int64)
    return Windows(torch.from_numpy(values), torch.from_numpy(starts), torch.from_numpy(lengths))
