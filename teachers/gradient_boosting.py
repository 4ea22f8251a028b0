"""Gradient boosted trees over the features of user, item and pair: no gradient loop, but a strong teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from distill.batch import Batch, Columns, Ragged
from distill.errors import DataError, RecipeError, RunError
from distill.hub.feature_models import check_same_features, read_feature_model, write_feature_model
from distill.model import Model
from distill.nn.feature_embedding import check_pair, read_columns, vocabulary_of
from distill.nn.text_encoder import in_slices
from distill.outputs import Needs, Outputs

if TYPE_CHECKING:
    from distill.data.feature_schema import Feature
    from distill.data.feature_table import FeatureTable
    from distill.data.features import Features
    from distill.data.judged import Judged
    from distill.data.source import JudgedSource

TYPE, TREES = "teachers.GradientBoosting", "trees.txt"
AT_ONCE = 2**18  # pairs scored together
CATEGORIES = 256  # of a column whose categories are split one by one; the ids of a longer one are numbers


class GradientBoosting(Model):
    """LightGBM over the columns that a privileged ranker reads; its scores are logits.

    It is fitted once, before the first step, on the labels of all listed pairs of the train split. A boosted
    model knows its own training rows by heart, so on these it gives out-of-fold scores: of trees that have
    seen no row of the same user. Everywhere else all trees answer.

    A history becomes its length, its last id and how often the candidate is in it; text is left out.

    Provides ``scores`` [B, N]. Needs LightGBM: ``pip install distill-search[recsys]``.

    Args:
        features: Fitted.
        privileged: Whether it reads privileged features.
        trees: How many.
        leaves: Of each tree, at most.
        learning_rate: Of the boosting.
        least: Rows of a leaf, at least.
        folds: How many parts the users are cut into, for the out-of-fold scores.
        seed: Of the folds and of LightGBM.
        checkpoint: A saved one, with the same features; it is not fitted again and has no out-of-fold scores.

    References:
        Ke et al., 2017. LightGBM: A Highly Efficient Gradient Boosting Decision Tree.
    """

    def __init__(
        self,
        features: Features,
        privileged: bool = True,
        trees: int = 200,
        leaves: int = 31,
        learning_rate: float = 0.05,
        least: int = 20,
        folds: int = 5,
        seed: int = 0,
        checkpoint: str | Path | None = None,
    ):
        super().__init__()
        lightgbm()
        if trees < 1 or leaves < 2 or least < 1:
            raise ValueError(f"needs a tree, two leaves and a row, got {trees}, {leaves} and {least}.")
        if folds < 2:
            raise ValueError(f"folds must be at least 2, to leave rows out, got {folds}.")
        self.features, self.folds, self.seed = features, folds, seed
        sides = [features.side(side, privileged=privileged) for side in ("user", "item", "context")]
        self.sides = [[feature for feature in side if feature.kind != "text"] for side in sides]
        self.arguments = {
            "privileged": privileged,
            "trees": trees,
            "leaves": leaves,
            "learning_rate": learning_rate,
            "least": least,
            "folds": folds,
            "seed": seed,
        }
        self.booster: Any = None
        self.out_of_fold: OutOfFold | None = None
        self.checkpoint = None if checkpoint is None else str(checkpoint)
        if checkpoint is not None:
            folder, _, saved = read_feature_model(checkpoint, TYPE)
            check_same_features(features, saved, folder)
            self.booster = _read(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments) -> GradientBoosting:
        """Open a saved one, from a folder or the Hub."""
        path, saved, features = read_feature_model(folder, TYPE)
        model = cls(features, **{**saved, **arguments})
        model.booster, model.checkpoint = _read(path), str(folder)
        return model

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"scores"})

    @property
    def reads(self) -> Columns:
        return Columns(*map(tuple, self.sides))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def identity(self) -> dict[str, Any] | None:
        if self.booster is None:
            return None
        own = b"" if self.out_of_fold is None else self.out_of_fold.scores.numpy().tobytes()
        return {
            "checkpoint": self.checkpoint or "",
            "trees": xxhash.xxh3_128_hexdigest(self.booster.model_to_string().encode()),
            "out_of_fold": xxhash.xxh3_128_hexdigest(own),
            "features": self.features.fingerprint,
        }

    def fit(self, source: JudgedSource) -> None:
        """Grow the trees on all listed pairs of a train split, and once per fold on the others of it.

        Raises:
            DataError: Labels that are not 0 and 1, or only one of them.
        """
        if self.checkpoint is not None:
            return
        judged = source.judged
        labels = self._labels(judged)
        query = torch.arange(len(judged.listed)).repeat_interleave(judged.listed.lengths)
        rows = np.concatenate([self._rows(judged, query, part) for part in _parts(len(query))])
        data = lightgbm().Dataset(
            rows, labels, categorical_feature=self._categories(), params=self._settings(), free_raw_data=False
        )
        group = query if judged.groups is None else judged.groups[query]
        draw = torch.Generator().manual_seed(self.seed)
        fold = (torch.randperm(int(group.max()) + 1, generator=draw) % self.folds)[group].numpy()
        scores = np.empty(len(rows), dtype=np.float32)
        for out in np.unique(fold):
            left = np.flatnonzero(fold != out)
            if len(np.unique(labels[left])) < 2:
                raise DataError(
                    f"{judged.name}: without one part in {self.folds} of its users, all labels are "
                    f"{labels[left][0] if len(left) else 'gone'}; out-of-fold scores need more users."
                )
            trees = self._grow(data.subset(left))
            scores[fold == out] = trees.predict(rows[fold == out], raw_score=True)
        self.booster = self._grow(data)
        self.out_of_fold = OutOfFold(source.name, judged, query, torch.from_numpy(scores))

    def _rows(self, judged: Judged, query: Tensor, part: slice) -> np.ndarray:
        """What the trees read of some of the listed pairs."""
        sides = ((judged.queries, query[part]), (judged.candidates, judged.listed.values[part]))
        chosen = [(table, *rows.unique(return_inverse=True)) for table, rows in sides]
        (users, user), (items, item) = ((table.take(rows).columns, place) for table, rows, place in chosen)
        own = {name: judged.pair[name][part] for name in self.reads.keys[2]}
        return self._matrix(users, items, own, user, item)

    def _labels(self, judged: Judged) -> np.ndarray:
        labels = np.zeros(0) if judged.labels is None else judged.labels.numpy()
        if len(wrong := np.flatnonzero((labels != 0) & (labels != 1))):
            raise DataError(
                f"{judged.name}: gradient boosting needs labels 0 and 1, but pair {wrong[0]} (counted from "
                f"0) has {labels[wrong[0]]:g}."
            )
        if len(np.unique(labels)) < 2:
            there = f"only {labels[0]:g}" if len(labels) else "none"
            raise DataError(
                f"{judged.name}: gradient boosting needs listed pairs with label 0 and with label 1, and the "
                f"data has {there}. It learns from what was shown, not from what a sampler draws."
            )
        return labels

    def _settings(self) -> dict[str, Any]:
        about = self.arguments
        return {
            "objective": "binary",
            "num_leaves": about["leaves"],
            "learning_rate": about["learning_rate"],
            "min_data_in_leaf": about["least"],
            "seed": self.seed,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": torch.get_num_threads(),
            "verbosity": -1,
        }

    def _grow(self, data: Any) -> Any:
        return lightgbm().train(self._settings(), data, num_boost_round=self.arguments["trees"])

    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        rows, places = batch.mask.nonzero(as_tuple=True)
        item = batch.index[rows, places]
        context = {name: column[rows, places] for name, column in batch.pair.items()}
        said = self._scores(batch.queries, batch.candidates, context, rows, item)
        if self.out_of_fold is not None and self.out_of_fold.source == batch.source:
            said = self.out_of_fold.instead_of(said, batch.query_ids[rows], batch.candidate_ids[item])
        return Outputs(scores=batch.spread(said))

    def score_pairs(
        self,
        queries: FeatureTable,
        candidates: FeatureTable,
        pair: Mapping[str, Tensor] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Scores [n] float32 of n pairs, by all trees; see ``PrivilegedRanker.score_pairs``."""
        check_pair(self.sides[2], pair)
        said = [torch.empty(0)]
        users, items, _ = self.sides
        for part in in_slices(len(queries), AT_ONCE, progress, "pairs"):
            own = {name: column[part] for name, column in (pair or {}).items()}
            asked, found = read_columns(queries[part], users), read_columns(candidates[part], items)
            each = torch.arange(len(queries[part]))
            said.append(self._scores(asked, found, own, each, each))
        return torch.cat(said)

    def _scores(
        self, users: Mapping[str, Any], items: Mapping[str, Any], context: Mapping[str, Tensor],
        user: Tensor, item: Tensor,
    ) -> Tensor:  # fmt: skip
        if self.booster is None:
            raise RunError("gradient boosting was not fitted: its `fit` comes before the first question.")
        if not len(user):
            return torch.empty(0)
        rows = self._matrix(users, items, context, user, item)
        return torch.from_numpy(self.booster.predict(rows, raw_score=True)).float()

    def _matrix(
        self, users: Mapping[str, Any], items: Mapping[str, Any], context: Mapping[str, Tensor],
        user: Tensor, item: Tensor,
    ) -> np.ndarray:  # fmt: skip
        """What the trees read of n pairs [n, columns] float32: rows of ``users`` and ``items``."""
        columns: list[Tensor] = []
        sides = zip(self.sides, (users, items, context), (user, item, None), strict=True)
        for features, given, rows in sides:
            for feature in features:
                column = given[feature.name]
                if not isinstance(column, Ragged):
                    columns.append(column if rows is None else column[rows])
                    continue
                assert rows is not None  # a pair has no history
                lengths, last = column.lengths, column.offsets[1:] - 1
                ids = torch.cat([column.values, column.values.new_zeros(1)])  # of an empty one, the padding
                columns += [lengths[rows], ids[torch.where(lengths > 0, last, len(ids) - 1)][rows]]
                if (target := self._target(feature)) is not None:
                    columns.append(_occurrences(column, items[target], user, item))
        return np.stack([column.cpu().numpy().astype(np.float32) for column in columns], axis=1)

    def _target(self, history: Feature) -> str | None:
        """The item's feature that shares a user's history's vocabulary."""
        if history.side != "user":
            return None
        return next(
            (
                f.name
                for f in self.sides[1]
                if f.kind == "categorical" and vocabulary_of(f) == vocabulary_of(history)
            ),
            None,
        )

    def _categories(self) -> list[int]:
        """Which columns of the matrix hold short lists of categories."""
        kinds: list[bool] = []
        for feature in [feature for side in self.sides for feature in side]:
            short = feature.kind == "categorical" and self.features.size(vocabulary_of(feature)) <= CATEGORIES
            kinds += [short]
            if feature.kind == "sequence":
                kinds += [False] * (1 + (self._target(feature) is not None))
        return [i for i, short in enumerate(kinds) if short]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that ``from_pretrained`` opens: the trees as LightGBM's text, and JSON."""
        if self.booster is None:
            raise RunError("gradient boosting was not fitted, so there is nothing to save.")
        texts = {TREES: self.booster.model_to_string()}
        write_feature_model(folder, TYPE, self.arguments, self.features, None, texts)


