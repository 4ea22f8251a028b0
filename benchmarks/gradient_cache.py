"""How much memory a large batch takes, with its gradient cached and without.

    python benchmarks/gradient_cache.py --output gradient_cache.cpu.json

One optimiser step of a 6-layer MiniLM on 1,024 queries with two texts each (about 10 and 60 words, drawn from
a short list), in-batch negatives, AdamW, float32, on a CPU; each in a process of its own, whose peak resident
memory is read. Without caching the same batch would not fit, so smaller ones are measured and a line is put
through them.

The last line is a JSON object: ``peak_gb`` with caching, ``peak_gb_without`` as the line has it (1 GB is 10^9
bytes), and the raw figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _measure import MINILM, machine, report

TEXTS = 2  # per query
TARGET_GB = 8.0
WORDS = """
    river sea ship water air fire earth light sound cell gene blood heart brain drug patient risk study trial
    wing flow jet heat plate wave speed pressure body surface layer theory model data system program language
""".split()


def one_step(model: str, queries: int, rows: int | None) -> dict[str, Any]:
    """Train one step in this process: its peak memory and its seconds."""
    from distill.batch import Ragged
    from distill.data import Judged, TextSource, TextTable
    from distill.graph import Arrow, DistillationGraph
    from distill.objectives import SampledSoftmax
    from distill.settings import TrainSettings
    from distill.trainer import Trainer
    from students import BiEncoder

    chance = random.Random(1)

    def texts(n: int, words: int) -> list[str]:
        lengths = (chance.randint(words // 2, words * 3 // 2) for _ in range(n))
        return [" ".join(chance.choices(WORDS, k=length)) + f" {i}" for i, length in enumerate(lengths)]

    def table(given: list[str]) -> TextTable:
        return TextTable([str(i) for i in range(len(given))], given)

    judged = Judged(
        task="rerank",
        queries=table(texts(queries, 10)),
        candidates=table(texts(queries * TEXTS, 60)),
        listed=Ragged.of([[TEXTS * q + i for i in range(TEXTS)] for q in range(queries)]),
        labels=torch.tensor([float(i == 0) for _ in range(queries) for i in range(TEXTS)]),
    )
    graph = DistillationGraph(
        {"student": BiEncoder(model)}, [Arrow("labels", SampledSoftmax(), "student")], ["student"]
    )
    source = TextSource(judged, queries, TEXTS, seed=1)
    source.prepare(*graph.columns())
    settings = TrainSettings(steps=1, batch_size=queries, mixed_precision="no", gradient_cache=rows)
    batch = source.batch(0, 0)
    ids = sum(len(column.values) for side in (batch.queries, batch.candidates) for column in side.values())
    loaded, start = peak_gb(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(graph, source, settings, folder)
        losses, _, _ = trainer._step()
    return {
        "queries": queries,
        "rows": rows,
        "ids": ids,
        "loaded_gb": loaded,
        "peak_gb": peak_gb(),
        "seconds": round(time.perf_counter() - start, 1),
        "loss": round(losses["labels"].item(), 6),
    }


def peak_gb() -> float:
    """The most memory this process held at any time: its resident set, in GB."""
    from distill.progress import peak_memory

    return (peak_memory() or 0) / 1e3


def measured(model: str, queries: int, rows: int | None) -> dict[str, Any]:
    """``one_step`` in a process of its own."""
    asked = json.dumps({"model": model, "queries": queries, "rows": rows})
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, "--one", asked],
            env={**os.environ, "DISTILL_CACHE": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    print(found, flush=True)
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    queries = 64 if arguments.quick else 1024
    small = (8, 16) if arguments.quick else (16, 48)
    cached = measured(arguments.model, queries, arguments.rows)
    few, more = (measured(arguments.model, n, None) for n in small)
    slope = (more["peak_gb"] - few["peak_gb"]) / (more["ids"] - few["ids"])
    without = few["peak_gb"] + slope * (cached["ids"] - few["ids"])
    return {
        "benchmark": "gradient_cache",
        "quick": arguments.quick,
        "queries": queries,
        "texts": TEXTS,
        "peak_gb": cached["peak_gb"],
        "peak_gb_without": round(without, 1),
        "targets": {"peak_gb": TARGET_GB},
        "reached": cached["peak_gb"] < TARGET_GB,
        "cached": cached,
        "without": [few, more],
        "machine": machine(torch.device("cpu")),
    }


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one_step(**json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="64 queries: ends within 3 minutes")
    parser.add_argument("--model", default=MINILM, help="a sentence-transformers folder")
    parser.add_argument(
        "--output", type=Path, help="also write the JSON here; a bare name: benchmarks/results/"
    )
    parser.add_argument("--rows", type=int, default=32, help="texts that are represented at a time")
    arguments = parser.parse_args()
    report(run(arguments), arguments.output)


if __name__ == "__main__":
    main()
