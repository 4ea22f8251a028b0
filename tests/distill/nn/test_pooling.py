"""The pooled mean and its gradient, against a loop and torch's own."""

import pytest
import torch

from distill.batch import Ragged
from distill.nn.pooling import mean_of_rows


@pytest.mark.parametrize("rows", [40, 2**16 + 5])
@pytest.mark.parametrize("sparse", [False, True])
def test_equals_a_loop_with_its_gradient(rows, sparse):
    weight = torch.randn(rows, 3, requires_grad=True)
    ids = Ragged.of([[rows - 1, 7, 7], [], [rows - 1], [1, 2, 3, 4, 7], []])
    expected = torch.stack(
        [weight[row].mean(dim=0) if len(row) else torch.zeros(3) for row in map(ids.__getitem__, range(5))]
    )
    factors = torch.randn(5, 3)
    (expected * factors).sum().backward()
    wanted, weight.grad = weight.grad, None
    found = mean_of_rows(weight, ids, sparse)
    torch.testing.assert_close(found, expected)
    (found * factors).sum().backward()
    assert weight.grad.is_sparse == sparse
    torch.testing.assert_close(weight.grad.to_dense(), wanted)
    with torch.no_grad():
        torch.testing.assert_close(mean_of_rows(weight, ids, sparse), expected)


def test_no_sequence_holds_anything():
    weight = torch.randn(9, 2, requires_grad=True)
    for sparse in (False, True):
        weight.grad = None
        mean_of_rows(weight, Ragged.of([[], []]), sparse).sum().backward()
        assert weight.grad.to_dense().abs().sum() == 0
        assert mean_of_rows(weight, Ragged.of([]), sparse).shape == (0, 2)
