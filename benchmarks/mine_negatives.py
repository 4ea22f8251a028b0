"""How much memory mining takes: neighbours of generated vectors, a million candidates within 4 GB.

    python benchmarks/mine_negatives.py --output mine_negatives.cpu.json

An encoder that generates its vectors stands for a real one: what is measured is the search, its files and
its lists (``distill.data.NearestNegatives``, its scores checked), in a process of its own. The last line is
a JSON object; ``peak_gb`` is the most memory that the process ever held, vectors and libraries included,
and ``recall`` the share of what was mined that is among the exact neighbours of its query.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # what is measured is this checkout, whether or not it is installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from distill.batch import Batch, Columns, Ragged  # noqa: E402
from distill.data import Judged, NearestNegatives, TextTable  # noqa: E402
from distill.graph import DistillationGraph  # noqa: E402
from distill.model import Encoder  # noqa: E402
from distill.outputs import Needs, Outputs  # noqa: E402
from distill.progress import peak_memory  # noqa: E402

BOUND = 4.0  # GB


class Generated(Encoder):
    """Unit vectors made of a text's number: near one of 4,093 centres, so that there are neighbours."""

    provides = frozenset({"queries", "candidates"})
    reads = Columns()

    def __init__(self, dim: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        tables = [torch.randn(size, dim, generator=generator) for size in (4093, 8179, 8191)]
        self.tables = torch.nn.ParameterList(tables)  # the sizes are prime: no two texts share all three rows

    @property
    def dim(self) -> int:
        return self.tables[0].shape[1]

    def vectors(self, numbers: Tensor) -> Tensor:
        summed = sum(table.detach()[numbers % len(table)] for table in self.tables)
        return torch.nn.functional.normalize(summed, dim=-1)

    def encode_queries(self, queries: Any, progress: bool = False) -> Tensor:
        return self.vectors(torch.tensor([4093 * 10**6 + int(text[1:]) for text in queries]))

    def encode_candidates(self, candidates: Any, progress: bool = False) -> Tensor:
        return self.vectors(torch.tensor([int(text) for text in candidates]))

    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        raise NotImplementedError


def generated(rows: int, queries: int) -> Judged:
    """Query i has one positive: a candidate of its own centre."""
    texts, asked = [str(i) for i in range(rows)], [f"q{i}" for i in range(queries)]
    return Judged(
        task="retrieval",
        queries=TextTable(asked, asked),
        candidates=TextTable(texts, texts),
        listed=Ragged.of_lengths(torch.arange(queries) % rows, torch.ones(queries, dtype=torch.int64)),
        labels=torch.ones(queries),
    )


def peak_gb() -> float:
    """The most memory this process held at any time: its resident set, in GB."""
    return (peak_memory() or 0) / 1e3


def recall(encoder: Generated, judged: Judged, sampler: NearestNegatives, some: int = 20) -> float:
    """Which share of the first queries' negatives a plain matrix product finds too."""
    from distill.evaluation import search

    assert sampler.mined is not None
    queries = encoder.encode_queries(judged.queries.texts[:some])  # each is its own distinct text
    texts, size, k = judged.candidates.texts, 2**16, sampler.top + 1  # one of them is the positive
    found = []
    for start in range(0, len(texts), size):
        scores, rows = search(queries, encoder.encode_candidates(texts[start : start + size]), k)
        found.append((scores, rows + start))
    scores = torch.cat([part for part, _ in found], dim=1)
    rows = torch.cat([part for _, part in found], dim=1)
    best = rows.gather(1, scores.topk(k, dim=1).indices)
    hits = [
        len(set(mined) & set(exact)) / len(mined)
        for mined, exact in zip(sampler.mined.rows.tolist(), best.tolist(), strict=False)
        if mined
    ]
    return sum(hits) / len(hits)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = arguments.rows or (50_000 if arguments.quick else 1_000_000)
    queries = arguments.queries or (500 if arguments.quick else 10_000)
    before = peak_gb()
    judged = generated(rows, queries)
    encoder = Generated(arguments.dim)
    sampler = NearestNegatives("teacher", 7, top=100, keep_below=0.9, strata=4)
    sampler.prepare(judged)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DISTILL_CACHE"] = f"{folder}/cache"
        graph = DistillationGraph({"teacher": encoder}, [], ())
        figures = sampler.refresh(graph, 0, Path(folder) / "run", torch.arange(queries))
    seconds = time.perf_counter() - start
    peak = peak_gb()
    return {
        "benchmark": "mine_negatives",
        "quick": arguments.quick,
        "rows": rows,
        "queries": queries,
        "dim": arguments.dim,
        "vectors_gb": rows * arguments.dim * 4 / 1e9,
        "seconds": round(seconds, 1),
        "peak_gb": round(peak, 3),
        "libraries_gb": round(before, 3),
        "bound_gb": BOUND,
        "within": peak < BOUND,
        "recall": round(recall(encoder, judged, sampler), 6),
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="50,000 candidates: a few seconds")
    parser.add_argument("--rows", type=int, help="candidates (1,000,000)")
    parser.add_argument("--queries", type=int, help="queries (10,000)")
    parser.add_argument("--dim", type=int, default=384, help="numbers in a vector")
    parser.add_argument(
        "--output", type=Path, help="also write the JSON here; a bare name: benchmarks/results/"
    )
    arguments = parser.parse_args()
    result = run(arguments)
    if arguments.output is not None:
        bare = arguments.output.parent == Path()
        path = ROOT / "benchmarks" / "results" / arguments.output if bare else arguments.output
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
