"""Vocabularies and statistics of a feature schema, fitted on train. Next: ``feature_table.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distill.batch import Ragged
from distill.data.cache import content_hash
from distill.data.feature_schema import Feature, Side, schema_of
from distill.data.feature_table import FeatureTable, Names, mixed, text_hash
from distill.data.frames import collect, frame_of, need_polars, require, scan
from distill.errors import DataError
from distill.hub.files import atomic_write_text, read_json

if TYPE_CHECKING:
    import polars

FORMAT = 1  # of what `save` writes
PADDING, UNKNOWN, FIRST = 0, 1, 2  # ids
At = Callable[[int], str]  # of a row: its table, column and number in words, for errors


class Features:
    """A feature schema with what was fitted to it: vocabularies, means, bucket edges, text vectors.

    Args:
        schema: Features, or mappings with their arguments.

    Example:
        >>> import polars as pl
        >>> age = Feature(name="age", kind="categorical", side="user")
        >>> features = Features([age]).fit(user=pl.DataFrame({"age": [18, 25, 18]}))
        >>> features.size("age"), features.encode([{"age": 25}, {"age": 99}], [age]).columns["age"]
        (4, tensor([3, 1]))
    """

    def __init__(self, schema: Sequence[Feature | Mapping[str, Any]]):
        self.schema = schema_of(schema)
        self.withheld: tuple[Feature, ...] = ()  # privileged ones that ``public`` took out: to be refused
        self._by_name = {feature.name: feature for feature in self.schema}
        self._vocabularies: dict[str, polars.Series] = {}  # owner -> distinct values, in order of their ids
        self._numbers: dict[str, tuple[float, float]] = {}  # dense feature -> mean, deviation
        self._edges: dict[str, np.ndarray] = {}  # bucketised feature -> inner edges
        self._vectors: dict[str, Tensor] = {}  # text feature -> a vector per vocabulary row

    def __len__(self) -> int:
        return len(self.schema)

    def __getitem__(self, name: str) -> Feature:
        if name not in self._by_name:
            raise KeyError(f"there is no feature '{name}'; there are {', '.join(self._by_name)}.")
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def side(self, side: Side, privileged: bool = False) -> tuple[Feature, ...]:
        """The features of a side, in the order of the schema: those serving knows, or all of them."""
        return tuple(f for f in self.schema if f.side == side and (privileged or not f.privileged))

    def public(self) -> Features:
        """Without privileged features and all that was fitted to them; of these only the names are known.

        One whose vocabulary others share stays.
        """
        owners = {feature.vocabulary for feature in self.schema if not feature.privileged}
        kept = [f for f in self.schema if not f.privileged or f.name in owners]
        made = Features(kept)
        made.withheld = tuple(f for f in self.schema if f not in kept) + self.withheld
        made._vocabularies = {name: v for name, v in self._vocabularies.items() if name in made}
        made._numbers = {name: v for name, v in self._numbers.items() if name in made}
        made._edges = {name: v for name, v in self._edges.items() if name in made}
        made._vectors = {name: v for name, v in self._vectors.items() if name in made}
        return made

    def fit(
        self,
        user: Any = None,
        item: Any = None,
        context: Any = None,
        texts: Mapping[str, Any] | None = None,
    ) -> Features:
        """Learn vocabularies and statistics from train rows of each side, read as a stream.

        A side's frame may lack a sequence that shares a vocabulary: it has nothing to learn from it. Text
        features take their texts from the table of their side in ``texts`` where there is one, such as the
        whole catalogue: a text has its vector whoever saw the item.

        Raises:
            DataError: A column is missing or of a wrong type, or a dense one holds a missing number.
        """
        for side, given in (("user", user), ("item", item), ("context", context)):
            features = [f for f in self.schema if f.side == side and f.vocabulary is None]
            if not features:
                continue
            if given is None:
                raise DataError(f"features: the {side} side has features, but no train rows to fit them on.")
            where = f"{side}s" if side != "context" else "interactions"
            frame = scan(given, where)
            require(frame, [f.source for f in features], where)
            every = scan(texts[side], where) if texts and side in texts else frame
            for feature in features:
                rows = every if feature.kind == "text" else frame
                self._fit(feature, rows.select(feature.source), where)
        self.__dict__.pop("fingerprint", None)
        return self

    def _fit(self, feature: Feature, column: polars.LazyFrame, where: str) -> None:
        if feature.kind == "dense":
            self._fit_numbers(feature, column, where)
        elif feature.hash_buckets is None:
            self._vocabularies[feature.name] = self._distinct(feature, column, where)
            if feature.kind == "text":
                self._vectors[feature.name] = self._encoded(feature)

    def _distinct(self, feature: Feature, column: polars.LazyFrame, where: str) -> polars.Series:
        """The distinct values, in order; those seen less than ``min_count`` times left out."""
        pl = need_polars()
        values = pl.col(feature.source)
        if feature.kind == "sequence":
            if feature.separator is not None:
                values = values.str.split(feature.separator)
            values = values.explode()
        column = column.select(values.alias("value")).drop_nulls()
        if feature.separator is not None:
            column = column.filter(pl.col("value") != "")
        if feature.min_count > 1:
            counted = column.group_by("value").agg(pl.len().alias("count"))
            column = counted.filter(pl.col("count") >= feature.min_count).select("value")
        else:
            column = column.unique()
        place = _place(where, feature)
        distinct = _categories(collect(column, place)["value"], place, lambda row: place)  # rows unknown
        return distinct.unique().sort()

    def _fit_numbers(self, feature: Feature, column: polars.LazyFrame, where: str) -> None:
        pl = need_polars()
        if feature.transform in ("none", "log") and feature.buckets is None:
            return
        values = pl.col(feature.source).cast(pl.Float64, strict=False)
        if feature.fill is not None:
            values = values.fill_nan(None).fill_null(feature.fill)
        if feature.transform == "log_standard":
            values = values.sign() * values.abs().log1p()
        place = _place(where, feature)
        if feature.buckets is not None:
            cuts = np.linspace(0, 1, feature.buckets + 1)[1:-1].tolist()
            wanted = [values.quantile(q, "linear").alias(str(i)) for i, q in enumerate(cuts)]
        else:
            wanted = [values.mean().alias("mean"), values.std(ddof=0).alias("deviation")]
        found = collect(column.select(wanted), place).row(0)
        if any(value is None or not np.isfinite(value) for value in found):
            _numbers(feature, collect(column, place)[feature.source], where)  # says which row is to blame
            raise DataError(f"{place}: there is no number to fit on.")
        if feature.buckets is not None:
            self._edges[feature.name] = np.unique(np.asarray(found))
        else:
            self._numbers[feature.name] = (float(found[0]), float(found[1]) or 1.0)

    def _encoded(self, feature: Feature) -> Tensor:
        """Vectors [size, D] of a text feature's distinct texts; padding and unknown are zero."""
        from distill.open import open_model

        model: Any = open_model(str(feature.encoder))
        texts = self._vocabularies[feature.name].to_list()
        if not hasattr(model, "encode_candidates"):
            raise DataError(f"features, '{feature.name}': {feature.encoder} encodes no texts by themselves.")
        vectors = model.encode_candidates(texts)
        return torch.cat([vectors.new_zeros(FIRST, vectors.shape[1]), vectors])

    def size(self, name: str) -> int:
        """How many rows the embedding table of a feature has: 0 padding, 1 unknown, real ids from 2."""
        feature = self[name]
        if not feature.has_ids:
            raise ValueError(f"'{name}' is a number; only what has ids has a table.")
        if feature.buckets is not None:
            return self._fitted(self._edges, feature) + 1 + FIRST
        owner = self[feature.owner]
        if owner.hash_buckets is not None:
            return owner.hash_buckets + FIRST
        return self._fitted(self._vocabularies, owner) + FIRST

    def text_vectors(self, name: str) -> Tensor:
        """Vectors [size, D] of a text feature: row i is that of id i; padding and unknown are zero."""
        if self[name].kind != "text":
            raise ValueError(f"'{name}' is no text feature.")
        self._fitted(self._vectors, self[name])
        return self._vectors[name]

    def values(self, name: str) -> list[Any]:
        """What the ids from 2 stand for, in order."""
        owner = self[self[name].owner]
        self._fitted(self._vocabularies, owner)
        return self._vocabularies[owner.name].to_list()

    @staticmethod
    def _fitted(found: Mapping[str, Any], feature: Feature) -> int:
        if feature.name not in found:
            raise RuntimeError(f"'{feature.name}' has no vocabulary: fit the features first, or load them.")
        return len(found[feature.name])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the schema and of all that was fitted."""
        parts = [json.dumps({**self._described(), "withheld": None}, sort_keys=True)]
        for name, values in sorted(self._vocabularies.items()):
            hashes = mixed(_raw_hash(values) + np.arange(len(values), dtype=np.uint64))
            parts += [name, str(values.dtype), str(len(values)), str(int(hashes.sum(dtype=np.uint64)))]
        return content_hash(parts)

    def encode(
        self, rows: Any, features: Sequence[Feature | str], ids: Any = None, where: str = "rows"
    ) -> FeatureTable:
        """Raw rows as columns of ids and numbers.

        Args:
            rows: A polars or pandas DataFrame, or a sequence of mappings from column to value.
            features: Those that are wanted; no other column is looked at.
            ids: Names of the rows [n]; their numbers, if not given.
            where: What errors call the rows.

        Raises:
            DataError: A column is missing, of another type than it was fitted on, or a dense one holds NaN.
                A category that train did not have is no error: it is id 1.
        """
        wanted = [self[f] if isinstance(f, str) else f for f in features]
        frame = frame_of(rows, [f.source for f in wanted], where)
        columns = {f.name: self._column(f, frame[f.source], where) for f in wanted}
        n = len(frame) if wanted else len(rows)
        return FeatureTable(Names(range(n) if ids is None else ids), columns)

    def _column(self, feature: Feature, values: polars.Series, where: str) -> Tensor | Ragged:
        if feature.kind == "dense":
            numbers = _numbers(feature, values, where)
            if feature.buckets is not None:
                self._fitted(self._edges, feature)
                buckets = np.searchsorted(self._edges[feature.name], numbers, side="right") + FIRST
                return torch.from_numpy(buckets.astype(np.int64))
            return torch.from_numpy(self._transformed(feature, numbers).astype(np.float32))
        if feature.kind == "sequence":
            return self._sequence(feature, values, where)
        return torch.from_numpy(self._ids(feature, values, where))

    def _transformed(self, feature: Feature, numbers: np.ndarray) -> np.ndarray:
        if feature.transform in ("log", "log_standard"):
            numbers = np.sign(numbers) * np.log1p(np.abs(numbers))
        if feature.transform in ("standard", "log_standard"):
            self._fitted(self._numbers, feature)
            mean, deviation = self._numbers[feature.name]
            numbers = (numbers - mean) / deviation
        return numbers

    def _sequence(self, feature: Feature, values: polars.Series, where: str) -> Ragged:
        pl = need_polars()
        place = _place(where, feature)
        if feature.separator is not None:
            if values.dtype not in (pl.String, pl.Null):
                raise DataError(f"{place} holds {values.dtype}, not texts cut by '{feature.separator}'.")
            values = values.cast(pl.String).fill_null("").str.split(feature.separator)
            values = values.list.eval(pl.element().filter(pl.element() != ""))
        if values.dtype == pl.Null:
            values = values.cast(pl.List(pl.Null))
        if isinstance(values.dtype, pl.Array):
            values = values.arr.to_list()
        if not isinstance(values.dtype, pl.List):
            raise DataError(
                f"{place} holds {values.dtype}, not lists. Give a list per row, or name the separator of a "
                f"text that stands for one."
            )
        if feature.max_length is not None:
            values = values.list.tail(feature.max_length)
        lengths = values.list.len().fill_null(0).to_numpy().astype(np.int64)
        flat = values.filter(pl.Series(lengths > 0)).explode()

        def at(value: int) -> str:
            return in_words(where, feature.source, int(lengths.cumsum().searchsorted(value, side="right")))

        ids = self._ids(feature, flat, where, at)
        return Ragged.of_lengths(torch.from_numpy(ids), torch.from_numpy(lengths))

    def _ids(self, feature: Feature, values: polars.Series, where: str, at: At | None = None) -> np.ndarray:
        """Ids [n] int64 of categories; unknown and missing ones are 1."""
        pl = need_polars()
        place, owner = _place(where, feature), self[feature.owner]
        values = _categories(values, place, at or partial(in_words, where, feature.source))
        if owner.hash_buckets is not None:
            known = values.is_not_null().to_numpy()
            hashed = mixed(_raw_hash(values.fill_null("" if values.dtype == pl.String else 0)))
            ids = (hashed % np.uint64(owner.hash_buckets)).astype(np.int64) + FIRST
            return np.where(known, ids, UNKNOWN)
        self._fitted(self._vocabularies, owner)
        vocabulary = self._vocabularies[owner.name]
        if values.dtype != vocabulary.dtype and values.null_count() < len(values) and len(vocabulary):
            raise DataError(
                f"{place} holds {_kind(values)}, but it was fitted on {_kind(vocabulary)}. Give the values "
                f"as they were in training."
            )
        if not len(vocabulary) or values.null_count() == len(values):
            return np.full(len(values), UNKNOWN, np.int64)
        places = pl.Series(range(FIRST, FIRST + len(vocabulary)), dtype=pl.Int64)
        found = values.replace_strict(vocabulary, places, default=UNKNOWN, return_dtype=pl.Int64)
        return found.fill_null(UNKNOWN).to_numpy().copy()

    def _described(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "schema": [f.model_dump(exclude_defaults=True) for f in self.schema],
            "withheld": [{"name": f.name, "side": f.side, "column": f.source} for f in self.withheld],
            "numbers": self._numbers,
            "edges": {name: edges.tolist() for name, edges in self._edges.items()},
        }

    def save(self, folder: str | Path) -> None:
        """Write ``features.json`` and, per vocabulary and text feature, an Arrow or safetensors file."""
        from safetensors.torch import save_file

        pl = need_polars()
        folder = Path(folder)
        (folder / "vocabulary").mkdir(parents=True, exist_ok=True)
        for name, values in self._vocabularies.items():
            pl.DataFrame({"value": values}).write_ipc(folder / "vocabulary" / f"{name}.arrow")
        if self._vectors:
            save_file(self._vectors, folder / "text_vectors.safetensors")
        atomic_write_text(folder / "features.json", json.dumps(self._described(), indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Features:
        """What ``save`` wrote.

        Raises:
            DataError: A file is missing or broken, or written by a later version.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        pl = need_polars()
        path = Path(folder) / "features.json"
        told = read_json(path)
        version = told.get("format") if isinstance(told, dict) else None
        if not isinstance(version, int) or not 1 <= version <= FORMAT:
            raise DataError(
                f"{path}: format {version!r} is not known to this version of Distill, which reads formats 1 "
                f"to {FORMAT}. Update Distill, or save the model again with this version."
            )
        try:
            features = cls(told["schema"])
            features.withheld = tuple(
                Feature(kind="categorical", privileged=True, **one) for one in told.get("withheld", [])
            )
            features._numbers = {name: (mean, dev) for name, (mean, dev) in told["numbers"].items()}
            features._edges = {name: np.asarray(edges) for name, edges in told["edges"].items()}
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); copy or download it again.") from error
        for feature in features.schema:
            if feature.vocabulary is None and feature.hash_buckets is None and feature.kind != "dense":
                file = path.parent / "vocabulary" / f"{feature.name}.arrow"
                try:
                    features._vocabularies[feature.name] = pl.read_ipc(file)["value"]
                except (OSError, pl.exceptions.PolarsError) as error:
                    raise DataError(
                        f"{file}: the vocabulary cannot be read; copy or download the folder again."
                    ) from error
        if any(feature.kind == "text" for feature in features.schema):
            file = path.parent / "text_vectors.safetensors"
            try:
                features._vectors = load_file(file)
            except (OSError, SafetensorError) as error:
                raise DataError(
                    f"{file}: the vectors of the texts cannot be read; save the model again, or copy or "
                    f"download the folder again."
                ) from error
        return features


