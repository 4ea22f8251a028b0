"""Where things lie on this machine, and how files come to lie there: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.errors import DataError

try:
    import fcntl
except ImportError:  # not a Unix: what a killed process left is not swept away there
    fcntl = None  # type: ignore[assignment]


def recipes_folder() -> Path:
    """The folder of the recipes that come with Distill.

    An installed package carries it inside ``distill``; in a checkout it lies beside ``distill``.
    """
    package = Path(__file__).resolve().parent
    places = (package / "recipes", package.parent / "recipes")
    for folder in places:
        if folder.is_dir():
            return folder
    raise DataError(
        f"The recipes that come with Distill are missing: there is neither {places[0]} nor {places[1]}. "
        f"Install Distill again, or name a recipe by the path of its YAML file."
    )


def cache_folder() -> Path:
    """Where work that other runs can use again is kept: ``$DISTILL_CACHE``, else ``~/.cache/distill``.

    The folder need not exist yet: who writes there makes it.
    """
    return Path(os.environ.get("DISTILL_CACHE") or "~/.cache/distill").expanduser()


def store_folder() -> Path:
    """Where the teacher store lies: ``$DISTILL_STORE``, else ``store`` in the cache folder."""
    given = os.environ.get("DISTILL_STORE")
    return Path(given).expanduser() if given else cache_folder() / "store"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place by rename if all goes well, else vanishes.

    Who reads sees the old file or the new, never a part. The file is on the disk before it is renamed. What
    a process left that was killed meanwhile is removed by the next that writes to ``path``.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with replacing(path) as new:
        ...     _ = new.write_text("all of it")
        >>> path.read_text()
        'all of it'
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _beside(path)
    try:
        with _locked(new):
            yield new
            with new.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of ``folder`` when the block ends well.

    When the block fails nothing of it stays, and a folder that was there before is untouched.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "student"
        >>> with replacing_folder(target) as new:
        ...     _ = (new / "config.json").write_text("{}")
        >>> sorted(path.name for path in target.iterdir())
        ['config.json']
    """
    target = Path(folder).absolute()
    if target.exists() and not target.is_dir():
        raise DataError(f"{folder} is a file; a folder is to be written there. Choose another name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    new = _beside(target)
    old = new.with_suffix(".old")
    new.mkdir()
    try:
        with _locked(new):
            yield new
            if target.exists():
                target.rename(old)
            try:
                new.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A free hidden name in the same folder, hence on the same disk: a rename there is atomic."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        if _is_abandoned(left):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock on a new file or a folder; it ends with the process, however that ends."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _is_abandoned(path: Path) -> bool:
    """Whether no living process writes there."""
    if fcntl is None:
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # renamed meanwhile
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
