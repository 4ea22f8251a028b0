"""What a log says of a key before each of its rows: counts and rates that never see the present."""

from __future__ import annotations

import numpy as np

WEIGHT = 5.0  # rows that the mean rate counts for, where a key has few


def before(keys: np.ndarray, times: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many rows of its key are strictly earlier than each row, and how many of those are positive.

    Rows of equal time see nothing of each other, whatever their order.

    >>> counts, positives = before(np.array([7, 7, 7, 8]), np.array([1, 2, 2, 3]), np.array([1, 0, 1, 1]))
    >>> counts.tolist(), positives.tolist()
    ([0, 1, 1, 0], [0, 1, 1, 0])
    """
    order = np.lexsort((times, keys))
    k, t = keys[order], times[order]
    new_key, new_time = np.ones(len(k), bool), np.ones(len(k), bool)
    new_key[1:] = k[1:] != k[:-1]
    new_time[1:] = new_key[1:] | (t[1:] != t[:-1])
    place = np.arange(len(k))
    first_of_key = np.maximum.accumulate(np.where(new_key, place, 0))
    first_of_time = np.maximum.accumulate(np.where(new_time, place, 0))
    upto = np.concatenate([[0], np.cumsum(labels[order] > 0)])
    counts, positives = np.empty(len(k), np.int64), np.empty(len(k), np.int64)
    counts[order] = first_of_time - first_of_key
    positives[order] = upto[first_of_time] - upto[first_of_key]
    return counts, positives


def rate(counts: np.ndarray, positives: np.ndarray, mean: float) -> np.ndarray:
    """The share of positives, drawn towards the mean where there are few rows."""
    return (positives + WEIGHT * mean) / (counts + WEIGHT)
