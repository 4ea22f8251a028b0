"""Tables from files, folders, the Hub or memory, under our column names. Next: ``retrieval.py``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from distill.data.files import TAKES, read_file, suffix_of
from distill.errors import DataError

Spec = Any  # a path, a Hub name, a Dataset or DataFrame, a list of those, or {path: ..., columns: ...}


@dataclass(frozen=True)
class RawTable:
    """Columns under our names, and the places they came from, for errors that say where."""

    data: pa.Table
    theirs: Mapping[str, str]  # our column name -> the name in the file
    places: tuple[tuple[str, int], ...]  # name of the file and its number of rows, in order

    def __len__(self) -> int:
        return self.data.num_rows

    def __contains__(self, column: str) -> bool:
        return column in self.data.column_names

    @property
    def name(self) -> str:
        return ", ".join(name for name, _ in self.places[:3]) + (", ..." if len(self.places) > 3 else "")

    def where(self, column: str, row: int | None = None) -> str:
        """File, column and row (from 0) in words."""
        name = self.name
        if row is not None:
            for place, rows in self.places:
                if row < rows:
                    name = place
                    break
                row -= rows
        at = "" if row is None else f", row {row} (counted from 0)"
        return f"{name}, column '{self.theirs.get(column, column)}'{at}"

    def strings(self, column: str) -> list[str]:
        """A column of texts, which may be empty or missing: missing is empty."""
        values = self.data[column]
        kind = values.type
        if pa.types.is_null(kind):
            return [""] * len(self)
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise DataError(
                f"{self.where(column)} holds {kind}, not text. Name the column that holds the texts."
            )
        return values.fill_null("").to_pylist()

    def texts(self, column: str) -> list[str]:
        """A column of texts, none of them empty."""
        texts = self.strings(column)
        for row, text in enumerate(texts):
            if not text or text.isspace():
                raise DataError(
                    f"{self.where(column, row)}: the text is empty. Remove the row, or fill it in."
                )
        return texts

    def ids(self, column: str, unique: bool = False) -> list[str]:
        """A column of ids as strings: numbers and texts alike."""
        values = self.data[column]
        kind = values.type
        if values.null_count:
            row = pc.index(values.is_null(), True).as_py()
            raise DataError(f"{self.where(column, row)}: the id is missing. Remove the row, or fill it in.")
        if pa.types.is_floating(kind):  # 7.0 stands for the id 7
            whole = pc.equal(values, pc.floor(values))
            if not pc.all(whole).as_py():
                row = pc.index(whole, False).as_py()
                raise DataError(
                    f"{self.where(column, row)}: {values[row].as_py()} is no id. "
                    f"Store ids as text or whole numbers."
                )
            values = values.cast(pa.int64())
        ids = values.cast(pa.string()).to_pylist()
        if unique and len(set(ids)) < len(ids):
            first: dict[str, int] = {}
            row = next(row for row, i in enumerate(ids) if first.setdefault(i, row) != row)
            raise DataError(
                f"{self.where(column, row)}: the id '{ids[row]}' stands there for the second time "
                f"(first: {self.where(column, first[ids[row]])}). Ids must be unique; remove one of the rows."
            )
        return ids

    def numbers(self, column: str) -> list[float]:
        """A column of finite numbers."""
        numbers: list[float] = []
        for row, value in enumerate(self.data[column].to_pylist()):
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = float("nan")
            if not abs(number) < float("inf"):
                raise DataError(
                    f"{self.where(column, row)}: {value!r} is not a finite number. "
                    f"Remove the row, or mend the value."
                )
            numbers.append(number)
        return numbers


def read_table(
    spec: Spec,
    columns: Mapping[str, str | None] | None = None,
    optional: Collection[str] = (),
    where: str = "table",
) -> RawTable:
    """Read a table and give its columns our names.

    Args:
        spec: A parquet, jsonl, json, csv or tsv file (the texts also as .gz); a folder of such files; a
            Hub data set ``owner/name``, ``owner/name:config`` or ``owner/name:config:split``; a
            ``datasets.Dataset``, pandas ``DataFrame`` or ``pyarrow.Table``; a list of any of these, one
            below the other; or a mapping with ``path`` (one of the above) and ``columns`` of its own.
        columns: Our name -> the name in the file; None as a name: the file has no such column. Without
            it all columns are read as they are.
        optional: Those of our names that may be absent.
        where: What the spec is for (``data.corpus``), for errors.

    Values of csv and tsv files stay text, so an id ``007`` keeps its zeros. A tsv file knows no quotes.
    """
    if isinstance(spec, list | tuple):
        if not spec:
            raise DataError(f"{where}: the list of tables is empty.")
        return _below([read_table(one, columns, optional, f"{where}[{i}]") for i, one in enumerate(spec)])
    if isinstance(spec, Mapping):
        if "path" not in spec or set(spec) - {"path", "columns"}:
            raise DataError(
                f"{where}: a table is given by 'path' and, if need be, 'columns'; here are {_quoted(spec)}."
            )
        own = spec.get("columns") or {}
        if columns is not None and (unknown := set(own) - set(columns)):
            raise DataError(
                f"{where}.columns: no column is called {_quoted(unknown)} here; known: {_quoted(columns)}."
            )
        return read_table(spec["path"], {**(columns or {}), **own} or None, optional, where)
    wanted = None if columns is None else {ours: name for ours, name in columns.items() if name is not None}
    if isinstance(spec, str | Path):
        return _read_path(str(spec), wanted, optional, where)
    return _renamed(_from_memory(spec, where), f"{where} ({type(spec).__name__})", wanted, optional)


def _read_path(
    spec: str, wanted: Mapping[str, str] | None, optional: Collection[str], where: str
) -> RawTable:
    path = Path(spec).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if suffix_of(file) and not file.name.startswith("."))
        if not files:
            raise DataError(f"{where}: the folder {path} holds no table; it takes {TAKES} files.")
        return _below([_renamed(read_file(file, wanted), str(file), wanted, optional) for file in files])
    if path.is_file():
        return _renamed(read_file(path, wanted), str(path), wanted, optional)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}", spec) and not suffix_of(path):
        return _renamed(_read_hub(spec, where), spec, wanted, optional)
    raise DataError(
        f"{where}: there is no file or folder {path} (looked for in {Path.cwd()}). "
        f"Mend the path, or name a Hub data set as owner/name:config:split."
    )


def _read_hub(spec: str, where: str) -> pa.Table:
    import datasets

    name, *rest = spec.split(":")
    try:
        if len(rest) == 1 and rest[0] not in datasets.get_dataset_config_names(name):
            data = datasets.load_dataset(name, split=rest[0])  # a split of the only configuration
        else:
            data = datasets.load_dataset(name, *rest[:1], split=rest[1] if len(rest) == 2 else None)
    except Exception as error:  # whatever the network, the Hub or the files may raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{where}: '{spec}' is no file or folder here (looked for in {Path.cwd()}), and no Hub data set "
            f"that could be loaded: {reason}"
        ) from error
    if isinstance(data, Mapping):
        if len(data) > 1:
            raise DataError(
                f"{where}: {spec} has the splits {_quoted(data)}; name one, as in {spec}:{next(iter(data))}."
            )
        (data,) = data.values()
    return _from_memory(data, where)


def _from_memory(data: Any, where: str) -> pa.Table:
    if isinstance(data, pa.Table):
        return data
    # by name, so that neither library is imported to find out
    kind = f"{type(data).__module__.partition('.')[0]}.{type(data).__name__}"
    if kind == "datasets.Dataset":
        return data.with_format("arrow")[:]
    if kind == "pandas.DataFrame":
        return pa.Table.from_pandas(data, preserve_index=False)
    raise DataError(
        f"{where}: a {type(data).__name__} is no table; give a path, a Hub name, a Dataset or a DataFrame."
    )


def _renamed(
    data: pa.Table, name: str, wanted: Mapping[str, str] | None, optional: Collection[str]
) -> RawTable:
    if wanted is None:
        return RawTable(data, {}, ((name, data.num_rows),))
    found = {}
    for ours, theirs in wanted.items():
        if theirs in data.column_names:
            found[ours] = theirs
        elif ours not in optional:
            guess = difflib.get_close_matches(theirs, data.column_names, n=1)
            raise DataError(
                f"{name}: there is no column '{theirs}'"
                + (f" (for '{ours}')" if ours != theirs else "")
                + f"; it has {_quoted(data.column_names)}."
                + (f" Did you mean '{guess[0]}'?" if guess else "")
                + f" Say which column it is with columns: {{{ours}: ...}}."
            )
    return RawTable(
        pa.table({ours: data[theirs] for ours, theirs in found.items()}), found, ((name, data.num_rows),)
    )


def _below(tables: Sequence[RawTable]) -> RawTable:
    """One table of several, one below the other."""
    names = [name for name in tables[0].data.column_names if all(name in table for table in tables)]
    columns = {}
    for name in names:
        chunks = [chunk for table in tables for chunk in table.data[name].chunks]
        if len({chunk.type for chunk in chunks}) > 1:
            chunks = [chunk.cast(pa.large_string()) for chunk in chunks]
        columns[name] = pa.chunked_array(chunks, type=None if chunks else tables[0].data[name].type)
    theirs = {ours: name for table in reversed(tables) for ours, name in table.theirs.items()}
    return RawTable(pa.table(columns), theirs, tuple(place for table in tables for place in table.places))


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
