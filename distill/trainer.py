"""The training loop, on Accelerate. It knows nodes and arrows, and no model or objective."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

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
from distill.checkup import health_at_start
from distill.data.source import Source
from distill.errors import DataError, RecipeError, RunError
from distill.evaluation import merit
from distill.graph import DistillationGraph
from distill.nn.precision import resolve_precision
from distill.optimizer import optimizers, rate_at, rate_problems, table_names
from distill.paths import replacing
from distill.pieces import piece_problems
from distill.processes import (
    any_of,
    from_first,
    is_first,
    rank,
    start,
    sum_gradients,
    take_from_first,
    wait,
    world,
)
from distill.progress import Bar, History, Progress, bar, stoppable
from distill.settings import TrainSettings
from distill.store import RecalledBatches, TeacherMemory, fit_teachers, judged_sources

log = logging.getLogger("distill")

SECONDS_BETWEEN_CHECKPOINTS = 300.0  # at most, where a recipe does not say


class Trainer:
    """Trains the graph of one run, and leaves its best parameters in it.

    A run that was interrupted goes on from its newest checkpoint and, on a CPU, ends bit for bit where an
    uninterrupted one ends: order, negatives and candidates are functions of (seed, epoch, step), and what
    evolves (parameters, optimiser, random numbers) is in the checkpoint, mined lists beside it.

    Args:
        graph: Checked, with its arrows.
        source: Where batches come from.
        settings: The ``train`` section of a recipe.
        folder: Of the run; ``history.jsonl``, ``checkpoints/`` and ``mined/`` are written there.
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
        graph.gradient_cache = settings.gradient_cache
        problems = [*piece_problems(graph, settings.gradient_cache is not None, world() > 1)]
        if problems := [*problems, *rate_problems(settings, graph)]:
            raise RecipeError("\n".join(problems))
        self.parameters = graph.trainable()
        take_from_first(list(self.parameters.values()))
        tables = table_names(graph)
        self._clipped = [p for name, p in self.parameters.items() if name not in tables]
        self._tables = [p for name, p in self.parameters.items() if name in tables]
        if tables and self.precision == "fp16":
            raise RecipeError(
                "train.mixed_precision: fp16 scales gradients, and those of embedding tables do not go "
                "through its scaler; use bf16, or 'no'."
            )
        self.optimizers = [self.accelerator.prepare(one) for one in optimizers(graph, settings)]
        self.optimizer = self.optimizers[0]
        self._steps_given = steps is not None or settings.steps is not None
        self.progress = Progress(steps=steps or self._steps())
        self._history = History(self.folder / "history.jsonl")
        self._interrupted = threading.Event()
        self._recalled: RecalledBatches | None = None
        self._refreshed: int | None = None  # the epoch that the source was refreshed for

    def fit(self) -> Progress:
        """Train to the end, or go on from the newest checkpoint.

        Raises:
            RunError: A loss or a gradient that is not finite; says which arrow it came from.
            KeyboardInterrupt: After the step at hand and a checkpoint.
        """
        start = time.monotonic()
        fit_teachers(self.graph, judged_sources(self.source))
        fitting = time.monotonic() - start
        checkpoint = from_first(latest(self._checkpoints))
        torch.manual_seed(self.settings.seed + rank())
        if checkpoint is not None:
            self._resume(checkpoint)
        else:
            self._history.start()
            if self.settings.minutes and not self._steps_given:
                self._fit_to_time()
        if self.progress.step < self.progress.steps and not self.progress.stopped:
            self.progress.asking += fitting
            self._train()
        wait()
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
            with stoppable(self._interrupted), bar(self.progress.steps, self.progress.step) as shown:
                self._loop(shown)
        finally:
            if self.settings.trackers:
                self.accelerator.end_training()

    def _loop(self, shown: Bar) -> None:
        """Steps, evaluations and checkpoints, in this order, until the last step or an early stop."""
        p, epoch = self.progress, self._batches_per_epoch / self.settings.accumulate
        every = max(1, round(epoch * (self.settings.evaluate_every or math.inf))) if self.evaluate else 0
        said: dict[str, Tensor] = {}
        tokens, since = 0, time.monotonic()
        saved = since
        while p.step < p.steps and not p.stopped:
            began = time.monotonic() - self._asking
            losses, norm, read = self._step()
            tokens += read
            self._spend(time.monotonic() - self._asking - began, read)
            for name, loss in losses.items():
                said[name] = loss
            p.step += 1
            shown.update(p.step, {name: loss for name, loss in losses.items() if "/" not in name})
            if p.step % self.settings.log_every == 0 or p.step == p.steps:
                speed = tokens / (time.monotonic() - since)
                self._record({**self._losses(said), "grad_norm": norm, "tokens_per_second": round(speed)})
                said, tokens, since = {}, 0, time.monotonic()
            measured = bool(every) and (p.step % every == 0 or p.step == p.steps)
            if measured:
                self._measure()
            wanted = self.settings.checkpoint_every
            interrupted, late = any_of(
                self._interrupted.is_set(), time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS
            )
            due = measured or late if wanted is None else p.step % wanted == 0
            if due or interrupted or p.stopped or p.step == p.steps:
                self._save()
                saved = time.monotonic()
            if interrupted:
                raise KeyboardInterrupt(f"stopped after step {p.step} of {p.steps}; a checkpoint is saved")

    def _step(self) -> tuple[dict[str, Tensor], float, int]:
        """One optimiser step: the mean loss of each arrow and part, the gradient's norm, and the ids read."""
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
                for part, value in loss.parts.items():  # no arrow's own name holds a slash
                    share = value.detach().sum() / divisors[name].clamp(min=1)
                    means[f"{name}/{part}"] = means.get(f"{name}/{part}", 0) + share
                total = total + weights[name] * mean
            if isinstance(total, Tensor) and total.requires_grad:
                self.accelerator.backward(total / world())  # each process has the whole loss
        sum_gradients(list(self.parameters.values()))
        norm = self._descend(done, weights, batches)
        return means, norm, sum(_ids_in(batch) for batch in batches)

    def _descend(self, done: float, weights: Mapping[str, float], batches: Sequence[Batch]) -> float:
        limit = self.settings.clip if self.settings.clip is not None else math.inf
        norm = float(self.accelerator.clip_grad_norm_(self._clipped, limit))
        whole = math.isfinite(norm) and _finite(self._tables)
        if not whole and self.accelerator.scaler is None:  # a scaler skips the step by itself
            culprit = self._culprit(weights, batches, done)
            raise RunError(self._diverged(f"the gradient of {culprit} is not finite", self.progress.step + 1))
        rate = self._rate(self.progress.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate
            optimizer.step()
        self._zero_grad()
        return norm

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _culprit(self, weights: Mapping[str, float], batches: Sequence[Batch], done: float) -> str:
        """Which arrow's own gradient is not finite: asked one by one, after the fact."""
        for name in weights:
            for batch in batches:
                self._zero_grad()
                losses = self.graph(batch, done)
                if name in losses and losses[name].loss.requires_grad:
                    losses[name].loss.sum().backward()
                (bad,) = any_of(not _finite(self.parameters.values()))
                if bad:
                    return f"losses.{name}"
        return "the sum of all losses"

    def _batch(self, place: int) -> Batch:
        epoch, step = divmod(place, self._batches_per_epoch)
        if epoch != self._refreshed:
            if figures := self.source.refresh(self.graph, epoch, self.folder / "mined", begun=step > 0):
                self._record(figures)
            self._refreshed = epoch
        if self._recalled is None:
            memory = TeacherMemory(self.graph, judged_sources(self.source), self.settings.store)
            memory.fill(self._interrupted.is_set)
            self.progress.health = health_at_start(memory)
            self._recalled = RecalledBatches(memory, self.source)
            self._spent = (self.progress.asking, Counter(self.progress.asked))
            self._live_before = Counter(self.progress.live)
        batch = self._recalled.batch(epoch, step)
        return batch.to(self.accelerator.device)

    @property
    def _asking(self) -> float:
        """Seconds in which this process asked what the teacher store keeps."""
        return self._recalled.memory.seconds if self._recalled is not None else 0.0

    def _spend(self, seconds: float, tokens: int) -> None:
        """Add what a step cost, and what the teachers were asked until then."""
        assert self._recalled is not None
        p, memory, (asking, asked) = self.progress, self._recalled.memory, self._spent
        p.seconds, p.tokens = p.seconds + seconds, p.tokens + tokens
        p.asking, p.asked = asking + memory.seconds, dict(asked + memory.asked)
        p.live = dict(self._live_before + self.graph.live)
        heard = memory.answers
        p.answers = {name: max(heard[name], p.answers.get(name, 0)) for name in heard | Counter(p.answers)}

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
        value = merit(name, metrics[name])
        value = -math.inf if math.isnan(value) else value  # a correlation that is not defined
        if p.best is None or value > p.best:
            p.best, p.best_step, p.without_better, p.dev = value, p.step, 0, metrics
            if is_first():
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

    def _save(self) -> None:
        folder = self._checkpoints / f"step-{self.progress.step:08d}"
        if not all(parameter.isfinite().all() for parameter in self.parameters.values()):
            raise RunError(self._diverged("the parameters are not finite", self.progress.step))
        state = {"progress": vars(self.progress), "precision": self.precision, "processes": world()}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        save_checkpoint(folder, self.parameters, [one.optimizer for one in self.optimizers], state)
        if is_first():
            keep_newest(self._checkpoints, folder)

    def _resume(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self.parameters, [one.optimizer for one in self.optimizers])
        self.progress = Progress(**state["progress"])
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._history.cut(self.progress.history_bytes)
        for what, before, now in (
            ("precision", state["precision"], self.precision),
            ("processes", state.get("processes", 1), world()),
        ):
            if before != now:
                log.warning(
                    "the checkpoint was left by a training with %s %s, and it goes on with %s: it will not "
                    "end bit for bit where it would have ended.", what, before, now,
                )  # fmt: skip
        log.info("going on from step %d of %d", self.progress.step, self.progress.steps)

    def _losses(self, said: Mapping[str, Tensor]) -> dict[str, float]:
        done = (self.progress.step - 1) / self.progress.steps
        names = {arrow.name: arrow.weight_at(done) for arrow in self.graph.arrows if arrow.name in said}
        losses = {f"loss/{name}": loss.item() for name, loss in said.items()}
        total = sum(weight * losses[f"loss/{name}"] for name, weight in names.items())
        return {"loss": total, **losses, **{f"weight/{name}": weight for name, weight in names.items()}}

    def _record(self, values: Mapping[str, float]) -> None:
        p = self.progress
        place = {
            "step": p.step,
            "epoch": round(p.step * self.settings.accumulate / self._batches_per_epoch, 4),
        }
        rate = self.settings.learning_rate * self._rate(max(0, p.step - 1))
        p.history_bytes = self._history.write({**place, "learning_rate": rate, **values})
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
            self._zero_grad()
            times.append((time.monotonic() - start) * self.settings.accumulate)
        torch.set_rng_state(state)
        each = from_first(sorted(times)[len(times) // 2] * 1.15)  # the optimiser's own share
        minutes = self.settings.minutes or 0.0
        fits = max(1, int(minutes * 60 / each))
        log.info(
            "a step takes %.2f s here: %d of %d steps fit into %g minutes",
            each, min(fits, p.steps), p.steps, self.settings.minutes,
        )  # fmt: skip
        p.steps = min(p.steps, fits)

    def _rate(self, step: int) -> float:
        return rate_at(step, self.progress.steps, self.settings)

    def _diverged(self, what: str, step: int) -> str:
        kept = latest(self._checkpoints)
        where = (
            f"The checkpoint {kept} is the last good one." if kept else "No checkpoint was written before it."
        )
        return (
            f"step {step}: {what.rstrip('.')}. {where} Lower train.learning_rate, or look at the "
            f"arrow's temperature and its teacher's scores."
        )


def steps_of(settings: TrainSettings, batches_per_epoch: int) -> int:
    """Optimiser steps in all, unless ``minutes`` cuts them."""
    if settings.steps is not None:
        return settings.steps
    return max(1, round(settings.epochs * batches_per_epoch / settings.accumulate))


def _accelerator(settings: TrainSettings, folder: Path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    start()
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


def _finite(parameters: Iterable[Tensor]) -> bool:
    """Whether all gradients are."""
    given = [p.grad for p in parameters if p.grad is not None]
    return all(bool((g._values() if g.is_sparse else g).isfinite().all()) for g in given)


def _ids_in(batch: Batch) -> int:
    columns = [*batch.queries.values(), *batch.candidates.values()]
    return sum(len(column.values) for column in columns if isinstance(column, Ragged))
