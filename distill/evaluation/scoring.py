"""What a model says outside training: scores of pairs, and candidates found. Next: ``evaluate.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from distill.batch import Ragged
from distill.data.bm25 import WORDS
from distill.data.judged import Judged, Table, TextTable
from distill.errors import DataError, RecipeError
from distill.evaluation.search import places, search, search_maxsim, top
from distill.model import Encoder
from distill.processes import gather, in_shares, share

PAIRS_AT_ONCE = 4096  # whose texts' vectors, or tokens, are laid side by side


class PairScorer(Protocol):
    """A model that reads query and candidate together, so that it can re-rank but not search.

    Where queries and candidates are tables of features, ``score_pairs`` gets a third argument: the columns
    of the pairs [n] by name (context), of which ``reads.pair`` says which it needs.
    """

    def score_pairs(self, queries: Any, candidates: Any, *pair: Mapping[str, Tensor]) -> Tensor:
        """Scores [n] float32 of n pairs, as ``Table.take`` gives them."""


class VectorScorer(Protocol):
    """What of an Encoder is measured: vectors whose dot products, times ``scale()``, are its scores."""

    search: ClassVar[str]

    def scale(self) -> Tensor | float: ...
    def encode_queries(self, queries: Any, progress: bool = False) -> Tensor: ...
    def encode_candidates(self, candidates: Any, progress: bool = False) -> Tensor: ...


class PairOfVectors(VectorScorer, Protocol):
    """An Encoder that scores pairs of its vectors by heads of its own: each text is still encoded once."""

    def score_encoded(self, queries: Any, candidates: Any) -> Tensor:
        """Scores [n] float32 of n pairs of what it encodes, vectors or a Ragged, on the CPU."""


class Combined(Protocol):
    """A model made of others, whose scores of a query's whole list it puts together."""

    parts: Mapping[str, Any]

    def combined(self, said: Mapping[str, Tensor], query: Tensor) -> Tensor:
        """Scores [T] of T pairs, from those [T] of each part; ``query`` [T] says whose list a pair is on."""


def is_combined(model: Any) -> TypeGuard[Combined]:
    return hasattr(model, "combined")


Measured = VectorScorer | PairOfVectors | PairScorer | Combined


