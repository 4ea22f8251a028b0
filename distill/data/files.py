"""Tables in files: parquet, jsonl, json, csv, tsv. Next: ``tables.py``, which gives them our names."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill.errors import DataError

FORMATS = (".parquet", ".jsonl", ".json", ".csv", ".tsv")  # the texts also as .gz
TAKES = "parquet, jsonl, json, csv or tsv (the last four also with .gz)"


def suffix_of(path: Path) -> str | None:
    """Which of ``FORMATS`` the file's name says it is."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    suffix = next((suffix for suffix in FORMATS if plain.endswith(suffix)), None)
    return None if suffix == ".parquet" and plain != name else suffix


def read_file(path: Path, wanted: Mapping[str, str] | None = None) -> pa.Table:
    """The table in a file; of parquet only the ``wanted`` columns (our name -> theirs) are read."""
    suffix = suffix_of(path)
    if suffix is None:
        raise DataError(f"{path}: unknown format '{''.join(path.suffixes[-2:])}'; it takes {TAKES}.")
    try:
        if suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                names = None if wanted is None else sorted(set(wanted.values()))
                if names is not None and not set(names) <= set(file.schema_arrow.names):
                    names = None  # read all: the error, if it is one, says what there is
                return file.read(columns=names)
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.suffix.lower() == ".gz"
            else path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as text
        ):
            if suffix in (".csv", ".tsv"):
                return _read_csv(text, path, suffix)
            return _read_json(text, path, suffix)
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(
            f"{path}: the file cannot be read as {suffix[1:]} ({reason}). "
            f"It may be cut short; fetch or write it again."
        ) from error


def _read_csv(text: Iterable[str], path: Path, suffix: str) -> pa.Table:
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the usual 128 KiB
    if suffix == ".csv":
        rows = csv.reader(text, strict=True)
    else:
        rows = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(rows, None)
    if header is None:
        raise DataError(f"{path}: the file is empty; its first line must name the columns.")
    columns: list[list[str]] = [[] for _ in header]
    for row, values in enumerate(rows):
        if not values:
            continue
        if len(values) != len(header):
            raise DataError(
                f"{path}, row {row} (counted from 0): {len(values)} values for the {len(header)} columns "
                f"{', '.join(header)}. Mend the row, or write the file anew."
            )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return pa.table([pa.array(column, pa.large_string()) for column in columns], names=header)


def _read_json(text: Iterable[str], path: Path, suffix: str) -> pa.Table:
    records: list[Any] = []
    if suffix == ".json":
        whole = "".join(text)
        if whole.lstrip().startswith("["):
            try:
                records = json.loads(whole)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}: not JSON ({error}). It may be cut short; fetch it again."
                ) from error
        text = [] if records else whole.splitlines()
    for line, written in enumerate(text, start=1):
        if written.strip():
            try:
                records.append(json.loads(written))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {line}: not JSON ({error}). It may be cut short; fetch it again."
                ) from error
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(
                f"{path}, row {row} (counted from 0): a {type(record).__name__}, not an object with keys."
            )
    names = list(dict.fromkeys(name for record in records for name in record))
    return pa.table({name: _array([record.get(name) for record in records]) for name in names})


def _array(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # mixed types: as text
        return pa.array(
            [v if v is None or isinstance(v, str) else json.dumps(v) for v in values], pa.large_string()
        )
