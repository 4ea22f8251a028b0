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


def soft(classes, taught, temperature=None, mask=None):
    objective, batch = CrossEntropy(temperature), Batch.of_scores(*np.shape(classes)[:2])
    objective.hear()
    objective.bind({}, {})
    if mask is not None:
        batch.mask.copy_(torch.tensor(mask))
    student, teacher = (Outputs(classes=torch.as_tensor(one)) for one in (classes, taught))
    return objective(student, teacher, batch)


@pytest.mark.parametrize("temperature", [None, 2.5])
def test_soft_labels_are_the_divergence_of_each_pair_written_out_in_numpy(temperature):
    classes, taught = np.arange(12).reshape(2, 2, 3) % 5.0, np.arange(12).reshape(2, 2, 3) % 4.0
    tau = temperature or 1.0
    log_q, log_p = log_softmax(classes / tau, axis=-1), log_softmax(taught / tau, axis=-1)
    expected = tau**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1).sum(-1)
    loss, count = soft(classes.tolist(), taught.tolist(), temperature)
    assert loss.tolist() == pytest.approx(expected, rel=1e-5) and count.tolist() == [2, 2]


def test_soft_labels_of_a_padded_pair_say_nothing():
    loss, count = soft([[[1.0, 0.0], [5.0, 5.0]]], [[[1.0, 0.0], [9.0, 0.0]]], mask=[[True, False]])
    assert (loss.item(), count.item()) == (0.0, 1)


def test_a_classifier_of_other_classes_cannot_teach():
    with pytest.raises(ValueError, match="Shapes must match"):
        soft([[[0.0, 0.0]]], [[[0.0, 0.0, 0.0]]])
    with pytest.raises(ValueError, match="the student tells 3 classes apart and the teacher 2"):
        CrossEntropy().bind({"classes": 3}, {"classes": 2})  # before the first step


def test_a_temperature_is_refused_where_it_would_do_nothing():
    with pytest.raises(ValueError, match="does nothing to labels"):
        CrossEntropy(temperature=2.0).bind({}, {})
    with pytest.raises(ValueError, match="temperature"):
        CrossEntropy(temperature=0.0)
