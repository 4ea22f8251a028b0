"""A privileged feature whose strength is chosen: data, and the ridge that shows the inverted U."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from distill.batch import Ragged
from distill.data.dataset import DataSet
from distill.data.feature_schema import Feature
from distill.data.feature_table import FeatureTable, Names
from distill.data.features import Features
from distill.data.frames import need_polars
from distill.data.interaction_source import InteractionSource
from distill.data.judged import Judged
from distill.data.negatives import Negatives

NOISE = 0.5  # deviation of what z says beside x and y
STRENGTH = 1.5  # norm of b: how much of y the x decide


@dataclass(frozen=True)
class Sample:
    """n draws: regular x [n, D], privileged z [n], labels y [n]."""

    x: np.ndarray
    z: np.ndarray
    y: np.ndarray


def draw(rows: int, b: np.ndarray, a: float, c: float, random: np.random.Generator) -> Sample:
    r"""x of N(0, I), y of Bernoulli(sigmoid(x b)), z = a (x b) + c (2y - 1) + 0.5 N(0, 1)."""
    x = random.standard_normal((rows, len(b)))
    logits = x @ b
    y = (random.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.float64)
    z = a * logits + c * (2 * y - 1) + NOISE * random.standard_normal(rows)
    return Sample(x, z, y)


def direction(dim: int, random: np.random.Generator) -> np.ndarray:
    """A random b [dim] of norm 1.5."""
    b = random.standard_normal(dim)
    return STRENGTH * b / np.linalg.norm(b)


class SimulatedPrivileged(DataSet):
    r"""Users with features x, one item, a label y, and a privileged z that knows more of y than x does.

    .. math:: x \sim N(0, I), \quad y \sim \mathrm{Bernoulli}(\sigma(x \cdot b)), \quad
              z = a\,(x \cdot b) + c\,(2y - 1) + 0.5\,N(0, 1)

    With ``a`` the teacher sees x without its noise, with ``c`` it sees the label. As c grows the teacher
    gets better all the way, a student that learns from it first better, then worse: what an over-predictive
    teacher says is nearly the label again. Our re-implementation of what Yang et al. found.

    Args:
        a: How much of x's part z holds.
        c: How much of the label z holds.
        train: Rows; few, as the student gains where labels are few.
        dev: Rows.
        test: Rows.
        dim: How many features a user has.
        seed: Of b and of all rows.

    References:
        Yang et al., 2022. Toward Understanding Privileged Features Distillation in Learning-to-Rank.
        arXiv:2209.08754
    """

    def __init__(
        self,
        a: float = 1.0,
        c: float = 0.5,
        train: int = 300,
        dev: int = 2000,
        test: int = 20_000,
        dim: int = 50,
        seed: int = 0,
    ):
        if min(train, dev, test, dim) < 2:
            raise ValueError("train, dev, test and dim must be at least 2.")
        if not (np.isfinite(a) and np.isfinite(c)):
            raise ValueError(f"a ({a}) and c ({c}) must be finite.")
        super().__init__(["train", "dev", "test"])
        self.a, self.c, self.dim, self.seed = a, c, dim, seed
        self.rows = {"train": train, "dev": dev, "test": test}
        self._features: Features | None = None

    @property
    def features(self) -> Features:
        if self._features is None:
            pl = need_polars()
            user = [Feature(name=f"x{i:02}", kind="dense", side="user") for i in range(self.dim)]
            item = Feature(name="item", kind="categorical", side="item")
            z = Feature(name="z", kind="dense", side="context", privileged=True)
            sample = self.sample("train")
            frame = pl.DataFrame({f.name: sample.x[:, i] for i, f in enumerate(user)})
            fitted = Features([*user, item, z])
            self._features = fitted.fit(frame, pl.DataFrame({"item": [0]}), pl.DataFrame({"z": sample.z}))
        return self._features

    def sample(self, name: str) -> Sample:
        """The rows of a split, the same for each a and c but for z."""
        b = direction(self.dim, np.random.default_rng((self.seed, 0)))
        random = np.random.default_rng((self.seed, 1 + self.splits.index(name)))
        return draw(self.rows[name], b, self.a, self.c, random)

    def read(self, name: str) -> Judged:
        sample, n = self.sample(name), self.rows[name]
        columns = {f"x{i:02}": torch.from_numpy(sample.x[:, i]).float() for i in range(self.dim)}
        return Judged(
            task="pairs",
            queries=FeatureTable(Names(range(n)), columns),
            candidates=FeatureTable(Names(["item"]), {"item": torch.tensor([2])}),
            listed=Ragged(torch.zeros(n, dtype=torch.int64), torch.arange(n + 1)),
            labels=torch.from_numpy(sample.y).float(),
            name=f"SimulatedPrivileged ({name})",
            pair={"z": torch.from_numpy(sample.z).float()},
        )

    def train_source(
        self,
        batch_size: int,
        candidates: int = 8,
        negatives: Sequence[Negatives] = (),
        seed: int = 0,
        name: str = "data",
        with_positive: bool = False,
    ) -> InteractionSource:
        return InteractionSource(
            self.split("train"), batch_size, candidates, negatives, seed, name, with_positive
        )


def ridge(x: np.ndarray, targets: np.ndarray, l2: float) -> np.ndarray:
    """The weights w [D] that minimise the cross-entropy to ``targets`` in [0, 1] plus l2 |w|^2 / 2."""
    from scipy.optimize import minimize

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        f = x @ w
        value = (np.logaddexp(0, f) - targets * f).sum() + 0.5 * l2 * (w @ w)
        return float(value), x.T @ (1 / (1 + np.exp(-f)) - targets) + l2 * w

    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x


@dataclass(frozen=True)
class Outcome:
    """AUCs of the teacher on train, of student and direct training on test; variance of g."""

    teacher: float
    student: float
    direct: float
    variance: float


def simulate(a: float, c: float, seed: int, rows: int = 300, test: int = 20_000, dim: int = 50) -> Outcome:
    """A teacher (L2 20 on x and z), a student (L2 1) of its probabilities g alone, and one of the labels."""
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(seed)
    b = direction(dim, random)
    told, asked = draw(rows, b, a, c, random), draw(test, b, a, c, random)
    both = np.column_stack([told.x, told.z])
    logits = both @ ridge(both, told.y, 20.0)
    g = 1 / (1 + np.exp(-logits))
    student, direct = (asked.x @ ridge(told.x, targets, 1.0) for targets in (g, told.y))
    return Outcome(
        roc_auc_score(told.y, logits),
        roc_auc_score(asked.y, student),
        roc_auc_score(asked.y, direct),
        float(g.var()),
    )
