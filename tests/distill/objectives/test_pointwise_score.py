import numpy as np
import pytest
import torch
from scipy.special import expit

from distill.batch import Batch
from distill.objectives import PointwiseScore
from distill.outputs import Outputs

STUDENT, TEACHER = [[2.0, 0.5, -1.0], [0.0, 0.0, 3.0]], [[9.0, 1.0, 4.0], [1.0, 2.0, 3.0]]


def pointwise(student, teacher, mask=None, **settings):
    student, teacher = torch.as_tensor(student), torch.as_tensor(teacher)
    batch = Batch.of_scores(*student.shape)
    if mask is not None:
        batch.mask.copy_(torch.tensor(mask))
    return PointwiseScore(**settings)(Outputs(scores=student), Outputs(scores=teacher), batch)


def test_mse_equals_the_formula_written_out_in_numpy():
    expected = ((3.0 * np.array(STUDENT) - np.array(TEACHER)) ** 2).sum(-1)
    loss, count = pointwise(STUDENT, TEACHER, scale=3.0)
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert count.tolist() == [3, 3]


def test_bce_equals_the_formula_written_out_in_numpy():
    p, q = expit(np.array(TEACHER)), expit(3.0 * np.array(STUDENT))
    expected = -(p * np.log(q) + (1 - p) * np.log(1 - q)).sum(-1)
    loss, count = pointwise(STUDENT, TEACHER, loss="bce", scale=3.0)
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert count.tolist() == [3, 3]


@pytest.mark.parametrize("form", ["mse", "bce"])
def test_a_padded_candidate_is_neither_summed_nor_counted(form):
    padded = pointwise([[2.0, 99.0]], [[1.0, -99.0]], mask=[[True, False]], loss=form)
    torch.testing.assert_close(padded, pointwise([[2.0]], [[1.0]], loss=form))


@pytest.mark.parametrize("form", ["mse", "bce"])
def test_the_gradient_vanishes_where_the_student_says_what_the_teacher_says(form):
    student = torch.tensor([[0.3, -2.0, 1.0]], requires_grad=True)
    pointwise(student, [[0.3, -2.0, 5.0]], loss=form).loss.backward()
    assert student.grad[0, :2].abs().max() < 1e-6 and student.grad[0, 2] < -0.1


def test_refuses_a_loss_it_does_not_know():
    with pytest.raises(ValueError, match="loss must be one of mse, bce; got 'l1'"):
        PointwiseScore(loss="l1")
    with pytest.raises(ValueError, match="scale must be positive"):
        PointwiseScore(scale=float("nan"))
