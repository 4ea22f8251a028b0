"""What it costs to hear a transformer's queries and keys: a forward with and without listening.

    python benchmarks/attention.py --output attention.cpu.json

A forward of six layers over 256 of WikiQA's pairs (docstrings where that is not there), as a teacher reads a
batch, a logit of each: alone, while the last layer is heard, and while all are. Then a forward and a backward
over a quarter of them, as a student learns. The aim is less than a tenth more for a layer. The last line is a
JSON object; ``ratio`` is time with the last layer heard over time without, ``ratio_all`` with all of them,
``ratio_learning`` with all of them while learning.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _groups import CANDIDATES, read_groups
from _measure import Peak, alternate, device_of, forward_flops, machine, median, options, report, wait_for

AIM = 1.1
PAIRS = 256


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = device_of(arguments.device)
    from distill.nn.precision import resolve_precision, serving_autocast
    from students import BiEncoder
    from teachers import CrossEncoder

    model = CrossEncoder(arguments.model, classes=1).to(device)
    data, groups = read_groups(PAIRS // CANDIDATES)
    queries = [query for query, texts in zip(groups.queries, groups.candidates, strict=True) for _ in texts]
    candidates = [text for texts in groups.candidates for text in texts]
    asked, read = (model.column.encode(texts) for texts in (queries, candidates))
    ids, types = model.encoder.tokenizer.frame_pairs(asked, read, model.max_length, model.query_max_length)
    heads = {"logits": lambda output, mask: output.logits}

    few = torch.arange(len(ids) // 4)
    fewer, their_types = ids.select(few), None if types is None else types.select(few)

    def forward(layers: list[int]) -> Callable[[], float]:
        def timed() -> float:
            start = time.perf_counter()
            with torch.no_grad(), serving_autocast(model):
                model.encoder.read(ids, types, heads, layers=layers)
            wait_for(device)
            return round(time.perf_counter() - start, 4)

        return timed

    def step(layers: list[int]) -> Callable[[], float]:
        read = {"first": lambda output, mask: output.last_hidden_state[:, 0]}

        def timed() -> float:
            start = time.perf_counter()
            with serving_autocast(model):
                said = learning.read(fewer, their_types, read, layers=layers)
            sum(one.float().square().sum() for one in said.values()).backward()
            wait_for(device)
            return round(time.perf_counter() - start, 4)

        return timed

    learning = BiEncoder(arguments.model, dropout=0.0).to(device).query_tower.encoder.train()
    every = [*range(model.sizes["layers"])]
    sides = {
        "alone": forward([]),
        "last": forward([-1]),
        "all": forward(every),
        "learning": step([]),
        "learning_all": step(every),
    }
    for side in sides.values():
        side()  # a warm-up
    seconds = alternate(sides, arguments.rounds or (5 if arguments.quick else 15))
    peaks = Peak(device, seconds=0.3)
    least = {name: min(runs) for name, runs in seconds.items()}
    flops = forward_flops(model.encoder.backbone, ids.lengths)
    ratio = round(least["last"] / least["alone"], 3)
    return {
        "benchmark": "attention",
        "quick": arguments.quick,
        "ratio": ratio,
        "ratio_all": round(least["all"] / least["alone"], 3),
        "ratio_learning": round(least["learning_all"] / least["learning"], 3),
        "aim": AIM,
        "reached": ratio <= AIM,
        "pairs": len(queries),
        "tokens": int(ids.lengths.sum()),
        "share_of_peak": peaks.share(flops, least["alone"]),
        "seconds": seconds,
        "median_seconds": {name: median(runs, 4) for name, runs in seconds.items()},
        "precision": resolve_precision(model.precision, device),
        "data": data,
        "machine": machine(device),
    }


def main() -> None:
    arguments = options(__doc__).parse_args()
    report(run(arguments), arguments.output)


if __name__ == "__main__":
    main()
