"""Files that appear whole or not at all, and JSON that says where it is broken."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.errors import DataError


def _beside(path: Path, kind: str) -> Path:
    """A free hidden name in the same folder, hence on the same disk: a rename there is atomic."""
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}"


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of ``folder`` when the block ends well.

    When the block fails nothing of it stays, and a folder that was there before is untouched.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "student"
        >>> with atomic_folder(target) as new:
        ...     _ = (new / "config.json").write_text("{}")
        >>> sorted(path.name for path in target.iterdir())
        ['config.json']
    """
    target = Path(folder).absolute()
    if target.exists() and not target.is_dir():
        raise DataError(f"{folder} is a file; a folder is to be written there. Choose another name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = _beside(target, "tmp"), _beside(target, "old")
    new.mkdir()
    try:
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


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) by rename: a reader sees the old text or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _beside(path.absolute(), "tmp")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def read_json(path: Path, default: Any = None) -> Any:
    """What a JSON file says; ``default`` where there is none, if one is given."""
    if default is not None and not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; the folder was not copied or downloaded whole.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); copy or download it again.") from None


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