class OutOfFold:
    """Scores of a train split's listed pairs, found again by the rows of query and candidate."""

    def __init__(self, source: str, judged: Judged, query: Tensor, scores: Tensor):
        self.source, self.count = source, len(judged.candidates)
        keys = query * self.count + judged.candidates.same[judged.listed.values]
        self.keys, order = keys.sort(stable=True)
        self.scores = scores[order]

    def instead_of(self, said: Tensor, query: Tensor, candidate: Tensor) -> Tensor:
        """``said`` [n], but what is known of a pair where it is known."""
        keys = (query * self.count + candidate).cpu()
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[place] == keys, self.scores[place], said)


def lightgbm() -> Any:
    """The library.

    Raises:
        RecipeError: It is not installed.
    """
    try:
        import lightgbm
    except ImportError as error:
        raise RecipeError(
            "gradient boosting needs LightGBM, which is not installed: pip install 'distill-search[recsys]'."
        ) from error
    return lightgbm


def _read(folder: Path) -> Any:
    try:
        return lightgbm().Booster(model_str=(folder / TREES).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, lightgbm().basic.LightGBMError) as error:
        raise DataError(
            f"{folder / TREES} cannot be read ({error}). It was not saved, copied or downloaded whole; do so "
            f"again."
        ) from error


def _parts(n: int) -> Iterator[slice]:
    for start in range(0, n, AT_ONCE):
        yield slice(start, start + AT_ONCE)


def _occurrences(history: Ragged, target: Tensor, user: Tensor, item: Tensor) -> Tensor:
    """How often each pair's candidate is in its user's history: [n]."""
    seen, wanted = history.select(user), target[item]
    owner = torch.repeat_interleave(torch.arange(len(user)), seen.lengths)
    return torch.zeros(len(user)).index_add_(0, owner, (seen.values == wanted[owner]).float())
