"""Stella's three losses by their worked numbers, and each of the two that are new by itself."""

import numpy as np
import pytest
import torch

from distill.batch import Batch
from distill.objectives import EmbeddingMatch, RelativeOrder, SimilarityMatch
from distill.objectives.relative_order import relative_order
from distill.outputs import Outputs

TEACHER = [[1.0, 0.0], [3.0, 4.0], [0.0, 1.0]]
STUDENT = [[1.0, 0.2], [1.0, 1.0], [0.0, 1.0]]


def texts(vectors, queries=1):
    """The first ones as queries, the others as candidates."""
    vectors = torch.as_tensor(vectors, dtype=torch.float32)
    return Outputs(queries=vectors[:queries], candidates=vectors[queries:])


def batch_of(n, queries=1):
    """n texts, some of them queries that list nobody."""
    none = torch.zeros(queries, 0, dtype=torch.int64)
    return Batch(none, none.bool(), torch.arange(queries), torch.arange(n - queries))


def loss_of(objective, student, teacher, queries=1):
    return objective(texts(student, queries), texts(teacher, queries), batch_of(len(student), queries))


def cosines(vectors):
    vectors = np.array(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def test_stellas_three_losses_by_the_worked_numbers():
    objectives = (EmbeddingMatch(projection=False), SimilarityMatch(), RelativeOrder())
    objectives[0].bind({"queries": 2, "candidates": 2}, {"queries": 2, "candidates": 2})
    losses = [loss_of(objective, STUDENT, TEACHER) for objective in objectives]
    found = [(loss.sum() / count.sum()).item() for loss, count in losses]
    assert found == pytest.approx([0.009823, 0.022431, 0.046648], abs=1e-6)
    assert np.dot([10, 200, 20], found) == pytest.approx(5.517324, abs=1e-4)


@pytest.mark.parametrize("queries", [0, 2, 5])
def test_equal_the_formulas_written_out_in_numpy(queries):
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(5, 4)), random.normal(size=(5, 7))  # of two sizes
    s, t = cosines(student), cosines(teacher)
    loss, count = loss_of(SimilarityMatch(), student, teacher, queries)
    assert loss.tolist() == pytest.approx(((s - t) ** 2).mean(axis=1), rel=1e-5)
    assert count.tolist() == [1] * 5
    order, _ = loss_of(RelativeOrder(margin=0.1), student, teacher, queries)
    for r in range(5):
        others = [(j, k) for j in range(5) for k in range(5) if r not in (j, k) and t[r, j] > t[r, k]]
        expected = np.mean([max(0, s[r, k] - s[r, j] + 0.1) for j, k in others])
        assert order[r].item() == pytest.approx(expected, rel=1e-5)


def test_only_the_named_texts_are_compared():
    student, teacher = np.random.default_rng(1).normal(size=(2, 6, 3))
    for objective in (SimilarityMatch, RelativeOrder):
        alone, count = loss_of(objective(["candidates"]), student, teacher, queries=2)
        assert count.tolist() == [1] * 4
        torch.testing.assert_close(alone, loss_of(objective(), student[2:], teacher[2:], queries=1).loss)


def test_length_and_a_turn_of_the_space_change_nothing():
    vectors = np.random.default_rng(2).normal(size=(5, 3))
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    loss, _ = loss_of(SimilarityMatch(), 7 * vectors @ turn, vectors)
    assert loss.abs().max() < 1e-10
    order, _ = loss_of(RelativeOrder(margin=0.0), 7 * vectors @ turn, vectors)
    assert not order.any()


def test_texts_that_the_teacher_ties_have_no_order():
    loss, count = loss_of(RelativeOrder(), np.eye(3), [[1.0, 0.0]] * 3)
    assert not loss.any() and count.tolist() == [1, 1, 1]


def test_too_few_texts_say_nothing():
    for objective, n in ((SimilarityMatch(), 1), (RelativeOrder(), 2)):
        loss, count = loss_of(objective, STUDENT[:n], TEACHER[:n])
        assert not loss.any() and not count.any()
        assert loss_of(objective, STUDENT[: n + 1], TEACHER[: n + 1]).count.all()


def test_refuses_fields_that_are_no_vectors_and_a_margin_below_zero():
    for objective in (SimilarityMatch, RelativeOrder):
        with pytest.raises(ValueError, match="fields must be a list of queries, candidates or both"):
            objective(fields=["scores"])
    with pytest.raises(ValueError, match="margin must be 0 or more"):
        RelativeOrder(margin=-1)


def test_many_texts_are_compared_in_blocks():
    student, teacher = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0))
    found = []
    for at_once in (9**3, 200, 1):  # all rows, two at a time, one at a time
        leaf = student.clone().requires_grad_()
        loss = relative_order(leaf, teacher, 0.1, at_once)
        loss.sum().backward()
        found.append((loss.detach(), leaf.grad))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(gradient, found[0][1])
