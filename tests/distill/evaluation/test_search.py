import numpy as np
import pytest
import torch

from distill.batch import Ragged
from distill.errors import DataError
from distill.evaluation import search, top


def whole_vectors(rows: int, seed: int) -> torch.Tensor:
    """Small whole numbers: products are exact, and many are equal."""
    return torch.randint(-2, 3, (rows, 3), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("chunk", [1, 2, 7, 40, 1000])
@pytest.mark.parametrize("k", [1, 5, 40, 99])
def test_search_equals_a_sort_of_all_scores_with_ties_to_the_lowest_row(k, chunk):
    queries, candidates = whole_vectors(6, seed=1), whole_vectors(40, seed=2)
    every = queries.numpy() @ candidates.numpy().T
    order = np.argsort(-every, axis=1, kind="stable")[:, :k]
    scores, rows = search(queries, candidates, k, chunk)
    assert rows.tolist() == order.tolist()
    assert scores.tolist() == np.take_along_axis(every, order, axis=1).tolist()
    assert (scores.dtype, rows.dtype) == (torch.float32, torch.int64)


def test_search_finds_the_same_among_random_vectors():
    generator = torch.Generator().manual_seed(3)
    queries, candidates = (torch.randn(rows, 16, generator=generator) for rows in (5, 300))
    expected = (queries @ candidates.T).sort(descending=True)
    scores, rows = search(queries, candidates, k=10, chunk=64)
    assert rows.tolist() == expected.indices[:, :10].tolist()
    torch.testing.assert_close(scores, expected.values[:, :10])


def test_blocks_of_queries_change_nothing():
    queries, candidates = whole_vectors(9, seed=4), whole_vectors(20, seed=5)
    at_once, one_by_one = search(queries, candidates, k=3), search(queries, candidates, k=3, chunk=2**23)
    assert all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))


def test_minus_zero_equals_zero_and_extremes_keep_their_order():
    scores, columns = top(torch.tensor([[-0.0, 0.0, -3e38, 3e38, -1e-40, 1e-40]]), k=6)
    assert columns.tolist() == [[3, 5, 0, 1, 4, 2]]
    assert scores[0, 0] == torch.tensor(3e38)


def test_no_queries_is_an_empty_answer():
    scores, rows = search(torch.empty(0, 4), torch.ones(5, 4), k=2)
    assert scores.shape == rows.shape == (0, 2)


def test_what_cannot_be_searched_is_refused():
    """A NaN would win or lose every comparison; other shapes would broadcast or fail far from the cause."""
    broken = torch.ones(3, 2)
    broken[1, 0] = torch.nan
    with pytest.raises(DataError, match="vector of candidate 1 is not finite"):
        search(torch.ones(1, 2), broken, k=1)
    with pytest.raises(DataError, match="vector of query 1 is not finite"):
        search(broken, torch.ones(1, 2), k=1)
    with pytest.raises(ValueError, match="same D"):
        search(torch.ones(1, 2), torch.ones(1, 3), k=1)
    with pytest.raises(ValueError, match="at least 1"):
        search(torch.ones(1, 2), torch.ones(1, 2), k=0)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_what_a_query_has_seen_is_left_out(k, chunk):
    """A query may have seen nothing, some, some twice, all but three, or all."""
    queries, candidates = whole_vectors(5, seed=1), whole_vectors(40, seed=2)
    seen = [[], [3, 9, 39, 0], [8, 8], list(range(37)), list(range(40))]
    every = queries @ candidates.T
    for row, rows in enumerate(seen):
        every[row, rows] = -torch.inf
    expected = every.sort(dim=1, descending=True, stable=True)
    rows = expected.indices.masked_fill(expected.values == -torch.inf, -1)
    found = search(queries, candidates, k, chunk, Ragged.of(seen))
    assert found[1].tolist() == rows[:, :k].tolist()
    assert found[0].tolist() == expected.values[:, :k].tolist()


def test_blocks_of_queries_know_what_each_has_seen():
    queries, candidates = whole_vectors(9, seed=4), whole_vectors(20, seed=5)
    seen = Ragged.of([[row, 19 - row] for row in range(9)])
    at_once = search(queries, candidates, 3, seen=seen)
    one_by_one = search(queries, candidates, 3, chunk=2**23, seen=seen)
    assert all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))


def test_seen_is_of_each_query():
    with pytest.raises(ValueError, match="seen must have a row for each of 2 queries, got 1"):
        search(torch.ones(2, 3), torch.ones(4, 3), 1, seen=Ragged.of([[0]]))