def _place(where: str, feature: Feature) -> str:
    return f"{where}, column '{feature.source}'"


def _kind(values: polars.Series) -> str:
    return "words" if str(values.dtype) == "String" else "whole numbers"


def in_words(where: str, column: str, row: int) -> str:
    """Where an error is: table, column and row."""
    return f"{where}, column '{column}', row {row} (counted from 0)"


def check_column(feature: Feature, values: polars.Series, where: str, at: At | None = None) -> None:
    """Refuse, before its rows are put in another order, a column that cannot be encoded.

    Raises:
        DataError: A number is missing or a category is a fraction; ``at`` says where it is.
    """
    if feature.kind == "dense":
        _numbers(feature, values, where, at)
    elif feature.kind != "sequence":
        _categories(values, _place(where, feature), at or partial(in_words, where, feature.source))


def _categories(values: polars.Series, place: str, at: At) -> polars.Series:
    """Categories as Int64 or String; a number with a fraction is none."""
    pl = need_polars()
    kind = values.dtype
    if kind.is_integer() or kind in (pl.Boolean, pl.Null):
        return values.cast(pl.Int64)
    if kind.is_float():
        values = values.fill_nan(None)
        if (values == values.round()).fill_null(True).all():
            return values.cast(pl.Int64)
        row = (values != values.round()).fill_null(False).arg_max() or 0
        raise DataError(f"{at(row)}: {values[row]} is no category; give whole numbers or words.")
    if kind in (pl.String, pl.Categorical, pl.Enum) or isinstance(kind, pl.Categorical | pl.Enum):
        return values.cast(pl.String)
    raise DataError(f"{place} holds {kind}, which are no categories; give whole numbers or words.")


def _numbers(feature: Feature, values: polars.Series, where: str, at: At | None = None) -> np.ndarray:
    """Numbers [n] float64, none of them missing."""
    pl = need_polars()
    place = _place(where, feature)
    if not (values.dtype.is_numeric() or values.dtype in (pl.Boolean, pl.Null)):
        raise DataError(f"{place} holds {values.dtype}, not numbers.")
    values = values.cast(pl.Float64)
    if feature.fill is not None:
        values = values.fill_nan(None).fill_null(feature.fill)
    numbers = values.to_numpy()
    if len(wrong := np.flatnonzero(~np.isfinite(numbers))):
        row = int(wrong[0])
        raise DataError(
            f"{(at or partial(in_words, where, feature.source))(row)}: {values[row]} is no finite number. "
            f"Mend the row, or say with `fill` what stands for a missing one."
        )
    return numbers


def _raw_hash(values: polars.Series) -> np.ndarray:
    if str(values.dtype) == "String":
        return text_hash(values)
    return mixed(values.to_numpy().astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
