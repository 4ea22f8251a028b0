"""Streams give what one thread gives, bit for bit, in value and gradient."""

import threading
import time

import pytest
import torch
from torch import nn

from distill.nn.cpu_streams import in_streams, learn_in_streams, stream_count
from distill.nn.dropout import dropout


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Layer(nn.Module):
    """A product with dropout, which lets the chunks come in another order each time it is asked to."""

    def __init__(self, p=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 20).view(4, 5))
        self.unused = nn.Parameter(torch.zeros(2))
        self.p, self.late = p, None

    def run(self, place, x):
        if place == self.late:
            time.sleep(0.05)
        return dropout(x @ self.weight, self.p) if self.p else x @ self.weight


def learnt(layer, late=None, seed=1):
    layer.late = late
    given = [torch.linspace(0, 1, 4 * n).view(n, 4).requires_grad_() for n in (3, 2, 4)]
    torch.manual_seed(seed)
    said = learn_in_streams(layer.run, given, layer)
    sum((one.sin() * (i + 1)).sum() for i, one in enumerate(said)).backward()
    found = [*(one.detach() for one in said), *(one.grad for one in given), layer.weight.grad]
    layer.weight.grad = None
    assert layer.unused.grad is None
    return found


def test_value_and_gradient_are_those_of_the_plain_products(threads):
    threads(2)
    layer = Layer()
    given = [torch.linspace(0, 1, 4 * n).view(n, 4).requires_grad_() for n in (3, 2, 4)]
    plain = [one @ layer.weight for one in given]
    sum((one.sin() * (i + 1)).sum() for i, one in enumerate(plain)).backward()
    expected = [*plain, *(one.grad for one in given), layer.weight.grad]
    layer.weight.grad = None
    for ours, theirs in zip(learnt(layer), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_it_does_not_matter_who_comes_first(p, threads):
    """Dropout draws, and gradients are added, by the place of a chunk: two runs are equal bit for bit."""
    threads(2)
    layer = Layer(p)
    runs = [learnt(layer, late) for late in (None, 0, 1, 2)]
    threads(1)
    runs.append(learnt(layer))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    if p:
        assert not torch.equal(learnt(layer, seed=2)[0], runs[0][0])


def test_without_gradient_dropout_draws_the_same(threads):
    """Gradient caching runs twice, without and with gradient."""
    threads(2)
    layer, given = Layer(0.5), [torch.ones(3, 4), torch.ones(2, 4)]
    torch.manual_seed(5)
    with torch.no_grad():
        first = learn_in_streams(layer.run, given, layer)
    torch.manual_seed(5)
    again = learn_in_streams(layer.run, given, layer)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not first[0].requires_grad and again[0].requires_grad


def test_streams_take_over_the_settings_of_their_caller(threads):
    threads(2)
    weight = torch.ones(2, 2, requires_grad=True)

    def settings(_):
        return threading.get_ident(), (weight @ weight).requires_grad, (weight @ weight).dtype

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = in_streams(settings, [0, 1, 2])
    assert {one[1:] for one in found} == {(True, torch.bfloat16)}
    assert threading.get_ident() not in {one[0] for one in found}
    assert stream_count(1) == 1 and stream_count(5) == 2


def test_an_error_in_the_backward_is_raised(threads):
    threads(2)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("broken here")

    layer = Layer()
    said = learn_in_streams(lambda i, x: Broken.apply(x @ layer.weight), [torch.ones(2, 4)] * 2, layer)
    with pytest.raises(ValueError, match="broken here"):
        torch.cat([*said]).sum().backward()
    assert torch.get_num_threads() == 2
