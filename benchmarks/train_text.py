"""How fast a student learns from stored teacher scores: ours beside ``SentenceTransformerTrainer``.

    python benchmarks/train_text.py --output train_text.cpu.json

Both train the same 6-layer MiniLM from the same weights on the same groups in the same order: batches of 16
WikiQA questions with 8 sentences each, KL on scores, AdamW, equal learning rates; see ``_groups.py``.

Each training is a process of its own, as a user's is: settings and memory that one side leaves behind would
change the other's speed. The sides take turns: the peer with its defaults (float32) and with ``bf16=True``,
ours with ``mixed_precision: auto`` and in float32, all with the checkpoint's dropout. Before, both train in
float32 without dropout, and their losses are compared step by step. Speed is real ids (of all texts of the
groups, without padding) per second of training steps; the first steps, in which memory grows and kernels are
made for new shapes, warm up and are not counted. ``--quick`` times fewer steps, once.
``seconds_including_setup`` runs from groups of texts in memory to the last step: loading the model, making
the data set, cutting texts into ids (ours: into an empty cache; the peer does it within each step),
and the first steps.

The last line is a JSON object; ``ratio`` is ours over the peer's default, ``share_of_peak`` ours, of the
machine's bf16 matrix-product rate.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _groups import BATCH, CANDIDATES, SEED, Groups, in_order, read_groups, source_of
from _measure import (
    Peak,
    alternate,
    device_of,
    forward_flops,
    ids_per_text,
    machine,
    median,
    options,
    report,
    wait_for,
)
from torch import nn

from distill.batch import Batch, Columns
from distill.model import Model
from distill.objectives.base import Loss
from distill.outputs import Needs, Outputs

RATE = 2e-5
# The peer's loss is student_temperature^2 * KL, ours teacher_temperature^2 * KL: with one temperature for
# student and teacher both are the same number. Here it suits cosines, which both sides' scores are.
TEMPERATURE = 0.05
TARGETS = {"ratio": 6.0, "ratio_bf16": 3.0, "curves": 1e-3}


class StoredScores(Model):
    """The node whose scores come with the data: it is never asked."""

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"scores"})

    @property
    def reads(self) -> Columns:
        return Columns()

    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        raise AssertionError("the scores come with the data")

    def save_pretrained(self, folder: str | Path) -> None:
        raise AssertionError("nothing to save")


@dataclass
class Run:
    """One training: when each step ended, and its loss. Starts its clock when it is made.

    Only the ends of the warm-up and of the last step wait for the device.
    """

    device: torch.device
    warm: int
    steps: int
    precision: str = ""
    losses: list[Any] = field(default_factory=list)  # tensors until the run is over
    ends: list[float] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    def watch(self, loss: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Hooks on the modules that both sides have: the loss's forward and the optimiser's step."""
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
    def seconds(self) -> float:
        """Of the steps after the warm-up."""
        return self.ends[self.steps - 1] - self.ends[self.warm - 1]

    @property
    def with_setup(self) -> float:
        return self.ends[-1] - self.start

    @property
    def curve(self) -> list[float]:
        """The mean KL of each step, without the factor of the temperature."""
        return [float(loss) / TEMPERATURE**2 for loss in self.losses]

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s for {self.steps - self.warm} steps ({self.precision})"


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    checkpoint: str
    device: torch.device
    groups: Groups
    ordered: Groups  # as the batches come
    warm: int
    steps: int  # the warm-up's included


def train_peer(setting: Setting, bf16: bool = False, dropout: float | None = None) -> Run:
    """``SentenceTransformerTrainer`` with its defaults, or in bf16."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback

    from distill.nn.text_encoder import dropout_arguments

    def unshuffled(dataset, batch_size: int, drop_last: bool, **others) -> DefaultBatchSampler:
        return DefaultBatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    run = Run(setting.device, setting.warm, setting.steps)
    with tempfile.TemporaryDirectory() as folder:
        model = SentenceTransformer(
            setting.checkpoint,
            device=str(setting.device),
            config_kwargs=dropout_arguments(setting.checkpoint, dropout),
        )
        columns = {f"candidate_{i}": [g[i] for g in setting.ordered.candidates] for i in range(CANDIDATES)}
        loss = DistillKLDivLoss(model, temperature=TEMPERATURE)
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                max_steps=setting.steps,
                learning_rate=RATE,  # linear to 0 without warm-up, no decay, norm cut at 1: defaults, as ours
                use_cpu=setting.device.type == "cpu",  # else bf16 is refused there
                bf16=bf16,
                seed=SEED,
                batch_sampler=unshuffled,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(
                {"query": setting.ordered.queries, **columns, "label": setting.ordered.scores}
            ),
            loss=loss,
        )
        trainer.remove_callback(PrinterCallback)
        run.watch(loss, trainer.create_optimizer())
        run.precision = trainer.accelerator.mixed_precision
        trainer.train()
    return run


def train_ours(setting: Setting, precision: str = "auto", dropout: float | None = None) -> Run:
    """Our trainer, into an empty token cache."""
    from distill.graph import Arrow, DistillationGraph
    from distill.objectives import ScoreKL
    from distill.settings import TrainSettings
    from distill.trainer import Trainer
    from students import BiEncoder

    run = Run(setting.device, setting.warm, setting.steps)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DISTILL_CACHE"] = folder
        nodes = {"teacher": StoredScores(), "student": BiEncoder(setting.checkpoint, dropout=dropout)}
        kl = Arrow("kl", ScoreKL(TEMPERATURE), head="student", tail="teacher")
        graph = DistillationGraph(nodes, [kl], trained=["student"])
        source = source_of(setting.groups)
        source.prepare(*graph.columns())
        trainer = Trainer(
            graph,
            source,
            TrainSettings(
                steps=setting.steps,
                batch_size=BATCH,
                learning_rate=RATE,
                weight_decay=0.0,
                warmup=0.0,
                clip=1.0,
                mixed_precision=precision,  # type: ignore[arg-type]
                seed=SEED,
                evaluate_every=None,
            ),
            folder,
        )
        run.watch(kl.objective, trainer.optimizer.optimizer)
        run.precision = trainer.precision
        trainer.fit()
    return run


def alone(train: Callable[..., Run], *arguments: Any) -> Run:
    """``train`` with these arguments, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_trained, train, arguments).result()


