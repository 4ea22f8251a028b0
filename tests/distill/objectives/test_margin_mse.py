import numpy as np
import pytest
import torch

from distill.batch import Batch, Ragged
from distill.objectives import MarginMSE
from distill.outputs import Outputs


def mse(student, teacher, labels=None, mask=None, **settings):
    student, teacher = torch.as_tensor(student), torch.as_tensor(teacher)
    batch = Batch.of_scores(*student.shape, labels=None if labels is None else torch.tensor(labels))
    if mask is not None:
        batch.mask.copy_(torch.tensor(mask))
    return MarginMSE(**settings)(Outputs(scores=student), Outputs(scores=teacher), batch)


@pytest.mark.parametrize(
    ("settings", "mask", "expected"),
    [
        ({}, [[True, True, False]], 0.25),  # the first negative alone
        ({}, None, 0.625),
        ({"pairs": "all"}, None, 1 / 3),
    ],
)
def test_margins_of_a_dot_product_student(settings, mask, expected):
    loss, count = mse([[20.0, 18.5, 18.0]], [[4.0, 2.0, 1.0]], mask=mask, **settings)
    assert (loss.item(), count.item()) == (pytest.approx(expected, abs=1e-6), 1)


def test_each_positive_is_paired_with_each_negative_wherever_it_stands():
    s, t = np.array([1.0, 0.2, -0.5, 2.0]), np.array([3.0, -1.0, 0.5, 1.0])
    pairs = [(i, j) for i in (0, 2) for j in (1, 3)]
    expected = np.mean([((s[i] - s[j]) - (t[i] - t[j])) ** 2 for i, j in pairs])
    loss, _ = mse([s.tolist()], [t.tolist()], labels=[[1.0, 0.0, 2.0, 0.0]])
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_scale_stretches_the_students_margins_alone():
    scaled = mse([[0.8, 0.7, 0.3]], [[4.0, 2.0, 1.0]], scale=20.0)
    torch.testing.assert_close(scaled, mse([[16.0, 14.0, 6.0]], [[4.0, 2.0, 1.0]]))


def test_no_shift_of_either_side_matters():
    shifted = mse([[3.0, 2.0, 5.0]], [[4.0, 2.0, 1.0]])
    torch.testing.assert_close(shifted, mse([[1.0, 0.0, 3.0]], [[14.0, 12.0, 11.0]]))


@pytest.mark.parametrize("pairs", ["positive", "all"])
def test_a_padded_candidate_changes_nothing(pairs):
    padded = mse([[2.0, 0.5, 99.0]], [[1.0, 3.0, -99.0]], mask=[[True, True, False]], pairs=pairs)
    torch.testing.assert_close(padded, mse([[2.0, 0.5]], [[1.0, 3.0]], pairs=pairs))


@pytest.mark.parametrize("labels", [[[0.0, 0.0]], [[1.0, 1.0]]])
def test_a_query_without_a_pair_says_nothing(labels):
    loss, count = mse([[2.0, 0.5]], [[1.0, 3.0]], labels=labels)
    assert loss.tolist() == count.tolist() == [0]


def test_one_candidate_has_no_margin():
    loss, count = mse([[2.0, 0.5]], [[1.0, 3.0]], mask=[[True, False]], pairs="all")
    assert loss.tolist() == count.tolist() == [0]


def test_gradient_widens_a_margin_that_is_too_small():
    student = torch.zeros(1, 2, requires_grad=True)
    mse(student, [[3.0, 1.0]]).loss.backward()
    assert student.grad[0, 0] < 0 < student.grad[0, 1]


def test_labels_are_read_for_positive_pairs_only():
    assert MarginMSE().labelled and not MarginMSE(pairs="all").labelled


def test_refuses_what_would_train_something_else():
    """A misspelt choice must not fall back to another; a scale of 0 would hide the student."""
    with pytest.raises(ValueError, match="pairs must be one of positive, all; got 'every'"):
        MarginMSE(pairs="every")
    with pytest.raises(ValueError, match="scale must be positive"):
        MarginMSE(scale=0.0)


def test_in_batch_sets_each_positive_against_the_whole_batch():
    """TAS-Balanced's second term: not only against the listed, but never against a known positive."""
    batch = Batch(
        index=torch.tensor([[2, 0], [1, 3]]),
        mask=torch.ones(2, 2, dtype=torch.bool),
        query_ids=torch.arange(2),
        candidate_ids=torch.tensor([9, 8, 7, 6, 5]),  # nobody lists the last
        labels=torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
        known_positives=Ragged.of([[7, 8], [8, 6]]),
    )
    student, teacher = np.random.default_rng(0).normal(size=(2, 2, 5)).astype(np.float32)
    objective = MarginMSE(in_batch=True, scale=2.0)
    said = Outputs(in_batch=torch.from_numpy(student)), Outputs(in_batch=torch.from_numpy(teacher))
    loss, count = objective(*said, batch)
    off = 2 * student - teacher
    expected = [
        np.mean([(off[b, i] - off[b, j]) ** 2 for i in positives for j in negatives])
        for b, (positives, negatives) in enumerate([([2], [0, 3, 4]), ([1, 3], [0, 2, 4])])
    ]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5) and count.tolist() == [1, 1]
    assert objective.across and objective.labelled and objective.teacher_needs.fields == {"in_batch"}
    every, count = MarginMSE(pairs="all", in_batch=True, scale=2.0)(*said, batch)
    assert every.tolist() == pytest.approx([((row[:, None] - row) ** 2).mean() for row in off], rel=1e-5)
