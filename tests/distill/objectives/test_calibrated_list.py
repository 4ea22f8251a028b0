import numpy as np
import pytest
import torch
from scipy.special import expit

from distill.batch import Batch
from distill.objectives import CalibratedList, ScoreKL
from distill.outputs import Outputs


def clid(student, teacher, objective=None):
    student, teacher = torch.as_tensor(student), torch.as_tensor(teacher)
    batch = Batch.of_scores(*student.shape)
    return (objective or CalibratedList())(Outputs(scores=student), Outputs(scores=teacher), batch)


def logits(*probabilities):
    return torch.tensor([probabilities]).logit()


def test_three_probabilities():
    loss, count = clid(logits(0.5, 0.5, 0.2), logits(0.8, 0.4, 0.2))
    assert (loss.item(), count.item()) == (pytest.approx(1.006367, abs=1e-5), 1)


def test_its_least_value_is_the_entropy_of_the_teachers_shares():
    assert clid(logits(0.8, 0.4, 0.2), logits(0.8, 0.4, 0.2)).loss.item() == pytest.approx(0.955700, abs=1e-5)


def test_equals_the_formula_written_out_in_numpy():
    student, teacher = np.array([[2.0, -1.0, 0.3], [0.0, 4.0, -5.0]]), np.array([[0.1, 3.0, -2.0]] * 2)
    p, q = expit(teacher), expit(student)
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    assert clid(student, teacher).loss.tolist() == pytest.approx(-(p * np.log(q)).sum(-1), rel=1e-5)


def test_unlike_a_softmax_it_sees_a_constant_added_to_all_logits():
    teacher = logits(0.8, 0.4, 0.2)
    shifted = (teacher + 3.0).requires_grad_()
    assert clid(shifted, teacher, ScoreKL()).loss.item() == pytest.approx(0.0, abs=1e-6)
    loss = clid(shifted, teacher).loss
    assert loss.item() > 0.9558
    loss.backward()
    assert shifted.grad[0, 0] < 0 < shifted.grad[0, 2]


def test_logits_far_from_zero_stay_finite():
    student = torch.tensor([[-300.0, 300.0]], requires_grad=True)
    loss, _ = clid(student, torch.tensor([[300.0, -300.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(300.0) and student.grad.isfinite().all()


def test_a_list_of_one_says_nothing():
    loss, count = clid([[1.0]], [[2.0]])
    assert loss.item() == count.item() == 0
