"""Batches of one topic: queries that are alike are learnt together. Part of ``source.py``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from distill.data.cache import replacing
from distill.data.judged import Judged
from distill.errors import DataError
from distill.processes import from_first, in_shares, is_first, wait

if TYPE_CHECKING:
    from distill.graph import DistillationGraph

log = logging.getLogger("distill")


class Topics:
    """Clusters of queries: a source fills its batches from one after the other (topic-aware sampling).

    The other queries' candidates, which an objective over the batch compares with, are then of the same
    topic, and harder. Queries are clustered once, by k-means over their vectors. An epoch has every query
    once: where a topic ends within a batch the next one goes on, and the batches come in an order drawn anew.

    Args:
        by: The node whose vectors are clustered: a frozen encoder with a vector per text.
        clusters: How many topics; best so many that each has a few batches of queries.

    References:
        Hofstätter et al., 2021. Efficiently Teaching an Effective Dense Retriever with Balanced Topic
        Aware Sampling. arXiv:2104.06967
    """

    names_nodes: ClassVar[tuple[str, ...]] = ("by",)

    def __init__(self, by: str, clusters: int):
        if clusters < 2:
            raise ValueError(f"clusters must be at least 2, got {clusters}.")
        self.by, self.clusters = by, clusters
        self.topic: Tensor | None = None  # [queries] int64

    def refresh(self, graph: DistillationGraph, judged: Judged, folder: Path, seed: int) -> None:
        """Have the topics at hand: from the run's folder, or clustered now.

        Raises:
            DataError: There are fewer distinct queries than clusters, or the file in the folder is damaged.
        """
        if self.topic is not None:
            return
        path = folder / "topics.npy"
        if from_first(path.exists()):
            self.topic = self._load(path, len(judged.queries))
            return
        from distill.evaluation.scoring import serving

        distinct, place = judged.queries.same.unique(return_inverse=True)
        if len(distinct) < self.clusters:
            raise DataError(
                f"topics: there are {len(distinct):,} distinct queries, fewer than {self.clusters} clusters."
            )
        model: Any = graph.nodes[self.by]
        with serving(model):
            vectors = in_shares(partial(model.encode_queries), judged.queries.take(distinct))
        topic = from_first(_k_means(vectors.float().cpu().numpy(), self.clusters, seed))
        self.topic = torch.from_numpy(topic.astype(np.int64))[place]
        if is_first():
            with replacing(path, in_cache=False) as new, new.open("wb") as file:
                np.save(file, self.topic.numpy())
        wait()
        log.info("topics: %s queries in %s clusters", f"{len(distinct):,}", f"{self.clusters:,}")

    def _load(self, path: Path, queries: int) -> Tensor:
        try:
            topic = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} is damaged ({error}): remove it, and it is made again.") from error
        if topic.shape != (queries,) or topic.dtype != np.int64:
            raise DataError(f"{path} is not of these {queries:,} queries: remove it, and it is made again.")
        return torch.from_numpy(topic)

    def ordered(self, rows: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
        """The queries at ``rows`` [n], shuffled, in the order in which batches of one topic are cut off."""
        if self.topic is None:
            raise RuntimeError("Topics: its source's refresh comes before its batches.")
        rows = rows[torch.randperm(len(rows), generator=generator)]
        turn = torch.randperm(self.clusters, generator=generator)[self.topic[rows]]
        rows = rows[turn.argsort(stable=True)]
        full = len(rows) // batch_size
        batches = rows[: full * batch_size].view(full, batch_size)
        order = torch.randperm(full, generator=generator)
        return torch.cat([batches[order].flatten(), rows[full * batch_size :]])

    def problems(self, graph: DistillationGraph, judged: Judged) -> Iterator[str]:
        """Why it cannot work with this graph and these data; each begins with the argument's name."""
        from distill.evaluation.scoring import can_search

        node = graph.nodes.get(self.by)
        if node is None:
            yield f"by: there is no model '{self.by}'; there are {', '.join(graph.nodes)}."
        elif not can_search(node):
            yield f"by: '{self.by}' ({type(node).__name__}) gives no single vector per text; name an encoder."
        elif ({self.by} | graph.below(self.by)) & graph.trained:
            yield f"by: '{self.by}' learns, and queries are clustered once; name a frozen encoder."
        if not len(judged.queries):
            yield "type: the data has texts only, and no query to cluster; leave the topics out."

    def costs(self, judged: Judged) -> str:
        """What ``refresh`` will ask of the node."""
        return f"{self.by} encodes {len(judged.queries.same.unique()):,} queries for topics, once"


def _k_means(vectors: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """To which cluster each of n vectors [n, D] belongs: [n]."""
    import faiss

    vectors = np.ascontiguousarray(vectors)
    k_means = faiss.Kmeans(vectors.shape[1], clusters, niter=20, seed=seed, min_points_per_centroid=1)
    k_means.train(vectors)
    return k_means.index.search(vectors, 1)[1][:, 0]
