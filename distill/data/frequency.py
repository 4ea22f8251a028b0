"""How often items come, estimated as they come. Part of ``interaction_source.py``."""

from __future__ import annotations

import numpy as np

from distill.data.feature_table import mixed

LEAST = 1e-10  # of a probability


class StreamingFrequency:
    r"""The probability that a batch holds an item, from the gaps between the steps that held it.

    Each hash bucket keeps the step A at which it was last hit and a running mean B of the gap between hits.
    At global step t = 1, 2, ..., for each distinct item y of the batch,

    .. math:: B_{h(y)} \leftarrow (1 - \alpha) B_{h(y)} + \alpha (t - A_{h(y)}), \qquad A_{h(y)} \leftarrow t

    and :math:`p(y) = 1 / B_{h(y)}`. With several hashes the largest B is taken: a collision can only shorten
    a gap. A starts at 0, so an item's first gap is the step itself, as in the paper; it decays.

    Args:
        buckets: H, per hash.
        hashes: How many hashes.
        rate: :math:`\alpha`: small is steady, large follows changes.
        start: Every B at the beginning.
        seed: Of the hashes.

    References:
        Yi et al., 2019. Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations,
        algorithm 2. RecSys 2019

    Example:
        >>> estimator = StreamingFrequency(buckets=8, rate=0.5)
        >>> for step in (1, 11):
        ...     estimator.update(np.array([3]), step)
        >>> estimator.probability(np.array([3]))  # the gaps 1 and 10 from a mean of 100: 50.5, 30.25
        array([0.03305785])
    """

    def __init__(
        self, buckets: int = 2**20, hashes: int = 1, rate: float = 0.01, start: float = 100.0, seed: int = 0
    ):
        if buckets < 1 or hashes < 1:
            raise ValueError(f"buckets ({buckets}) and hashes ({hashes}) must be at least 1.")
        if not 0 < rate < 1 or not start >= 1:
            raise ValueError(f"rate ({rate}) must lie between 0 and 1, and start ({start}) be at least 1.")
        self.buckets, self.hashes, self.rate, self.start, self.seed = buckets, hashes, rate, start, seed
        self.last = np.zeros((hashes, buckets), np.int64)
        self.gap = np.full((hashes, buckets), float(start))

    def fresh(self) -> StreamingFrequency:
        """The same estimator before its first step."""
        return StreamingFrequency(self.buckets, self.hashes, self.rate, self.start, self.seed)

    def update(self, items: np.ndarray, step: int) -> None:
        """Count the items [n] of one batch; an item that comes twice counts once."""
        for k, places in enumerate(self._places(items)):
            hit = np.unique(places)
            self.gap[k, hit] += self.rate * (step - self.last[k, hit] - self.gap[k, hit])
            self.last[k, hit] = step

    def probability(self, items: np.ndarray) -> np.ndarray:
        """The probability that a batch holds each item: [n]."""
        gaps = np.stack([self.gap[k, places] for k, places in enumerate(self._places(items))])
        return np.clip(1.0 / gaps.max(axis=0), LEAST, 1.0)

    def _places(self, items: np.ndarray) -> np.ndarray:
        """The bucket of each item by each hash: [hashes, n]."""
        salts = mixed(np.arange(self.hashes, dtype=np.uint64) + np.uint64(1 + self.hashes * self.seed))
        hashed = mixed(items.astype(np.uint64)[None, :] + salts[:, None])
        return (hashed % np.uint64(self.buckets)).astype(np.int64)