def score(
    model: Measured,
    judged: Judged,
    query: Tensor,
    candidate: Tensor,
    progress: bool = False,
    pair: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Scores [T] float32 of T pairs, given as rows of queries [T] and of candidates [T].

    Args:
        pair: The features of each pair, by name [T]; None: they are not known.
    """
    query, candidate = judged.queries.same[query], judged.candidates.same[candidate]
    if can_search(model) or encodes_apart(model):
        queries, q = _encoded(model.encode_queries, judged.queries, query, progress, model)
        candidates, c = _encoded(model.encode_candidates, judged.candidates, candidate, progress, model)
        parts = zip(q.split(PAIRS_AT_ONCE), c.split(PAIRS_AT_ONCE), strict=True)
        if encodes_apart(model):
            own = (model.score_encoded(_rows(queries, i), _rows(candidates, j)) for i, j in parts)
            return torch.cat([torch.empty(0), *own])
        products = torch.cat([torch.empty(0), *((queries[i] * candidates[j]).sum(dim=1) for i, j in parts)])
        return products * torch.as_tensor(model.scale()).detach().cpu()
    if is_combined(model):
        told = {n: score(part, judged, query, candidate, progress, pair) for n, part in model.parts.items()}
        return model.combined(told, query)
    scorer, wanted = cast(PairScorer, model), pair_columns(model)
    if wanted and (pair is None or not set(wanted) <= pair.keys()):
        raise DataError(
            f"{type(model).__name__} reads features of a listed pair ({', '.join(wanted)}), which "
            f"{judged.name or 'the split'} does not say of these pairs."
        )
    place = None  # pairs without features of their own are scored once
    columns: Mapping[str, Tensor] = {name: pair[name] for name in wanted} if pair is not None else {}
    if not wanted:
        distinct, place = torch.unique(query * len(judged.candidates) + candidate, return_inverse=True)
        query, candidate = distinct // len(judged.candidates), distinct % len(judged.candidates)
    texts = isinstance(judged.queries, TextTable)

    def scores(entries: Tensor) -> Tensor:
        said = [torch.empty(0)]
        with serving(model), tqdm(total=len(entries), desc="score pairs", disable=not progress) as bar:
            for part in entries.split(2**12) if len(entries) else ():
                asked, answers = judged.queries.take(query[part]), judged.candidates.take(candidate[part])
                of_pairs = () if texts else ({name: column[part] for name, column in columns.items()},)
                said.append(scorer.score_pairs(asked, answers, *of_pairs).float().cpu())
                bar.update(len(part))
        return torch.cat(said)

    found = _in_shares(model, scores, torch.arange(len(query)))
    return found if place is None else found[place]


def _rows(encoded: Any, rows: Tensor) -> Any:
    return encoded.select(rows) if isinstance(encoded, Ragged) else encoded[rows]


def _in_shares(model: Any, ask: Callable[[Any], Any], given: Any) -> Any:
    """All processes ask for their share and have all; a model may see to that itself (``stored.py``)."""
    return ask(given) if getattr(model, "asks_in_shares", False) else in_shares(ask, given)


def score_listed(model: Measured, judged: Judged, progress: bool = False) -> Tensor:
    """A model's scores [T] of all that is listed, aligned to ``judged.listed.values``."""
    return score(model, judged, query_of(judged.listed), judged.listed.values, progress, judged.pair)


def can_search(model: Any) -> TypeGuard[VectorScorer]:
    """Whether its vectors can be searched by dot product; another model can only re-rank."""
    return getattr(model, "search", None) == "dot"


def encodes_apart(model: Any) -> TypeGuard[PairOfVectors]:
    """Whether it scores pairs from vectors of its own, by more than their product: it can only re-rank."""
    return getattr(model, "search", None) == "own"


def pair_columns(model: Any) -> list[str]:
    """The features of a listed pair that a model reads, by name."""
    return [column.key for column in getattr(getattr(model, "reads", None), "pair", ())]


def searches_tokens(model: Any) -> TypeGuard[Encoder]:
    """Whether it has a vector per token, to be searched by MaxSim."""
    return isinstance(model, Encoder) and model.search == "maxsim"


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
    encode: Callable[..., Any], table: Table, rows: Tensor, progress: bool, model: VectorScorer
) -> tuple[Any, Tensor]:
    """Vectors, u rows, of the distinct ones of ``rows`` [T], and which of them each row is [T]."""
    distinct, place = torch.unique(rows, return_inverse=True)
    with serving(model):
        return _in_shares(model, partial(encode, progress=progress), table.take(distinct)), place


class _Laid(NamedTuple):
    """What a search compares."""

    groups: Ragged  # the candidates of each distinct content, in order of id
    vectors: Any  # [contents, D], or a Ragged of tokens
    queries: Any  # [u, D], or a Ragged of tokens
    place: Tensor  # [kept queries] which of them each query is
    hidden: Ragged | None  # of each query of this process's share, the contents that are left out


def _laid(model: VectorScorer, judged: Judged, kept: Tensor, place_of: Tensor, progress: bool) -> _Laid:
    groups = _by_content(judged.candidates, place_of)
    with serving(model):
        firsts = judged.candidates.take(groups.values[groups.offsets[:-1]])
        vectors = _in_shares(model, partial(model.encode_candidates, progress=progress), firsts)
    queries, place = _encoded(
        model.encode_queries, judged.queries, judged.queries.same[kept], progress, model
    )
    if judged.seen is None:
        return _Laid(groups, vectors, queries, place, None)
    if searches_tokens(model):
        raise RecipeError("a search by tokens cannot leave out what a query has seen; take another model.")
    seen = judged.seen if len(kept) == len(judged.seen) else judged.seen.select(kept)
    mine = share(len(kept))
    offsets = seen.offsets[mine.start : mine.stop + 1]
    hidden = _all_seen(Ragged(seen.values[offsets[0] : offsets[-1]], offsets - offsets[0]), groups)
    # queries with one content need not have seen the same
    return _Laid(groups, vectors, queries[place], torch.arange(len(kept)), hidden)


