import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from distill.batch import Batch
from distill.objectives.score_kl import ScoreKL, listwise_kl
from distill.outputs import Outputs


def kl(student, teacher, mask=None, **settings):
    """ScoreKL's rows [B] of lists of scores."""
    student, teacher = torch.as_tensor(student), torch.as_tensor(teacher)
    batch = Batch.of_scores(*student.shape)
    if mask is not None:
        batch.mask.copy_(torch.tensor(mask))
    return ScoreKL(**settings)(Outputs(scores=student), Outputs(scores=teacher), batch)


def rows(*values):
    """The plain function's arguments of one row each: student, teacher, mask."""
    student, teacher = (torch.tensor([value]) for value in values)
    return student, teacher, torch.ones_like(student, dtype=torch.bool)


def test_equals_the_formula_written_out_in_numpy():
    student = np.array([[2.0, 0.5, -1.0], [0.0, 0.0, 3.0]])
    teacher = np.array([[9.0, 1.0, 4.0], [1.0, 2.0, 3.0]])
    p, q = softmax(teacher / 3.0, axis=-1), softmax(student / 2.0, axis=-1)
    expected = 3.0**2 * (p * np.log(p / q)).sum(-1)
    loss, count = kl(student, teacher, temperature=2.0, teacher_temperature=3.0)
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert count.tolist() == [1, 1]


@pytest.mark.parametrize(("temperature", "expected"), [(1, 0.037402), (2, 0.070409), (4, 0.081704)])
def test_hintons_factor_keeps_the_loss_from_shrinking(temperature, expected):
    loss, _ = kl([[20.0, 18.5, 18.0]], [[4.0, 2.0, 1.0]], temperature=temperature)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("temperature", "expected"), [(1, 0.037402), (2, 0.017602), (4, 0.005107)])
def test_the_plain_divergence_has_no_factor(temperature, expected):
    divergence = listwise_kl(*rows([20.0, 18.5, 18.0], [4.0, 2.0, 1.0]), temperature)
    assert divergence.item() == pytest.approx(expected, abs=1e-6)


def test_scores_scaled_to_their_lists_range_teach_next_to_nothing():
    """Why there is no such option: softmax(minmax(s)) is at most e times as sharp as it is flat."""
    student, teacher, mask = rows([1.0, 0.25, 0.0], [1.0, 1 / 3, 0.0])
    assert listwise_kl(student, teacher, mask).item() == pytest.approx(0.000680, abs=1e-6)


def test_the_six_scores_of_a_cascade():
    """ERNIE-Search: cross-encoder, ColBERT and student on the labels, and each arrow between them."""
    cross, bridge, student = [3.0, 1.0, 0.0], [2.0, 1.5, 0.5], [1.0, 1.2, 0.3]
    positive = [1.0, -1e9, -1e9]  # the KL from a sure teacher is the cross-entropy of its choice
    said = [kl([s], [t])[0].item() for s, t in [
        (cross, positive), (bridge, positive), (student, positive),
        (bridge, cross), (student, bridge), (student, cross),
    ]]  # fmt: skip
    expected = [0.169846, 0.604131, 0.999892, 0.199977, 0.066151, 0.482193]
    assert said == pytest.approx(expected, abs=1e-6)
    assert sum(said) == pytest.approx(2.522189, abs=2e-6)


def test_it_is_the_forward_divergence():
    loss, _ = kl([[1.0, 1.2, 0.3]], [[4.0, 2.0, 1.0]])
    assert loss.item() == pytest.approx(0.482193, abs=1e-6)


def test_a_cosine_student_and_a_normalised_teacher_each_have_their_temperature():
    """The setting of CADET: softmax(t / 0.3) against softmax(cosine / 0.05)."""
    divergence = listwise_kl(*rows([0.8, 0.75, 0.5], [1.0, 0.6, 0.2]), 0.05, 0.3)
    assert divergence.item() == pytest.approx(0.135409, abs=1e-6)


def test_the_factor_does_not_depend_on_the_unit_of_the_student():
    """A student at 0.05 keeps the loss it would have with scores and temperature 20 times as large."""
    teacher = [[4.0, 2.0, 1.0]]
    cosines, _ = kl([[0.8, 0.75, 0.5]], teacher, temperature=0.05, teacher_temperature=1.0)
    logits, _ = kl([[16.0, 15.0, 10.0]], teacher, temperature=1.0)
    torch.testing.assert_close(cosines, logits)


def test_a_padded_candidate_changes_nothing():
    padded = kl([[2.0, 0.5, 99.0]], [[1.0, 3.0, -99.0]], mask=[[True, True, False]])
    torch.testing.assert_close(padded, kl([[2.0, 0.5]], [[1.0, 3.0]]))


def test_one_candidate_is_no_list():
    loss, count = kl([[2.0, 0.5], [2.0, 0.5]], [[1.0, 3.0]] * 2, mask=[[True, False], [False, False]])
    assert loss.tolist() == count.tolist() == [0, 0]


def test_gradient_pulls_the_student_towards_the_teachers_favourite():
    student = torch.zeros(1, 3, requires_grad=True)
    kl(student, [[0.0, 5.0, 0.0]]).loss.backward()
    assert student.grad.argmin() == 1  # a step against the gradient raises candidate 1


def test_a_confident_teacher_and_a_cold_student_stay_finite():
    """Differences a softmax cannot hold: one side underflows to 0, its logarithm must not."""
    student = torch.tensor([[1.0, -1.0, 0.0]], requires_grad=True)
    loss, _ = kl(student, [[-300.0, 300.0, 0.0]], temperature=0.001, teacher_temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2000.0)
    assert student.grad.isfinite().all()


def test_in_batch_compares_every_candidate_of_the_batch():
    batch = Batch.of_scores(2, 2)
    student = torch.tensor([[2.0, 0.5, -1.0, 0.0], [0.0, 0.0, 3.0, 1.0]])
    teacher = torch.tensor([[9.0, 1.0, 4.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    objective = ScoreKL(in_batch=True)
    assert objective.across and not ScoreKL().across
    batch.mask[0] = False  # who is listed does not matter
    loss, count = objective(Outputs(in_batch=student), Outputs(in_batch=teacher), batch)
    torch.testing.assert_close(loss, kl(student, teacher).loss)
    assert count.tolist() == [1, 1]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["temperature", "teacher_temperature"])
def test_refuses_a_temperature_that_divides_by_nothing(name, temperature):
    """NaN scores would only show as a stopped run, hours from the typing error."""
    with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
        ScoreKL(**{name: temperature})


scores = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=6)


@settings(max_examples=50, deadline=None)
@given(scores, st.randoms(use_true_random=False), st.floats(-20, 20), st.floats(-20, 20))
def test_no_shift_of_either_side_changes_the_loss(teacher, random, student_shift, teacher_shift):
    student = random.sample(teacher, len(teacher))
    plain, _ = kl([student], [teacher], temperature=2.0)
    shifted, _ = kl(
        [[score + student_shift for score in student]],
        [[score + teacher_shift for score in teacher]],
        temperature=2.0,
    )
    assert shifted.item() == pytest.approx(plain.item(), rel=1e-4, abs=1e-4)
    assert plain.item() >= -1e-5
