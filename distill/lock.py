"""One run at a time in a folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.errors import UserError
from distill.paths import fcntl

LOCK = "lock"  # in the run folder, while somebody runs there


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Inside, the folder (made where it is not there) is this process's; the system frees it if it dies.

    Raises:
        UserError: Another process runs there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:  # not a Unix: nobody is kept out there
        yield
        return
    path = folder / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace") or "unknown"
            os.close(file)
            raise UserError(
                f"{folder} is in use: process {holder} runs there. Wait for it, end it, or give this run a "
                f"name of its own (name=...)."
            ) from None
        except BaseException:
            os.close(file)
            raise
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            break
        os.close(file)  # its holder has just ended and taken the file away
    try:
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)
