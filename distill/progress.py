"""Where a training stands, and how it is shown, written down and stopped. Next: ``trainer.py``."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.processes import is_first, world

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

log = logging.getLogger("distill")


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
    seconds: float = 0.0  # of its steps, without those in which answers were asked that the store keeps
    asking: float = 0.0  # seconds of these
    tokens: int = 0  # ids in its batches
    asked: dict[str, int] = field(default_factory=dict)  # teacher -> texts and pairs it was asked about
    answers: dict[str, int] = field(default_factory=dict)  # teacher -> those heard, each once
    live: dict[str, int] = field(default_factory=dict)  # teacher -> those asked anew each time (attention)
    health: dict[str, Any] = field(default_factory=dict)  # of the frozen teachers, as they were at the start

    def cost(self) -> dict[str, Any]:
        """What the training cost, for ``metrics.json``.

        ``teacher_calls`` were made in this run; ``teacher_answers`` are what it would have asked of an empty
        store (at least, where it was interrupted and samplers brought pairs). What no store keeps (attention)
        is in both, each time that it was asked; ``teacher_seconds`` are without it, and with fitting.
        """
        return {
            "seconds": round(self.seconds, 2),
            "teacher_seconds": round(self.asking, 2),
            "tokens": self.tokens,
            "teacher_calls": dict(Counter(self.asked) + Counter(self.live)),
            "teacher_answers": dict(Counter(self.answers) + Counter(self.live)),
            "peak_memory_mb": peak_memory(),
            "peak_gpu_memory_mb": _peak_gpu_memory(),
        }


STATUS = Path("/proc/self/status")


def peak_memory() -> int | None:
    """The most memory this process has held, in MB; None: the system does not say.

    On Linux not what ``getrusage`` says, which begins at what the process held that started this one.
    """
    if STATUS.exists() and (held := STATUS.read_text().partition("VmHWM:")[2].split()[:1]):
        return round(int(held[0]) * 1024 / 1e6)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6)  # bytes there, KiB elsewhere


def _peak_gpu_memory() -> int | None:
    """The most that this process has reserved of its GPU, in MB; None: it uses none."""
    if not torch.cuda.is_initialized():
        return None
    return round(torch.cuda.max_memory_reserved() / 1e6)


class History:
    """``history.jsonl``, a line per logged step; the first process writes it."""

    def __init__(self, path: Path):
        self.path = path

    def start(self) -> None:
        if is_first():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")

    def cut(self, size: int) -> None:
        """Take away what comes after ``size`` bytes: it will be written again."""
        if is_first() and self.path.exists():
            with self.path.open("r+b") as history:
                history.truncate(size)

    def write(self, line: Mapping[str, Any]) -> int:
        """Write a line; returns the bytes that there are then (0 where this process does not write)."""
        if not is_first():
            return 0
        with self.path.open("ab") as history:
            history.write((json.dumps(line) + "\n").encode())
            return history.tell()


class Bar:
    """A bar on a terminal; in a log, a line at each twentieth of the way."""

    def __init__(self, steps: int, step: int):
        from tqdm import tqdm

        hidden = None if is_first() else True
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=hidden, dynamic_ncols=True)
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


@contextmanager
def bar(steps: int, step: int) -> Iterator[Bar]:
    shown = Bar(steps, step)
    try:
        yield shown
    finally:
        shown.close()


@contextmanager
def stoppable(interrupted: threading.Event) -> Iterator[None]:
    """Ctrl-C, or a SIGTERM, sets ``interrupted``; a second one ends at once.

    With several processes a second one changes nothing: a launcher passes on what its terminal has sent
    already, and kills those who do not end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if interrupted.is_set():
            if world() == 1:
                raise KeyboardInterrupt
            return
        interrupted.set()
        log.info("stopping after this step%s", "; once more stops at once" if world() == 1 else "")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
