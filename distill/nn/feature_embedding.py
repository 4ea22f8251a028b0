"""From columns of features to one row of numbers: embedding tables, pooled histories, dense values.

A table belongs to a vocabulary, so features that share one (a history and the item's id) share its rows.
Next: ``mlp.py``, what follows; ``../optimizer.py``, which moves only the rows that were read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.batch import Ragged, Readable
from distill.errors import DataError
from distill.nn.pooling import mean_of_rows

if TYPE_CHECKING:
    from distill.data.feature_schema import Feature
    from distill.data.feature_table import FeatureTable
    from distill.data.features import Features

PADDING, UNKNOWN = 0, 1  # ids that are nothing, and nobody known
SPARSE_ABOVE = 2**15  # rows; the gradient of a larger table holds only the rows that were read
SPREAD = 0.05  # standard deviation of a new table


class Table(nn.Module):
    """A vector [dim] for each id of a vocabulary; id 0 has the vector 0, always."""

    def __init__(self, rows: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim).normal_(std=SPREAD))
        self.weight.data[PADDING] = 0.0

    @property
    def sparse(self) -> bool:
        """Whether its gradient is a sparse tensor: the cost of a step then does not grow with the table."""
        return len(self.weight) > SPARSE_ABOVE

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors [..., dim] of ids [...]."""
        return F.embedding(ids, self.weight, padding_idx=PADDING, sparse=self.sparse)

    def mean(self, ids: Ragged) -> Tensor:
        """The mean vector [n, dim] of each of n sequences; 0 where one is empty."""
        return mean_of_rows(self.weight, ids, self.sparse)


class Tables(nn.Module):
    """The tables that some features read, by vocabulary.

    Args:
        features: Fitted; they know how many rows each vocabulary has.
        wanted: The features that will be read.
        dim: The size of a vector.
        given: Tables of another model, by vocabulary; those that are wanted are shared, not made anew.
    """

    def __init__(
        self,
        features: Features,
        wanted: Iterable[Feature],
        dim: int,
        given: Mapping[str, Table] | None = None,
    ):
        super().__init__()
        if dim < 1:
            raise ValueError(f"the size of an embedding must be at least 1, got {dim}.")
        self.dim = dim
        self.names = tuple(dict.fromkeys(vocabulary_of(f) for f in wanted if has_ids(f)))
        self._tables = nn.ModuleDict()
        for name in self.names:
            shape, table = (features.size(name), dim), (given or {}).get(name)
            if table is not None and (*table.weight.shape,) != shape:
                raise ValueError(
                    f"the shared table of '{name}' is {[*table.weight.shape]}, and {[*shape]} is needed: "
                    f"both models must read the features of one data set."
                )
            self._tables[_key(name)] = Table(*shape) if table is None else table

    def by_name(self) -> dict[str, Table]:
        """The tables by vocabulary."""
        return {name: self._tables[_key(name)] for name in self.names}  # type: ignore[misc]


class FeatureEmbedding(nn.Module):
    """Columns of features, side by side, as one row of numbers each.

    An id becomes its table's vector, a sequence the mean of its items' vectors (of an empty one: a learned
    vector, 0 at first), text the projection of its encoder's stored vector, a dense value stays itself.

    Args:
        features: Fitted.
        wanted: Which of them, in this order.
        dim: The size of a table's vector.
        unknown: Share of ids that a training replaces by the unknown one, so that its row learns too.
    """

    def __init__(self, features: Features, wanted: Sequence[Feature], dim: int, unknown: float = 0.0):
        super().__init__()
        if not 0.0 <= unknown < 1.0:
            raise ValueError(f"unknown must be a share from 0 up to 1, got {unknown}.")
        self.wanted, self.unknown = tuple(wanted), unknown
        self.widths = tuple(dim if has_vector(feature) else 1 for feature in self.wanted)
        self.empty = nn.ParameterDict(
            {_key(f.name): nn.Parameter(torch.zeros(dim)) for f in self.wanted if f.kind == "sequence"}
        )
        self.projections = nn.ModuleDict()
        for feature in self.wanted:
            if feature.kind == "text":
                vectors = features.text_vectors(feature.name).float()
                self.register_buffer(f"{_key(feature.name)}_vectors", vectors, persistent=False)
                self.projections[_key(feature.name)] = nn.Linear(vectors.shape[1], dim)

    @property
    def width(self) -> int:
        """W, how many numbers a row has."""
        return sum(self.widths)

    def forward(
        self,
        columns: Mapping[str, Any],
        tables: Mapping[str, Table],
    ) -> Tensor:
        """Rows [n, W] float32, of n rows of columns by the features' names, and tables by vocabulary."""
        parts = [self._embedded(feature, columns[feature.name], tables) for feature in self.wanted]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _embedded(self, feature: Feature, column: Any, tables: Mapping[str, Table]) -> Tensor:
        if feature.kind == "sequence":
            none = (column.lengths == 0).to(self.empty[_key(feature.name)].dtype)
            return torch.addcmul(
                tables[vocabulary_of(feature)].mean(column), none[:, None], self.empty[_key(feature.name)]
            )
        if feature.kind == "text":
            vectors = F.embedding(column, self.get_buffer(f"{_key(feature.name)}_vectors"))
            return self.projections[_key(feature.name)](vectors).float()
        if not has_ids(feature):
            return column[:, None].float()
        if self.training and self.unknown and feature.kind == "categorical":
            hidden = (torch.rand(column.shape, device=column.device) < self.unknown) & (column != PADDING)
            column = column.masked_fill(hidden, UNKNOWN)
        return tables[vocabulary_of(feature)](column)


def read_columns(table: FeatureTable, wanted: Iterable[Readable]) -> dict[str, Any]:
    """The columns of a table that are read.

    Raises:
        DataError: One is missing.
    """
    names = [feature.key for feature in wanted]
    if lost := [name for name in names if name not in table.columns]:
        raise DataError(
            f"the rows have no column '{lost[0]}', which the model reads; they have "
            f"{', '.join(table.columns)}."
        )
    return {name: table.columns[name] for name in names}


def check_pair(wanted: Iterable[Readable], pair: Mapping[str, Tensor] | None) -> None:
    """Refuse to score pairs without the features of the pair itself."""
    for name in (feature.key for feature in wanted):
        if name not in (pair or {}):
            raise DataError(f"the model reads '{name}' of each pair of user and item; give it in `pair`.")


def has_ids(feature: Feature) -> bool:
    """Whether its column holds ids of a vocabulary (or of buckets), hence rows of a table."""
    return feature.kind in ("categorical", "sequence") or (feature.kind == "dense" and bool(feature.buckets))


def has_vector(feature: Feature) -> bool:
    """Whether it becomes a vector, not one number."""
    return has_ids(feature) or feature.kind == "text"


def vocabulary_of(feature: Feature) -> str:
    """The vocabulary whose ids its column holds: its own, unless it shares that of another feature."""
    return feature.vocabulary or feature.name


def _key(name: str) -> str:
    """A feature's name as modules of torch may be called: `type` and `keys` are taken."""
    return f"{name}_"
