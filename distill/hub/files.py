"""Files that appear whole or not at all, and JSON that says where it is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.errors import DataError
from distill.paths import replacing
from distill.paths import replacing_folder as atomic_folder

__all__ = ["atomic_folder", "atomic_write_text", "read_json", "write_json"]


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) by rename: a reader sees the old text or the new, never a part."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


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
