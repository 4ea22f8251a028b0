"""How fast interactions become a data set, and in how much memory: 1, 3 and 10 million generated rows.

    python benchmarks/prepare_interactions.py --output prepare_interactions.cpu.json

Both sides read the same parquet file of users, items and times, put it in order, leave each user's last two
out, learn the ids of what is left, encode all rows, and find every row's history: the last 50 of its user
that are strictly earlier, and what each user saw before the test. Ours is ``distill.data.Interactions``; the
peer is the same in pandas, without a loop over rows. Each run is a process of its own, the sides take turns,
and ``peak_gb`` is the most memory that process held. The last line is a JSON object: ``ratio`` is how many
times as many rows per second ours prepares at the largest size, ``memory_ratio`` the peer's memory over ours,
``bytes_per_row`` the growth between the smallest and the largest size.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # what is measured is this checkout, whether or not it is installed

HISTORY = 50
SIZES = (1_000_000, 3_000_000, 10_000_000)


def generate(path: Path, rows: int) -> None:
    """A log of ``rows`` interactions: 100 per user, items by a power law, times at random, not in order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    items = np.minimum(random.pareto(1.1, rows) * 20, 99_999).astype(np.int64)
    columns = {
        "user_id": random.integers(rows // 100, size=rows) * 7 + 3,
        "item_id": items * 13 + 5,
        "timestamp": random.integers(1_600_000_000, 1_700_000_000, size=rows),
    }
    pq.write_table(pa.table(columns), path)


def ours(path: Path) -> dict[str, int]:
    from distill.data import Interactions

    features = [
        {"name": "user_id", "kind": "categorical", "side": "user"},
        {
            "name": "hist_item_id",
            "kind": "sequence",
            "side": "user",
            "vocabulary": "item_id",
            "max_length": HISTORY,
        },
        {"name": "item_id", "kind": "categorical", "side": "item"},
    ]
    data = Interactions(str(path), features)
    train, test = data.split("train"), data.split("test")
    lengths = train.queries.histories["hist_item_id"].lengths  # type: ignore[attr-defined]
    return {
        "train": len(train.queries),
        "test": len(test.queries),
        "items": data.features.size("item_id") - 2,
        "history": int(lengths.sum()),
        "seen": len(test.seen.values) if test.seen is not None else 0,
    }


def pandas(path: Path) -> dict[str, int]:
    import pandas as pd

    rows = pd.read_parquet(path)
    rows = rows.sort_values(["user_id", "timestamp", "item_id"], kind="stable", ignore_index=True)
    by_user = rows.groupby("user_id", sort=False)
    place = by_user.cumcount()
    back = by_user["item_id"].transform("size") - 1 - place
    train, test = back >= 2, back == 0
    items = np.sort(rows.loc[train, "item_id"].unique())
    users = np.sort(rows.loc[train, "user_id"].unique())
    rows["item"] = pd.Index(items).get_indexer(rows["item_id"]) + 2
    rows["user"] = pd.Index(users).get_indexer(rows["user_id"]) + 2
    earlier = place.groupby([rows["user_id"], rows["timestamp"]], sort=False).transform("min")
    lengths = earlier.clip(upper=HISTORY)
    starts = rows.index.to_series() - place + earlier - lengths
    assert len(starts) == len(rows)
    target = rows["item_id"].where(test).groupby(rows["user_id"], sort=False).transform("max")
    seen = rows.loc[~test & (rows["item_id"] != target), ["user_id", "item_id"]].drop_duplicates()
    return {
        "train": int(train.sum()),
        "test": int(test.sum()),
        "items": len(items),
        "history": int(lengths[train].sum()),
        "seen": len(seen),
    }


def measured(side: str, path: Path) -> None:
    """One run, in this process: what it found, seconds and peak, as JSON."""
    if side == "ours":
        importlib.import_module("distill.data")
        importlib.import_module("polars")
    else:
        importlib.import_module("pandas")
    before = peak_gb()
    start, cpu = time.perf_counter(), time.process_time()
    found = (ours if side == "ours" else pandas)(path)
    told = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps({"found": found, **told, "peak_gb": peak_gb(), "libraries_gb": before}))


def peak_gb() -> float:
    """The most memory this process held at any time: its resident set, in GB."""
    status = Path("/proc/self/status")
    held = status.read_text().partition("VmHWM:")[2].split()[:1] if status.exists() else []
    return int(held[0]) * 1024 / 1e9 if held else 0.0


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = arguments.sizes or (SIZES[:2] if arguments.quick else SIZES)
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in sizes:
            path = Path(folder) / f"{rows}.parquet"
            generate(path, rows)
            runs: dict[str, list[dict[str, Any]]] = {"ours": [], "pandas": []}
            for number in range(rounds):
                for side, done in runs.items():
                    command = [sys.executable, __file__, "--side", side, "--file", str(path)]
                    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    done.append(json.loads(told.splitlines()[-1]))
                    seconds, peak = done[-1]["seconds"], done[-1]["peak_gb"]
                    print(
                        f"{rows:,} rows, round {number + 1}: {side} {seconds:.2f} s, {peak:.2f} GB",
                        flush=True,
                    )
            found = [one["found"] for done in runs.values() for one in done]
            assert all(one == found[0] for one in found), f"the sides prepare different things: {found}"
            figures.append(
                {"rows": rows, "found": found[0], **{s: medians(d, rows) for s, d in runs.items()}}
            )
            path.unlink()
    first, last = figures[0], figures[-1]
    growth = {
        side: round(
            (last[side]["peak_gb"] - first[side]["peak_gb"]) * 1e9 / (last["rows"] - first["rows"]), 1
        )
        for side in ("ours", "pandas")
    }
    return {
        "benchmark": "prepare_interactions",
        "quick": arguments.quick,
        "ratio": round(last["ours"]["rows_per_second"] / last["pandas"]["rows_per_second"], 2),
        "memory_ratio": round(last["pandas"]["peak_gb"] / last["ours"]["peak_gb"], 2),
        "bytes_per_row": growth,
        "rounds": rounds,
        "sizes": figures,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
    }


def medians(runs: list[dict[str, Any]], rows: int) -> dict[str, float]:
    seconds = statistics.median(run["seconds"] for run in runs)
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(statistics.median(run["cpu_seconds"] for run in runs), 3),
        "rows_per_second": round(rows / seconds),
        "peak_gb": round(statistics.median(run["peak_gb"] for run in runs), 3),
        "libraries_gb": round(statistics.median(run["libraries_gb"] for run in runs), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1 and 3 million rows, one round")
    parser.add_argument("--sizes", type=int, nargs="+", help="rows of each size (1, 3 and 10 million)")
    parser.add_argument("--rounds", type=int, help="how often the sides take turns at each size (3)")
    parser.add_argument(
        "--output", type=Path, help="also write the JSON here; a bare name: benchmarks/results/"
    )
    parser.add_argument("--side", choices=["ours", "pandas"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        measured(arguments.side, arguments.file)
        return
    result = run(arguments)
    if arguments.output is not None:
        bare = arguments.output.parent == Path()
        path = ROOT / "benchmarks" / "results" / arguments.output if bare else arguments.output
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
