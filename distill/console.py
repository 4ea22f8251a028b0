"""What the command shows: tables on stdout, messages on stderr. Next: ``cli.py``."""

from __future__ import annotations

import atexit
import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from distill.errors import RunError, UserError

log = logging.getLogger("distill")

WIDE = 160  # columns of a table that goes into a file or a pipe


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> None:
    """Print a table on stdout; the first ``text_columns`` columns are words, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD)
    for place, name in enumerate(header):
        table.add_column(Text(name), justify="left" if place < text_columns else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: what stands in brackets is no markup
    _console().print(table)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """The same table in Markdown.

    >>> print(markdown_table(["model", "nDCG@10"], [["student", "0.4213"]]))
    | model | nDCG@10 |
    |:--|--:|
    | student | 0.4213 |
    """
    lines = [header, [*[":--"] * text_columns, *["--:"] * (len(header) - text_columns)], *rows]
    cells = (["" if cell is None else str(cell).replace("|", "\\|") for cell in line] for line in lines)
    texts = [f"| {' | '.join(line)} |" for line in cells]
    texts[1] = texts[1].replace(" ", "")
    return "\n".join(texts)


def one_line(text: str, width: int = 100) -> str:
    """The start of a text, on one line.

    >>> one_line("two\\nlines of words", width=12)
    'two lines o…'
    """
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def say(message: str) -> None:
    """A message on stderr, above a progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)


class Messages(logging.Handler):
    """Shows what the framework logs: as it is on a terminal, with the time in a file."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        when = "" if sys.stderr.isatty() else self._time.formatTime(record, "%H:%M:%S ")
        say(f"{when}{level}{record.getMessage()}")

    _time = logging.Formatter()


@contextmanager
def messages() -> Iterator[None]:
    """Inside, the log of the framework is shown."""
    logger, handler = logging.getLogger("distill"), Messages()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turns what goes wrong into one message and an exit code; of several processes one speaks."""
    with messages(), warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")  # of libraries; ours are logged
        try:
            with one_voice():
                yield
        except BrokenPipeError:
            raise  # whoever read our output has gone
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                traceback.print_exc()
            message, code = _explained(error)
            if _is_heard():
                say(message)
            raise typer.Exit(code) from None


@contextmanager
def one_voice() -> Iterator[None]:
    """Inside, this is one of the processes that ``accelerate launch`` started; only the first is heard."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        if "MASTER_PORT" in os.environ and os.environ.get("ACCELERATE_USE_CPU") == "True":
            log.warning(
                "accelerate launch --cpu starts one process only; several, on CPUs too, are started by "
                "accelerate launch --multi_gpu --num_processes N."
            )
        yield
        return
    from distill import processes

    processes.start()
    signal.signal(signal.SIGTERM, _told_to_end)
    with ExitStack() as stack:
        if not processes.is_first():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield
    processes.end()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is done and written; threads of libraries abort now and then as an interpreter ends


def _told_to_end(number: int, frame: Any) -> None:
    """A launcher whose other process has failed says SIGTERM: who is failing because of it first says why."""
    if sys.exc_info()[0] is None:
        raise KeyboardInterrupt


def _is_heard() -> bool:
    """Whether this process, which fails, should say why."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    from distill import processes

    return processes.speaks()


def _explained(error: BaseException) -> tuple[str, int]:
    """What to say about an error, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        said = str(error) or "what was saved before is kept"
        return f"interrupted: {said}. The same command goes on from there.", 1
    if _disk_is_full(error):
        return (
            f"error: the disk is full ({error}). Free some space; what was finished is kept, and the same "
            f"command goes on from there.",
            1,
        )
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, RunError):
        return f"error: {error}", 1
    return f"error: {type(error).__name__}: {one_line(str(error), 500)} (--debug shows where)", 1


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether this error, or one it came from, is a full disk; libraries say so in words only."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def quiet_libraries() -> None:
    """No bars and reports of libraries for the loading and saving of local files; downloads keep theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as reports

    reports.set_verbosity_error()
    reports.disable_progress_bar()
    if sys.stderr.isatty() and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        enable_progress_bars()


def _console() -> Console:
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
