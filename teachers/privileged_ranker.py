"""A ranker that sees user and item together, and columns that only training knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from distill.batch import Batch, Columns, Ragged
from distill.hub.feature_models import (
    check_same_features,
    load_weights,
    read_feature_model,
    write_feature_model,
)
from distill.model import Model
from distill.nn.cross_network import CrossNetwork
from distill.nn.feature_embedding import (
    FeatureEmbedding,
    Tables,
    check_pair,
    read_columns,
    vocabulary_of,
)
from distill.nn.mlp import MLP, Activation
from distill.nn.target_attention import TargetAttention
from distill.nn.text_encoder import in_slices
from distill.outputs import Needs, Outputs

if TYPE_CHECKING:
    from distill.data.feature_table import FeatureTable
    from distill.data.features import Features

TYPE = "teachers.PrivilegedRanker"
AT_ONCE = 16384  # pairs scored together


class PrivilegedRanker(Model):
    """One network over user, item, context and privileged features of a pair; its score is a logit.

    As the teacher of Privileged Features Distillation (PFD) it reads the student's own tables
    (``tables: {ref: student.tables}``) and is trained beside it; the student's loss never reaches it, as an
    arrow's tail is detached. ``own_tables: [user_id]`` keeps a table apart, as the paper found best for the
    user id when scores of pairs are distilled.

    Provides ``scores`` [B, N].

    Args:
        features: Fitted.
        tables: Of another node, to share (``{ref: student.tables}``); None: all its own.
        own_tables: Features whose tables are its own although another node's are shared.
        embedding_dim: The size of a table's vectors; None is that of ``tables``, else 16.
        body: ``dcn``: a cross network beside an MLP (the parallel form of DCN-v2); ``mlp``: the MLP alone.
        widths: Of the MLP's hidden layers.
        cross_layers: Of the cross network.
        cross_rank: Of its matrices; None: full ones.
        history: ``mean`` of its vectors; ``attention`` adds their sum as the candidate weighs it (DIN), for
            each history that shares the vocabulary of one of the item's features.
        dropout: Of the MLP, in training.
        activation: Of the MLP.
        privileged: Whether it reads privileged features; without, it is a larger model of what serving knows.
        unknown: Share of ids that a training hides.
        checkpoint: Start from the weights of a saved ranker, with the same features.

    References:
        Xu et al., 2020. Privileged Features Distillation at Taobao Recommendations. arXiv:1907.05171
        Wang et al., 2021. DCN V2. arXiv:2008.13535
        Zhou et al., 2018. Deep Interest Network. arXiv:1706.06978
    """

    def __init__(
        self,
        features: Features,
        tables: Tables | None = None,
        own_tables: Sequence[str] = (),
        embedding_dim: int | None = None,
        body: Literal["dcn", "mlp"] = "dcn",
        widths: Sequence[int] = (256, 128),
        cross_layers: int = 2,
        cross_rank: int | None = None,
        history: Literal["mean", "attention"] = "mean",
        dropout: float = 0.0,
        activation: Activation = "relu",
        privileged: bool = True,
        unknown: float = 0.01,
        checkpoint: str | Path | None = None,
    ):
        super().__init__()
        for what, value, known in (
            ("body", body, ("dcn", "mlp")),
            ("history", history, ("mean", "attention")),
        ):
            if value not in known:
                raise ValueError(f"{what} must be {' or '.join(known)}, got '{value}'.")
        if checkpoint is not None and tables is not None:
            raise ValueError("checkpoint: a saved ranker brings its tables with it; leave out `tables`.")
        dim = embedding_dim or (16 if tables is None else tables.dim)
        if tables is not None and dim != tables.dim:
            raise ValueError(
                f"embedding_dim {dim} must be that of the shared tables, {tables.dim}; leave it out."
            )
        sides = [features.side(side, privileged=privileged) for side in ("user", "item", "context")]
        self.user_features, self.item_features, self.pair_features = sides
        wanted = [feature for side in sides for feature in side]
        own = {feature.name: vocabulary_of(feature) for feature in wanted}
        if lost := [name for name in own_tables if name not in own]:
            raise ValueError(f"own_tables: it reads no feature '{lost[0]}'; it reads {', '.join(own)}.")
        kept = {own[name] for name in own_tables}
        given = {} if tables is None else tables.by_name()
        self.features = features
        self.tables = Tables(features, wanted, dim, {n: t for n, t in given.items() if n not in kept})
        embeddings = [FeatureEmbedding(features, side, dim, unknown) for side in sides]
        self.of_user, self.of_item, self.of_pair = embeddings
        self.targets = self._targets() if history == "attention" else {}
        self.attention = nn.ModuleDict({f"{name}_": TargetAttention(dim) for name in self.targets})
        width = sum(embedding.width for embedding in embeddings) + dim * len(self.targets)
        self.cross = CrossNetwork(width, cross_layers, cross_rank) if body == "dcn" else None
        self.deep = MLP(width, [*widths, 1], dropout, activation)
        self.last = nn.Linear(width, 1, bias=False) if body == "dcn" else None
        self.arguments: dict[str, Any] = {
            "embedding_dim": dim,
            "body": body,
            "widths": list(widths),
            "cross_layers": cross_layers,
            "cross_rank": cross_rank,
            "history": history,
            "dropout": dropout,
            "activation": activation,
            "privileged": privileged,
            "unknown": unknown,
        }
        self.checkpoint = None if checkpoint is None else str(checkpoint)
        if checkpoint is not None:
            folder, _, saved = read_feature_model(checkpoint, TYPE)
            check_same_features(features, saved, folder)
            load_weights(self, folder)
        self.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments) -> PrivilegedRanker:
        """Open a saved one, from a folder or the Hub; ``arguments`` replace those it was saved with."""
        path, saved, features = read_feature_model(folder, TYPE)
        model = cls(features, **{**saved, **arguments})
        load_weights(model, path)
        model.checkpoint = str(folder)
        return model

    def _targets(self) -> dict[str, str]:
        """For each history the item's feature that its items can be compared with."""
        items = reversed(self.item_features)
        by_vocabulary = {vocabulary_of(f): f.name for f in items if f.kind == "categorical"}
        found = {
            f.name: by_vocabulary[vocabulary_of(f)]
            for f in self.user_features
            if f.kind == "sequence" and vocabulary_of(f) in by_vocabulary
        }
        if not found:
            raise ValueError(
                "history: attention needs a user's sequence that shares the vocabulary of one of the item's "
                "categorical features; name it there with `vocabulary`, or take history: mean."
            )
        return found

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"scores"})

    @property
    def reads(self) -> Columns:
        return Columns(self.user_features, self.item_features, self.pair_features)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "checkpoint": self.checkpoint or "",
            **self.arguments,
            "features": self.features.fingerprint,
        }

    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        rows, places = batch.mask.nonzero(as_tuple=True)
        context = {name: column[rows, places] for name, column in batch.pair.items()}
        logits = self._logits(batch.queries, batch.candidates, context, rows, batch.index[rows, places])
        return Outputs(scores=batch.spread(logits))

    def _logits(
        self,
        users: Mapping[str, Any],
        items: Mapping[str, Any],
        context: Mapping[str, Tensor],
        user: Tensor,
        item: Tensor,
    ) -> Tensor:
        """Logits [n] of n pairs: ``user`` [n] and ``item`` [n] are rows of ``users`` and ``items``.

        Users and items are embedded once, however many pairs they are in.
        """
        tables = self.tables.by_name()
        parts = [
            self.of_user(users, tables).index_select(0, user),
            self.of_item(items, tables).index_select(0, item),
        ]
        if self.pair_features:
            parts.append(self.of_pair(context, tables))
        for history, target in self.targets.items():
            seen: Ragged = users[history].select(user)
            table = tables[vocabulary_of(self.features[history])]
            meets = table(items[target]).index_select(0, item)
            attended = self.attention[f"{history}_"](table(seen.values), seen.lengths, meets)
            parts.append(attended)
        rows = torch.cat(parts, dim=1)
        logits = self.deep(rows)[:, 0].float()
        if self.cross is None or self.last is None:
            return logits
        return logits + self.last(self.cross(rows))[:, 0].float()

    @torch.no_grad()
    def score_pairs(
        self,
        queries: FeatureTable,
        candidates: FeatureTable,
        pair: Mapping[str, Tensor] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Scores [n] float32 on the CPU, of n pairs: rows of queries and candidates side by side.

        Args:
            pair: The pairs' own features [n], by name, as they lie in ``Judged.pair``.
        """
        check_pair(self.pair_features, pair)
        scores = torch.empty(len(queries))
        learning, _ = self.training, self.eval()
        for part in in_slices(len(queries), AT_ONCE, progress, "pairs"):
            asked = self._moved(read_columns(queries[part], self.user_features))
            found = self._moved(read_columns(candidates[part], self.item_features))
            own = self._moved({f.name: (pair or {})[f.name][part] for f in self.pair_features})
            each = torch.arange(len(scores[part]), device=self.device)
            scores[part] = self._logits(asked, found, own, each, each).cpu()
        self.train(learning)
        return scores

    def _moved(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        return {name: column.to(self.device) for name, column in columns.items()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that ``from_pretrained`` opens; shared tables are written as its own."""
        write_feature_model(folder, TYPE, self.arguments, self.features, self.state_dict())
