"""How fast texts become vectors: ``students.BiEncoder`` beside ``SentenceTransformer.encode``.

    python benchmarks/encode_text.py --output encode_text.cpu.json

Both open the same checkpoint and encode the same texts in turn, each with its defaults: 5,000 short texts
(questions and sentences of WikiQA) and SciFact's corpus. Without the data folder ($DISTILL_DATA) they are
first sentences and bodies of the docstrings installed here. The last line is a JSON object; ``ratio`` is the
smaller of the two sets' ratios of texts per second, ``share_of_peak`` ours on the long texts, of the
machine's bf16 matrix-product rate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _measure import (
    Peak,
    alternate,
    data_folder,
    device_of,
    forward_flops,
    ids_per_text,
    machine,
    median,
    options,
    report,
    wait_for,
)
from torch import Tensor

TARGETS = {"ratio": 4.0, "least_cosine": 0.999}


def text_sets(short: int, long: int) -> tuple[str, dict[str, list[str]]]:
    """Where the texts come from, and the two sets, at most so many of each."""
    folder = data_folder()
    if folder is None:
        from distill.data import Documentation

        pairs = Documentation().split("train")
        return "documentation", {"short": pairs.queries.texts[:short], "long": pairs.candidates.texts[:long]}
    import pandas as pd

    wikiqa = pd.read_parquet(folder / "wikiqa" / "train_tokenized.parquet")
    scifact = pd.read_parquet(folder / "scifact" / "corpus.parquet")
    sentences = [*dict.fromkeys([*wikiqa.question, *wikiqa.sentence])]
    chosen = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(1))[:short]
    return "wikiqa, scifact", {
        "short": [sentences[row] for row in chosen.tolist()],
        "long": (scifact.title + " " + scifact.text).tolist()[:long],
    }


def measured(
    texts: Sequence[str],
    peer: Any,
    ours: Any,
    rounds: int,
    device: torch.device,
    budget: float | None,
) -> dict[str, Any]:
    """Both sides on one set of texts: seconds of each round, FLOPs of one, and how close the vectors are."""
    vectors: dict[str, Tensor] = {}

    def timed(name: str, encode: Callable[[Sequence[str]], Any]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            found = encode(texts)
            wait_for(device)
            seconds = time.perf_counter() - start
            vectors[name] = torch.as_tensor(found)
            return round(seconds, 4)

        return run

    sides = {
        "peer": timed("peer", lambda texts: peer.encode(list(texts), show_progress_bar=False)),
        "ours": timed("ours", ours.encode_candidates),
    }
    some = texts[:: max(1, len(texts) // 32)]
    peer.encode(list(some), show_progress_bar=False), ours.encode_candidates(some)  # a warm-up for each
    seconds = alternate(sides, rounds, budget)
    backbone = ours.candidate_tower.encoder.backbone
    lengths = ids_per_text(ours.candidate_tower.encoder.tokenizer.tokenizer, texts, ours.max_length)
    tokens = int(lengths.sum())
    result: dict[str, Any] = {
        "texts": len(texts),
        "tokens": tokens,
        "flops": forward_flops(backbone, lengths),
    }
    for name, runs in seconds.items():
        each = median(runs, 6)
        result[name] = {
            "seconds": runs,
            "texts_per_second": round(len(texts) / each, 1),
            "tokens_per_second": round(tokens / each),
        }
    result["ratio"] = round(median(seconds["peer"], 6) / median(seconds["ours"], 6), 3)
    result["least_cosine"] = round(F.cosine_similarity(vectors["peer"], vectors["ours"]).min().item(), 6)
    return result


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = device_of(arguments.device)
    from sentence_transformers import SentenceTransformer

    from distill.hub import resolve_checkpoint
    from distill.nn.precision import resolve_precision
    from students import BiEncoder

    checkpoint = resolve_checkpoint(arguments.model)
    rounds = arguments.rounds or (2 if arguments.quick else 3)
    short = arguments.texts or (1000 if arguments.quick else 5000)
    long = arguments.documents or (200 if arguments.quick else 1_000_000)
    data, sets = text_sets(short, long)
    peaks = Peak(device, seconds=0.3 if arguments.quick else 1.0)
    peer = SentenceTransformer(checkpoint, device=str(device))
    ours = BiEncoder(checkpoint).to(device)
    found = {
        name: measured(texts, peer, ours, rounds, device, 60.0 if arguments.quick else None)
        for name, texts in sets.items()
    }
    peaks.measure()
    for result in found.values():
        for side in (result["peer"], result["ours"]):
            side["share_of_peak"] = peaks.share(result["flops"], median(side["seconds"], 6))
    ratio = min(result["ratio"] for result in found.values())
    cosine = min(result["least_cosine"] for result in found.values())
    return {
        "benchmark": "encode_text",
        "quick": arguments.quick,
        "ratio": ratio,
        "share_of_peak": found["long"]["ours"]["share_of_peak"],
        "least_cosine": cosine,
        "targets": TARGETS,
        "reached": ratio >= TARGETS["ratio"] and cosine >= TARGETS["least_cosine"],
        "precision": {"peer": "float32", "ours": resolve_precision(ours.precision, device)},
        "sets": found,
        "data": data,
        "peak_tflops": peaks.tera(),
        "machine": machine(device),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--texts", type=int, help="at most so many short texts (5,000)")
    parser.add_argument("--documents", type=int, help="at most so many long ones (all)")
    arguments = parser.parse_args()
    report(run(arguments), arguments.output)


if __name__ == "__main__":
    main()
