import dataclasses
import math

import numpy as np
import pytest
import torch

from distill.batch import Batch, Ragged
from distill.objectives import GuidedSoftmax, SampledSoftmax
from distill.objectives.guided_softmax import too_near
from distill.outputs import Outputs


def listed(student, guide, **settings):
    student, guide = torch.as_tensor(student), torch.as_tensor(guide)
    objective = GuidedSoftmax(temperature=1.0, in_batch=False, **settings)
    return objective(Outputs(scores=student), Outputs(scores=guide), Batch.of_scores(*student.shape))


def kept(guide, **settings):
    """Which of the negatives after the positive are left, of one list."""
    mask = torch.ones(1, len(guide), dtype=torch.bool)
    positive = torch.zeros_like(mask)
    positive[0, 0] = True
    return (~too_near(torch.tensor([guide]), positive, mask & ~positive, **settings))[0, 1:].tolist()


def test_negatives_above_the_limit_leave_the_sum():
    student = np.array([[0.2, 0.9, -0.5, 0.1], [0.0, 0.3, 0.6, -1.0]])
    guide = np.array([[0.5, 0.9, 0.4, 0.1], [0.8, 0.1, 0.2, 0.9]])
    loss, count = listed(student, guide)
    expected = []
    for s, g in zip(np.exp(student), guide, strict=True):
        expected.append(-math.log(s[0] / (s[0] + s[1:][g[1:] <= g[0]].sum())))
    assert loss.tolist() == pytest.approx(expected, rel=1e-5) and count.tolist() == [1, 1]


def test_the_limit_by_the_worked_number():
    """A positive at 0.8: with a relative margin of 0.05 the threshold is 0.76."""
    assert kept([0.8, 0.75, 0.77, 0.81], relative_margin=0.05) == [True, False, False]
    assert kept([0.8, 0.75, 0.77, 0.81]) == [True, True, False]
    assert kept([0.8, 0.75, 0.65, 0.81], margin=0.1) == [False, True, False]
    assert kept([-2.0, -2.05, -2.2, -1.0], relative_margin=0.05) == [False, True, False]  # -2.1, not -1.9
    assert kept([1.0, 0.59, 0.61], relative_margin=0.4) == [True, False]  # CADET: 0.6 of the top


def test_the_lowest_of_several_positives_sets_the_limit_and_none_is_left_out():
    positives = torch.tensor([[True, True, False, False]])
    near = too_near(torch.tensor([[0.9, 0.4, 0.5, 0.3]]), positives, ~positives)
    assert near.tolist() == [[False, False, True, False]]


def test_a_guide_that_agrees_with_the_labels_changes_nothing():
    batch = dataclasses.replace(
        Batch.of_scores(3, 2),
        known_positives=Ragged.of([[0, 3], [2], [4]]),
        draws=torch.tensor([1, 3, 1, 1, 2, 1]),
    )
    student, guide = torch.randn(3, 6), torch.zeros(3, 6)
    guide[[0, 1, 2], [0, 2, 4]] = 1.0
    guided, count = GuidedSoftmax()(Outputs(in_batch=student), Outputs(in_batch=guide), batch)
    plain, expected = SampledSoftmax()(Outputs(in_batch=student), None, batch)
    assert torch.equal(guided, plain) and torch.equal(count, expected)


def test_in_batch_the_guide_sees_every_candidate():
    """Query 0 has a false negative among the positives of query 1: candidate 2."""
    batch = Batch.of_scores(2, 2)
    student = torch.zeros(2, 4, requires_grad=True)
    guide = torch.tensor([[0.5, 0.1, 0.6, 0.2], [0.1, 0.2, 0.9, 0.3]])
    loss, _ = GuidedSoftmax(temperature=1.0)(Outputs(in_batch=student), Outputs(in_batch=guide), batch)
    assert loss.tolist() == pytest.approx([math.log(3), math.log(4)])
    loss.sum().backward()
    assert student.grad[0, 2] == 0 and student.grad[1, 0] > 0


def test_over_lists_of_positives_alone_it_would_learn_nothing():
    """Which a run refuses beforehand; over a batch there are others."""
    assert GuidedSoftmax(in_batch=False).contrasts and not GuidedSoftmax().contrasts


def test_without_a_rival_nothing_is_lost():
    scores = torch.randn(1, 3, requires_grad=True)
    loss, count = listed(scores, [[0.1, 0.5, 0.9]])
    loss.backward()
    assert loss.tolist() == [0.0] and count.tolist() == [1.0] and not scores.grad.any()


@pytest.mark.parametrize(
    "settings", [{"margin": -0.1}, {"margin": math.nan}, {"relative_margin": 1.0}, {"relative_margin": -0.1}]
)
def test_refuses_margins_that_would_call_positives_rivals(settings):
    with pytest.raises(ValueError, match="margin must be 0 or more and relative_margin below 1"):
        GuidedSoftmax(**settings)
