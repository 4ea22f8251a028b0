"""Answering on a CPU: the same numbers, in order, and no thread setting left behind."""

import threading

import pytest
import torch
from torch import nn
from transformers import AutoModel

from distill.nn import cpu_serving
from distill.nn.cpu_serving import PackedLinear, packs, serving_copy
from distill.nn.cpu_streams import in_streams


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif(not packs(), reason="this build of torch cannot pack")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 32), (2, 5, 32)])
def test_a_packed_layer_answers_as_the_plain_one(bias, shape):
    linear = nn.Linear(32, 48, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(shape, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(linear, 8)(x), linear(x), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_a_serving_copy_is_near_and_leaves_the_original_alone(name, family):
    model = AutoModel.from_pretrained(family(name)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = torch.randint(4, 20, (3, 7))
    copy = serving_copy(model, 64)
    assert not any(p.requires_grad for p in copy.parameters())
    with torch.no_grad():
        near, exact = copy(input_ids=ids).last_hidden_state.float(), model(input_ids=ids).last_hidden_state
    assert torch.cosine_similarity(near, exact, dim=-1).min() > 0.999
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("count", [0, 1, 7])
def test_streams_answer_in_order_without_gradient(count, threads):
    threads(2)
    weight = torch.ones(1, requires_grad=True)
    seen = set()

    def work(one):
        seen.add(threading.get_ident())
        return weight * one, torch.get_num_threads()

    with torch.no_grad():
        said = in_streams(work, range(count))
    assert [value.item() for value, _ in said] == [*range(count)]
    assert not any(value.requires_grad for value, _ in said)
    assert torch.get_num_threads() == 2
    if count > 1:
        assert threading.get_ident() not in seen and {number for _, number in said} == {1}


def test_streams_keep_the_autocast_of_their_caller(threads):
    threads(2)
    x = torch.randn(4, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert {product.dtype for product in in_streams(lambda one: one @ x, [x, x])} == {torch.bfloat16}


def test_an_error_in_a_stream_is_raised_and_threads_are_given_back(threads):
    threads(2)

    def work(one):
        raise ValueError(f"row {one}")

    with pytest.raises(ValueError, match="row 0"):
        in_streams(work, range(5))
    assert torch.get_num_threads() == 2


def test_without_the_operators_the_copy_is_plain(family, monkeypatch):
    monkeypatch.setattr(cpu_serving, "packs", lambda: False)
    copy = serving_copy(AutoModel.from_pretrained(family("bert")), 64)
    assert not any(isinstance(module, PackedLinear) for module in copy.modules())
