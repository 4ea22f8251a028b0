"""Hard negatives: found by words or vectors, measured by the positives, drawn. Next: ``mining.py``."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.batch import Ragged
from distill.data.cache import content_hash
from distill.data.judged import Judged
from distill.data.mining import Limits, Mined, fingerprint, judged_hash, own_texts, turns
from distill.data.negatives import Negatives
from distill.data.neighbours import Neighbours, Pairs, Search, Words
from distill.errors import DataError, RecipeError, UserError
from distill.lock import only_run_in
from distill.paths import cache_folder
from distill.processes import any_of, from_first, is_first, wait

if TYPE_CHECKING:
    from distill.graph import DistillationGraph

log = logging.getLogger("distill")

QUERIES_AT_ONCE = 4096  # searched together; what an interrupted mining has to do again
CHECKED_AT_ONCE = 256  # the same, where each pair is read by a model: about 25,000 pairs


class HardNegatives(Negatives):
    """Candidates that a search finds near the query, without those too near to be negative.

    Of what the search finds, best first, known positives and the query's own text are taken out, then the
    first ``skip``. Of the next ``top``, those are removed whose score says that they may be relevant. From
    the rest ``count`` are drawn each time, fewer where fewer are left. The scores are the search's own, or
    those of ``checked_by``. A query with several positives is measured by the lowest, as they take turns;
    one without a positive has no margin to keep.

    Args:
        count: How many are drawn per query and epoch.
        top: They are drawn from so many of the best, known positives not counted.
        skip: The first so many are passed over: among them are most positives that nobody labelled.
        checked_by: The node whose scores decide: a cross-encoder that reads each pair, or an encoder.
        margin: How far below its positive's score a negative's must be: see ``highest_allowed``.
        relative_margin: The same, as a share of the positive's score: 0.05 keeps what is below 95% of it.
        keep_below: What each negative's score must be below, whatever the positive's is.
        sigmoid: The scores are logits, their sigmoid is compared: a share of a logit would mean little.
        strata: Draw evenly over so many parts of the range of a query's scores: see ``turns``.
        every: Mine anew every so many epochs, with the nodes as they then are; None: once.

    References:
        Qu et al., 2021. RocketQA: an optimized training approach to dense passage retrieval (negatives
        that a cross-encoder finds irrelevant). arXiv:2010.08191
        Moreira et al., 2024. NV-Retriever (margins to the positive). arXiv:2407.15831
    """

    names_nodes: ClassVar[tuple[str, ...]] = ("checked_by",)

    def __init__(
        self,
        count: int,
        top: int = 100,
        skip: int = 0,
        checked_by: str | None = None,
        margin: float | None = None,
        relative_margin: float | None = None,
        keep_below: float | None = None,
        sigmoid: bool = False,
        strata: int | None = None,
        every: int | None = None,
    ):
        super().__init__(count)
        if skip < 0 or top < count:
            raise ValueError(f"top ({top}) must be at least count ({count}), and skip ({skip}) not negative.")
        if strata is not None and strata < 2:
            raise ValueError(f"strata must be at least 2, got {strata}.")
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 epoch, got {every}.")
        self.limits = Limits(margin, relative_margin, keep_below)
        self.judges = bool(self.limits.given) or strata is not None
        if self.judges and checked_by is None and "by" not in self.names_nodes:
            raise ValueError(
                "BM25's scores do not say how relevant a text is: name a node in checked_by, or leave out "
                "margin, relative_margin, keep_below and strata."
            )
        for name, given in (("checked_by", checked_by is not None), ("sigmoid", sigmoid)):
            if given and not self.judges:
                raise ValueError(
                    f"{name} does nothing without margin, relative_margin, keep_below or strata."
                )
        self.top, self.skip, self.checked_by = top, skip, checked_by
        self.sigmoid, self.strata, self.every = sigmoid, strata, every
        self.mined: Mined | None = None
        self._judged: Judged | None = None
        self._texts = ""  # a hash of all texts and positives
        self._own: Tensor | None = None
        self._path: Path | None = None  # of the lists at hand

    @abstractmethod
    def _search(self, graph: DistillationGraph | None, folder: Path) -> Search:
        """What finds the candidates; ``folder`` is for what it keeps meanwhile."""

    @property
    def nodes(self) -> list[str]:
        """The nodes that are asked."""
        return [name for key in self.names_nodes if (name := getattr(self, key)) is not None]

    @property
    def judged(self) -> Judged:
        if self._judged is None:
            raise RuntimeError(f"{type(self).__name__}: prepare(judged) comes before its use.")
        return self._judged

    def prepare(self, judged: Judged) -> None:
        self._judged, self._own, self._texts = judged, own_texts(judged), judged_hash(judged)

    def refresh(
        self, graph: DistillationGraph, epoch: int, folder: Path, queries: Tensor, begun: bool = False
    ) -> dict[str, float]:
        """Have the lists of this epoch at hand: from the run's folder, the cache, or mined now.

        Lists that a trained node made cannot be made again once it has learnt from them, so where the
        training is past that moment they must be in the folder.

        Returns:
            Figures of the lists, if this is the moment for which they are mined.

        Raises:
            DataError: The lists are not there, or damaged; or no query has a negative.
        """
        if problems := list(self.problems(graph, self.judged)):
            raise RecipeError("; ".join(problems))
        due = epoch - epoch % self.every if self.every else 0
        path = folder / f"epoch-{due:04}.arrow"
        if path == self._path:
            return {}
        key, state = self._key(queries), self._state(graph)
        if self._learns(graph) and (begun or epoch > due):
            mined = self._kept(path, key)
        elif (found := _load(path, key, state)) is not None:
            mined = found
        else:
            mined = self._mine(graph, queries, key, state, keep=not self._learns(graph))
            _save(mined, path, key, state, in_cache=False)
        self.mined, self._path = mined, path
        return mined.figures() if epoch == due and not begun else {}

    def draw(self, query_rows: Tensor, generator: torch.Generator) -> Tensor:
        if self.mined is None:
            if self.nodes:
                raise RuntimeError(f"{type(self).__name__}: its source's refresh comes before its batches.")
            every_query = torch.arange(len(self.judged.queries))
            self.mined = self._mine(None, every_query, self._key(every_query), "")
        asked = self.judged.queries.same[query_rows]
        place = torch.searchsorted(self.mined.queries, asked).clamp(max=len(self.mined.queries) - 1)
        rows, mask = self.mined.rows.select(place).padded(-1)
        mask &= (self.mined.queries[place] == asked)[:, None]
        if self.strata is None:
            order = torch.rand(rows.shape, generator=generator)
        else:
            scores = Ragged(self.mined.scores, self.mined.rows.offsets).select(place).padded(0.0)[0]
            order = turns(scores, mask, self.strata, generator)
        order = order.masked_fill(~mask, math.inf).argsort(dim=1)[:, : self.count]
        drawn = rows.masked_fill(~mask, -1).gather(1, order).long()
        return F.pad(drawn, (0, self.count - drawn.shape[1]), value=-1)

    def problems(self, graph: DistillationGraph, judged: Judged) -> Iterator[str]:
        for key in self.names_nodes:
            if (name := getattr(self, key)) is None:
                continue
            node: Any = graph.nodes.get(name)
            if node is None:
                yield f"{key}: there is no model '{name}'; there are {', '.join(graph.nodes)}."
            elif key == "by" and not _can_search(node):
                yield (
                    f"by: '{name}' ({type(node).__name__}) gives no single vector per text, so it cannot be "
                    f"searched; name an encoder, and '{name}' in `checked_by`."
                )
            elif not node.measurable:
                yield f"{key}: '{name}' ({type(node).__name__}) needs more than a pair of texts to score it."
            elif not (_can_search(node) or ("scores" in node.provides and hasattr(node, "score_pairs"))):
                yield f"{key}: '{name}' ({type(node).__name__}) gives no score to a pair of texts."
        known = all(name in graph.nodes for name in self.nodes)
        if self.every is not None and known and not self._learns(graph):
            who = " and ".join(f"'{name}'" for name in self.nodes) or "BM25"
            yield f"every: {who} will not learn, so it would find the same again; leave it out."
        if judged.labels is None:
            for name in self.limits.given.keys() - {"keep_below"}:
                yield f"{name}: the data has no labels, so no positive to keep it from; leave it out."
        if not len(judged.queries):
            yield "type: the data has texts only, and no query to mine for; leave the sampler out."

    def costs(self, graph: DistillationGraph, judged: Judged, queries: Tensor) -> Iterator[str]:
        asked = judged.queries.same[queries].unique()
        texts = len(judged.candidates.same.unique())
        pairs = len(asked) * min(self.top, texts) + int(judged.taken.lengths[judged.who[asked]].sum())
        when = (
            "once" if self.every is None else f"every {self.every} epochs" if self.every > 1 else "each epoch"
        )
        for name in self.nodes:
            if _can_search(graph.nodes[name]):
                yield f"{name} encodes {texts:,} candidates and {len(asked):,} queries for negatives, {when}"
            else:
                yield f"{name} is asked about up to {pairs:,} pairs for negatives, {when}"

    def _learns(self, graph: DistillationGraph) -> bool:
        """Whether any node that is asked, or one it is built from, is trained."""
        return any(({name} | graph.below(name)) & graph.trained for name in self.nodes)

    def _state(self, graph: DistillationGraph) -> str:
        """A hash of the weights of all nodes that are asked, and of those that they are built from."""
        below = {name for node in self.nodes for name in graph.below(node)} - set(self.nodes)
        return content_hash([fingerprint(graph.nodes[name]) for name in (*self.nodes, *sorted(below))])

    def _key(self, queries: Tensor) -> str:
        """A hash of settings, texts and queries: all but the models' weights."""
        settings = {key: getattr(self, key) for key in (*self.names_nodes, "top", "skip", "sigmoid")}
        told = {"type": type(self).__name__, **settings, **self.limits.given, "judges": self.judges}
        asked = self.judged.queries.same[queries].unique()
        return content_hash([json.dumps(told), self._texts, " ".join(map(str, asked.tolist()))])

    def _kept(self, path: Path, key: str) -> Mined:
        """Lists that cannot be mined again."""
        try:
            mined, reason = Mined.load(path, key), f"{path} is missing, or of other settings or texts"
        except ValueError as error:
            mined, reason = None, str(error)
        if mined is None:
            raise DataError(
                f"{reason}. The training goes on from the lists of that epoch, and its models have learnt "
                f"since, so they cannot be mined again. Put the file back, or remove the run's checkpoints "
                f"to begin anew."
            )
        return mined

    def _mine(
        self, graph: DistillationGraph | None, queries: Tensor, key: str, state: str, keep: bool = False
    ) -> Mined:
        """Lists of the queries at rows [n], block by block: what an interrupted mining did is not done again.

        Args:
            keep: Put them into the cache, and look for them there first.
        """
        name = content_hash([key, state])
        cached = cache_folder() / "mined" / f"{name}.arrow"
        if keep and (found := _load(cached, key, state)) is not None:
            return found
        with _folder_of_its_own(cache_folder() / "mining" / name) as folder:
            mined = self._mine_in(folder, graph, queries, key, state)
            if is_first():
                shutil.rmtree(folder, ignore_errors=True)
        if not len(mined.ranks):
            raise self._none_left(mined)
        if keep:
            _save(mined, cached, key, state)
        return mined

    def _mine_in(
        self, folder: Path, graph: DistillationGraph | None, queries: Tensor, key: str, state: str
    ) -> Mined:
        """``_mine``, its pieces in a folder."""
        asked = self.judged.queries.same[queries].unique()
        search = self._search(graph, folder)
        judge = self._judge(graph, folder, search)
        size = CHECKED_AT_ONCE if isinstance(judge, Pairs) else QUERIES_AT_ONCE
        parts = []
        for number, block in enumerate(asked.split(size)):
            path = folder / f"queries-{size}-{number:05}.arrow"
            if (part := _load(path, key, state)) is None:
                part = self._block(block, search, judge)
                _save(part, path, key, state)
            parts.append(part)
            if len(asked) > size:
                done = min(len(asked), (number + 1) * size)
                log.info("mining: %s of %s queries have their lists", f"{done:,}", f"{len(asked):,}")
        return Mined.join(parts)

    def _judge(
        self, graph: DistillationGraph | None, folder: Path, search: Search
    ) -> Neighbours | Pairs | None:
        """What scores positives and what was found; None: nothing asks for scores."""
        if not self.judges:
            return None
        if self.checked_by is None:
            assert isinstance(search, Neighbours)  # else it was refused
            return search
        assert graph is not None
        node: Any = graph.nodes[self.checked_by]
        if _can_search(node):
            return Neighbours(node, self.judged, folder / "checked_by")
        return Pairs(node, self.judged)

    def _block(self, queries: Tensor, search: Search, judge: Neighbours | Pairs | None) -> Mined:
        positives = self.judged.positives_of(queries)
        never = int(positives.lengths.max()) + 1  # positives, and the query's own text
        rows, scores = search.nearest(queries, self.skip + self.top + never)
        assert self._own is not None
        real = (rows >= 0) & (rows != self._own[queries][:, None])
        real &= ~self.judged.is_positive(queries[:, None].expand_as(rows), rows)
        order = (~real).int().argsort(dim=1, stable=True)[:, self.skip : self.skip + self.top]
        rows, scores, real = (values.gather(1, order) for values in (rows, scores, real))
        ranks = torch.arange(self.skip + 1, self.skip + 1 + rows.shape[1], dtype=torch.int32).expand_as(rows)
        positive = torch.full((len(queries),), math.nan)
        removed = torch.zeros(len(queries), dtype=torch.int32)
        if judge is not None:
            of_found = real.nonzero()[:, 0]
            of_positive = torch.arange(len(queries)).repeat_interleave(positives.lengths)
            if judge is search:
                said, told = scores[real], judge.scores(queries, of_positive, positives.values)
            else:
                which, asked = torch.cat([of_found, of_positive]), torch.cat([rows[real], positives.values])
                said, told = judge.scores(queries, which, asked).split([len(of_found), len(of_positive)])
            said, told = (self._checked(values) for values in (said, told))
            scores = torch.full_like(scores, math.nan).masked_scatter(real, said)
            lowest = torch.full_like(positive, math.inf).scatter_reduce(0, of_positive, told, "amin")
            positive = torch.where(positives.lengths > 0, lowest, math.nan)
            close = real & self.limits.broken(scores, positive)
            removed, real = close.sum(dim=1, dtype=torch.int32), real & ~close
        found = Ragged.of_lengths(rows[real].int(), real.sum(dim=1))
        return Mined(queries, found, ranks[real], scores[real], positive, removed)

    def _checked(self, scores: Tensor) -> Tensor:
        if not scores.isfinite().all():
            raise DataError(f"'{self.nodes[-1]}' gives a pair a score that is not finite; has it diverged?")
        return scores.sigmoid() if self.sigmoid else scores

    def _none_left(self, mined: Mined) -> DataError:
        n, removed, told = len(mined.queries), int(mined.removed.sum()), mined.figures()
        who = getattr(self, "by", "BM25")
        if not removed:
            return DataError(
                f"no query of {n:,} has a negative: beyond the first {self.skip} (skip), {who} found nothing "
                f"but known positives."
            )
        limits = " and ".join(f"{name} {value:g}" for name, value in self.limits.given.items())
        lowest = (
            f", whose positives score {told['positive score']:.3g} in the mean"
            if "positive score" in told
            else ""
        )
        return DataError(
            f"{limits} removes every negative: all {n:,} queries{lowest}, lost all that {who} found, "
            f"{removed:,} candidates. Take a smaller margin (or a higher keep_below), or look further down "
            f"the ranking: top is {self.top}, skip {self.skip}."
        )


