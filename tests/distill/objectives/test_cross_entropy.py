import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from distill.batch import Batch
from distill.errors import DataError
from distill.objectives import CrossEntropy
from distill.outputs import Outputs


def cross_entropy(classes, labels, mask=None):
    labels = torch.tensor(labels)
    batch = Batch.of_scores(*labels.shape, labels=labels)
    if mask is not None:
        batch.mask.copy_(torch.tensor(mask))
    return CrossEntropy()(Outputs(classes=torch.as_tensor(classes)), None, batch)


def test_two_logits_of_a_cross_encoder():
    loss, count = cross_entropy([[[0.2, 1.3], [1.0, -0.5]]], [[1.0, 0.0]])
    assert (loss / count).item() == pytest.approx(0.244374, abs=1e-6)


def test_equals_the_formula_written_out_in_numpy():
    classes = np.arange(2 * 2 * 3).reshape(2, 2, 3) % 5.0
    labels = np.array([[2, 0], [1, 1]])
    expected = -np.take_along_axis(log_softmax(classes, axis=-1), labels[..., None], -1)[..., 0].sum(-1)
    loss, count = cross_entropy(classes.tolist(), labels.astype(float).tolist())
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert count.tolist() == [2, 2]


def test_a_padded_candidate_is_neither_summed_nor_counted_nor_checked():
    loss, count = cross_entropy([[[0.2, 1.3], [9.0, 9.0]]], [[1.0, -100.0]], mask=[[True, False]])
    assert (loss.item(), count.item()) == (pytest.approx(0.287335, abs=1e-6), 1)


def test_gradient_raises_the_right_class():
    classes = torch.zeros(1, 1, 3, requires_grad=True)
    cross_entropy(classes, [[2.0]]).loss.backward()
    assert classes.grad.argmin() == 2


@pytest.mark.parametrize("label", [2.0, -1.0, 0.5, float("nan")])
def test_refuses_labels_that_name_no_class(label):
    """A similarity of 0.5 would be cut to class 0, and class -1 would be the last."""
    with pytest.raises(DataError, match=r"from 0 to 1 .* query 1 .* has (2|-1|0\.5|nan)\."):
        cross_entropy([[[0.0, 0.0]]] * 2, [[1.0], [label]])
