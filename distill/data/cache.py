"""The cache folder: what is costly to make is kept under a hash of all that decides it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from distill import paths
from distill.errors import DataError


def content_hash(parts: Iterable[str]) -> str:
    """A hash of a sequence of strings, and of where one ends and the next begins.

    >>> content_hash(["ab", "c"]) == content_hash(["a", "bc"])
    False
    """
    state = xxhash.xxh3_128()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def unit_hash(text: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on the text and the seed alone: the same on every machine."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed=seed) / 2**64


@contextmanager
def replacing(path: Path, in_cache: bool = True) -> Iterator[Path]:
    """``distill.paths.replacing`` for a file of the cache: an error says which setting helps."""
    try:
        with paths.replacing(path) as temporary:
            yield temporary
    except OSError as error:
        what, other = ("the cache", ", or set DISTILL_CACHE to another folder") if in_cache else ("it", "")
        raise DataError(f"{path}: cannot write {what} ({error}). Free space there{other}.") from error
