"""From raw tables to what splits are made of: filter, order, split, fit, encode."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from distill.batch import Ragged
from distill.data.feature_schema import Feature
from distill.data.features import Features
from distill.data.frames import collect, need_polars
from distill.data.interaction_log import (
    DEV,
    TEST,
    TRAIN,
    Log,
    by_time,
    in_order,
    k_core,
    leave_last_out,
    time_leaks,
)
from distill.data.interaction_source import Law
from distill.data.interaction_splits import Events, Prepared
from distill.data.interaction_tables import PART, Tables, only_binary, read_rows
from distill.errors import DataError

if TYPE_CHECKING:
    import polars

log = logging.getLogger("distill")


@dataclass(frozen=True)
class Settings:
    """How interactions become splits: the arguments that all data sets of interactions share.

    Args:
        task: ``retrieval``: who took what, searched among all items. ``pairs``: impressions with a label of
            0 or 1, each scored.
        split: ``last``: each user's last is test, the one before dev. ``time``: the latest are test, those
            before dev, for all users at once; only this keeps the future out of training.
        dev: The share of the rows that is dev, in a split by time.
        test: The same for test.
        at_least: Interactions with a lower label are no positives; None: all are.
        core: Remove users and items with less interactions, until none is left.
        catalogue: What is searched: items that somebody took (``taken``), or the whole items table (``all``).
        sampled: ``test_N`` lists each user's test item among N that the user never took.
        width: The most impressions that are one query.
        seed: Of negatives that are drawn once, and of histories where no time is known.
        log_q: What is in the pool of ``log_q``: see ``InteractionSource``.
    """

    task: Literal["retrieval", "pairs"] = "retrieval"
    split: Literal["last", "time"] = "last"
    dev: float = 0.1
    test: float = 0.1
    at_least: float | None = None
    core: int = 0
    catalogue: Literal["taken", "all"] = "taken"
    sampled: int = 99
    width: int = 8
    seed: int = 0
    log_q: Law = "batch"

    def check(self) -> None:
        for name, allowed in (
            ("task", ("retrieval", "pairs")),
            ("split", ("last", "time")),
            ("catalogue", ("taken", "all")),
            ("log_q", ("batch", "listed")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(allowed)}, got '{getattr(self, name)}'.")
        if not (0 <= self.dev < 1 and 0 <= self.test < 1 and self.dev + self.test < 1):
            raise ValueError(
                f"dev ({self.dev}) and test ({self.test}) are shares that leave something to train."
            )
        if self.task == "pairs" and self.split == "last":
            raise ValueError("impressions are split by time: give split: time.")
        if self.core < 0 or self.width < 1 or self.sampled < 0:
            raise ValueError("core and sampled must not be negative, and width must be at least 1.")
        if self.task == "pairs" and self.at_least is not None:
            raise ValueError("at_least makes positives of ratings; the labels of impressions are 0 or 1.")


def prepare(
    tables: Tables, schema: Sequence[Feature], settings: Settings, name: str
) -> tuple[Prepared, Features]:
    """Read, filter, order, split, fit and encode.

    Raises:
        DataError: A table lacks a column or a row, or holds what cannot be.
    """
    rows, users, items = read_rows(tables, schema)
    taken = np.ones(len(rows), bool)
    if settings.task == "pairs":
        assert tables.label is not None
        only_binary(rows, tables)
    elif settings.at_least is not None:
        if tables.label is None:
            raise DataError(f"{name}: at_least needs a label; name its column in columns.label.")
        taken = rows[tables.label].to_numpy() >= settings.at_least
    exposed = rows.filter(~taken)
    if settings.core:
        taken[taken] = k_core(rows["user"].to_numpy()[taken], rows["item"].to_numpy()[taken], settings.core)
    if not taken.any():
        raise DataError(
            f"{name}: no interaction is left; lower at_least ({settings.at_least}) or core ({settings.core})."
        )
    if not taken.all():
        rows = rows.filter(taken)
    before = len(users)
    users, rows, exposed = _recode(users, rows, exposed, "user")
    if len(users) < before:
        log.info(
            "%s: %s users without an interaction that counts are left out", name, f"{before - len(users):,}"
        )
    if settings.catalogue == "taken":
        items, rows, exposed = _recode(items, rows, exposed, "item")

    times = None if tables.time is None else rows[tables.time].to_numpy()
    codes = rows["user"].to_numpy(), rows["item"].to_numpy()
    order = in_order(*codes, times)
    if times is None:
        order = order[_first_of_each(*(code[order] for code in codes))]
    found = Log(
        codes[0][order],
        codes[1][order],
        None if times is None else times[order],
        np.zeros(len(order), np.uint8),
    )
    rest = [name for name in rows.columns if name not in ("user", "item", tables.time)]
    rows = rows.select(rest)[order] if rest else rows.clear()  # what context features and labels need
    found = replace(found, part=_parts(found, rows, settings, name))
    if (leaks := time_leaks(found)) is not None:
        log.log(logging.WARNING if leaks.own else logging.INFO, "%s", leaks.words(name))

    train = found.part == TRAIN
    features, remembered = Features(schema), _remembered(schema, tables)
    known = [f for f in schema if f.side == "user" and f.name not in remembered]
    context = [f for f in schema if f.side == "context"]
    features.fit(
        user=users[np.flatnonzero(np.bincount(found.users[train]))],
        item=items[np.flatnonzero(np.bincount(found.items[train]))],
        context=rows.filter(train) if context else None,
        texts={"user": users, "item": items},
    )
    encoded = features.encode(items, features.side("item", privileged=True), items[tables.item], "items")
    data = Prepared(
        log=found,
        users=features.encode(users, known, users[tables.user], "users"),
        items=encoded,
        remembered={name: (f, _ids_of(encoded, f)) for name, f in remembered.items()},
        labels=rows[str(tables.label)].to_numpy() if settings.task == "pairs" else None,
        pair=features.encode(rows, context, where="interactions").columns if context else {},  # type: ignore[arg-type]
        seed=settings.seed,
    )
    if len(exposed):
        data = replace(data, exposed=_exposed(exposed, tables, data))
    if tables.before is not None:
        assert found.times is not None
        owner, earlier = rows_of_lists(tables.before, data, "what was before the log")
        data = replace(data, before=Events(owner, earlier, np.full(len(owner), found.times.min() - 1)))
    return data, features


def _recode(
    table: polars.DataFrame, rows: polars.DataFrame, exposed: polars.DataFrame, column: str
) -> tuple[polars.DataFrame, polars.DataFrame, polars.DataFrame]:
    """The table without what no row names, and the rows' places in it."""
    pl = need_polars()
    used = np.zeros(len(table), bool)
    used[rows[column].to_numpy()] = True
    if used.all():
        return table, rows, exposed
    place = (used.cumsum() - 1).astype(np.int32)

    def moved(frame: polars.DataFrame) -> polars.DataFrame:
        return frame.with_columns(pl.Series(column, place[frame[column].to_numpy()]))

    exposed = exposed.filter(pl.Series(used[exposed[column].to_numpy()]))
    return table.filter(pl.Series(used)), moved(rows), moved(exposed)


