"""The training loop, on Accelerate. It knows nodes and arrows, and no model or objective."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.batch import Batch, Ragged
from distill.checkpoint import (
    keep_newest,
    latest,
    load_checkpoint,
    load_parameters,
    save_checkpoint,
    save_parameters,
)
from distill.data.source import Source
from distill.errors import DataError, RecipeError, RunError
from distill.evaluation import higher_is_better
from distill.graph import DistillationGraph
from distill.nn.precision import resolve_precision
from distill.paths import replacing
from distill.recipe import nearest
from distill.settings import TrainSettings
from distill.store import RecalledBatches, TeacherMemory, text_sources

log = logging.getLogger("distill")

SECONDS_BETWEEN_CHECKPOINTS = 300.0  # at most, where a recipe does not say


@dataclass
class Progress:
    """Where a training stands; all of it is in a checkpoint."""

    step: int = 0
    steps: int = 0  # in all
    best: float | None = None
    best_step: int = 0
    without_better: int = 0  # evaluations since the best
    history_bytes: int = 0
    dev: dict[str, float] = field(default_factory=dict)  # of the best step
    stopped: str = ""  # why it ended before its last step


class Trainer:
    """Trains the graph of one run, and leaves its best parameters in it.

    A run that was interrupted goes on from its newest checkpoint and, on a CPU, ends bit for bit where an
    uninterrupted one ends: order, negatives and candidates are functions of (seed, epoch, step), and what
    evolves (parameters, optimiser, random numbers) is in the checkpoint.

    Args:
        graph: Checked, with its arrows.
        source: Where batches come from.
        settings: The ``train`` section of a recipe.
        folder: Of the run; ``history.jsonl`` and ``checkpoints/`` are written there.
        evaluate: Measures the kept node on the dev split: metrics by name; None: no dev split.
        select: The metric that decides which step is best.
        steps: Optimiser steps in all; None follows the settings.
    """

    def __init__(
        self,
        graph: DistillationGraph,
        source: Source,
        settings: TrainSettings,
        folder: str | Path,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        select: str | None = None,
        steps: int | None = None,
    ):
        self.graph = graph
        self.source = source
        self.settings = settings
        self.folder = Path(folder)
        self.evaluate = evaluate if settings.evaluate_every else None
        self.select = select
        self.accelerator = _accelerator(settings, self.folder)
        self.precision = self.accelerator.mixed_precision
        torch.use_deterministic_algorithms(settings.deterministic)
        graph.to(self.accelerator.device)
        graph.autocast = self.accelerator.autocast
        self.parameters = graph.trainable()
        self.optimizer = self.accelerator.prepare(self._optimizer())
        self._steps_given = steps is not None or settings.steps is not None
        self.progress = Progress(steps=steps or self._steps())
        self._interrupted = threading.Event()
        self._recalled: RecalledBatches | None = None

    def fit(self) -> Progress:
        """Train to the end, or go on from the newest checkpoint.

        Raises:
            RunError: A loss or a gradient that is not finite; says which arrow it came from.
            KeyboardInterrupt: After the step at hand and a checkpoint.
        """
        checkpoint = latest(self._checkpoints)
        torch.manual_seed(self.settings.seed)
        if checkpoint is None and self.settings.minutes and not self._steps_given:
            self._fit_to_time()
        if checkpoint is not None:
            self._resume(checkpoint)
        else:
            self._start_history()
        if self.progress.step < self.progress.steps and not self.progress.stopped:
            self._train()
        if (self._best / "model.safetensors").exists():
            load_parameters(self._best / "model.safetensors", self.parameters)
        self.graph.eval()
        return self.progress

    def _train(self) -> None:
        if self.settings.trackers:
            settings = self.settings.model_dump(mode="json")
            plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
            self.accelerator.init_trackers("distill", plain)
        try:
            with self._stoppable(), self._bar() as bar:
                self._loop(bar)
        finally:
            if self.settings.trackers:
                self.accelerator.end_training()

    def _loop(self, bar: _Bar) -> None:
        """Steps, evaluations and checkpoints, in this order, until the last step or an early stop."""
        p, epoch = self.progress, self._batches_per_epoch / self.settings.accumulate
        every = max(1, round(epoch * (self.settings.evaluate_every or math.inf))) if self.evaluate else 0
        said: dict[str, Tensor] = {}
        tokens, since = 0, time.monotonic()
        saved = since
        while p.step < p.steps and not p.stopped:
            losses, norm, read = self._step()
            tokens += read
            for name, loss in losses.items():
                said[name] = loss
            p.step += 1
            bar.update(p.step, losses)
            if p.step % self.settings.log_every == 0 or p.step == p.steps:
                speed = tokens / (time.monotonic() - since)
                self._record({**self._losses(said), "grad_norm": norm, "tokens_per_second": round(speed)})
                said, tokens, since = {}, 0, time.monotonic()
            measured = bool(every) and (p.step % every == 0 or p.step == p.steps)
            if measured:
                self._measure()
            wanted = self.settings.checkpoint_every
            late = time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS
            due = measured or late if wanted is None else p.step % wanted == 0
            if due or self._interrupted.is_set() or p.stopped or p.step == p.steps:
                self._save()
                saved = time.monotonic()
            if self._interrupted.is_set():
                raise KeyboardInterrupt(f"stopped after step {p.step} of {p.steps}; a checkpoint is saved")

    def _step(self) -> tuple[dict[str, Tensor], float, int]:
        """One optimiser step: each arrow's mean loss, the norm of the gradient, and the ids read."""
        p = self.progress
        done = p.step / p.steps
        batches = [
            self._batch(p.step * self.settings.accumulate + i) for i in range(self.settings.accumulate)
        ]
        divisors: dict[str, Tensor] = {}
        for batch in batches:
            for name, count in self.graph.counts(batch, done).items():
                divisors[name] = divisors.get(name, 0) + count
        self.graph.train()
        weights = {arrow.name: arrow.weight_at(done) for arrow in self.graph.arrows}
        means: dict[str, Tensor] = {}
        for batch in batches:
            total = 0
            for name, loss in self.graph(batch, done).items():
                mean = loss.loss.sum() / divisors[name].clamp(min=1)
                if not torch.isfinite(mean):
                    raise RunError(
                        self._diverged(f"the loss of losses.{name} became {mean.item()}", p.step + 1)
                    )
                means[name] = means.get(name, 0) + mean.detach()
                total = total + weights[name] * mean
            if isinstance(total, Tensor) and total.requires_grad:
                self.accelerator.backward(total)
        norm = self._descend(done, weights, batches)
        return means, norm, sum(_ids_in(batch) for batch in batches)

    def _descend(self, done: float, weights: Mapping[str, float], batches: Sequence[Batch]) -> float:
        limit = self.settings.clip if self.settings.clip is not None else math.inf
        norm = float(self.accelerator.clip_grad_norm_(list(self.parameters.values()), limit))
        if not math.isfinite(norm) and self.accelerator.scaler is None:  # a scaler skips the step by itself
            culprit = self._culprit(weights, batches, done)
            raise RunError(self._diverged(f"the gradient of {culprit} is not finite", self.progress.step + 1))
        rate = self._rate(self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _culprit(self, weights: Mapping[str, float], batches: Sequence[Batch], done: float) -> str:
        """Which arrow's own gradient is not finite: asked one by one, after the fact."""
        for name in weights:
            for batch in batches:
                self.optimizer.zero_grad()
                losses = self.graph(batch, done)
                if name in losses and losses[name].loss.requires_grad:
                    losses[name].loss.sum().backward()
                    if any(
                        p.grad is not None and not p.grad.isfinite().all() for p in self.parameters.values()
                    ):
                        return f"losses.{name}"
        return "the sum of all losses"

    def _batch(self, place: int) -> Batch:
        if self._recalled is None:
            memory = TeacherMemory(self.graph, text_sources(self.source), self.settings.store)
            memory.fill(self._interrupted.is_set)
            self._recalled = RecalledBatches(memory, self.source)
        batch = self._recalled.batch(*divmod(place, self._batches_per_epoch))
        return batch.to(self.accelerator.device)

    def _measure(self) -> None:
        assert self.evaluate is not None
        p = self.progress
        self.graph.eval()
        try:
            metrics = dict(self.evaluate())
        except DataError as error:  # the split was checked before, so it is the model that has diverged
            raise RunError(self._diverged(f"the student cannot be measured: {error}", p.step)) from error
        self._record({f"dev/{name}": value for name, value in metrics.items()})
        name = self.select or next(iter(metrics))
        value = metrics[name] if higher_is_better(name) else -metrics[name]
        value = -math.inf if math.isnan(value) else value  # a correlation that is not defined
        if p.best is None or value > p.best:
            p.best, p.best_step, p.without_better, p.dev = value, p.step, 0, metrics
            with replacing(self._best / "model.safetensors") as partial:
                save_parameters(partial, self.parameters)
        else:
            p.without_better += 1
            if self.settings.patience and p.without_better >= self.settings.patience:
                p.stopped = f"no better {self.select} in {p.without_better} evaluations"
        log.info(
            "step %d of %d: %s", p.step, p.steps, ", ".join(f"dev {k} {v:.4f}" for k, v in metrics.items())
        )

    # What lies on disk

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def _best(self) -> Path:
        return self._checkpoints / "best"

    @property
    def _history(self) -> Path:
        return self.folder / "history.jsonl"

    def _save(self) -> None:
        folder = self._checkpoints / f"step-{self.progress.step:08d}"
        if not all(parameter.isfinite().all() for parameter in self.parameters.values()):
            raise RunError(self._diverged("the parameters are not finite", self.progress.step))
        state = {"progress": vars(self.progress), "precision": self.precision}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        save_checkpoint(folder, self.parameters, self.optimizer.optimizer, state)
        keep_newest(self._checkpoints, folder)

    def _resume(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self.parameters, self.optimizer.optimizer)
        self.progress = Progress(**state["progress"])
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self._history.exists():  # lines after the checkpoint will be written again
            with self._history.open("r+b") as history:
                history.truncate(self.progress.history_bytes)
        log.info("going on from step %d of %d", self.progress.step, self.progress.steps)

    def _start_history(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._history.write_bytes(b"")

    def _losses(self, said: Mapping[str, Tensor]) -> dict[str, float]:
        done = (self.progress.step - 1) / self.progress.steps
        names = {arrow.name: arrow.weight_at(done) for arrow in self.graph.arrows if arrow.name in said}
        losses = {f"loss/{name}": said[name].item() for name in names}
        total = sum(weight * losses[f"loss/{name}"] for name, weight in names.items())
        return {"loss": total, **losses, **{f"weight/{name}": weight for name, weight in names.items()}}

    def _record(self, values: Mapping[str, float]) -> None:
        p = self.progress
        place = {
            "step": p.step,
            "epoch": round(p.step * self.settings.accumulate / self._batches_per_epoch, 4),
        }
        rate = self.settings.learning_rate * self._rate(p.step - 1)
        line = json.dumps({**place, "learning_rate": rate, **values}) + "\n"
        with self._history.open("ab") as history:
            history.write(line.encode())
            p.history_bytes = history.tell()
        if self.settings.trackers:
            self.accelerator.log(dict(values), step=p.step)

    # How long, how fast, and when to stop

    @property
    def _batches_per_epoch(self) -> int:
        return self.source.steps(0)

    def _steps(self) -> int:
        return steps_of(self.settings, self._batches_per_epoch)

    def _fit_to_time(self) -> None:
        """Cut the steps to what fits into ``minutes``, by the speed of a few steps that teach nothing."""
        state, p = torch.get_rng_state(), self.progress
        times = []
        self._batch(0)  # the teachers are asked before the clock starts
        self.graph.train()
        for place in range(8):
            start = time.monotonic()
            batch = self._batch(place % self._batches_per_epoch)
            losses = [loss.loss.sum() for loss in self.graph(batch, 0.5).values()]
            if learnt := [loss for loss in losses if loss.requires_grad]:
                torch.stack(learnt).sum().backward()
            self.optimizer.zero_grad()
            times.append((time.monotonic() - start) * self.settings.accumulate)
        torch.set_rng_state(state)
        each = sorted(times)[len(times) // 2] * 1.15  # the optimiser's own share
        minutes = self.settings.minutes or 0.0
        fits = max(1, int(minutes * 60 / each))
        log.info(
            "a step takes %.2f s here: %d of %d steps fit into %g minutes",
            each, min(fits, p.steps), p.steps, self.settings.minutes,
        )  # fmt: skip
        p.steps = min(p.steps, fits)

    def _rate(self, step: int) -> float:
        """The learning rate's factor at a step: up over the warm-up, then by the schedule."""
        warmup = round(self.settings.warmup * self.progress.steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        rest = (step - warmup) / max(1, self.progress.steps - warmup)
        return {"constant": 1.0, "linear": 1.0 - rest, "cosine": 0.5 * (1.0 + math.cos(math.pi * rest))}[
            self.settings.schedule
        ]

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW; vectors (biases, norms) do not decay."""
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            rate = next(
                (
                    r
                    for node, r in self.settings.learning_rates.items()
                    if name.startswith(f"node_modules.{node}.")
                ),
                self.settings.learning_rate,
            )
            decay = self.settings.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
        if unknown := sorted(set(self.settings.learning_rates) - self.graph.trained):
            trained = sorted(self.graph.trained)
            raise RecipeError(
                f"train.learning_rates: '{unknown[0]}' is not a trained model; these are: "
                f"{', '.join(trained)}.{nearest(unknown[0], trained)}"
            )
        return torch.optim.AdamW(
            [
                {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
                for (rate, decay), parameters in groups.items()
            ],
            fused=True,
        )

    def _diverged(self, what: str, step: int) -> str:
        kept = latest(self._checkpoints)
        where = (
            f"The checkpoint {kept} is the last good one." if kept else "No checkpoint was written before it."
        )
        return (
            f"step {step}: {what.rstrip('.')}. {where} Lower train.learning_rate, or look at the "
            f"arrow's temperature and its teacher's scores."
        )

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """The first Ctrl-C ends after the step at hand, the second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self._interrupted.is_set():
                raise KeyboardInterrupt
            self._interrupted.set()
            log.info("stopping after this step; once more stops at once")

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _bar(self) -> Iterator[_Bar]:
        bar = _Bar(self.progress.steps, self.progress.step)
        try:
            yield bar
        finally:
            bar.close()


def steps_of(settings: TrainSettings, batches_per_epoch: int) -> int:
    """Optimiser steps in all, unless ``minutes`` cuts them."""
    if settings.steps is not None:
        return settings.steps
    return max(1, round(settings.epochs * batches_per_epoch / settings.accumulate))


class _Bar:
    """A bar on a terminal; in a log, a line at each twentieth of the way."""

    def __init__(self, steps: int, step: int):
        from tqdm import tqdm

        self._bar = tqdm(total=steps, initial=step, unit="step", disable=None, dynamic_ncols=True)
        self._every, self._steps = max(1, steps // 20), steps

    def update(self, step: int, losses: Mapping[str, Tensor]) -> None:
        self._bar.update(1)
        if self._bar.disable:
            if step % self._every == 0:
                words = ", ".join(f"{name} {float(loss):.4f}" for name, loss in losses.items())
                log.info("step %d of %d: %s", step, self._steps, words)
        elif step % 10 == 0:
            self._bar.set_postfix({name: f"{float(loss):.3f}" for name, loss in losses.items()})

    def close(self) -> None:
        self._bar.close()


def _accelerator(settings: TrainSettings, folder: Path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    precision = resolve_precision(settings.mixed_precision, PartialState().device)
    if precision == "fp16" and PartialState().device.type == "cpu":
        raise RecipeError("train.mixed_precision: fp16 needs a GPU; leave it at auto, or take bf16.")
    AcceleratorState._reset_state()  # a teacher trained before may have had another precision
    try:
        return Accelerator(
            mixed_precision=precision, log_with=settings.trackers or None, project_dir=str(folder / "logs")
        )
    except ValueError as error:
        raise RecipeError(f"train: {error}") from error


def _ids_in(batch: Batch) -> int:
    columns = [*batch.queries.values(), *batch.candidates.values()]
    return sum(len(column.values) for column in columns if isinstance(column, Ragged))
