import dataclasses
import math

import numpy as np
import pytest
import torch

from distill.batch import Batch, Ragged
from distill.objectives import BPR
from distill.outputs import Outputs


def listed(scores, labels=None, temperature=1.0):
    scores = torch.as_tensor(scores)
    batch = Batch.of_scores(*scores.shape, labels=None if labels is None else torch.tensor(labels))
    return BPR(temperature)(Outputs(scores=scores), None, batch)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.513015), (0.1, 0.0181499)])
def test_one_positive_above_one_negative(temperature, expected):
    loss, count = listed([[0.6, 0.2]], temperature=temperature)
    assert (loss.item(), count.item()) == (pytest.approx(expected, rel=1e-5), 1)


def test_equals_the_formula_written_out_in_numpy():
    scores, labels = np.array([[2.0, 0.5, -1.0, 1.0]]), np.array([[1.0, 1.0, 0.0, 0.0]])
    margins = scores[0, :2, None] - scores[0, None, 2:]
    expected = -np.log(1 / (1 + np.exp(-margins / 0.7))).mean()
    assert listed(scores, labels, 0.7).loss.item() == pytest.approx(expected, rel=1e-5)


def test_in_batch_each_negative_counts_as_often_as_it_was_drawn_and_a_known_positive_never():
    batch = Batch(
        index=torch.tensor([[1], [2]]),
        mask=torch.ones(2, 1, dtype=torch.bool),
        query_ids=torch.arange(2),
        candidate_ids=torch.tensor([9, 8, 7, 6]),  # nobody lists the first and the last
        labels=torch.ones(2, 1),
        draws=torch.tensor([3, 1, 1, 1]),
        known_positives=Ragged.of([[8], [7, 8]]),
    )
    scores = torch.tensor([[0.5, 1.0, 2.0, 0.0], [0.5, 9.0, 2.0, 1.0]], requires_grad=True)
    loss, count = BPR(in_batch=True)(Outputs(in_batch=scores), None, batch)

    def lost(*margins):
        return sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)

    expected = [lost(0.5, 0.5, 0.5, -1.0, 1.0), lost(1.5, 1.5, 1.5, 1.0)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5) and count.tolist() == [1, 1]
    loss.sum().backward()
    assert (scores.grad == 0).nonzero().tolist() == [[1, 1]]


def test_a_list_without_a_negative_or_a_positive_says_nothing():
    loss, count = listed([[2.0, 1.0], [2.0, 1.0]], labels=[[1.0, 1.0], [0.0, 0.0]])
    assert loss.tolist() == count.tolist() == [0, 0]


def test_a_candidate_alone_in_the_batch_has_nobody_below_it():
    batch = dataclasses.replace(Batch.of_scores(1, 1), known_positives=Ragged.of([[0]]))
    loss, count = BPR(in_batch=True)(Outputs(in_batch=torch.zeros(1, 1)), None, batch)
    assert loss.item() == 0.0 and count.item() == 1.0


def test_gradient_raises_the_positive_and_lowers_the_negative_that_is_nearest():
    scores = torch.tensor([[0.0, 1.0, -1.0]], requires_grad=True)
    listed(scores).loss.backward()
    assert scores.grad[0, 0] < 0 < scores.grad[0, 2] < scores.grad[0, 1]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_a_temperature_that_divides_by_nothing(temperature):
    """A negative one would rank positives last, with a loss that falls as it should."""
    with pytest.raises(ValueError, match="temperature must be positive"):
        BPR(temperature)


def test_only_in_batch_negatives_compare_queries_with_each_other():
    assert BPR(in_batch=True).across and not BPR().across
