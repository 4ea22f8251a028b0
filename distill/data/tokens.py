"""The token cache: a text is cut into ids once per tokenizer and prompt. Next: ``nn/tokenizer.py``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import torch
import xxhash

from distill.batch import Ragged
from distill.data.cache import content_hash, replacing
from distill.paths import cache_folder

logger = logging.getLogger(__name__)
CHUNK = 20_000  # texts encoded at a time: their ids are Python lists until they are packed


class Column(Protocol):
    """What the cache asks of a ``TextColumn``."""

    @property
    def key(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, texts: list[str]) -> Ragged: ...


def tokenized(texts: list[str], column: Column, cache_dir: str | Path | None = None) -> Ragged:
    """Ids of prompt and text, without special tokens: one row per text, int32, mapped from disk.

    The file is found by what decides its content: tokenizer, prompt and texts. One that is damaged is
    made again.
    """
    name = content_hash([column.fingerprint, column.key, *texts])
    path = Path(cache_dir or cache_folder() / "tokens") / f"{name}.arrow"
    if path.exists():
        try:
            return _load(path, len(texts))
        except (pa.ArrowException, OSError, ValueError) as error:
            logger.warning("%s: the token cache is damaged (%s) and is made again.", path, error)
    pieces = [column.encode(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
    pieces = pieces or [Ragged.of([], dtype=torch.int32)]
    values = torch.cat([piece.values.to(torch.int32) for piece in pieces])
    whole = Ragged.of_lengths(values, torch.cat([piece.lengths for piece in pieces]))
    with replacing(path) as temporary:
        _save(whole, temporary)
    return _load(path, len(texts))


def _save(ids: Ragged, path: Path) -> None:
    columns = {"values": pa.array(ids.values.numpy()), "offsets": pa.array(ids.offsets.numpy())}
    schema = pa.schema([(name, pa.large_list(array.type)) for name, array in columns.items()])
    schema = schema.with_metadata({"checksum": _checksum(ids)})
    lists = [pa.LargeListArray.from_arrays([0, len(array)], array) for array in columns.values()]
    with pa.ipc.new_file(path, schema) as writer:
        writer.write_batch(pa.record_batch(lists, schema=schema))


def _load(path: Path, rows: int) -> Ragged:
    """The file's ids without a copy; ValueError where they are not those once written."""
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        batch, checksum = reader.get_batch(0), reader.schema.metadata[b"checksum"]
    # read-only pages: to write into these tensors would end the process
    values, offsets = (torch.from_dlpack(batch.column(name).values) for name in ("values", "offsets"))
    ids = Ragged(values, offsets)
    if len(ids) != rows or _checksum(ids).encode() != checksum:
        raise ValueError("its checksum does not match")
    return ids


def _checksum(ids: Ragged) -> str:
    state = xxhash.xxh3_64()
    for tensor in (ids.values, ids.offsets):
        state.update(tensor.numpy().data.cast("B") if len(tensor) else b"")
    return state.hexdigest()
