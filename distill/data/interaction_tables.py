"""Raw tables of interactions, users and items, checked and joined by rows. Part of ``interactions.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.data.feature_schema import Feature
from distill.data.features import At, check_column, in_words
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
    given: Mapping[int, str] = field(default_factory=dict)  # PART -> its table's name, if each part is one

    def place(self, rows: polars.DataFrame, column: str, row: int) -> str:
        """Table, column and row of the interactions in words; the row is counted in the table as given."""
        where = "interactions"
        if self.given:
            part = rows[PART][row]
            where, row = self.given[part], row - int((rows[PART] == part).arg_max() or 0)
        return in_words(where, column, row)


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
        if known[key].is_float():
            _refuse_fractions(collect(frame.select(key), where)[key], partial(tables.place, rows, key))
        if rows[ours].null_count():
            row = rows[ours].is_null().arg_max() or 0
            value = collect(frame.select(key).slice(row, 1), where)[key][0]
            raise DataError(
                f"{tables.place(rows, key, row)}: "
                + (
                    "the id is missing. Remove the row, or fill it in."
                    if value is None
                    else f"there is no row for {value!r} in the table of {ours}s."
                )
            )
    if not len(rows):
        raise DataError(f"{where}: the table is empty.")
    for f in schema:
        if f.side == "context":
            check_column(f, rows[f.source], where, partial(tables.place, rows, f.source))
    changed = []
    if tables.time is not None:
        changed.append(pl.Series(tables.time, _times(rows, tables)))
    if tables.label is not None:
        changed.append(pl.Series(tables.label, _labels(rows, tables)))
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
    if given is not None and known[key].is_float():
        _refuse_fractions(collect(table.select(key), where)[key], partial(in_words, where, key))
    ids = _category(known[key], key, where).alias(key)
    table = table.select(ids, *dict.fromkeys(c for c in columns if c != key))
    found = collect(table.drop_nulls().unique() if given is None else table, where)
    for f in schema:
        if f.side == side and f.source in columns and f.source != key:
            check_column(f, found[f.source], where)  # before it is sorted: the error names the row as given
    found = found.sort(key)
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


def _refuse_fractions(ids: polars.Series, at: At) -> None:
    """Refuse ids 1.5 and 1.7, of which both would become 1; 7.0 stands for 7."""
    if (broken := ((ids != ids.floor()) & ids.is_finite()).fill_null(False)).any():
        row = broken.arg_max() or 0
        raise DataError(f"{at(row)}: {ids[row]} is no id. Store ids as text or whole numbers.")


def _times(rows: polars.DataFrame, tables: Tables) -> np.ndarray:
    """Times [T] int64, of any unit: only their order counts."""
    pl = need_polars()
    column = str(tables.time)
    values = found = rows[column]
    kind = values.dtype
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
        raise DataError(f"interactions, column '{column}' holds {kind}, which is no time.")
    if found.null_count():
        row = found.is_null().arg_max() or 0
        raise DataError(
            f"{tables.place(rows, column, row)}: {values[row]!r} is no time. Mend the row, or say "
            f"`time: null` if nobody knows the times."
        )
    return found.to_numpy()


def _labels(rows: polars.DataFrame, tables: Tables) -> np.ndarray:
    pl = need_polars()
    column = str(tables.label)
    values = rows[column]
    if not (values.dtype.is_numeric() or values.dtype == pl.Boolean):
        raise DataError(f"interactions, column '{column}' holds {values.dtype}, not numbers.")
    numbers = values.cast(pl.Float32).to_numpy()
    if len(wrong := np.flatnonzero(~np.isfinite(numbers))):
        row = int(wrong[0])
        raise DataError(f"{tables.place(rows, column, row)}: {values[row]} is no finite number.")
    return numbers


def only_binary(rows: polars.DataFrame, tables: Tables) -> None:
    """Refuse labels of impressions other than 0 and 1; the rows are those of ``read_rows``."""
    column = str(tables.label)
    labels = rows[column].to_numpy()
    if len(wrong := np.flatnonzero((labels != 0) & (labels != 1))):
        row = int(wrong[0])
        raise DataError(
            f"{tables.place(rows, column, row)}: the label {labels[row]:g} is neither 0 nor 1, as the labels "
            f"of impressions are. Name another column, or make positives of ratings with task: retrieval and "
            f"at_least."
        )
