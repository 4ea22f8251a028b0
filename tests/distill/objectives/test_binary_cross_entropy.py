import numpy as np
import pytest
import torch
from scipy.special import expit

from distill.batch import Batch
from distill.errors import DataError
from distill.objectives import BinaryCrossEntropy, PointwiseScore
from distill.outputs import Needs, Outputs


def bce(scores, labels, mask=None):
    labels = torch.tensor(labels)
    batch = Batch.of_scores(*labels.shape, labels=labels)
    if mask is not None:
        batch.mask.copy_(torch.tensor(mask))
    return BinaryCrossEntropy()(Outputs(scores=torch.as_tensor(scores)), None, batch)


def test_equals_the_formula_written_out_in_numpy():
    scores, labels = np.array([[2.0, -1.0], [0.5, 3.0]]), np.array([[1.0, 0.0], [0.25, 1.0]])
    q = expit(scores)
    expected = -(labels * np.log(q) + (1 - labels) * np.log(1 - q)).sum(-1)
    loss, count = bce(scores.tolist(), labels.tolist())
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert count.tolist() == [2, 2]


def test_four_scores_of_a_cross_encoder():
    loss, count = bce([[2.0, 1.0, 0.0, -1.0]], [[1.0, 0.0, 0.0, 0.0]])
    assert (loss / count).item() == pytest.approx(0.611650, abs=1e-6)


def test_a_padded_candidate_is_neither_summed_nor_counted():
    loss, count = bce([[2.0, 0.0]], [[1.0, 1.0]], mask=[[True, False]])
    assert (loss.item(), count.item()) == (pytest.approx(0.126928, abs=1e-6), 1)


def test_gradient_raises_the_relevant_and_lowers_the_other():
    scores = torch.zeros(1, 2, requires_grad=True)
    bce(scores, [[0.0, 1.0]]).loss.backward()
    assert scores.grad[0, 0] > 0 > scores.grad[0, 1]


@pytest.mark.parametrize("label", [2.0, -1.0, float("nan")])
def test_refuses_labels_that_are_no_probabilities(label):
    """With a grade of 2 the loss has no lower end: the model learns to be certain of everything."""
    with pytest.raises(
        DataError, match=r"labels from 0 to 1, but query 1 .* has (2|-1|nan) for candidate 3 "
    ):
        bce([[0.0, 0.0]] * 2, [[1.0, 0.0], [0.0, label]])


def test_a_teachers_probability_stands_for_the_label():
    """Privileged features distillation, worked by hand: f_s = 0, f_t = 2, lambda = 1/2, y = 1."""
    student = torch.zeros(1, 1, requires_grad=True)
    batch = Batch.of_scores(1, 1)
    hard, soft = BinaryCrossEntropy(), BinaryCrossEntropy()
    soft.hear()
    assert soft.teacher_needs == Needs("scores") and hard.labelled and not soft.labelled
    said = Outputs(scores=student), Outputs(scores=torch.tensor([[2.0]]))
    labels, taught = hard(said[0], None, batch).loss, soft(*said, batch).loss
    assert (labels.item(), taught.item()) == pytest.approx((0.693147, 0.693147), abs=1e-6)
    (0.5 * labels + 0.5 * taught).backward()
    assert student.grad.item() == pytest.approx(-0.440399, abs=1e-6)
    assert hard(said[1], None, batch).loss.item() == pytest.approx(0.126928, abs=1e-6)  # the teacher's own


def test_with_a_teacher_labels_are_not_read():
    soft = BinaryCrossEntropy()
    soft.hear()
    batch = Batch.of_scores(1, 2, labels=torch.tensor([[7.0, float("nan")]]))
    scores = torch.tensor([[2.0, -1.0]])
    loss = soft(Outputs(scores=scores), Outputs(scores=2 * scores), batch).loss
    same = PointwiseScore(loss="bce")(Outputs(scores=scores), Outputs(scores=2 * scores), batch).loss
    torch.testing.assert_close(loss, same, rtol=0, atol=0)
