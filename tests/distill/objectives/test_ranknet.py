import numpy as np
import pytest
import torch

from distill.batch import Batch
from distill.objectives import RankNet
from distill.outputs import Outputs


def rank(student, teacher, mask=None, **settings):
    student, teacher = torch.as_tensor(student), torch.as_tensor(teacher)
    batch = Batch.of_scores(*student.shape)
    if mask is not None:
        batch.mask.copy_(torch.tensor(mask))
    return RankNet(**settings)(Outputs(scores=student), Outputs(scores=teacher), batch)


def test_three_candidates_of_which_the_student_swaps_two():
    loss, count = rank([[1.0, 1.2, 0.3]], [[4.0, 2.0, 1.0]])
    assert (loss.item(), count.item()) == (pytest.approx(0.514160, abs=1e-6), 1)


def test_equals_the_formula_written_out_with_ties_and_a_temperature():
    s, t = [0.3, -0.2, 0.9, 0.1], [2.0, 2.0, 1.0, 5.0]
    pairs = [(i, j) for i in range(4) for j in range(4) if t[i] > t[j]]
    expected = np.mean([np.log1p(np.exp(-(s[i] - s[j]) / 0.05)) for i, j in pairs])
    assert len(pairs) == 5
    assert rank([s], [t], temperature=0.05).loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_probability_of_the_wrong_order_is_trmds_loss():
    loss = rank([[1.2, 0.7]], [[1.0, 0.0]], form="probability").loss
    assert loss.item() == pytest.approx(1 - np.exp(1.2) / (np.exp(1.2) + np.exp(0.7)), abs=1e-6)
    assert loss.item() == pytest.approx(0.377541, abs=1e-6)
    far = rank([[-1e4, 1e4]], [[1.0, 0.0]], form="probability", temperature=0.1).loss
    assert far.item() == 1.0  # bounded


def test_refuses_a_form_it_does_not_know():
    with pytest.raises(ValueError, match="form must be one of log, probability; got 'square'"):
        RankNet(form="square")


def test_only_the_order_of_the_teacher_counts():
    expected = rank([[1.0, 1.2, 0.3]], [[4.0, 2.0, 1.0]])
    torch.testing.assert_close(rank([[1.0, 1.2, 0.3]], [[1e6, -3.0, -3.1]]), expected)


def test_a_padded_candidate_changes_nothing():
    padded = rank([[2.0, 0.5, 99.0]], [[1.0, 3.0, -99.0]], mask=[[True, True, False]])
    torch.testing.assert_close(padded, rank([[2.0, 0.5]], [[1.0, 3.0]]))


def test_a_teacher_that_ties_everything_teaches_nothing():
    student = torch.tensor([[2.0, 0.5]], requires_grad=True)
    loss, count = rank(student, [[1.0, 1.0]])
    loss.sum().backward()
    assert (loss.item(), count.item()) == (0, 1)
    assert not student.grad.any()


def test_one_candidate_has_no_order():
    loss, count = rank([[2.0, 0.5]], [[1.0, 3.0]], mask=[[True, False]])
    assert loss.tolist() == count.tolist() == [0]


def test_gradient_raises_the_candidate_the_teacher_puts_first():
    student = torch.zeros(1, 3, requires_grad=True)
    rank(student, [[0.0, 5.0, 1.0]]).loss.backward()
    assert student.grad[0].argsort().tolist() == [1, 2, 0]


def test_a_student_far_from_the_order_stays_finite():
    student = torch.tensor([[-1.0, 1.0]], requires_grad=True)
    loss, _ = rank(student, [[2.0, 1.0]], temperature=0.001)
    loss.backward()
    assert loss.item() == pytest.approx(2000.0) and student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_refuses_a_temperature_that_turns_the_order_around(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        RankNet(temperature)