def _first_of_each(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Which rows, in order of (user, item), are the first of both."""
    first = np.ones(len(users), bool)
    first[1:] = (np.diff(users) != 0) | (np.diff(items) != 0)
    return first


def _parts(found: Log, rows: polars.DataFrame, settings: Settings, name: str) -> np.ndarray:
    """Which part each row is in: as the tables say, and for what they do not say as the settings do."""
    part = np.zeros(len(found), np.uint8)
    if PART in rows.columns:
        part = rows[PART].to_numpy().astype(np.uint8)
    train = np.flatnonzero(part == TRAIN)
    if settings.split == "time":
        if found.times is None:
            raise DataError(f"{name}: a split by time needs the times; name their column in columns.time.")
        part[train] = by_time(found.times[train], settings.dev, settings.test)
        return part
    if (part == TEST).any():
        if not (part == DEV).any():  # another of each user: the last, or where no time is known any
            lots = (
                None if found.times is not None else np.random.default_rng(settings.seed).random(len(train))
            )
            part[train] = _one_out(found.users[train], lots)
        return part
    if found.times is None:
        raise DataError(
            f"{name}: without times no interaction is a user's last. Name their column in columns.time, "
            f"or give a table for test."
        )
    return leave_last_out(found.users)


def _one_out(users: np.ndarray, lots: np.ndarray | None) -> np.ndarray:
    """Parts [n] of ordered rows: one of each user with two or more is dev, the last or one by lot."""
    order = np.arange(len(users)) if lots is None else np.lexsort((lots, users))
    last = np.ones(len(users), bool)
    last[:-1] = users[1:] != users[:-1]
    several = last & np.append(False, users[1:] == users[:-1])
    part = np.full(len(users), TRAIN, np.uint8)
    part[order[several]] = DEV
    return part


def _remembered(schema: Sequence[Feature], tables: Tables) -> dict[str, Feature]:
    """The features that are histories: sequences of a user that share an item's ids and stand in no table."""
    there = set() if tables.users is None else set(tables.users.collect_schema())
    by_name = {f.name: f for f in schema}
    found = {}
    for f in schema:
        if f.kind == "sequence" and f.side == "user" and f.vocabulary is not None and f.source not in there:
            owner = by_name[f.vocabulary]
            if owner.side != "item" or owner.kind != "categorical":
                raise DataError(
                    f"features, '{f.name}': a history holds the ids of a categorical feature of the item, "
                    f"and '{owner.name}' is none; there is no column '{f.source}' in the users table either."
                )
            found[f.name] = f
    return found


def _ids_of(items: Any, history: Feature) -> Tensor:
    return items.columns[history.vocabulary].int()


def rows_of_lists(frame: polars.LazyFrame, data: Prepared, where: str) -> tuple[np.ndarray, np.ndarray]:
    """A table of ``user`` and ``items`` (a list) as rows of users, in order, and of items, if known."""
    pl = need_polars()
    codes = []
    for column, table in (("user", data.users), ("items", data.items)):
        values: Any = table.ids.values  # type: ignore[attr-defined]
        codes.append(
            pl.col(column)
            .cast(values.dtype)
            .replace_strict(values, pl.Series(range(len(values)), dtype=pl.Int32), default=None)
        )
    found = collect(frame.select("user", "items").explode("items").select(codes).drop_nulls(), where)
    users, items = found["user"].to_numpy(), found["items"].to_numpy()
    order = np.argsort(users, kind="stable")
    return users[order], items[order]


def _exposed(exposed: polars.DataFrame, tables: Tables, data: Prepared) -> Ragged:
    """Per user the items below ``at_least`` before anything of the user is measured."""
    users, items = exposed["user"].to_numpy(), exposed["item"].to_numpy()
    if tables.time is not None and data.log.times is not None:
        measured = (data.log.part == DEV) | (data.log.part == TEST)
        first = np.full(len(data.users), np.iinfo(np.int64).max)
        np.minimum.at(first, data.log.users[measured], data.log.times[measured])
        early = exposed[tables.time].to_numpy() < first[users]
        users, items = users[early], items[early]
    order = np.argsort(users, kind="stable")
    counts = np.bincount(users, minlength=len(data.users))
    return Ragged.of_lengths(torch.from_numpy(items[order].astype(np.int64)), torch.from_numpy(counts))
