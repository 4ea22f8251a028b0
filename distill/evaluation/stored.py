"""Models as they are measured: frozen teachers by the teacher store, others without encoding twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.judged import text_keys
from distill.evaluation.scoring import can_search, encodes_apart, is_combined, searches_tokens
from distill.model import Model
from distill.nn.precision import resolve_precision
from distill.paths import store_folder
from distill.processes import gather, in_shares, is_first
from distill.store_files import SERVED, Signal, Teacher, pair_keys

KEPT_BYTES = 2**28  # of vectors that are held until the next evaluation
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}


def stored(model: Model, search: bool, latest: dict[bytes, Tensor] | None = None) -> Any:
    """What is measured in the place of a model of texts: where the store can keep its answers, ``Stored``.

    It must be frozen, and not built of others. One that learns is ``Remembered``, where ``latest`` is given.

    Args:
        search: Whether all candidates are searched: vectors per token are too many to keep.
        latest: Where the vectors of the last search are held.
    """
    if is_combined(model):
        return StoredParts(model, search)
    precision = getattr(model, "precision", None)
    if precision is None or encodes_apart(model) or (search and searches_tokens(model)):
        return model
    learns = model.of or any(parameter.requires_grad for parameter in model.parameters())
    if learns and (latest is None or not search or not can_search(model)):
        return model
    dtype = DTYPES[resolve_precision(precision, model.device)]  # beside what it says in training, if the same
    teacher = Teacher.of(model, dtype, store_folder())
    if teacher is None:
        return model
    if not learns or latest is None:
        return Stored(model, teacher)
    return Remembered(model, teacher.address, latest)


class Stored:
    """Answers as the model would, and asks it only what the store does not know; in all else the model.

    Kept beside what is said in training, under names of their own (``served_scores``), in float32: a model
    is asked in other batches there, so that last bits differ. All processes must ask the same.
    """

    asks_in_shares = True

    def __init__(self, model: Any, teacher: Teacher):
        self.model, self.teacher = model, teacher
        self.asked = 0  # about how many texts and pairs
        self._signals: dict[str, Signal] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_queries(self, queries: Sequence[str], progress: bool = False) -> Tensor:
        encode = partial(self.model.encode_queries, progress=progress)
        return self._answers("queries", text_keys(queries), lambda part: encode(_at(queries, part)))

    def encode_candidates(self, candidates: Sequence[str], progress: bool = False) -> Tensor:
        encode = partial(self.model.encode_candidates, progress=progress)
        return self._answers("candidates", text_keys(candidates), lambda part: encode(_at(candidates, part)))

    def score_pairs(self, queries: Sequence[str], candidates: Sequence[str]) -> Tensor:
        keys = pair_keys(text_keys(queries), text_keys(candidates))
        return self._answers(
            "scores", keys, lambda part: self.model.score_pairs(_at(queries, part), _at(candidates, part))
        )

    def _answers(self, kind: str, keys: np.ndarray, ask: Callable[[Tensor], Tensor]) -> Tensor:
        """The answer to each key [n, ...]; ``ask`` gives those at rows."""
        field = f"{SERVED}{kind}"
        if kind not in self._signals:
            self._signals[kind] = Signal(self.teacher, (field,), "float32", mend=is_first())
        signal = self._signals[kind]
        unknown = torch.from_numpy(signal.find(keys) < 0)
        rows = gather(unknown[None]).any(dim=0).numpy().nonzero()[0]  # unknown to any process
        rows = rows[np.sort(np.unique(keys[rows], axis=0, return_index=True)[1])]
        if len(rows):
            values = in_shares(ask, torch.from_numpy(rows)).float()
            signal.append(keys[rows], {field: values}, on_disk=is_first())
            self.asked += len(rows)
        return signal.read(signal.find(keys))[field]


class Remembered:
    """A model that learns, at one step: the vectors that were searched last are held, by whichever model.

    So where dev chose the last step, its candidates are not encoded again for test.

    Args:
        address: Of all that decides its answers, its weights too.
    """

    def __init__(self, model: Any, address: str, latest: dict[bytes, Tensor]):
        self.model, self.address, self.latest = model, address, latest

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_candidates(self, candidates: Sequence[str], progress: bool = False) -> Tensor:
        key = self.address.encode() + text_keys(candidates).tobytes()
        if key not in self.latest:
            self.latest.clear()
            vectors = self.model.encode_candidates(candidates, progress)
            if vectors.nbytes > KEPT_BYTES:
                return vectors
            self.latest[key] = vectors
        return self.latest[key]


class StoredParts:
    """A model made of others, each of which answers from the store; see ``scoring.Combined``."""

    def __init__(self, model: Any, search: bool):
        self.model = model
        self.parts = {name: stored(part, search) for name, part in model.parts.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @property
    def asked(self) -> int:
        return sum(getattr(part, "asked", 0) for part in self.parts.values())


def _at(texts: Sequence[str], rows: Tensor) -> list[str]:
    return [texts[row] for row in rows.tolist()]
