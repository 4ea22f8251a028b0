"""The teacher store on disk: a folder per teacher, in it one per signal, in it blocks. Next: ``store.py``.

    STORE/<hash of the teacher>/teacher.json          who it is: all that the hash is made of, to be read
    STORE/<hash of the teacher>/scores.float32/*.arrow     blocks: keys of pairs, and their scores

A block is an Arrow IPC file named by the hash of its bytes: it is written once, by rename, and never changed;
one whose bytes no longer have the hash of its name is damaged, and as if it were not there. A key is made of
texts, never of row numbers, so that another run, recipe or data set finds what was said before.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from distill.data.cache import content_hash
from distill.errors import DataError, RunError
from distill.hub.files import atomic_write_text
from distill.model import Model
from distill.paths import replacing

log = logging.getLogger("distill")

FORMAT = 1  # of blocks and keys; another one has other addresses
ABOUT = "teacher.json"
SERVED = "served_"  # begins the names of what was said when a teacher was measured
_PRECISE = {"precision": ""}
Precision = Literal["float16", "float32"]  # in which answers are kept
ODD = np.array([[0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], [0x165667B19E3779F9, 0xD6E8FEB86659FD93]], "uint64")


def pair_keys(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The keys [n, 2] of n pairs, from the keys of their texts, each [n, 2]."""
    return queries * ODD[0] + candidates * ODD[1]  # modulo 2^64


@dataclass(frozen=True)
class Teacher:
    """What decides a teacher's answers, and where they are kept.

    Args:
        root: The folder of the store.
        about: All that the address is a hash of; and ``checkpoint``, what the recipe calls it.
    """

    root: Path
    about: Mapping[str, Any]

    @classmethod
    def of(cls, node: Model, precision: str, root: Path) -> Teacher | None:
        """The teacher that a frozen node is; None: the node cannot say what decides its answers."""
        if (identity := node.identity) is None:
            return None
        kind = f"{type(node).__module__}.{type(node).__qualname__}"
        about = {"type": kind, **identity, "weights": weights_hash(node), "precision": precision}
        return cls(root, json.loads(json.dumps({**about, "format": FORMAT})))

    @cached_property
    def address(self) -> str:
        return content_hash([json.dumps(_decisive(self.about), sort_keys=True)])

    @property
    def folder(self) -> Path:
        return self.root / self.address

    def check(self) -> None:
        """Refuse a folder that another teacher wrote."""
        there = read_about(self.folder)
        if there is None or _decisive(there) == _decisive(self.about):
            return
        ours, theirs = _flat(_decisive(self.about)), _flat(_decisive(there))
        different = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        said = "; ".join(f"{key} is {theirs.get(key)} there, {ours.get(key)} here" for key in different[:5])
        raise DataError(
            f"{self.folder} was written by another teacher under the name of this one ({said}). Remove this "
            f"folder, or set DISTILL_STORE to another one."
        )

    def introduce(self) -> None:
        """Say in the teacher's folder who it is."""
        if read_about(self.folder) is None:
            atomic_write_text(self.folder / ABOUT, json.dumps(self.about, indent=1) + "\n")


def weights_hash(node: Model) -> str:
    """A hash of a model's weights and buffers: their names, types, shapes and bytes."""
    state = xxhash.xxh3_128()
    for name, value in sorted(node.state_dict().items()):
        state.update(f"{name} {value.dtype} {[*value.shape]} ".encode())
        if value.numel():
            state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def read_about(folder: Path) -> dict[str, Any] | None:
    """What a teacher's folder says of it; None: nothing that can be read."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) else None


def _decisive(about: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in about.items() if key != "checkpoint"}


def _flat(about: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings inside settings by a name with dots."""
    flat: dict[str, Any] = {}
    for key, value in about.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat


@dataclass(frozen=True)
class _Block:
    keys: np.ndarray  # [n, 2] uint64
    values: dict[str, np.ndarray]  # field of Outputs -> [n, ...], mapped from disk


