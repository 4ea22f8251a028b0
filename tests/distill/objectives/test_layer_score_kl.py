"""LEAD: which layers are drawn, how they are weighed, and the divergence of each."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from distill.batch import Batch
from distill.objectives import LayerScoreKL
from distill.objectives.layer_score_kl import drawn
from distill.outputs import Outputs

B, N = 3, 4
LISTED = {5: [0, 1, 2, 3], 9: [4, 5, 6], 77: [8, 9, 10, 11]}  # of a_batch: each query's candidates


def made(layers, depths, **arguments) -> LayerScoreKL:
    objective = LayerScoreKL(layers, **arguments)
    objective.bind({"layer_scores": depths[0]}, {"layer_scores": depths[1]})
    return objective


def said(depth: int, seed: int) -> Outputs:
    return Outputs(layer_scores=torch.randn(B, N, depth, generator=torch.Generator().manual_seed(seed)))


def a_batch() -> Batch:
    labels = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    batch = dataclasses.replace(Batch.of_scores(B, N, labels=labels), query_ids=torch.tensor([5, 9, 77]))
    batch.mask[1, 3] = False
    return batch


def test_it_is_the_formula():
    batch, student, teacher = a_batch(), said(2, 0), said(6, 1)
    objective = made(2, (2, 6), temperature=0.5, teacher_temperature=2.0, evenness=1.5)
    loss, count = objective(student, teacher, batch)
    expected = np.zeros(B)
    lists = torch.tensor([q + 7919 * sum(ids) for q, ids in LISTED.items()])
    for b in range(B):
        there = batch.mask[b].numpy()
        s, t = (one.layer_scores[b].numpy()[there] for one in (student, teacher))
        positive = batch.labels[b].numpy()[there] > 0
        of_student, of_teacher = (drawn(lists, d, 2, side)[b] for side, d in ((0, 2), (1, 6)))
        nll, kl = [], []
        for v, u in zip(of_student, of_teacher, strict=True):
            log_p, log_q = log_softmax(t[:, u] / 2.0), log_softmax(s[:, v] / 0.5)
            kl.append((np.exp(log_p) * (log_p - log_q)).sum())
            nll.append(-log_p[positive].mean() if positive.any() else 0.0)
        expected[b] = 2.0**2 * (softmax(-np.array(nll) / 1.5) * kl).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert count.tolist() == [1, 1, 1]


def test_layers_are_drawn_by_the_list_alone_in_order_and_all_of_them_sometimes():
    rows = torch.arange(3000)
    for side in (0, 1):
        layers = drawn(rows, 6, 3, side)
        assert (layers.diff(dim=1) > 0).all()
        shares = layers.flatten().bincount(minlength=6) / len(rows)
        assert (shares - 0.5).abs().max() < 0.04  # each in half of the draws of three
        assert torch.equal(drawn(rows[100:200], 6, 3, side), layers[100:200])
    assert not torch.equal(drawn(rows, 6, 3, 0), drawn(rows, 6, 3, 1))
    assert drawn(rows[:2], 3, 3, 0).tolist() == [[0, 1, 2]] * 2


def test_a_query_that_lists_others_hears_other_layers():
    """As it does in the next epoch: else it would learn from the same layers all along."""
    scores = torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(0)).expand(40, 5, 6)
    scores = scores + torch.arange(5)[:, None] * torch.arange(1.0, 7)  # each layer says something else
    batch = Batch.of_scores(40, 5)
    other = dataclasses.replace(batch, candidate_ids=batch.candidate_ids + 1000)
    objective = made(1, (6, 6))
    one, same, two = (
        objective(Outputs(layer_scores=torch.zeros(40, 5, 6)), Outputs(layer_scores=scores), b).loss
        for b in (batch, batch, other)
    )
    assert torch.equal(one, same) and (one != two).float().mean() > 0.5


def test_a_layer_that_finds_the_positive_weighs_more():
    """The student errs as much by either layer; it hears more of the teacher's sure one."""
    batch = Batch.of_scores(1, 2, labels=torch.tensor([[1.0, 0.0]]))
    teacher = torch.tensor([[[3.0, -3.0], [0.0, 0.0]]])  # layer 0 is right, layer 1 is wrong

    def loss(evenness: float, wrong: int) -> float:
        student = teacher.clone()
        student[:, :, wrong] = -student[:, :, wrong]
        return made(None, (2, 2), evenness=evenness)(
            Outputs(layer_scores=student), Outputs(layer_scores=teacher), batch
        ).loss.item()

    assert loss(1.0, 0) > 10 * loss(1.0, 1) > 0
    assert loss(1e6, 0) == pytest.approx(loss(1e6, 1), rel=1e-4)


def test_refuses_more_layers_than_there_are():
    with pytest.raises(ValueError, match="layers 3 are more than there are: the student has 2"):
        made(3, (2, 6))
    with pytest.raises(ValueError, match="at least 1"):
        LayerScoreKL(0)
