"""Interactions of users with items as a data set. Next: ``interaction_prepare.py``, ``movielens.py``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from distill.data.dataset import DataSet
from distill.data.feature_schema import Feature, schema_of
from distill.data.features import Features
from distill.data.frames import need_polars, require, scan
from distill.data.interaction_log import PARTS, TRAIN
from distill.data.interaction_prepare import Settings, prepare, rows_of_lists
from distill.data.interaction_source import InteractionSource, Law
from distill.data.interaction_splits import Prepared, pairs, retrieval, sampled
from distill.data.interaction_tables import PART, Tables
from distill.data.judged import Judged
from distill.data.negatives import Negatives
from distill.data.tables import Spec
from distill.recipe import nearest

if TYPE_CHECKING:
    from distill.data.frequency import StreamingFrequency


class InteractionData(DataSet):
    """What is common to data sets of interactions; a subclass says which tables and features."""

    def __init__(
        self,
        features: Sequence[Feature | Mapping[str, Any]],
        settings: Settings,
        frequency: StreamingFrequency | None = None,
    ):
        settings.check()
        self.schema, self.settings, self.frequency = schema_of(features), settings, frequency
        names = ["train", "dev", "test"]
        if settings.task == "retrieval" and settings.sampled:
            names.append(f"test_{settings.sampled}")
        super().__init__(names)

    @abstractmethod
    def tables(self) -> Tables:
        """Read the tables."""

    @property
    def features(self) -> Features:
        """The schema, with vocabularies and statistics of the train split."""
        return self._prepared[1]

    @property
    def popularity(self) -> Tensor:
        """How often train holds each item of the catalogue as a positive: [items] int64."""
        data = self._prepared[0]
        kept = data.log.part == TRAIN
        if data.labels is not None:
            kept = kept & (data.labels > 0)
        return torch.from_numpy(np.bincount(data.log.items[kept], minlength=len(data.items)))

    def read(self, name: str) -> Judged:
        return replace(self._judged(name), popularity=self.popularity)

    def _judged(self, name: str) -> Judged:
        data, where = self._prepared[0], f"{type(self).__name__} ({name})"
        if self.settings.task == "pairs":
            return pairs(data, name, self.settings.width, where)
        if name not in PARTS:
            return sampled(data, self.split("test"), self.settings.sampled, where, self._given_negatives)
        return retrieval(data, name, where)

    def train_source(
        self,
        batch_size: int,
        candidates: int = 8,
        negatives: Sequence[Negatives] = (),
        seed: int = 0,
        name: str = "data",
        with_positive: bool = False,
    ) -> InteractionSource:
        pool = (self.frequency, self.settings.log_q)
        return InteractionSource(
            self.split("train"), batch_size, candidates, negatives, seed, name, with_positive, *pool
        )

    @cached_property
    def _prepared(self) -> tuple[Prepared, Features]:
        return prepare(self.tables(), self.schema, self.settings, type(self).__name__)

    @cached_property
    def _given_negatives(self) -> dict[int, np.ndarray] | None:
        """User row -> item rows, where the data set says which negatives `test_99` lists."""
        tables = self.tables()
        if tables.negatives is None:
            return None
        data = self._prepared[0]
        users, items = rows_of_lists(tables.negatives, data, "the sampled negatives")
        bounds = np.searchsorted(users, np.arange(len(data.users) + 1))
        return {user: items[bounds[user] : bounds[user + 1]] for user in range(len(data.users))}


class Interactions(InteractionData):
    """Tables of interactions, users and items.

    The order of the rows does not matter: they are put in order of time, equal times in order of the items'
    ids. A history holds what is strictly earlier than its target. Vocabularies and statistics are of train.

    Args:
        interactions: Table, as ``scan`` takes it: one row per interaction.
        features: The schema: see ``Feature``. Those of the user read the users table, those of the item the
            items table, those of the context the interactions.
        users: One row per user; without it the user's id is all that is known.
        items: The same for items.
        columns: Names of the columns ``user``, ``item``, ``time`` and ``label``. ``time: null``: nobody
            knows, so a history is a set: other items of the user. ``label: null``: every row is a positive.
        dev: The share of the latest rows that is dev, or a table; see ``split``.
        test: The same for test.
        task, split, at_least, core, catalogue, sampled, width, seed, log_q: See ``Settings``.
        frequency: How items' frequencies are estimated for ``log_q``; None: counted in train.

    Example:
        >>> import polars as pl
        >>> rows = pl.DataFrame({"user_id": [1, 1, 1], "item_id": [7, 8, 9], "timestamp": [30, 10, 20]})
        >>> ids = [{"name": "item_id", "kind": "categorical", "side": "item"}]
        >>> history = {"name": "hist", "kind": "sequence", "side": "user", "vocabulary": "item_id"}
        >>> data = Interactions(rows, [*ids, history])
        >>> data.split("test").queries.columns["hist"].tolist()  # 8, and 9, which train does not have
        [[2, 1]]
    """

    def __init__(
        self,
        interactions: Spec,
        features: Sequence[Feature | Mapping[str, Any]],
        users: Spec | None = None,
        items: Spec | None = None,
        columns: Mapping[str, str | None] | None = None,
        dev: Spec | float | None = None,
        test: Spec | float | None = None,
        task: Literal["retrieval", "pairs"] = "retrieval",
        split: Literal["last", "time"] = "last",
        at_least: float | None = None,
        core: int = 0,
        catalogue: Literal["taken", "all"] = "taken",
        sampled: int = 99,
        width: int = 8,
        seed: int = 0,
        frequency: StreamingFrequency | None = None,
        log_q: Law = "batch",
    ):
        names = {"user": "user_id", "item": "item_id", "time": "timestamp", "label": None}
        if unknown := set(columns or {}) - set(names):
            raise ValueError(
                f"columns has no key {sorted(unknown)}; it takes {', '.join(names)}."
                f"{nearest(min(unknown), names)}"
            )
        if task == "pairs":
            names["label"] = "label"
        self.columns = {**names, **(columns or {})}
        self.given = {"interactions": interactions, "users": users, "items": items}
        self.parts = {n: spec for n, spec in (("dev", dev), ("test", test)) if not _is_share(spec)}
        shares = {
            n: float(spec) for n, spec in (("dev", dev), ("test", test)) if isinstance(spec, int | float)
        }
        if shares and split == "last":
            raise ValueError(f"{' and '.join(shares)}: a share is cut off by time; give split: time.")
        super().__init__(
            features,
            Settings(
                task=task,
                split=split,
                **{n: 0.0 if self.parts.get(n) is not None else shares.get(n, 0.1) for n in ("dev", "test")},
                at_least=at_least,
                core=core,
                catalogue=catalogue,
                sampled=sampled,
                width=width,
                seed=seed,
                log_q=log_q,
            ),
            frequency,
        )

    def tables(self) -> Tables:
        pl = need_polars()
        specs = {"interactions": self.given["interactions"]}
        specs |= {name: spec for name, spec in self.parts.items() if spec is not None}
        frames = {name: scan(spec, name) for name, spec in specs.items()}
        needed = [c for c in self.columns.values() if c is not None]
        needed += [f.source for f in self.schema if f.side == "context"]
        for name, frame in frames.items():  # each by itself: below another, what it lacks would be null
            require(frame, needed, name)
        alone = len(frames) == 1
        part = {name: PARTS.get(name, TRAIN) for name in frames}
        marked = [f.with_columns(pl.lit(part[name], pl.UInt8).alias(PART)) for name, f in frames.items()]
        return Tables(
            frames["interactions"] if alone else pl.concat(marked, how="diagonal_relaxed"),
            None if self.given["users"] is None else scan(self.given["users"], "users"),
            None if self.given["items"] is None else scan(self.given["items"], "items"),
            str(self.columns["user"]),
            str(self.columns["item"]),
            self.columns["time"],
            self.columns["label"],
            given={} if alone else {part[name]: name for name in frames},
        )


def _is_share(spec: Any) -> bool:
    return spec is None or (isinstance(spec, int | float) and not isinstance(spec, bool))