class Signal:
    """What one teacher said in some fields of Outputs: blocks on disk, and where in them a key is.

    Values are mapped, not read; keys are held in memory, 24 bytes each.

    Args:
        teacher: Whose words these are; None keeps them in memory, until the process ends.
        fields: Of Outputs, all on one axis.
        precision: In which values are kept.
        mend: Remove blocks that are damaged.

    Raises:
        DataError: The folder, or a block in it, is another teacher's.
    """

    def __init__(
        self, teacher: Teacher | None, fields: Sequence[str], precision: Precision, mend: bool = True
    ):
        self.teacher, self.fields, self.precision = teacher, tuple(sorted(fields)), precision
        self._blocks: list[_Block] = []
        self._starts = np.zeros(0, dtype=np.int64)  # of each block's rows, among all rows
        self._low, self._high = np.zeros((2, 0), dtype=np.uint64)  # halves of the keys, in the order of low
        self._place = np.zeros(0, dtype=np.int64)  # row of each key
        if self.folder is not None and self.folder.is_dir():
            assert teacher is not None
            teacher.check()
            read = [self._read(path, mend) for path in sorted(self.folder.glob("*.arrow"))]
            self._take([block for block in read if block is not None])

    @property
    def folder(self) -> Path | None:
        return None if self.teacher is None else signal_folder(self.teacher, self.fields, self.precision)

    def __len__(self) -> int:
        """How many texts or pairs are known."""
        return len(self._low)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Where the answers to keys [n, 2] are: rows [n], -1 where there is none."""
        if not len(self._low):
            return np.full(len(keys), -1)
        low, high = np.ascontiguousarray(keys[:, 0]), keys[:, 1]
        at = np.searchsorted(self._low, low).clip(max=len(self._low) - 1)
        return np.where((self._low[at] == low) & (self._high[at] == high), self._place[at], -1)

    def read(self, rows: np.ndarray) -> dict[str, Tensor]:
        """The answers [n, ...] float32 at rows [n] that ``find`` gave, by field."""
        block_of = np.searchsorted(self._starts, rows, side="right") - 1
        order = block_of.argsort(kind="stable")
        numbers, cuts = np.unique(block_of[order], return_index=True)
        answers = {}
        for f in self.fields:
            shape = self._blocks[0].values[f].shape[1:] if self._blocks else ()
            answer = np.empty((len(rows), *shape), dtype=np.float32)
            for number, part in zip(numbers, np.split(order, cuts)[1:], strict=True):
                answer[part] = self._blocks[number].values[f][rows[part] - self._starts[number]]
            answers[f] = torch.from_numpy(answer)
        return answers

    def append(self, keys: np.ndarray, values: Mapping[str, Tensor], on_disk: bool = True) -> None:
        """Write a block, whole or not at all; or, where another process does, only know it.

        Raises:
            RunError: A value is not finite, or not in the range of the precision.
            DataError: It cannot be written.
        """
        arrays = {f: values[f].numpy() for f in self.fields}
        for f, array in arrays.items():
            with np.errstate(over="ignore"):
                kept = array.astype(self.precision)
            if not np.isfinite(kept).all():
                beyond = np.isfinite(array).all()
                raise RunError(
                    f"the teacher answered {f} "
                    + (f"beyond the range of {self.precision}; set train.store: float32."
                       if beyond else "that are not finite numbers; its checkpoint or precision is at fault.")
                )  # fmt: skip
            arrays[f] = kept
        data = self._packed(keys, arrays)
        if on_disk and self.folder is not None and self.teacher is not None:
            path = self.folder / f"{xxhash.xxh3_128_hexdigest(data)}.arrow"
            try:
                self.teacher.introduce()
                with replacing(path) as new:
                    new.write_bytes(data)
            except OSError as error:
                raise DataError(
                    f"{path}: cannot write the teacher store ({error}). Free space there, or set "
                    f"DISTILL_STORE to another folder."
                ) from error
            data = _mapped(path)
        self._take([self._unpacked(data)])

    def _packed(self, keys: np.ndarray, arrays: Mapping[str, np.ndarray]) -> pa.Buffer:
        columns = {"key": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), len(keys), [None, pa.py_buffer(np.ascontiguousarray(keys))]
        )}  # fmt: skip
        for f, array in arrays.items():
            flat = pa.array(array.reshape(-1))
            width = array[0].size
            columns[f] = flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
        shapes = json.dumps({f: array.shape[1:] for f, array in arrays.items()})
        address = "" if self.teacher is None else self.teacher.address
        table = pa.record_batch(columns).replace_schema_metadata({"teacher": address, "shapes": shapes})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_batch(table)
        return sink.getvalue()

    def _unpacked(self, data: pa.Buffer) -> _Block:
        reader = pa.ipc.open_file(pa.BufferReader(data))
        table, metadata = reader.get_batch(0), reader.schema.metadata
        shapes, n = json.loads(metadata[b"shapes"]), table.num_rows

        def array(column: str, dtype: str, shape: Sequence[int]) -> np.ndarray:
            buffer = table.column(column).buffers()[-1]
            return np.frombuffer(buffer, dtype, n * int(np.prod(shape))).reshape(n, *shape)

        if (address := metadata[b"teacher"].decode()) and address != (self.teacher and self.teacher.address):
            raise DataError(
                f"{self.folder}: a block in it was written by another teacher ({address}). Remove this "
                f"folder, or set DISTILL_STORE to another one."
            )
        values = {f: array(f, self.precision, shapes[f]) for f in self.fields}
        return _Block(array("key", "<u8", (2,)), values)

    def _read(self, path: Path, mend: bool) -> _Block | None:
        try:
            data = _mapped(path)
            if xxhash.xxh3_128_hexdigest(data) == path.stem:
                return self._unpacked(data)
        except (pa.ArrowException, OSError, ValueError, KeyError):
            pass  # as damaged as one with another hash
        log.warning("%s: this block of the teacher store is damaged; what it held is asked again.", path)
        if mend:
            path.unlink(missing_ok=True)
        return None

    def _take(self, blocks: Sequence[_Block]) -> None:
        """Find the keys of these blocks from now on; a key that is known already stays where it is."""
        if not blocks:
            return
        keys = np.concatenate([block.keys for block in blocks])
        ends = np.cumsum([len(block.keys) for block in blocks])
        first = int(self._starts[-1]) + len(self._blocks[-1].keys) if self._blocks else 0
        self._starts = np.concatenate([self._starts, first + np.concatenate([[0], ends[:-1]])])
        self._blocks += blocks
        order = keys[:, 0].argsort(kind="stable")
        low, high, place = keys[order, 0], keys[order, 1], order + first
        at = np.searchsorted(self._low, low, side="right")  # to the right: what was there is found first
        self._low, self._high = np.insert(self._low, at, low), np.insert(self._high, at, high)
        self._place = np.insert(self._place, at, place)


def _mapped(path: Path) -> pa.Buffer:
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def signal_folder(teacher: Teacher, fields: Sequence[str], precision: str) -> Path:
    return teacher.folder / f"{'+'.join(sorted(fields))}.{precision}"


def outdated(teacher: Teacher, used: Sequence[Path]) -> Iterator[Path]:
    """What the store holds of the same checkpoint under other settings: what ``--prune`` removes.

    Whole teachers of the same type and checkpoint name whose weights, tokenizer, prompts, lengths, precision
    or other settings differ; of this teacher itself, the ``used`` signals in another precision. What it said
    when it was measured, in whatever precision it serves, stays.
    """
    for folder in sorted(teacher.root.glob("*")):
        there = read_about(folder)
        same = there is not None and all(there.get(k) == teacher.about.get(k) for k in ("type", "checkpoint"))
        if there is None or not same or folder == teacher.folder or "checkpoint" not in teacher.about:
            continue
        served = [*folder.glob(f"{SERVED}*")] if there | _PRECISE == dict(teacher.about) | _PRECISE else []
        if not served:
            yield folder
        else:
            yield from (
                signal for signal in sorted(folder.iterdir()) if signal.is_dir() and signal not in served
            )
    for signal in used:
        for folder in sorted(teacher.folder.glob(f"{signal.stem}.*")):
            if folder not in used:
                yield folder


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def remove(folder: Path) -> None:
    """Remove a folder of the store; what says whose it is goes last, so that the rest is found again."""
    for inside in folder.iterdir():
        if inside.is_dir():
            shutil.rmtree(inside)
    shutil.rmtree(folder)
