import numpy as np
import pytest
import torch

from distill.batch import Batch
from distill.objectives import LambdaMRR
from distill.objectives.lambda_mrr import levels, places
from distill.outputs import Outputs


def loss_of(student, teacher, mask=None, **settings):
    student, teacher = torch.as_tensor(student), torch.as_tensor(teacher)
    batch = Batch.of_scores(*student.shape)
    if mask is not None:
        batch.mask.copy_(torch.tensor(mask))
    return LambdaMRR(**settings)(Outputs(scores=student), Outputs(scores=teacher), batch)


def written_out(s, y, temperature=1.0):
    rank = np.empty(len(s))
    rank[np.argsort(-s, kind="stable")] = np.arange(1, len(s) + 1)
    pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if y[i] > y[j]]
    return np.mean(
        [abs(1 / rank[i] - 1 / rank[j]) * np.log1p(np.exp(-(s[i] - s[j]) / temperature)) for i, j in pairs]
    )


def test_equals_the_formula_written_out_in_numpy():
    student = np.array([[2.0, 0.5, -1.0, 0.7], [0.0, 0.0, 3.0, 3.0]])
    teacher = np.array([[9.0, 1.0, 4.0, 1.0], [1.0, 2.0, 3.0, -7.0]])
    loss, count = loss_of(student, teacher, temperature=0.5)
    expected = [written_out(s, t, 0.5) for s, t in zip(student, teacher, strict=True)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5) and count.tolist() == [1, 1]


def test_the_worked_number():
    """Ranks 2, 1, 3; terms .399069, .067198 and .227436."""
    loss, _ = loss_of([[1.0, 1.2, 0.3]], [[4.0, 2.0, 1.0]])
    assert loss.item() == pytest.approx(0.231234, abs=1e-6)


def test_groups_teach_no_order_inside():
    teacher = torch.tensor([[5.0, 9.0, 1.0, 7.0, 3.0]])
    mask = torch.ones_like(teacher, dtype=torch.bool)
    assert levels(teacher, mask, [1, 2]).tolist() == [[1, 2, 0, 1, 0]]
    student = np.array([[0.3, -0.2, 0.9, 0.4, 0.0]])
    loss, _ = loss_of(student, teacher, groups=[1, 2])
    assert loss.item() == pytest.approx(written_out(student[0], [1, 2, 0, 1, 0]), rel=1e-5)
    everyone, _ = loss_of(student, teacher, groups=[9])
    assert everyone.item() == 0  # one group: no order


def test_a_padded_candidate_has_no_rank_and_no_group():
    padded = loss_of([[2.0, 99.0, 0.5]], [[1.0, 99.0, 3.0]], mask=[[True, False, True]], groups=[1])
    torch.testing.assert_close(padded, loss_of([[2.0, 0.5]], [[1.0, 3.0]], groups=[1]))


def test_equal_scores_have_ranks_too():
    """Else a student that ties all candidates, as one does at the start, would never learn."""
    student = torch.zeros(1, 3, requires_grad=True)
    assert places(student, torch.ones(1, 3, dtype=torch.bool)).tolist() == [[1, 2, 3]]
    loss_of(student, [[0.0, 5.0, 1.0]]).loss.backward()
    assert student.grad.argmin() == 1


def test_a_swap_at_the_top_costs_more_than_one_below():
    top, _ = loss_of([[3.0, 2.0, -9.0, -9.5]], [[1.0, 2.0, 0.0, 0.0]])
    bottom, _ = loss_of([[9.5, 9.0, 3.0, 2.0]], [[3.0, 3.0, 1.0, 2.0]])
    assert top > bottom


@pytest.mark.parametrize("groups", [[], [0], [3, -1]])
def test_refuses_groups_of_nobody(groups):
    with pytest.raises(ValueError, match="groups must be sizes of at least 1"):
        LambdaMRR(groups=groups)


def test_refuses_a_temperature_that_divides_by_nothing():
    with pytest.raises(ValueError, match="temperature must be positive"):
        LambdaMRR(temperature=0.0)
