"""The two contracts of a model: Model (can be asked about a batch) and Encoder (can be indexed)."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from distill.batch import Batch, Columns
from distill.outputs import Needs, Outputs

if TYPE_CHECKING:
    from distill.data.source import JudgedSource


class Model(nn.Module, ABC):
    """A node of the graph: a teacher, a student, or both.

    ``represent`` does the heavy part, one row at a time: what it says about a query, a candidate or a
    listed pair never depends on another row. ``compare`` does the light part over rows already
    represented. The framework gathers, caches and stores between the two.
    """

    shares: ClassVar[frozenset[str]] = frozenset()  # attributes that `ref: node.attribute` may name
    of: tuple[str, ...] = ()  # names of the nodes this one is built from
    recorded: ClassVar[bool] = False  # only what it said elsewhere is known: it cannot be asked
    by_data: tuple[str, ...] = ()  # names of data sets that it treats in ways of their own
    labelled: bool = False  # reads the labels: it can teach only where there are some
    measurable: bool = True  # False: what it says of a pair depends on the batch too (labels, the data set)

    @property
    @abstractmethod
    def provides(self) -> frozenset[str]:
        """Fields of Outputs that this built model can answer."""

    @property
    @abstractmethod
    def reads(self) -> Columns:
        """The columns read of queries, of candidates and of listed pairs."""

    @abstractmethod
    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        """Answer, row by row, what ``compare`` will need for ``needs``."""

    def compare(self, outputs: Outputs, batch: Batch, needs: Needs) -> Outputs:
        """Fill the fields of ``needs`` that follow from rows already represented."""
        return outputs

    @property
    def identity(self) -> dict[str, Any] | None:
        """Plain data that decides, with class and weights, what it answers; by it the teacher store knows it.

        ``checkpoint`` is only what the store calls it. None: answers are kept for one run, not on disk.
        """
        return None

    @property
    def sizes(self) -> dict[str, int]:
        """The last axis of fields whose size is known: what an objective's parameters are made for.

        Where attention is provided also ``layers`` and ``heads``.
        """
        return {}

    def fit(self, source: JudgedSource) -> None:
        """Learn from a train split what no gradient teaches; asked of frozen nodes before the first step."""
        return None

    def represents(self, needs: Needs) -> Needs:
        """The fields that ``represent`` fills so that ``compare`` can answer ``needs``."""
        return needs

    def of_needs(self, needs: Needs) -> Needs:
        """What a node built from others asks of them, to answer ``needs``."""
        return needs

    def knows(self, batch: Batch) -> Tensor | None:
        """Which listed pairs it gives a score to, by the batch alone: [B, N] bool; None: all of them.

        Of the others its arrows say nothing.
        """
        return None

    def represent_of(self, heard: Mapping[str, Outputs], batch: Batch, needs: Needs) -> Outputs:
        """``represent`` of a node built from others: ``heard`` is what each of ``self.of`` answered."""
        raise NotImplementedError(f"{type(self).__name__} cannot be built `of` another node.")

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights (safetensors), configuration and tokenizer to ``folder``."""

    def push_to_hub(self, repo_id: str, private: bool = False, token: str | None = None) -> str:
        """Save it and upload that to a repository of the Hub, made if it is not there; returns its address.

        A run's folder, which has a model card with figures, goes there by ``distill.hub.push_to_hub``.
        """
        from distill.hub import push_to_hub

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "model")
            return push_to_hub(Path(folder) / "model", repo_id, private, token)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class Encoder(Model):
    """A model whose candidates are encoded once, and searched in an index."""

    # How its vectors are compared: "dot"; "maxsim" of token vectors; "own": by its `score_encoded` alone, so
    # that it puts candidates in order and no index searches by them.
    search: ClassVar[str] = "dot"

    @property
    @abstractmethod
    def dim(self) -> int:
        """D, the size of a vector."""

    @property
    def sizes(self) -> dict[str, int]:
        return {"queries": self.dim, "candidates": self.dim}

    def scale(self) -> Tensor | float:
        """What a dot product of its vectors is multiplied by to be a score as served; above 0."""
        return 1.0

    def represents(self, needs: Needs) -> Needs:
        pairwise = needs.fields & {"scores", "in_batch"}
        return needs.only(
            (needs.fields - {"scores", "in_batch"}) | ({"queries", "candidates"} if pairwise else set())
        )

    @abstractmethod
    def encode_queries(self, queries: Sequence[Any], progress: bool = False) -> Any:
        """Vectors [n, D] float32 on the CPU, of n raw queries; by "maxsim" a Ragged of n rows of them."""

    @abstractmethod
    def encode_candidates(self, candidates: Sequence[Any], progress: bool = False) -> Any:
        """Vectors [n, D] float32 on the CPU, of n raw candidates; by "maxsim" a Ragged of n rows of them."""
