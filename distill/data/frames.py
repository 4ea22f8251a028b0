"""Tables of features as polars frames, read lazily. Next: ``feature_schema.py``."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from distill.data.files import suffix_of
from distill.data.tables import Spec, read_table
from distill.errors import DataError
from distill.recipe import nearest

if TYPE_CHECKING:
    import polars


def need_polars() -> ModuleType:
    """The polars library, which reads and counts tables of features.

    Raises:
        DataError: It is not installed.
    """
    try:
        import polars
    except ImportError as error:
        raise DataError(
            "tables of features are read with polars, which is not installed: "
            "pip install 'distill-search[recsys]'"
        ) from error
    return polars


def scan(spec: Spec, where: str = "table") -> polars.LazyFrame:
    """A table as a lazy frame: of a large file only what is asked for is ever in memory.

    Args:
        spec: A polars frame, lazy or not, or whatever ``read_table`` takes: parquet, csv, tsv and jsonl
            files, folders of them, Hub data sets, DataFrames, a list of these one below the other, or
            ``{path: ..., columns: {ours: theirs}}``. Types of csv and tsv files are inferred, also of .gz.
        where: What the table is for, for errors.
    """
    pl = need_polars()
    if isinstance(spec, pl.LazyFrame):
        return spec
    if isinstance(spec, pl.DataFrame):
        return spec.lazy()
    if isinstance(spec, list | tuple):
        if not spec:
            raise DataError(f"{where}: the list of tables is empty.")
        return pl.concat(
            [scan(one, f"{where}[{i}]") for i, one in enumerate(spec)], how="diagonal_relaxed", rechunk=False
        )
    if isinstance(spec, Mapping):
        if "path" not in spec or set(spec) - {"path", "columns"}:
            raise DataError(f"{where}: a table is given by 'path' and, if need be, 'columns'.")
        frame = scan(spec["path"], where)
        columns = {theirs: ours for ours, theirs in (spec.get("columns") or {}).items()}
        require(frame, columns, where)
        return frame.rename(columns)
    path = Path(spec).expanduser() if isinstance(spec, str | Path) else None
    if path is not None and path.is_dir():
        files = sorted(file for file in path.iterdir() if suffix_of(file) and not file.name.startswith("."))
        if not files:
            raise DataError(f"{where}: the folder {path} holds no table.")
        return scan(files, where)
    if path is not None and path.is_file():
        suffix = suffix_of(path)
        readers: dict[str | None, Any] = {
            ".parquet": pl.scan_parquet,
            ".csv": lambda file: pl.scan_csv(file, infer_schema_length=10_000),
            ".tsv": lambda file: pl.scan_csv(
                file, separator="\t", quote_char=None, infer_schema_length=10_000
            ),
            ".jsonl": lambda file: pl.scan_ndjson(file, infer_schema_length=10_000),
        }
        if suffix in readers and not (suffix == ".jsonl" and path.suffix.lower() == ".gz"):
            frame = readers[suffix](path)
            columns_of(frame, str(path))
            return frame
    return pl.from_arrow(read_table(spec, where=where).data).lazy()


def columns_of(frame: polars.LazyFrame, where: str) -> dict[str, polars.DataType]:
    """The columns of a frame and their types; the file is looked into here for the first time."""
    try:
        return dict(frame.collect_schema())
    except Exception as error:  # polars raises many kinds: of files, of types, of its own
        raise DataError(f"{where}: the table cannot be read ({_first_line(error)}).") from error


def collect(frame: polars.LazyFrame, where: str) -> polars.DataFrame:
    """The rows, read as a stream."""
    pl = need_polars()
    try:
        return frame.collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(
            f"{where}: the table cannot be read ({_first_line(error)}). It may be cut short, or hold values "
            f"of another type further down; write it again."
        ) from error


def require(frame: polars.LazyFrame, columns: Iterable[str], where: str) -> None:
    """Refuse a table that lacks a column."""
    known = columns_of(frame, where)
    for column in columns:
        if column not in known:
            raise DataError(
                f"{where}: there is no column '{column}'; it has {', '.join(known)}.{nearest(column, known)}"
            )


def frame_of(rows: Any, columns: Sequence[str], where: str) -> polars.DataFrame:
    """Raw rows as a frame with at least the given columns.

    Args:
        rows: A polars or pandas DataFrame, or a sequence of mappings from column to value.

    Raises:
        DataError: A row is no mapping, a column is missing, or its values are of several types.
    """
    pl = need_polars()
    if isinstance(rows, pl.LazyFrame | pl.DataFrame) or hasattr(rows, "columns"):
        lazy = scan(rows, where)
        require(lazy, columns, where)
        return collect(lazy.select(list(dict.fromkeys(columns))), where)
    if isinstance(rows, Mapping | str) or not isinstance(rows, Sequence):
        raise DataError(f"{where}: give a DataFrame or a list of dictionaries, not a {type(rows).__name__}.")
    for row, given in enumerate(rows):
        if not isinstance(given, Mapping):
            raise DataError(
                f"{where}, row {row} (counted from 0): a {type(given).__name__}, not a dictionary of columns."
            )
    data = {}
    for column in dict.fromkeys(columns):
        for row, values in enumerate(rows):
            if column not in values:
                raise DataError(
                    f"{where}, row {row} (counted from 0): there is no '{column}'; it has "
                    f"{', '.join(map(str, values))}.{nearest(column, list(values))}"
                )
        values = [one[column] for one in rows]
        try:
            data[column] = pl.Series(column, values, strict=True)
        except (TypeError, OverflowError, pl.exceptions.PolarsError) as error:
            row = bisect_left(range(len(values)), True, key=lambda row: _mixed(values[: row + 1]))
            raise DataError(
                f"{where}, column '{column}', row {row} (counted from 0): values of several types, in it or "
                f"up to it ({_first_line(error)}). Give values of one type."
            ) from error
    return pl.DataFrame(data)


def _mixed(values: Sequence[Any]) -> bool:
    """Whether no column holds these values."""
    pl = need_polars()
    try:
        pl.Series(values, strict=True)
    except (TypeError, OverflowError, pl.exceptions.PolarsError):
        return True
    return False


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