class BM25Negatives(HardNegatives):
    """Candidates that share words with the query, out of the best that BM25 finds.

    BM25's scores are no measure of relevance that margins could be taken from: name who checks them. The
    other arguments are those of ``HardNegatives``.

    References:
        Robertson and Zaragoza, 2009. The Probabilistic Relevance Framework: BM25 and Beyond.
    """

    def _search(self, graph: DistillationGraph | None, folder: Path) -> Search:
        return Words(self.judged, self.top + self.skip)


class NearestNegatives(HardNegatives):
    """Candidates whose vectors are nearest to the query's, found by an encoder of the graph with Faiss.

    The student finds its own (with ``every``, those that it confuses with the positive as it learns), a
    frozen teacher finds them once for all runs. The other arguments are those of ``HardNegatives``.

    Args:
        by: The node that searches: an encoder with a vector per text.

    References:
        Xiong et al., 2021. Approximate nearest neighbor negative contrastive learning for dense text
        retrieval. arXiv:2007.00808
    """

    names_nodes: ClassVar[tuple[str, ...]] = ("by", "checked_by")

    def __init__(
        self,
        by: str,
        count: int,
        top: int = 100,
        skip: int = 0,
        checked_by: str | None = None,
        margin: float | None = None,
        relative_margin: float | None = None,
        keep_below: float | None = None,
        sigmoid: bool = False,
        strata: int | None = None,
        every: int | None = None,
    ):
        super().__init__(
            count, top, skip, checked_by, margin, relative_margin, keep_below, sigmoid, strata, every
        )
        if checked_by == by:
            raise ValueError(f"checked_by: '{by}' scores what it finds anyway; leave it out.")
        self.by = by

    def _search(self, graph: DistillationGraph | None, folder: Path) -> Search:
        assert graph is not None
        node: Any = graph.nodes[self.by]
        return Neighbours(node, self.judged, folder / "by")


@contextmanager
def _folder_of_its_own(folder: Path) -> Iterator[Path]:
    """The folder; beside it one with this process's number, where another run mines the same just now."""
    with ExitStack() as held:
        if is_first():
            try:
                held.enter_context(only_run_in(folder))
            except UserError:
                folder = folder.with_name(f"{folder.name}-{os.getpid()}")
        yield from_first(folder)


def _load(path: Path, key: str, state: str) -> Mined | None:
    """Lists that can be made again if they are damaged; all processes find them, or none."""
    try:
        mined = Mined.load(path, key, state)
    except ValueError as error:
        log.warning("%s; it is mined again.", error)
        mined = None
    return None if any_of(mined is None)[0] else mined


def _save(mined: Mined, path: Path, key: str, state: str, in_cache: bool = True) -> None:
    """Keep lists for all processes, which all have them."""
    if is_first():
        mined.save(path, key, state, in_cache)
    wait()


def _can_search(model: Any) -> bool:
    from distill.evaluation.scoring import can_search  # which needs this package

    return can_search(model)
