"""The two-tower: users and items are encoded apart, from their features, and compared by a product."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.batch import Batch, Columns
from distill.data.judged import Table
from distill.errors import DataError
from distill.hub.feature_models import (
    built_arguments,
    check_same_features,
    load_weights,
    read_feature_model,
    tower_spec,
    write_feature_model,
)
from distill.model import Encoder
from distill.nn.feature_embedding import FeatureEmbedding, Tables, read_columns
from distill.nn.mlp import MLPTower, Tower
from distill.nn.text_encoder import in_slices
from distill.outputs import Needs, Outputs
from distill.recipe import nearest

if TYPE_CHECKING:
    from distill.data.feature_schema import Feature, Side
    from distill.data.feature_table import FeatureTable
    from distill.data.features import Features

TYPE = "students.TwoTower"
SIDES: tuple[Side, ...] = ("user", "item", "context")
MOST = math.log(100.0)  # of a learned scale's logarithm
AT_ONCE = 16384  # rows encoded together


class TwoTower(Encoder):
    r"""A tower over a user's features, another over an item's, and the product of their vectors.

    .. math:: s(u, i) = \langle f(x_u), g(x_i) \rangle / \tau

    with vectors of length 1 for a cosine. DSSM, YoutubeDNN (``item_tower: null``), YoutubeSBC and
    FacebookDSSM are recipes over it: they differ in losses, negatives and widths.

    It reads what serving knows and nothing else: the features of users and of items that are not privileged.
    A history is pooled by its mean, and features that share a vocabulary share a table.

    Provides ``queries`` [B, D], ``candidates`` [P, D], ``scores`` [B, N] and ``in_batch`` [B, P]; scores are
    logits, as served.

    Args:
        features: Fitted.
        dim: D; None is that of the towers, else 64.
        embedding_dim: The size of a table's vectors.
        user_tower: ``mlp`` (256, 128 and D wide), or a tower such as ``distill.nn.MLPTower``.
        item_tower: The same; None takes the item's own vector from its table, as YoutubeDNN does; D is then
            ``embedding_dim``.
        item_id: Without an item tower: the item's feature whose vector it is; None: its only one.
        similarity: ``cosine`` or ``dot``.
        temperature: Divides the product; None is 0.05 for a cosine (Yi et al.), 1 for a dot product.
        learned_temperature: It is learnt from there on, as the logarithm of its inverse, at most 100.
        user_features: Their names; None: all that serving knows.
        item_features: Their names; None: all that serving knows.
        unknown: Share of ids that a training hides, so that unknown users and items have a place.
        checkpoint: Start from the weights of a saved two-tower, with the same features.

    References:
        Huang et al., 2013. Learning Deep Structured Semantic Models for Web Search using Clickthrough Data.
        Covington, Adams and Sargin, 2016. Deep Neural Networks for YouTube Recommendations.
        Yi et al., 2019. Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations.
    """

    shares = frozenset({"tables"})

    def __init__(
        self,
        features: Features,
        dim: int | None = None,
        embedding_dim: int = 16,
        user_tower: Tower | Literal["mlp"] = "mlp",
        item_tower: Tower | Literal["mlp"] | None = "mlp",
        item_id: str | None = None,
        similarity: Literal["cosine", "dot"] = "cosine",
        temperature: float | None = None,
        learned_temperature: bool = False,
        user_features: Sequence[str] | None = None,
        item_features: Sequence[str] | None = None,
        unknown: float = 0.01,
        checkpoint: str | Path | None = None,
    ):
        super().__init__()
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"similarity must be cosine or dot, got '{similarity}'.")
        if temperature is None:
            temperature = 0.05 if similarity == "cosine" else 1.0
        if not 0.01 <= temperature < math.inf:
            raise ValueError(f"temperature must be at least 0.01 and finite, got {temperature}.")
        self.features, self.similarity, self.embedding_dim = features, similarity, embedding_dim
        self.user_features = public(features, "user", user_features)
        self.item_features = public(features, "item", item_features)
        self.item_id = self._id_feature(item_id) if item_tower is None else None
        if self.item_id is not None:
            self.item_features = (self.item_id,)
        self.unknown = unknown
        self.tables = Tables(features, (*self.user_features, *self.item_features), embedding_dim)
        self.user_embedding = FeatureEmbedding(features, self.user_features, embedding_dim, unknown)
        self.item_embedding = FeatureEmbedding(features, self.item_features, embedding_dim, unknown)
        towers = {"user_tower": user_tower, "item_tower": item_tower}
        sizes = {name: tower.dim for name, tower in towers.items() if isinstance(tower, Tower)}
        if item_tower is None:
            sizes["embedding_dim"] = embedding_dim
        if dim is not None:
            sizes["dim"] = dim
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"both sides need vectors of one size, got "
                f"{', '.join(f'{name} {size}' for name, size in sizes.items())}."
            )
        self._dim = next(iter(sizes.values()), 64)
        self.user_tower = self._bound(user_tower, self.user_embedding)
        self.item_tower = None if item_tower is None else self._bound(item_tower, self.item_embedding)
        self.temperature = temperature
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learned_temperature else None
        self._refused = _unknown_at_serving(features)
        self.checkpoint = None if checkpoint is None else str(checkpoint)
        if checkpoint is not None:
            folder, _, saved = read_feature_model(checkpoint, TYPE)
            check_same_features(features.public(), saved.public(), folder)
            load_weights(self, folder)
        self.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments) -> TwoTower:
        """Open a saved one, from a folder or the Hub.

        Args:
            folder: Where it is.
            arguments: Instead of those it was saved with, such as a tower of a class that is not ours.
        """
        path, saved, features = read_feature_model(folder, TYPE)
        model = cls(features, **{**built_arguments(saved, path, arguments), **arguments})
        load_weights(model, path)
        model.checkpoint = str(folder)
        return model

    def _id_feature(self, name: str | None) -> Feature:
        """The item's feature whose vector it is."""
        ids = [feature for feature in self.item_features if feature.kind == "categorical"]
        if name is None and len(ids) == 1:
            return ids[0]
        for feature in ids:
            if feature.name == name:
                return feature
        there = ", ".join(feature.name for feature in ids) or "none"
        raise ValueError(
            f"item_id: without an item tower, an item is the vector of one of its categorical features; "
            f"{'name which' if name is None else f'{name!r} is none'}: there are {there}."
        )

    def _bound(self, tower: Tower | str, embedding: FeatureEmbedding) -> Tower:
        if tower == "mlp":
            tower = MLPTower((256, 128, self._dim))
        if not isinstance(tower, Tower):
            raise ValueError(f"a tower is `mlp` or an object such as distill.nn.MLPTower, got {tower!r}.")
        tower.bind(embedding.widths)
        return tower

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"queries", "candidates", "scores", "in_batch"})

    @property
    def reads(self) -> Columns:
        return Columns(queries=self.user_features, candidates=self.item_features)

    @property
    def arguments(self) -> dict[str, Any]:
        """What it was made with, as plain data."""
        return {
            "dim": self._dim,
            "embedding_dim": self.embedding_dim,
            "user_tower": tower_spec(self.user_tower),
            "item_tower": None if self.item_tower is None else tower_spec(self.item_tower),
            "item_id": None if self.item_id is None else self.item_id.name,
            "similarity": self.similarity,
            "temperature": self.temperature,
            "learned_temperature": self.log_scale is not None,
            "user_features": [feature.name for feature in self.user_features],
            "item_features": [feature.name for feature in self.item_features],
            "unknown": self.unknown,
        }

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "checkpoint": self.checkpoint or "",
            **self.arguments,
            "features": self.features.fingerprint,
        }

    def scale(self) -> Tensor | float:
        if self.log_scale is None:
            return 1.0 / self.temperature
        return self.log_scale.clamp(max=MOST).exp()

    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        wanted = self.represents(needs)
        self._refuse((*batch.queries, *batch.candidates, *batch.pair))
        return Outputs(
            queries=self._users(batch.queries) if "queries" in wanted else None,
            candidates=self._items(batch.candidates) if "candidates" in wanted else None,
        )

    def compare(self, outputs: Outputs, batch: Batch, needs: Needs) -> Outputs:
        users, items = outputs.queries, outputs.candidates
        assert users is not None and items is not None
        if "scores" in needs:
            listed = F.embedding(batch.index, items)  # [B, N, D]; its backward is faster than indexing's
            outputs = outputs.with_(scores=(listed * users[:, None]).sum(dim=-1) * self.scale())
        if "in_batch" in needs:
            outputs = outputs.with_(in_batch=users @ items.T * self.scale())
        return outputs

    def _users(self, columns: Mapping[str, Any]) -> Tensor:
        return self._vectors(self.user_tower(self.user_embedding(columns, self.tables.by_name())))

    def _items(self, columns: Mapping[str, Any]) -> Tensor:
        rows = self.item_embedding(columns, self.tables.by_name())
        return self._vectors(rows if self.item_tower is None else self.item_tower(rows))

    def _vectors(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        return F.normalize(rows, dim=-1) if self.similarity == "cosine" else rows

    def _refuse(self, names: Iterable[Any], where: str = "") -> None:
        """Refuse columns that serving does not know: privileged ones, and those of a pair."""
        for name in names:
            if (feature := self._refused.get(name)) is not None:
                raise DataError(
                    f"{where}a two-tower cannot be asked with the column '{name}': {_why_not(feature)} "
                    f"Leave it out."
                )

    def encode_users(self, rows: Any, progress: bool = False) -> Tensor:
        """Vectors [n, D] float32 on the CPU, of n users.

        Args:
            rows: A DataFrame or a list of dictionaries, with the columns of ``user_features``.

        Raises:
            DataError: A column is missing, of a wrong type, or privileged.
        """
        return self._encode(rows, self.user_features, self._users, progress)

    def encode_items(self, rows: Any, progress: bool = False) -> Tensor:
        """Vectors [n, D] float32 on the CPU, of n items; see ``encode_users``."""
        return self._encode(rows, self.item_features, self._items, progress)

    def encode_queries(self, queries: Any, progress: bool = False) -> Tensor:
        """Vectors [n, D] float32 on the CPU, of the rows of a FeatureTable, or of raw ones.

        Of a table, only the columns of ``user_features`` are read.
        """
        return self.encode_users(queries, progress)

    def encode_candidates(self, candidates: Any, progress: bool = False) -> Tensor:
        """Vectors [n, D] float32 on the CPU, of the rows of a FeatureTable, or of raw ones."""
        return self.encode_items(candidates, progress)

    @torch.no_grad()
    def _encode(self, rows: Any, wanted: Sequence[Feature], encode: Any, progress: bool) -> Tensor:
        table = rows if isinstance(rows, Table) else self._encoded(rows, wanted)
        vectors = torch.empty(len(table), self.dim)
        learning, _ = self.training, self.eval()
        for part in in_slices(len(table), AT_ONCE, progress, "rows"):
            columns = read_columns(table[part], wanted)  # type: ignore[index]
            vectors[part] = encode({name: column.to(self.device) for name, column in columns.items()}).cpu()
        self.train(learning)
        return vectors

    def _encoded(self, rows: Any, wanted: Sequence[Feature]) -> FeatureTable:
        """Raw rows as a table."""
        rows = [rows] if isinstance(rows, Mapping) else rows
        self._refuse(getattr(rows, "columns", ()))
        for row, given in enumerate(rows if isinstance(rows, Sequence) else ()):
            if isinstance(given, Mapping):  # what else a row may be, encode refuses
                self._refuse(given, f"rows, row {row} (counted from 0): ")
        return self.features.encode(rows, wanted)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that ``from_pretrained`` opens: weights, settings, schema and vocabularies.

        Of privileged features nothing is written but their names, which are refused.
        """
        write_feature_model(folder, TYPE, self.arguments, self.features.public(), self.state_dict())


def public(
    features: Features, side: Literal["user", "item"], names: Sequence[str] | None
) -> tuple[Feature, ...]:
    """The features of a side that serving knows, or those of them that are named.

    Raises:
        ValueError: One of them is privileged, of a pair or of the other side, or there is none.
    """
    known = {feature.name: feature for feature in features.side(side)}
    if names is None:
        names = list(known)
    everything = {f.name: f for other in SIDES for f in features.side(other, privileged=True)}
    for name in names:
        if name in known:
            continue
        if name not in everything:
            raise ValueError(
                f"{side}_features: there is no feature '{name}'; there are {', '.join(known)}."
                f"{nearest(name, known)}"
            )
        raise ValueError(f"{side}_features: '{name}' cannot be read: {_why_not(everything[name], side)}")
    if not names:
        raise ValueError(
            f"{side}_features: there is none that serving knows, so a {side} cannot be encoded; the schema "
            f"needs one of side `{side}` that is not privileged."
        )
    return tuple(known[name] for name in names)


def _unknown_at_serving(features: Features) -> dict[str, Feature]:
    """The features that a student cannot be asked with, by their names and their columns in the data."""
    everything = [feature for side in SIDES for feature in features.side(side, privileged=True)]
    everything += features.withheld
    known = [feature for side in SIDES[:2] for feature in features.side(side)]
    names = {name for feature in known for name in (feature.name, feature.column)}
    return {
        name: feature
        for feature in everything
        for name in (feature.name, feature.column)
        if feature not in known and name is not None and name not in names
    }


def _why_not(feature: Feature, side: str = "") -> str:
    if feature.privileged:
        return "it is privileged, so it is known in training only; a teacher may read it, a student cannot."
    if feature.side == "context":
        return "it belongs to a pair of user and item, and a two-tower sees them apart."
    return f"it belongs to the {feature.side}, not to the {side}."
