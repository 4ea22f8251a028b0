"""Several encoders as one: their vectors end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.batch import Batch, Columns
from distill.measure import can_be_measured
from distill.model import Encoder, Model
from distill.outputs import Needs, Outputs
from teachers.parts import check_parts, open_parts, read_parts, write_parts


class Concatenation(Encoder):
    """Several encoders as one: each text's vectors of all of them, end to end.

    The dot product of two such vectors, times ``scale()``, is the sum of the parts' scores, so it can be
    searched; where parts have different scales (a two-tower's temperature), the queries' vectors make up for
    it. A student of another size learns from it by the similarities of texts, or through a projection.

    Provides ``queries`` [B, D], ``candidates`` [P, D], ``scores`` [B, N] and ``in_batch`` [B, P];
    D is the sum of the parts' sizes.

    Args:
        of: The encoders, with one vector per text.
        normalize: Give each part's vectors length 1, so that all weigh alike; None: as they are.
        checkpoint: A saved one of these encoders.

    References:
        Zhang et al., 2024. Jasper and Stella: distillation of SOTA embedding models. arXiv:2412.19048
    """

    def __init__(
        self, of: Mapping[str, Model], normalize: bool | None = None, checkpoint: str | Path | None = None
    ):
        super().__init__()
        self.parts: dict[str, Any] = check_parts(of, "candidates")
        self.of = tuple(self.parts)
        if checkpoint is not None:
            if normalize is not None:
                raise ValueError("the checkpoint says what is normalised: leave out normalize.")
            normalize = read_parts(checkpoint, "Concatenation", list(self.of))[0]["normalize"]
        for name, part in self.parts.items():
            if not isinstance(part, Encoder) or part.search != "dot":
                raise ValueError(f"of: '{name}' ({type(part).__name__}) has no vector per text to search by.")
        self.normalize = bool(normalize)
        self.measurable = all(can_be_measured(part) for part in self.parts.values())
        self.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Concatenation:
        """A saved one with the encoders that its folder refers to."""
        return cls(open_parts(folder), checkpoint=folder)

    @property
    def dim(self) -> int:
        return sum(part.dim for part in self.parts.values())

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"queries", "candidates", "scores", "in_batch"})

    @property
    def reads(self) -> Columns:
        return Columns()

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    def of_needs(self, needs: Needs) -> Needs:
        return self.represents(needs)

    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        raise NotImplementedError("a Concatenation hears its parts: it is asked by represent_of.")

    def represent_of(self, heard: Mapping[str, Outputs], batch: Batch, needs: Needs) -> Outputs:
        said = {f: [getattr(heard[name], f) for name in self.of] for f in self.represents(needs).fields}
        return Outputs().with_(**{field: self._joined(vectors, field) for field, vectors in said.items()})

    def scale(self) -> Tensor | float:
        """That of the first part; of parts whose vectors are given length 1, 1."""
        return 1.0 if self.normalize else next(iter(self.parts.values())).scale()

    def compare(self, outputs: Outputs, batch: Batch, needs: Needs) -> Outputs:
        queries, candidates = outputs.queries, outputs.candidates
        if "scores" in needs:
            assert queries is not None and candidates is not None
            scores = (candidates[batch.index] * queries[:, None]).sum(dim=-1) * self.scale()
            outputs = outputs.with_(scores=scores)
        if "in_batch" in needs:
            assert queries is not None and candidates is not None
            outputs = outputs.with_(in_batch=queries @ candidates.T * self.scale())
        return outputs

    def _joined(self, vectors: Sequence[Tensor], side: str) -> Tensor:
        if self.normalize:
            return torch.cat([F.normalize(part, dim=-1) for part in vectors], dim=-1)
        if side == "queries":
            scales = [part.scale() for part in self.parts.values()]
            vectors = [
                said * _ratio(scale, scales[0], said) for said, scale in zip(vectors, scales, strict=True)
            ]
        return torch.cat(list(vectors), dim=-1)

    @torch.no_grad()
    def encode_queries(self, queries: Sequence[Any], progress: bool = False) -> Tensor:
        """Vectors [n, D] float32 on the CPU, of n raw queries."""
        vectors = [part.encode_queries(queries, progress) for part in self.parts.values()]
        return self._joined(vectors, "queries")

    @torch.no_grad()
    def encode_candidates(self, candidates: Sequence[Any], progress: bool = False) -> Tensor:
        """Vectors [n, D] float32 on the CPU, of n raw candidates."""
        vectors = [part.encode_candidates(candidates, progress) for part in self.parts.values()]
        return self._joined(vectors, "candidates")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what is joined; the encoders stay where they are, and the folder refers to them."""
        write_parts(folder, "Concatenation", self.parts, {"normalize": self.normalize}, {})


def _ratio(scale: Tensor | float, first: Tensor | float, like: Tensor) -> Tensor | float:
    ratio = scale / first
    return ratio.to(like.device) if isinstance(ratio, Tensor) else ratio
