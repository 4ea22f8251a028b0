"""How fast a two-tower learns: ours beside torch-rechub's ``MatchTrainer``.

    python benchmarks/train_two_tower.py --peer FOLDER --output train_two_tower.cpu.json

Both train DSSM on MovieLens 1M, point-wise: five user fields and a history of 50 films in one tower, the
film's id in the other, layers of 256, 128 and 64, tables 16 wide, batches of 4,096 rows (a user at a moment,
a film, a label), one positive and 3 uniform negatives per user. The rows are the same (a drawn film that the
user has rated is left out, so ours has a few less in a batch); the peer's own loader shuffles them. Speed is
rows per second of training steps, loading included; the first steps warm up and are not counted.
The peer's loader is measured with and without worker processes, and ``ratio`` is ours over the faster.

``ours_large`` hashes the user's id into 2 million rows: the step's cost must not grow with the table. The
losses of both sides are compared as means over tenths of the training (optimisers and norms differ, so the
curves are alike, not equal).

``--peer`` is a folder that holds the package ``torch_rechub`` (0.9), where it is not installed:
``pip install --no-deps --target FOLDER 'torch-rechub==0.9.*'``. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import alternate, data_folder, device_of, machine, median, options, report, wait_for
from torch import nn

from distill.batch import Batch
from distill.data.interaction_source import InteractionSource
from distill.objectives.base import Loss

USERS, CANDIDATES, HISTORY = 1024, 4, 50  # users of a batch, films listed per user
ROWS = USERS * CANDIDATES
WIDTHS, DIM, RATE, SEED = (256, 128, 64), 16, 1e-3, 1
FIELDS = ("user_id", "gender", "age", "occupation", "zip")
LARGE = 2_000_000
TARGET = 8.0


@dataclass
class Run:
    """One training: when each step ended, and its loss."""

    device: torch.device
    warm: int
    steps: int
    rows: int  # of the steps after the warm-up
    losses: list[torch.Tensor] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    def watch(self, loss: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Hooks on what both sides have: the loss's forward and the optimiser's step."""
        loss.register_forward_hook(lambda module, given, said: self.losses.append(self._mean(said)))
        optimizer.register_step_post_hook(lambda *_: self._end())

    @staticmethod
    def _mean(said: Any) -> torch.Tensor:
        """A scalar, or our summed losses and counts."""
        return (said.loss.sum() / said.count.sum() if isinstance(said, Loss) else said).detach()

    def _end(self) -> None:
        if len(self.ends) + 1 in (self.warm, self.steps):
            wait_for(self.device)
        self.ends.append(time.perf_counter())

    @property
    def speed(self) -> float:
        """Rows per second after the warm-up."""
        return self.rows / (self.ends[self.steps - 1] - self.ends[self.warm - 1])

    @property
    def curve(self) -> list[float]:
        """The mean loss of each tenth of the training."""
        tenths = torch.stack(self.losses[: self.steps]).cpu().double().tensor_split(10)
        return [round(float(part.mean()), 4) for part in tenths if len(part)]

    def __str__(self) -> str:
        return f"{self.speed:,.0f} rows/s, loss {self.curve[0]:.4f} to {self.curve[-1]:.4f}"


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    device: torch.device
    folder: Path
    warm: int
    steps: int  # the warm-up's included


def films(setting: Setting, user_rows: int | None = None) -> tuple[Any, InteractionSource]:
    """The features and the batches of MovieLens 1M; with ``user_rows`` the user's id is hashed."""
    from distill.data import MovieLens, RandomNegatives

    schema: list[dict[str, Any]] = [{"name": name, "kind": "categorical", "side": "user"} for name in FIELDS]
    if user_rows is not None:
        schema[0]["hash_buckets"] = user_rows
    schema += [
        {"name": "hist_movie_id", "kind": "sequence", "side": "user", "vocabulary": "movie_id"},
        {"name": "movie_id", "kind": "categorical", "side": "item"},
    ]
    schema[-2]["max_length"] = HISTORY
    data = MovieLens(setting.folder / "ml-1m", features=schema, history=HISTORY)
    negatives = [RandomNegatives(count=CANDIDATES - 1)]
    return data.features, data.train_source(USERS, CANDIDATES, negatives, SEED)


def rows_of(batch: Batch) -> dict[str, np.ndarray]:
    """The listed pairs of a batch as the peer's loader takes them: a row each, histories padded to 50."""
    user, place = batch.mask.nonzero(as_tuple=True)
    item = batch.index[user, place]
    history, _ = batch.queries["hist_movie_id"].padded(0, HISTORY)
    columns = {name: batch.queries[name][user] for name in FIELDS}
    columns |= {"hist_movie_id": history[user], "movie_id": batch.candidates["movie_id"][item]}
    assert batch.labels is not None
    return {name: column.numpy() for name, column in {**columns, "label": batch.labels[user, place]}.items()}


def peer_rows(source: InteractionSource, steps: int) -> tuple[dict[str, np.ndarray], list[int]]:
    """The rows of the first batches, enough for ``steps`` of the peer's; and how many each of ours has."""
    source.prepare(*((_Named(n) for n in names) for names in ([*FIELDS, "hist_movie_id"], ["movie_id"])))
    parts: list[dict[str, np.ndarray]] = []
    while sum(sizes := [len(part["label"]) for part in parts]) < steps * ROWS:
        parts.append(rows_of(source.batch(0, len(parts))))
    return {name: np.concatenate([part[name] for part in parts])[: steps * ROWS] for name in parts[0]}, sizes


@dataclass(frozen=True)
class _Named:
    key: str


