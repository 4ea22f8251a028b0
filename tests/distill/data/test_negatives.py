"""Random negatives; BM25 finds what shares rare words, passes over positives, and is asked once."""

import bm25s
import pytest
import torch

from distill.batch import Ragged
from distill.data import BM25Negatives, Judged, RandomNegatives, TextTable

TEXTS = [
    "the red fish swims in the sea",
    "a red fish and a blue fish",
    "the tree bears an apple",
    "a red apple",
    "the red fish swims in the sea",
    "空气动力学模型",
]


def judged(queries, lists):
    n = sum(map(len, lists))
    return Judged(
        task="retrieval",
        queries=TextTable([str(i) for i in range(len(queries))], queries),
        candidates=TextTable([str(i) for i in range(len(TEXTS))], TEXTS),
        listed=Ragged.of(lists),
        labels=torch.ones(n),
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    return tmp_path


def tops(sampler, queries, lists):
    """What each query's negatives are drawn from, best first."""
    data = judged(queries, lists)
    sampler.prepare(data)
    sampler.draw(torch.tensor([0]), torch.Generator())
    rows = dict(zip(sampler.mined.queries.tolist(), sampler.mined.rows.tolist(), strict=True))
    return [rows[row] for row in data.queries.same.tolist()]


def test_the_best_come_first_without_positives_and_without_repeats():
    assert tops(BM25Negatives(1), ["red fish", "apple"], [[0], [2]]) == [[1, 3], [3]]


def test_the_first_may_be_passed_over_and_the_last_cut():
    assert tops(BM25Negatives(1, skip=1), ["red fish", "apple"], [[0], [2]]) == [[3], []]
    assert tops(BM25Negatives(1, top=1), ["red fish"], [[0]]) == [[1]]


def test_positives_of_the_same_query_elsewhere_are_passed_over():
    assert tops(BM25Negatives(1), ["red fish", "red fish"], [[0], [1]]) == [[3], [3]]


def test_the_querys_own_text_is_no_negative():
    assert tops(BM25Negatives(1), ["a red apple"], [[2]]) == [[1, 0]]


def test_words_of_languages_without_spaces_are_found():
    assert tops(BM25Negatives(1), ["动力"], [[0]]) == [[5]]


def test_draws_are_distinct_real_and_of_the_asked_shape():
    sampler = BM25Negatives(3)
    sampler.prepare(judged(["red fish", "apple", "unheard"], [[0], [2], [3]]))
    rows = sampler.draw(torch.tensor([2, 0, 1]), torch.Generator().manual_seed(1))
    assert rows.shape == (3, 3) and rows[0].tolist() == [-1] * 3
    assert sorted(rows[1].tolist()) == [-1, 1, 3] and sorted(rows[2].tolist()) == [-1, -1, 3]
    one = BM25Negatives(1)
    one.prepare(judged(["red fish"], [[0]]))
    drawn = {int(one.draw(torch.tensor([0]), torch.Generator().manual_seed(i))) for i in range(30)}
    assert drawn == {1, 3}


def test_lists_are_made_once_and_again_if_damaged(own_cache, monkeypatch):
    calls = []
    retrieve = bm25s.BM25.retrieve
    monkeypatch.setattr(bm25s.BM25, "retrieve", lambda *a, **k: calls.append(1) or retrieve(*a, **k))
    first = tops(BM25Negatives(1), ["red fish"], [[0]])
    assert tops(BM25Negatives(1), ["red fish"], [[0]]) == first and len(calls) == 1
    (path,) = (own_cache / "bm25").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    assert tops(BM25Negatives(1), ["red fish"], [[0]]) == first and len(calls) == 2
    tops(BM25Negatives(1), ["red apple"], [[0]])
    assert len(calls) == 3


def test_random_negatives_draw_texts_alike():
    sampler = RandomNegatives(2000)
    sampler.prepare(judged(["a"], [[0]]))
    rows = sampler.draw(torch.tensor([0, 0]), torch.Generator().manual_seed(0))
    counts = rows.flatten().bincount(minlength=6)
    assert rows.shape == (2, 2000) and counts[4] == 0  # 4 repeats the text of 0
    assert counts[[0, 1, 2, 3, 5]].min() > 700


def test_counts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="count must be at least 1"):
        RandomNegatives(0)
    with pytest.raises(ValueError, match=r"top \(2\) must be at least count \(3\)"):
        BM25Negatives(3, top=2)
