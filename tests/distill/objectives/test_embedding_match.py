from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.batch import Batch
from distill.objectives import EmbeddingMatch
from distill.outputs import Outputs
from distill.tokens import Tokens

QUERIES, CANDIDATES = [[1.0, 0.2]], [[1.0, 1.0], [0.0, 1.0]]
TAUGHT_QUERIES, TAUGHT_CANDIDATES = [[1.0, 0.0]], [[0.6, 0.8], [0.0, 1.0]]


def vectors(queries, candidates):
    return Outputs(queries=torch.tensor(queries), candidates=torch.tensor(candidates))


def match(student, teacher, **settings):
    batch = Batch.of_scores(1, 2)
    return EmbeddingMatch(**settings)(student, teacher, batch)


def test_three_texts_by_their_angle():
    """Their mean is the 0.009823 that Stella's cosine loss gives for these vectors."""
    loss, count = match(vectors(QUERIES, CANDIDATES), vectors(TAUGHT_QUERIES, TAUGHT_CANDIDATES))
    s = np.array(QUERIES + CANDIDATES)
    t = np.array(TAUGHT_QUERIES + TAUGHT_CANDIDATES)
    cosines = (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
    assert loss.tolist() == pytest.approx(1 - cosines, abs=1e-6)
    assert loss.mean().item() == pytest.approx(0.009823, abs=1e-6)
    assert count.tolist() == [1, 1, 1]


def test_mse_sums_over_the_dimensions():
    student, teacher = vectors(QUERIES, CANDIDATES), vectors(TAUGHT_QUERIES, TAUGHT_CANDIDATES)
    loss, _ = match(student, teacher, distance="mse")
    assert loss.tolist() == pytest.approx([0.04, 0.2, 0.0], abs=1e-6)


@pytest.mark.parametrize(("fields", "rows"), [(["queries"], [0]), (["candidates"], [1, 2])])
def test_only_the_chosen_fields_are_matched(fields, rows):
    student, teacher = vectors(QUERIES, CANDIDATES), vectors(TAUGHT_QUERIES, TAUGHT_CANDIDATES)
    every = match(student, teacher)
    (name,) = fields
    chosen = EmbeddingMatch(fields)(
        Outputs(**{name: getattr(student, name)}),
        Outputs(**{name: getattr(teacher, name)}),
        Batch.of_scores(1, 2),
    )
    torch.testing.assert_close(chosen.loss, every.loss[rows])
    assert chosen.count.tolist() == [1] * len(rows)
    assert EmbeddingMatch(fields).student_needs.fields == {name}


def test_the_order_of_fields_does_not_matter():
    student, teacher = vectors(QUERIES, CANDIDATES), vectors(TAUGHT_QUERIES, TAUGHT_CANDIDATES)
    turned = match(student, teacher, fields=("candidates", "queries"))
    torch.testing.assert_close(turned, match(student, teacher))


def test_a_student_of_another_size_learns_one_projection_for_both_fields():
    objective = EmbeddingMatch(distance="mse")
    objective.bind({"queries": 2, "candidates": 2}, {"queries": 3, "candidates": 3})
    (weight,) = objective.parameters()
    torch.testing.assert_close(weight.T @ weight, torch.eye(2))  # orthogonal: lengths survive it
    teacher = torch.randn(3, 3)
    loss, _ = objective(
        vectors(QUERIES, CANDIDATES),
        Outputs(queries=teacher[:1], candidates=teacher[1:]),
        Batch.of_scores(1, 2),
    )
    projected = torch.tensor(QUERIES + CANDIDATES) @ weight.T
    torch.testing.assert_close(loss, (projected - teacher).square().sum(-1))
    loss.sum().backward()
    assert weight.grad.any()


@pytest.mark.parametrize(("projection", "parameters"), [(True, 1), (None, 0), (False, 0)])
def test_equal_sizes_are_projected_only_when_asked(projection, parameters):
    objective = EmbeddingMatch(projection=projection)
    objective.bind({"queries": 2, "candidates": 2}, {"queries": 2, "candidates": 2})
    assert len(list(objective.parameters())) == parameters


def test_the_projection_is_saved_with_the_objective():
    objective = EmbeddingMatch(projection=True)
    objective.bind({"queries": 2, "candidates": 2}, {"queries": 2, "candidates": 2})
    assert list(objective.state_dict()) == ["linear.weight"]


def test_gradient_turns_the_student_towards_the_teacher():
    queries = torch.tensor([[1.0, 0.0]], requires_grad=True)
    teacher = Outputs(queries=torch.tensor([[0.0, 1.0]]))
    EmbeddingMatch(["queries"])(Outputs(queries=queries), teacher, Batch.of_scores(1, 2)).loss.backward()
    torch.testing.assert_close(queries.grad, torch.tensor([[0.0, -1.0]]))


def test_refuses_sizes_that_cannot_be_compared():
    """Found when the graph is built, not at the first batch."""
    with pytest.raises(ValueError, match="student vectors of size 2 with teacher vectors of size 3 without"):
        EmbeddingMatch(["queries"], projection=False).bind({"queries": 2}, {"queries": 3})
    with pytest.raises(ValueError, match="queries and candidates differ in size"):
        EmbeddingMatch().bind({"queries": 2, "candidates": 4}, {"queries": 3, "candidates": 3})


@pytest.mark.parametrize("fields", ["queries", [], ["queries", "scores"]])
def test_refuses_fields_that_hold_no_vectors(fields):
    with pytest.raises(
        ValueError, match="fields must be a list of some of queries, candidates, pair_vectors"
    ):
        EmbeddingMatch(fields)


def test_refuses_a_distance_it_does_not_know():
    with pytest.raises(ValueError, match="distance must be one of cosine, mse; got 'l1'"):
        EmbeddingMatch(distance="l1")


def test_vectors_of_listed_pairs_are_summed_over_each_list_and_their_padding_left_out():
    """The mean over the elements is TRMD's 0.17 for its worked numbers."""
    merged = torch.tensor([[[0.4, -0.5, 1.5], [9.0, 9.0, 9.0]], [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    taught = torch.tensor([[[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 1.0], [0.0, 1.0, 2.0]]])
    batch = replace(Batch.of_scores(2, 2), mask=torch.tensor([[True, False], [True, True]]))
    loss, count = EmbeddingMatch(["pair_vectors"], distance="mse")(
        Outputs(pair_vectors=merged), Outputs(pair_vectors=taught), batch
    )
    assert loss.tolist() == pytest.approx([0.51, 4.0])
    assert loss[0].item() / 3 == pytest.approx(0.17)
    assert count.tolist() == [1, 2]


def tokens(rows):
    """Rows of (place, vector)."""
    values = torch.tensor([vector for row in rows for _, vector in row]).view(-1, 2)
    places = torch.tensor([[place] for row in rows for place, _ in row], dtype=torch.int64).view(-1, 1)
    return Tokens(values, torch.tensor([0, *np.cumsum([len(row) for row in rows])]), places)


def test_tokens_are_matched_by_their_place_and_each_text_is_a_mean():
    """Special tokens (-1), one that the teacher cut, and punctuation it leaves out, are no terms."""
    student = tokens([
        [(-1, [9.0, 9.0]), (0, [1.0, 0.0]), (1, [0.0, 2.0]), (2, [5.0, 5.0])],
        [(0, [1.0, 1.0]), (1, [3.0, 0.0])],
    ])  # fmt: skip
    teacher = tokens([
        [(0, [1.0, 2.0]), (-1, [7.0, 7.0]), (1, [0.0, 1.0])],
        [(-1, [8.0, 8.0]), (1, [1.0, 0.0])],
    ])  # fmt: skip
    objective = EmbeddingMatch(fields=["query_tokens"], distance="mse")
    objective.bind({"query_tokens": 2}, {"query_tokens": 2})
    batch = Batch.of_scores(2, 1)
    loss, count = objective(Outputs(query_tokens=student), Outputs(query_tokens=teacher), batch)
    assert loss.tolist() == [(4.0 + 1.0) / 2, 4.0] and count.tolist() == [1, 1]


def test_a_text_without_a_common_token_loses_nothing():
    objective = EmbeddingMatch(fields=["candidate_tokens"])
    objective.bind({"candidate_tokens": 2}, {"candidate_tokens": 2})
    said = (tokens([[(0, [1.0, 0.0])]]), tokens([[(-1, [0.0, 1.0])]]))
    loss, _ = objective(*(Outputs(candidate_tokens=one) for one in said), Batch.of_scores(1, 1))
    assert loss.tolist() == [0.0]
