"""What a model says outside training: scores of pairs, and candidates found. Next: ``evaluate.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from distill.batch import Ragged
from distill.data.bm25 import WORDS
from distill.data.judged import Judged, Table
from distill.evaluation.search import search, top
from distill.model import Encoder
from distill.processes import gather, in_shares, share


class PairScorer(Protocol):
    """A model that reads query and candidate together, so that it can re-rank but not search."""

    def score_pairs(self, queries: Any, candidates: Any) -> Tensor:
        """Scores [n] float32 of n pairs, as ``Table.take`` gives them."""


def score(
    model: Encoder | PairScorer, judged: Judged, query: Tensor, candidate: Tensor, progress: bool = False
) -> Tensor:
    """Scores [T] float32 of T pairs, given as rows of queries [T] and of candidates [T]."""
    query, candidate = judged.queries.same[query], judged.candidates.same[candidate]
    if encodes_apart(model):
        queries, q = _encoded(model.encode_queries, judged.queries, query, progress, model)
        candidates, c = _encoded(model.encode_candidates, judged.candidates, candidate, progress, model)
        parts = zip(q.split(2**14), c.split(2**14), strict=True)
        return torch.cat(
            [torch.empty(0), *(model.score_encoded(queries[i], candidates[j]) for i, j in parts)]
        )
    pair, place = torch.unique(query * len(judged.candidates) + candidate, return_inverse=True)
    scorer = cast(PairScorer, model)

    def scores(pairs: Tensor) -> Tensor:
        said = [torch.empty(0)]
        with serving(model), tqdm(total=len(pairs), desc="score pairs", disable=not progress) as bar:
            for part in pairs.split(2**12) if len(pairs) else ():
                asked = judged.queries.take(part // len(judged.candidates))
                answers = judged.candidates.take(part % len(judged.candidates))
                said.append(scorer.score_pairs(asked, answers).float().cpu())
                bar.update(len(part))
        return torch.cat(said)

    return in_shares(scores, pair)[place]


def score_listed(model: Encoder | PairScorer, judged: Judged, progress: bool = False) -> Tensor:
    """A model's scores [T] of all that is listed, aligned to ``judged.listed.values``."""
    return score(model, judged, query_of(judged.listed), judged.listed.values, progress)


def can_search(model: Any) -> TypeGuard[Encoder]:
    """Whether its vectors can be searched by dot product; another model can only re-rank."""
    return isinstance(model, Encoder) and model.search == "dot"


def encodes_apart(model: Any) -> TypeGuard[Encoder]:
    """Whether each text has one vector, from which alone it scores pairs: texts are then encoded once."""
    return isinstance(model, Encoder) and model.search in ("dot", "own")


@contextmanager
def serving(model: Any) -> Iterator[None]:
    """Without dropout and gradients; a model in training goes back to it."""
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if training:
            model.train()


def _encoded(
    encode: Callable[..., Tensor], table: Table, rows: Tensor, progress: bool, model: Encoder
) -> tuple[Tensor, Tensor]:
    """Vectors [u, D] of the distinct ones of ``rows`` [T], and which of them each row is [T]."""
    distinct, place = torch.unique(rows, return_inverse=True)
    with serving(model):
        return in_shares(partial(encode, progress=progress), table.take(distinct)), place


def searched(
    model: Encoder, judged: Judged, kept: Tensor, depth: int, progress: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``depth`` candidates of each kept query: rows of queries, of candidates, and scores.

    Only distinct texts are searched, then each stands for all candidates with its text: equal texts have
    exactly equal scores. They are laid out in order of id, so that a tie goes to the lower id.
    """
    place_of = id_rank(judged.candidates)
    by_id = place_of.argsort()
    text = judged.candidates.same[by_id]
    by_text = text.argsort(stable=True)
    repeats = torch.unique_consecutive(text[by_text], return_counts=True)[1]
    groups = Ragged.of_lengths(by_id[by_text], repeats)  # candidates with one text, in order of id
    groups = groups.select(place_of[groups.values[groups.offsets[:-1]]].argsort())
    firsts = judged.candidates.take(groups.values[groups.offsets[:-1]])
    with serving(model):
        vectors = in_shares(partial(model.encode_candidates, progress=progress), firsts)
    queries, place = _encoded(
        model.encode_queries, judged.queries, judged.queries.same[kept], progress, model
    )
    scores, found = search(queries[share(len(queries))], vectors, depth)
    scores, found = gather(scores), gather(found)
    group = found[place].flatten()
    sizes = groups.lengths[group]
    query = kept.repeat_interleave(found.shape[1]).repeat_interleave(sizes)
    candidate = groups.select(group).values
    score = scores[place].flatten().repeat_interleave(sizes)
    order = torch.from_numpy(np.lexsort((place_of[candidate].numpy(), -score.numpy(), query.numpy())))
    position = torch.arange(len(query)) - torch.searchsorted(query, query)  # query is ascending, as kept is
    first = order[position < depth]
    return query[first], candidate[first], score[first]


def first_of_bm25(judged: Judged, kept: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k candidates of BM25 for each kept query, with the words that negatives are mined by."""
    import bm25s

    def words(texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(texts, token_pattern=WORDS, return_ids=False, show_progress=False)

    by_id = id_rank(judged.candidates).argsort()
    index = bm25s.BM25()
    index.index(words(judged.candidates.take(by_id)), show_progress=False)
    found = []
    for text in words(judged.queries.take(kept[share(len(kept))])):
        scores = index.get_scores(text) if text else np.zeros(len(by_id), dtype=np.float32)
        found.append(by_id[top(torch.from_numpy(scores)[None], k)[1][0]])
    first = gather(torch.cat([torch.empty(0, dtype=torch.int64), *found]))
    return kept.repeat_interleave(min(k, len(by_id))), first


def query_of(listed: Ragged) -> Tensor:
    """The query's row of each listed entry: [T]."""
    return torch.arange(len(listed)).repeat_interleave(listed.lengths)


def id_rank(table: Table) -> Tensor:
    """Each row's place in the order of ids: [n]."""
    by_id = torch.tensor(sorted(range(len(table)), key=table.ids.__getitem__), dtype=torch.int64)
    rank = torch.empty_like(by_id)
    rank[by_id] = torch.arange(len(by_id))
    return rank
