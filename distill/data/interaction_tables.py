"""Raw tables of interactions, users and items, checked and joined by rows. Part of ``interactions.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.data.feature_schema import Feature
from distill.data.frames import collect, need_polars, require
from distill.errors import DataError

if TYPE_CHECKING:
    import polars


PART = "distill_part"  # a column of the interactions that says which part of the split a row is


@dataclass(frozen=True)
class Tables:
    """The raw tables of a data set, and what its columns are called.

    ``interactions`` may have a column ``PART`` (0 train, 1 dev, 2 test) and one per context feature.
    """

    interactions: polars.LazyFrame
    users: polars.LazyFrame | None = None
    items: polars.LazyFrame | None = None
    user: str = "user_id"
    item: str = "item_id"
    time: str | None = "timestamp"
    label: str | None = None
    before: polars.LazyFrame | None = None  # user, items (a list, oldest first): from before the log
    negatives: polars.LazyFrame | None = None  # user, items: what `test_99` lists


def read_rows(
    tables: Tables, schema: Sequence[Feature]
) -> tuple[polars.DataFrame, polars.DataFrame, polars.DataFrame]:
    """The interactions with ``user`` and ``item`` as rows of the tables of users and of items, and those."""
    pl = need_polars()
    frame, where = tables.interactions, "interactions"
    others = [c for c in (tables.time, tables.label) if c is not None]
    context = [f.source for f in schema if f.side == "context"]
    require(frame, [tables.user, tables.item, *others, *context], where)
    if tables.label in context:
        raise DataError(
            f"features: the label '{tables.label}' is a context feature too; no model may read it."
        )
    users, items = (
        _side(given, frame, key, side, schema)
        for given, key, side in ((tables.users, tables.user, "user"), (tables.items, tables.item, "item"))
    )
    known = frame.collect_schema()
    wanted = [
        _category(known[key], key, where)
        .replace_strict(table[key], pl.Series(range(len(table)), dtype=pl.Int32), default=None)
        .alias(ours)
        for key, table, ours in ((tables.user, users, "user"), (tables.item, items, "item"))
    ]
    kept = dict.fromkeys([*others, *context, *([PART] if PART in known else [])])
    for key, table in ((tables.user, users), (tables.item, items)):
        if _category(known[key], key, where, dtype=True) != table[key].dtype:
            raise DataError(
                f"{where}, column '{key}' holds {known[key]}, but the table that describes it "
                f"{table[key].dtype}; give ids of one type."
            )
    rows = collect(frame.select(*wanted, *(pl.col(c) for c in kept if c not in ("user", "item"))), where)
    for key, ours in ((tables.user, "user"), (tables.item, "item")):
        if rows[ours].null_count():
            row = rows[ours].is_null().arg_max() or 0
            value = collect(frame.select(key).slice(row, 1), where)[key][0]
            raise DataError(
                f"{where}, column '{key}', row {row} (counted from 0): "
                + (
                    "the id is missing."
                    if value is None
                    else f"there is no row for {value!r} in the table of {ours}s."
                )
            )
    if not len(rows):
        raise DataError(f"{where}: the table is empty.")
    changed = []
    if tables.time is not None:
        changed.append(pl.Series(tables.time, _times(rows[tables.time], tables.time, where)))
    if tables.label is not None:
        changed.append(pl.Series(tables.label, _labels(rows[tables.label], tables.label, where)))
    return rows.with_columns(changed), users, items


def _side(
    given: polars.LazyFrame | None,
    frame: polars.LazyFrame,
    key: str,
    side: str,
    schema: Sequence[Feature],
) -> polars.DataFrame:
    """The table of users or of items in order of ids, which are distinct; of ids alone if none is given."""
    pl = need_polars()
    where = "interactions" if given is None else f"{side}s"
    table = frame if given is None else given
    known = table.collect_schema()
    columns = [f.source for f in schema if f.side == side and (f.vocabulary is None or f.source in known)]
    if given is None and (missing := [c for c in columns if c != key]):
        raise DataError(
            f"{side}s: there is no table of {side}s, so nothing says '{missing[0]}'; give one, or leave the "
            f"feature out."
        )
    require(table, [key, *columns], where)
    ids = _category(known[key], key, where).alias(key)
    table = table.select(ids, *dict.fromkeys(c for c in columns if c != key))
    table = (table.drop_nulls().unique() if given is None else table).sort(key)
    found = collect(table, where)
    if given is not None and found[key].n_unique() < len(found):
        twice = found[key].filter(found[key].is_duplicated())[0]
        raise DataError(
            f"{where}, column '{key}': the id {twice!r} stands there more than once; ids must be unique."
        )
    return found.filter(pl.col(key).is_not_null())


def _category(kind: polars.DataType, column: str, where: str, dtype: bool = False) -> Any:
    """An id column as whole numbers or words: the expression, or its type."""
    pl = need_polars()
    if kind.is_integer() or kind.is_float() or kind == pl.Boolean:
        return pl.Int64 if dtype else pl.col(column).cast(pl.Int64, strict=False)
    if kind in (pl.String, pl.Categorical, pl.Enum):
        return pl.String if dtype else pl.col(column).cast(pl.String)
    raise DataError(f"{where}, column '{column}' holds {kind}; ids are whole numbers or words.")


def _times(values: polars.Series, column: str, where: str) -> np.ndarray:
    """Times [T] int64, of any unit: only their order counts."""
    pl = need_polars()
    kind, found = values.dtype, values
    if kind == pl.String:
        found = values.cast(pl.Int64, strict=False)
        if found.null_count():
            with contextlib.suppress(pl.exceptions.ComputeError):  # no format fits: the row is named below
                found = values.str.to_datetime(strict=False, time_unit="us").cast(pl.Int64)
    elif kind.is_float():
        found = (values.fill_nan(None) * 1e6).round().cast(pl.Int64, strict=False)
    elif kind.is_integer() or kind.is_temporal():
        found = values.cast(pl.Int64)
    else:
        raise DataError(f"{where}, column '{column}' holds {kind}, which is no time.")
    if found.null_count():
        row = found.is_null().arg_max() or 0
        raise DataError(
            f"{where}, column '{column}', row {row} (counted from 0): {values[row]!r} is no time. Mend the "
            f"row, or say `time: null` if nobody knows the times."
        )
    return found.to_numpy()


def _labels(values: polars.Series, column: str, where: str) -> np.ndarray:
    pl = need_polars()
    if not (values.dtype.is_numeric() or values.dtype == pl.Boolean):
        raise DataError(f"{where}, column '{column}' holds {values.dtype}, not numbers.")
    numbers = values.cast(pl.Float32).to_numpy()
    if len(wrong := np.flatnonzero(~np.isfinite(numbers))):
        row = int(wrong[0])
        raise DataError(
            f"{where}, column '{column}', row {row} (counted from 0): {values[row]} is no finite number."
        )
    return numbers


def only_binary(labels: np.ndarray, column: str) -> np.ndarray:
    if len(wrong := np.flatnonzero((labels != 0) & (labels != 1))):
        raise DataError(
            f"interactions, column '{column}': the label {labels[wrong[0]]:g} is neither 0 nor 1, as the "
            f"labels of impressions are. Name another column, or make positives of ratings with "
            f"task: retrieval and at_least."
        )
    return labels