def train_peer(setting: Setting, features: Any, rows: dict[str, np.ndarray], workers: int) -> Run:
    """``MatchTrainer`` with its own loader and optimiser (Adam)."""
    from torch_rechub.basic.features import SequenceFeature, SparseFeature
    from torch_rechub.models.matching import DSSM
    from torch_rechub.trainers import MatchTrainer
    from torch_rechub.utils.data import MatchDataGenerator

    torch.manual_seed(SEED)
    run = Run(setting.device, setting.warm, setting.steps, ROWS * (setting.steps - setting.warm))
    size = features.size
    users = [SparseFeature(name, vocab_size=size(name), embed_dim=DIM) for name in FIELDS]
    users.append(
        SequenceFeature(
            "hist_movie_id",
            vocab_size=size("movie_id"),
            embed_dim=DIM,
            pooling="mean",
            shared_with="movie_id",
            padding_idx=0,
        )
    )
    items = [SparseFeature("movie_id", vocab_size=size("movie_id"), embed_dim=DIM)]
    tower = {"dims": list(WIDTHS), "activation": "prelu"}
    model = DSSM(users, items, user_params=tower, item_params=dict(tower))
    x, y = {name: column for name, column in rows.items() if name != "label"}, rows["label"]
    few = {name: column[:1] for name, column in x.items()}
    loader, _, _ = MatchDataGenerator(x, y).generate_dataloader(few, few, ROWS, num_workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MatchTrainer(
            model,
            mode=0,
            optimizer_params={"lr": RATE, "weight_decay": 0.0},
            n_epoch=1,
            device=str(setting.device),
            model_path=folder,
        )
        run.watch(trainer.criterion, trainer.optimizer)
        trainer.fit(loader)
    return run


def train_ours(
    setting: Setting, features: Any, source: InteractionSource, sizes: list[int], precision: str
) -> Run:
    """Our trainer on the source's own batches."""
    from distill.graph import Arrow, DistillationGraph
    from distill.nn import MLPTower
    from distill.objectives import BinaryCrossEntropy
    from distill.settings import TrainSettings
    from distill.trainer import Trainer
    from students import TwoTower

    torch.manual_seed(SEED)
    run = Run(setting.device, setting.warm, setting.steps, sum(sizes[setting.warm : setting.steps]))
    student = TwoTower(
        features, embedding_dim=DIM, user_tower=MLPTower(WIDTHS), item_tower=MLPTower(WIDTHS), temperature=1.0
    )
    bce = Arrow("bce", BinaryCrossEntropy(), "student")
    graph = DistillationGraph({"student": student}, [bce], trained=["student"])
    source.prepare(*graph.columns())
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            graph,
            source,
            TrainSettings(
                steps=setting.steps,
                batch_size=USERS,
                learning_rate=RATE,
                weight_decay=0.0,
                warmup=0.0,
                schedule="constant",
                mixed_precision=precision,  # type: ignore[arg-type]
                seed=SEED,
                evaluate_every=None,
            ),
            folder,
        )
        run.watch(bce.objective, trainer.optimizers[-1].optimizer)
        trainer.fit()
    return run


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.peer is not None:
        sys.path.append(str(arguments.peer))
    device, quick = device_of(arguments.device), arguments.quick
    folder = data_folder()
    if folder is None or not (folder / "ml-1m").is_dir():
        sys.exit("no ml-1m: set DISTILL_DATA to the folder of the data sets.")
    warm = 5
    setting = Setting(device, folder, warm, warm + (arguments.steps or (20 if quick else 200)))
    started = time.perf_counter()
    features, source = films(setting)
    large_features, large = films(setting, LARGE)
    rows, sizes = peer_rows(source, setting.steps)
    print(
        f"data: {time.perf_counter() - started:.1f} s, {len(rows['label']):,} rows for the peer", flush=True
    )

    sides: dict[str, Callable[[], Run]] = {
        "peer": partial(train_peer, setting, features, rows, 0),
        "ours": partial(train_ours, setting, features, source, sizes, "auto"),
        "peer_workers": partial(train_peer, setting, features, rows, 2),
        "ours_float32": partial(train_ours, setting, features, source, sizes, "no"),
        "ours_large": partial(train_ours, setting, large_features, large, sizes, "auto"),
    }
    budget = 150 - (time.perf_counter() - started) if quick else None
    runs = alternate(sides, arguments.rounds or (2 if quick else 3), budget)
    found: dict[str, dict[str, Any]] = {
        name: {
            "rows_per_second": round(median([one.speed for one in several])),
            "each": [round(one.speed) for one in several],
            "loss": several[-1].curve,
        }
        for name, several in runs.items()
    }
    speed = {name: side["rows_per_second"] for name, side in found.items()}
    ratio = speed["ours"] / max(speed["peer"], speed["peer_workers"])
    return {
        "benchmark": "train_two_tower",
        "quick": quick,
        "ratio": round(ratio, 3),
        "ratio_float32": round(speed["ours_float32"] / max(speed["peer"], speed["peer_workers"]), 3),
        "target": TARGET,
        "reached": bool(ratio >= TARGET),
        "table_rows": {"ours": features.size("user_id"), "ours_large": large_features.size("user_id")},
        "large_over_small": round(speed["ours_large"] / speed["ours"], 3),
        "steps": setting.steps - warm,
        "rows_of_a_step": ROWS,
        "sides": found,
        "machine": machine(device),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, help="how many steps are timed in each run")
    parser.add_argument("--peer", type=Path, help="a folder with the package torch_rechub")
    arguments = parser.parse_args()
    report(run(arguments), arguments.output)


if __name__ == "__main__":
    main()
