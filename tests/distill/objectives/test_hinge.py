import math

import pytest
import torch

from distill.batch import Batch, Ragged
from distill.objectives import Hinge
from distill.outputs import Outputs


def listed(scores, labels=None, **settings):
    scores = torch.as_tensor(scores)
    batch = Batch.of_scores(*scores.shape, labels=None if labels is None else torch.tensor(labels))
    return Hinge(**settings)(Outputs(scores=scores), None, batch)


@pytest.mark.parametrize(("margin", "expected"), [(0.2, 0.0), (0.5, 0.1)])
def test_one_positive_above_one_negative(margin, expected):
    loss, count = listed([[0.6, 0.2]], margin=margin)
    assert (loss.item(), count.item()) == (pytest.approx(expected, abs=1e-6), 1)


def test_the_mean_is_over_pairs_of_a_positive_and_a_negative():
    loss, _ = listed([[2.0, 0.5, -1.0, 1.0]], labels=[[1.0, 1.0, 0.0, 0.0]], margin=1.0)
    assert loss.item() == pytest.approx((0 + 0 + 0 + 1.5) / 4)
    loss, _ = listed([[2.0, 0.5, -1.0, 1.0]], labels=[[1.0, 1.0, 0.0, 0.0]], margin=2.0)
    assert loss.item() == pytest.approx((0 + 1.0 + 0.5 + 2.5) / 4)


@pytest.mark.parametrize(("hardest", "expected"), [(1, 1.2), (2, (1.2 + 0.9) / 2), (9, (1.2 + 0.9 + 0) / 3)])
def test_only_the_hardest_negatives_may_count(hardest, expected):
    loss, _ = listed([[0.5, 0.4, -3.0, 0.7]], margin=1.0, hardest=hardest)
    assert loss.item() == pytest.approx(expected)


def test_a_hard_negative_that_is_padding_or_does_not_exist_is_none():
    """Two hardest are asked for, and the second row has one negative: the padding's 99 is not it."""
    batch = Batch.of_scores(2, 3)
    batch.mask[1, 2] = False
    scores = torch.tensor([[0.0, 0.5, 0.2], [0.0, 0.5, 99.0]], requires_grad=True)
    loss, _ = Hinge(margin=1.0, hardest=2)(Outputs(scores=scores), None, batch)
    assert loss.tolist() == pytest.approx([(1.5 + 1.2) / 2, 1.5])
    loss.sum().backward()
    assert scores.grad[1, 2] == 0


def test_the_weight_by_rank_counts_all_negatives_within_the_margin():
    """Two of three negatives violate: of 300 candidates about 200 would stand above or within the margin."""
    loss, _ = listed([[0.5, 0.4, -3.0, 0.7]], margin=1.0, hardest=1, warp=300)
    assert loss.item() == pytest.approx(1.2 * math.log(1 + 200))
    loss, _ = listed([[0.5, 0.4, -3.0, 0.7]], margin=1.0, warp=300)
    assert loss.item() == pytest.approx((0.9 + 0 + 1.2) / 3 * math.log(1 + 200))


def test_the_weight_by_rank_passes_no_gradient_of_its_own():
    scores = torch.tensor([[0.5, 0.4, -3.0, 0.7]], requires_grad=True)
    listed(scores, margin=1.0, hardest=1, warp=300).loss.backward()
    assert scores.grad.tolist()[0] == pytest.approx([-math.log(201), 0, 0, math.log(201)])


def in_batch(scores, **settings):
    """Two queries, the second candidate drawn three times; the last is known to be right for query 1."""
    batch = Batch(
        index=torch.tensor([[0], [2]]),
        mask=torch.ones(2, 1, dtype=torch.bool),
        query_ids=torch.arange(2),
        candidate_ids=torch.tensor([9, 8, 7, 6]),
        labels=torch.ones(2, 1),
        draws=torch.tensor([1, 3, 1, 1]),
        known_positives=Ragged.of([[9], [7, 6]]),
    )
    return Hinge(in_batch=True, **settings)(Outputs(in_batch=torch.tensor(scores)), None, batch).loss


def test_in_batch_negatives_count_as_often_as_they_were_drawn_unless_they_are_the_hardest():
    scores = [[1.0, 0.5, 2.0, -1.0], [0.5, 0.0, 1.0, 9.0]]
    assert in_batch(scores).tolist() == pytest.approx([(3 * 0.5 + 2.0 + 0) / 5, (0.5 + 3 * 0.0) / 4])
    assert in_batch(scores, hardest=1).tolist() == pytest.approx([2.0, 0.5])
    assert in_batch(scores, hardest=2).tolist() == pytest.approx([(0.5 + 2.0) / 2, (0.5 + 0.0) / 2])
    warp = in_batch(scores, hardest=1, warp=10).tolist()
    assert warp == pytest.approx([2.0 * math.log(1 + 10 * 4 / 5), 0.5 * math.log(1 + 10 * 1 / 4)])


@pytest.mark.parametrize(
    "settings", [{"margin": 0.0}, {"margin": float("nan")}, {"hardest": 0}, {"warp": 0}], ids=str
)
def test_refuses_settings_that_would_teach_nothing(settings):
    """A margin of 0 is reached by a model that gives every candidate the same score."""
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        Hinge(**settings)