def searched(
    model: VectorScorer, judged: Judged, kept: Tensor, depth: int, progress: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``depth`` candidates of each kept query: rows of queries, of candidates, and scores.

    What a query has seen is left out. Only distinct contents are searched, then each stands for all
    candidates with it: equal contents have exactly equal scores. They are laid out in order of id, so that a
    tie goes to the lower id.
    """
    place_of = id_rank(judged.candidates)
    groups, vectors, queries, place, hidden = _laid(model, judged, kept, place_of, progress)
    mine = share(len(queries))
    if searches_tokens(model):
        asked = cast(Ragged, queries).select(torch.arange(mine.start, mine.stop))
        scores, found = search_maxsim(asked, cast(Ragged, vectors), depth)
    else:
        scores, found = search(queries[mine], vectors, depth, seen=hidden)
    scores, found = gather(scores)[place], gather(found)[place]
    there = found >= 0
    sizes = groups.lengths[found[there]]
    query = kept[:, None].expand_as(found)[there].repeat_interleave(sizes)
    candidate = groups.select(found[there]).values
    score = scores[there].repeat_interleave(sizes)
    if len(groups) < len(groups.values):
        query, candidate, score = _unseen(judged, query, candidate, score)
        order = torch.from_numpy(np.lexsort((place_of[candidate].numpy(), -score.numpy(), query.numpy())))
        query, candidate, score = query[order], candidate[order], score[order]
    position = torch.arange(len(query)) - torch.searchsorted(query, query)  # query is ascending, as kept is
    first = position < depth
    return query[first], candidate[first], score[first]


def placed(model: VectorScorer, judged: Judged, query: Tensor, candidate: Tensor, progress: bool) -> Tensor:
    """The place [T], from 0, at which a search for the queries at rows [T] finds the candidates at rows [T].

    As ``searched`` would, however deep they stand, without sorting what stands before them; the queries
    ascend, and no two candidates share their content.
    """
    kept, wanted = query.unique_consecutive(return_counts=True)
    place_of = id_rank(judged.candidates)
    _, vectors, queries, place, hidden = _laid(model, judged, kept, place_of, progress)
    mine = share(len(kept))
    rows = Ragged.of_lengths(place_of[candidate], wanted).select(torch.arange(mine.start, mine.stop))
    return gather(places(queries[place[mine]], vectors, rows, hidden))


def _by_content(table: Table, place_of: Tensor) -> Ragged:
    """The rows of each distinct content, in order of id; the contents in order of their first ids."""
    by_id = place_of.argsort()
    content = table.same[by_id]
    by_content = content.argsort(stable=True)
    repeats = torch.unique_consecutive(content[by_content], return_counts=True)[1]
    groups = Ragged.of_lengths(by_id[by_content], repeats)
    return groups.select(place_of[groups.values[groups.offsets[:-1]]].argsort())


def _all_seen(seen: Ragged, groups: Ragged) -> Ragged:
    """Per query the groups of candidates of which it has seen every one."""
    n, of_row = len(groups.values), torch.empty_like(groups.values)
    of_row[groups.values] = torch.arange(len(groups)).repeat_interleave(groups.lengths)
    if len(groups) == n:  # each candidate is its own
        return Ragged(of_row[seen.values], seen.offsets)
    pair = (query_of(seen) * n + seen.values).unique()
    group, times = (pair // n * len(groups) + of_row[pair % n]).unique(return_counts=True)
    group = group[times == groups.lengths[group % len(groups)]]
    return Ragged.of_lengths(group % len(groups), torch.bincount(group // len(groups), minlength=len(seen)))


def _unseen(judged: Judged, query: Tensor, candidate: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without candidates that their query has seen: those that share their content with one it has not."""
    if judged.seen is None:
        return query, candidate, score
    n = len(judged.candidates)
    left = ~torch.isin(query * n + candidate, query_of(judged.seen) * n + judged.seen.values)
    return query[left], candidate[left], score[left]


def first_of_bm25(judged: Judged, kept: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k candidates of BM25 for each kept query, with the words that negatives are mined by."""
    import bm25s

    if not isinstance(judged.queries, TextTable) or judged.seen is not None:
        raise RecipeError(
            f"{judged.name or 'the split'}: BM25 finds the candidates that a model re-ranks which cannot "
            f"search, and it reads texts only, without what a query has seen; a model that can search must "
            f"find them (rerank_from), or measure this one on listed candidates."
        )

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
