"""Several commands at a time, each in a process of its own, as many as there is room for."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL = 0.2  # seconds between looks at what runs


@dataclass(frozen=True)
class Job:
    """A command, the file that gets what it prints, and what it is for."""

    command: Sequence[str]
    log: Path
    about: Any


def run_jobs(
    jobs: Sequence[Job],
    fits: Callable[[Job, Sequence[Job]], bool],
    finished: Callable[[Job, int, float], None],
    environment: dict[str, str] | None = None,
) -> None:
    """Run all jobs in their order, several at a time.

    Args:
        fits: Whether the next job may start beside those that run; it does where none runs.
        finished: Told of each job that has ended: its exit code and its seconds.
        environment: Variables that differ from ours.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; each running job was interrupted, and has ended.
    """
    waiting = deque(jobs)
    running: dict[subprocess.Popen[bytes], tuple[Job, float]] = {}
    with terminable():
        try:
            while waiting or running:
                while waiting and (not running or fits(waiting[0], [job for job, _ in running.values()])):
                    job = waiting.popleft()
                    running[_start(job, environment or {})] = job, time.monotonic()
                time.sleep(POLL)
                for process in [process for process in running if process.poll() is not None]:
                    job, began = running.pop(process)
                    finished(job, process.returncode, time.monotonic() - began)
        except BaseException:
            _end(list(running))
            raise


def _start(job: Job, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,  # a terminal's Ctrl-C reaches us alone, and we pass it on once
            preexec_fn=_heed_interrupts,
        )


def _heed_interrupts() -> None:
    """A command in the background of a shell inherits to ignore them, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt the processes and wait for them; a second interrupt kills them."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, a SIGTERM is a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
