"""How fast a model's vectors are measured over a whole catalogue, and in how much memory.

    python benchmarks/evaluate_catalogue.py --output evaluate_catalogue.cpu.json

Users and items as many as MovieLens 1M has (6,040 and 3,706), random vectors, one target per user and as
many items seen before as its users have rated; seen items are left out. All sides begin at the vectors and
end at metrics at 10 and 100. They take turns:

- ours: ``distill.evaluation.evaluate_model``: exact, ties by id, with the values per query;
- the peer: what torch-rechub 0.9's examples do, with its own functions: an Annoy index, asked user by user,
  then ``topk_metrics``. It is approximate and leaves nothing out, so its metrics are its own. Where
  torch-rechub is not installed (``pip install torch-rechub annoy``), the first loop is the peer;
- two loops with numpy: for each user the scores of all items, seen ones at minus infinity, a sort of all (or,
  ``tight``, a partition), the first 100, the metrics of that user. Their metrics must be ours.

Then a million items, in a process of its own: ``large.peak_gb`` is the most memory that it held, vectors and
libraries included, before the loop is timed there too, on a few users. The last line is a JSON object;
``ratio`` is the peer's seconds by ours, ``large.ratio`` the loop's seconds per user by ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from _measure import alternate, machine, median, report
from torch import Tensor

from distill.batch import Ragged
from distill.data import Judged
from distill.evaluation import evaluate_model
from distill.evaluation.references import Rows
from distill.progress import peak_memory

METRICS = ["HitRate@10", "nDCG@10", "Recall@100", "MRR@100"]
DEPTH = 100
SECONDS, GB = 2.0, 2.0  # what was promised: 6,040 users in so many seconds, a million items in so many GB


@dataclass(frozen=True)
class Vectors:
    """A model that has encoded already: the vectors of rows are those rows of its tables."""

    users: Tensor  # [users, D]
    items: Tensor  # [items, D]
    search: ClassVar[str] = "dot"

    def scale(self) -> float:
        return 1.0

    def encode_queries(self, queries: Tensor, progress: bool = False) -> Tensor:
        return self.users[queries]

    def encode_candidates(self, candidates: Tensor, progress: bool = False) -> Tensor:
        return self.items[candidates]


def generated(users: int, items: int, dim: int, mean_seen: int, seed: int = 0) -> tuple[Vectors, Judged]:
    """Random vectors, a target per user, and lists of seen items whose lengths are drawn as exponentials."""
    draw = np.random.default_rng(seed)
    lengths = np.minimum(draw.exponential(mean_seen, users).astype(np.int64) + 1, items // 2)
    targets = draw.integers(0, items, users)
    pair = np.repeat(np.arange(users), lengths) * items + draw.integers(0, items, lengths.sum())
    pair = np.setdiff1d(pair, np.arange(users) * items + targets)  # distinct, and without the targets
    generator = torch.Generator().manual_seed(seed)
    model = Vectors(*(torch.randn(n, dim, generator=generator) for n in (users, items)))
    judged = Judged(
        task="retrieval",
        queries=Rows([f"u{row}" for row in range(users)]),
        candidates=Rows([f"{row:07}" for row in range(items)]),  # so that ids and rows have one order
        listed=Ragged.of_lengths(torch.from_numpy(targets), torch.ones(users, dtype=torch.int64)),
        labels=torch.ones(users),
        seen=Ragged.of_lengths(
            torch.from_numpy(pair % items), torch.from_numpy(np.bincount(pair // items, minlength=users))
        ),
    )
    return model, judged


def ours(model: Vectors, judged: Judged) -> tuple[float, dict[str, float]]:
    start = time.perf_counter()
    means = evaluate_model(model, judged, METRICS).means
    return time.perf_counter() - start, means


def loop(
    model: Vectors, judged: Judged, tight: bool = False, some: int | None = None
) -> tuple[float, dict[str, float]]:
    """The peer, user by user; of ``some`` users only."""
    users, items = model.users.numpy(), model.items.numpy()
    assert judged.seen is not None
    seen, bounds = judged.seen.values.numpy(), judged.seen.offsets.numpy()
    targets = judged.listed.values.numpy()
    start = time.perf_counter()
    hits, gains, recalls, reciprocals = [], [], [], []
    for user in range(len(users) if some is None else some):
        scores = items @ users[user]
        scores[seen[bounds[user] : bounds[user + 1]]] = -np.inf
        if tight:
            first = np.argpartition(-scores, DEPTH)[:DEPTH]
            first = first[np.argsort(-scores[first])]
        else:
            first = np.argsort(-scores)[:DEPTH]
        place = np.flatnonzero(first == targets[user])
        rank = int(place[0]) + 1 if len(place) else None
        hits.append(float(rank is not None and rank <= 10))
        gains.append(1 / math.log2(rank + 1) if rank is not None and rank <= 10 else 0.0)
        recalls.append(float(rank is not None))
        reciprocals.append(1 / rank if rank is not None else 0.0)
    means = [float(np.mean(values)) for values in (hits, gains, recalls, reciprocals)]
    return time.perf_counter() - start, dict(zip(METRICS, means, strict=True))


def rechub(model: Vectors, judged: Judged) -> tuple[float, dict[str, float]]:
    """The matching and the metrics of torch-rechub, as its examples call them."""
    from torch_rechub.basic.metric import topk_metrics
    from torch_rechub.utils.match import Annoy

    users, items = model.users.numpy(), model.items.numpy()
    targets = judged.listed.values.tolist()
    start = time.perf_counter()
    index = Annoy(n_trees=10)
    index.fit(items)
    found = {user: index.query(v=vector, n=DEPTH)[0] for user, vector in enumerate(users)}
    metrics = topk_metrics({user: [target] for user, target in enumerate(targets)}, found, topKs=[10, 100])
    took = time.perf_counter() - start
    return took, {name: float(str(values[-1]).split(":")[-1]) for name, values in metrics.items()}


def peak_gb() -> float:
    """The most memory this process held at any time: its resident set, in GB."""
    return (peak_memory() or 0) / 1e3


def large(users: int, items: int, dim: int) -> dict[str, Any]:
    """The figures of a large catalogue, of this process."""
    before = peak_gb()
    model, judged = generated(users, items, dim, mean_seen=165)
    seconds, means = ours(model, judged)
    peak, some = peak_gb(), min(users, 32)
    peer = loop(model, judged, some=some)[0] / some
    return {
        "items": items,
        "users": users,
        "vectors_gb": round(items * dim * 4 / 1e9, 3),
        "seconds": round(seconds, 2),
        "peer_seconds_per_user": round(peer, 4),
        "ratio": round(peer / (seconds / users), 2),
        "peak_gb": round(peak, 3),
        "libraries_gb": round(before, 3),
        "metrics": means,
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    model, judged = generated(arguments.users, arguments.items, arguments.dim, mean_seen=165)
    evaluate_model(model, judged, METRICS)  # what is imported and compiled on first use, for both
    sides = {
        "ours": lambda: ours(model, judged),
        "loop": lambda: loop(model, judged),
        "tight": lambda: loop(model, judged, tight=True),
    }
    peer = "loop"
    if importlib.util.find_spec("torch_rechub") is not None:
        peer, sides = "torch-rechub", {"torch-rechub": lambda: rechub(model, judged), **sides}
    found = alternate(sides, arguments.rounds)
    for name in METRICS:
        loops, mine = found["loop"][0][1][name], found["ours"][0][1][name]
        if abs(loops - mine) > 2 / arguments.users:  # sums in another order may break a tie differently
            sys.exit(f"{name}: ours is {mine}, the loop's {loops}.")
    seconds = {side: median([took for took, _ in of], 4) for side, of in found.items()}
    rows = arguments.large or (200_000 if arguments.quick else 1_000_000)
    asked = 256 if arguments.quick else 1_000
    command = [sys.executable, __file__, "--child", str(asked), str(rows), str(arguments.dim)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    catalogue = json.loads(said.splitlines()[-1])
    print(f"{rows:,} items: {catalogue}", flush=True)
    return {
        "benchmark": "evaluate_catalogue",
        "quick": arguments.quick,
        "peer": peer,
        "ratio": round(seconds[peer] / seconds["ours"], 2),
        "seconds": seconds,
        "within": {"seconds": seconds["ours"] < SECONDS, "gb": catalogue["peak_gb"] < GB},
        "all_seconds": {side: [round(took, 4) for took, _ in of] for side, of in found.items()},
        "users": arguments.users,
        "items": arguments.items,
        "seen": len(judged.seen.values) if judged.seen is not None else 0,
        "dim": arguments.dim,
        "depth": DEPTH,
        "metrics": found["ours"][0][1],
        "large": catalogue,
        "machine": machine(torch.device("cpu")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a large catalogue of 200,000 items")
    parser.add_argument("--users", type=int, default=6040)
    parser.add_argument("--items", type=int, default=3706)
    parser.add_argument("--large", type=int, help="items of the large catalogue (1,000,000)")
    parser.add_argument("--dim", type=int, default=64, help="numbers in a vector")
    parser.add_argument("--rounds", type=int, default=3, help="how often the sides take turns")
    parser.add_argument(
        "--output", type=Path, help="also write the JSON here; a bare name: benchmarks/results/"
    )
    parser.add_argument("--child", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(large(*arguments.child)), flush=True)
        return
    report(run(arguments), arguments.output)


if __name__ == "__main__":
    main()