def _trained(train: Callable[..., Run], arguments: tuple[Any, ...]) -> Run:
    run = train(*arguments)
    return replace(run, losses=[float(loss) for loss in run.losses])


def compare_curves(setting: Setting) -> dict[str, Any]:
    """Both sides in float32 without dropout: the same numbers, step by step."""
    peer, ours = alone(train_peer, setting, False, 0.0).curve, alone(train_ours, setting, "no", 0.0).curve
    differences = [abs(a - b) for a, b in zip(peer, ours, strict=True)]
    for step, (a, b) in enumerate(zip(peer, ours, strict=True), 1):
        print(f"step {step}: KL {a:.6f} (peer) {b:.6f} (ours)")
    print(f"largest difference {max(differences):.2e}", flush=True)
    return {
        "peer": [round(value, 6) for value in peer],
        "ours": [round(value, 6) for value in ours],
        "largest_difference": max(differences),
        "agree": max(differences) <= TARGETS["curves"],
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device, quick = device_of(arguments.device), arguments.quick
    from distill.hub import resolve_checkpoint
    from students import BiEncoder

    checkpoint = resolve_checkpoint(arguments.model)
    gpu = device.type == "cuda"
    warm, timed = (5, 20 if quick else 60) if gpu else (3, 5 if quick else 12)
    steps = warm + (arguments.steps or timed)
    data, groups = read_groups(steps * BATCH)
    setting = Setting(checkpoint, device, groups, in_order(groups, steps), warm, steps)
    some = arguments.curve_steps or (2 if quick else 8)
    peaks = Peak(device, seconds=0.3 if quick else 1.0)
    curves = compare_curves(Setting(checkpoint, device, groups, in_order(groups, some), 1, some))

    sides: dict[str, Callable[[], Run]] = {
        "peer": lambda: alone(train_peer, setting),
        "ours": lambda: alone(train_ours, setting),
        "peer_bf16": lambda: alone(train_peer, setting, True),
        "ours_float32": lambda: alone(train_ours, setting, "no"),
    }
    runs = alternate(sides, arguments.rounds or (1 if quick else 3))
    peaks.measure()

    student = BiEncoder(checkpoint)
    tokenizer, most = student.encoder.tokenizer.tokenizer, student.max_length
    lengths = ids_per_text(tokenizer, setting.ordered.at(range(warm * BATCH, steps * BATCH)).texts(), most)
    tokens, flops = int(lengths.sum()), 3 * forward_flops(student.encoder.backbone, lengths)
    found: dict[str, dict[str, Any]] = {}
    for name, several in runs.items():
        seconds = median([one.seconds for one in several], 6)
        found[name] = {
            "precision": several[0].precision,
            "tokens_per_second": round(tokens / seconds),
            "share_of_peak": peaks.share(flops, seconds),
            "seconds": [round(one.seconds, 4) for one in several],
            "seconds_including_setup": median([one.with_setup for one in several]),
            "loss": [round(value, 4) for value in several[-1].curve],
        }
    speed = {name: side["tokens_per_second"] for name, side in found.items()}
    ratio, ratio_bf16 = speed["ours"] / speed["peer"], speed["ours"] / speed["peer_bf16"]
    return {
        "benchmark": "train_text",
        "quick": quick,
        "ratio": round(ratio, 3),
        "ratio_bf16": round(ratio_bf16, 3),
        "ratio_float32": round(speed["ours_float32"] / speed["peer"], 3),
        "share_of_peak": found["ours"]["share_of_peak"],
        "targets": TARGETS,
        "reached": bool(
            ratio >= TARGETS["ratio"] and ratio_bf16 >= TARGETS["ratio_bf16"] and curves["agree"]
        ),
        "steps": steps - warm,
        "tokens": tokens,
        "flops": flops,
        "sides": found,
        "curves": curves,
        "data": data,
        "peak_tflops": peaks.tera(),
        "machine": machine(device),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, help="how many steps are timed in each run")
    parser.add_argument("--curve-steps", type=int, help="over how many steps the losses are compared")
    arguments = parser.parse_args()
    report(run(arguments), arguments.output)


if __name__ == "__main__":
    main()
