"""The attention and the dropout of CPU training are torch's, up to their speed."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distill.nn import cpu_training
from distill.nn.attention import use_attention
from distill.nn.cpu_training import LayerNorm, attention, prepare_for_cpu
from distill.nn.dropout import Dropout, dropout
from distill.nn.packed import ATTENTION


class Layer(nn.Module):
    """What an attention is told about its layer."""

    def __init__(self, is_causal=False):
        super().__init__()
        self.is_causal = is_causal


def inputs(n=3, heads=2, length=5, size=4):
    return [torch.randn(n, heads, length, size, requires_grad=True) for _ in range(3)]


def masks(n=3, length=5):
    real = torch.arange(length) < torch.tensor([5, 3, 1])[:n, None]
    padding = real[:, None, None, :].expand(n, 1, length, length)
    near = (torch.arange(length)[:, None] - torch.arange(length)).abs() <= 2
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "none": None,
        "padding": padding,
        "window": padding & near | torch.eye(length).bool(),
        "causal": causal,
    }


def compared(mask, module=None, **others):
    """Value and gradients of ours and of the library's, on equal inputs."""
    answers = []
    given = inputs()
    for function in (attention, sdpa_attention_forward):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
        out, _ = function(module or Layer(), *leaves, mask, **others)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        answers.append([out, *(leaf.grad for leaf in leaves)])
    return zip(*answers, strict=True)


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("kind", ["none", "padding", "window", "causal"])
def test_attention_equals_torchs_in_value_and_gradient(kind, scaling):
    for ours, theirs in compared(masks()[kind], scaling=scaling):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_causal_layer_without_a_mask_stays_causal():
    """The library leaves the mask out where causality says it all."""
    for ours, theirs in compared(None, Layer(is_causal=True)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    query, key, value = inputs()
    causal, _ = attention(Layer(is_causal=True), query, key, value, None)
    full, _ = attention(Layer(), query, key, value, None)
    assert (causal - full).abs().max() > 0.01


def test_grouped_heads_and_biases_are_left_to_torch():
    for ours, theirs in compared(None, position_bias=torch.randn(1, 2, 5, 5)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_attention_drops_its_weights_while_it_learns_only():
    query, key, _ = inputs(n=1, length=40)
    ones = torch.ones(1, 2, 40, 4)
    dropped, _ = attention(Layer(), query, key, ones, None, dropout=0.5)
    assert dropped.std() > 0.01 and dropped.mean().item() == pytest.approx(1.0, abs=0.1)
    kept, _ = attention(Layer(), query, key, ones, None, dropout=0.0)
    torch.testing.assert_close(kept, torch.ones_like(kept))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_zeroes_at_its_rate_and_keeps_the_expectation(p):
    x = torch.full((401, 997), 3.0)
    dropped = dropout(x, p)
    zeros = (dropped == 0).float()
    assert zeros.mean().item() == pytest.approx(p, abs=0.005)
    assert dropped.mean().item() == pytest.approx(3.0, rel=0.02)
    assert dropped.unique().tolist() == pytest.approx([0.0, 3.0 / (1 - p)])
    for axis in (0, 1):  # no row or column is dropped as a whole
        assert zeros.mean(axis).std() < 3 * (p * (1 - p) / x.shape[axis]) ** 0.5


def test_the_gradient_passes_where_the_value_did():
    x = torch.randn(50, 7, requires_grad=True)
    dropped = dropout(x, 0.3)
    dropped.sum().backward()
    torch.testing.assert_close(x.grad, (dropped != 0).float() / 0.7)


def test_the_mask_follows_from_the_seed_of_torch():
    """A resumed run must draw the masks that the uninterrupted one drew."""
    x = torch.ones(13, 5)

    def two(seed):
        torch.manual_seed(seed)
        return dropout(x, 0.5), dropout(x, 0.5)

    (a, b), (c, d), (e, _) = two(1), two(1), two(2)
    assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(a, b) and not torch.equal(a, e)


def test_dropout_is_the_identity_in_eval_and_at_zero():
    x = torch.randn(4, 4)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x
    assert Dropout(0.5).train()(x) is not x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_dtype_and_takes_any_shape(dtype):
    assert dropout(torch.ones(0, 3, dtype=dtype), 0.5).shape == (0, 3)
    assert dropout(torch.ones(7, dtype=dtype), 0.5).dtype == dtype


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "qwen2"])
def test_a_prepared_transformer_learns_as_before(name, family, texts):
    """Without dropout the prepared one gives equal values and gradients; and it does go through ours."""
    plain, ours = (AutoModel.from_pretrained(family(name)).double().eval() for _ in range(2))
    prepare_for_cpu(ours)
    use_attention(ours)
    assert ours.config._attn_implementation == ATTENTION
    ids = torch.randint(4, 20, (3, 7))
    mask = (torch.arange(7) < torch.tensor([7, 4, 2])[:, None]).long()
    for given in ({}, {"attention_mask": mask}):
        results = []
        for model in (plain, ours):
            model.zero_grad()
            out = model(input_ids=ids, **given).last_hidden_state[:, :2]
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
            results.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
        for theirs, our in zip(*results, strict=True):
            torch.testing.assert_close(our, theirs, atol=1e-9, rtol=1e-9)  # in float64: exact but for order


def test_a_layer_norm_answers_in_bf16_under_autocast_only():
    norm, ours = nn.LayerNorm(16), LayerNorm(16)
    ours.load_state_dict(norm.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(ours(x), norm(x))
    results = []
    for layer in (norm, ours):
        given = x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(given)
        (out.float() * torch.linspace(-1, 1, 80).view(5, 16)).sum().backward()
        results.append((out, given.grad, layer.weight.grad, layer.bias.grad))
    assert results[1][0].dtype == torch.bfloat16 and results[0][0].dtype == torch.float32
    for theirs, our in zip(*results, strict=True):
        torch.testing.assert_close(our.float(), theirs, atol=0.02, rtol=0.02)


def test_replaced_layer_norms_keep_their_parameters(family):
    model = AutoModel.from_pretrained(family("bert"))
    before = {name: id(p) for name, p in model.named_parameters()}
    prepare_for_cpu(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert sum(type(m) is LayerNorm for m in model.modules()) > 2
    assert not any(type(m) is nn.LayerNorm for m in model.modules())


def test_replaced_dropouts_keep_their_rate_and_mode(family):
    model = AutoModel.from_pretrained(family("bert"), hidden_dropout_prob=0.25).train()
    model.encoder.layer[0].eval()
    prepare_for_cpu(model)
    found = {name: m for name, m in model.named_modules() if isinstance(m, Dropout)}
    assert len(found) > 3 and not any(type(m) is nn.Dropout for m in model.modules())
    assert found["embeddings.dropout"].p == 0.25
    assert {name for name, m in found.items() if not m.training} == {
        name for name in found if name.startswith("encoder.layer.0.")
    }


def test_a_saved_configuration_does_not_know_of_it(family, tmp_path):
    """Elsewhere an attention of our name does not exist."""
    model = AutoModel.from_pretrained(family("bert"))
    use_attention(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert ATTENTION not in config.values()
    assert AutoModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_padding_mask_is_small_and_hides_what_the_usual_one_hides():
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    real = torch.tensor([[1, 1, 1], [1, 1, 0]])
    given = {"mask_function": bidirectional_mask_function, "attention_mask": real.bool(), "device": "cpu"}
    small, usual = cpu_training.padding_mask(2, 3, 3, **given), sdpa_mask(2, 3, 3, **given)
    assert small.shape == (2, 1, 1, 3)
    assert torch.equal(small.expand_as(usual), usual)
    assert cpu_training.padding_mask(2, 3, 3, **(given | {"attention_mask": torch.ones(2, 3)})) is None
    causal = given | {"mask_function": lambda batch, head, query, key: key <= query}
    assert cpu_training.padding_mask(2, 3, 3, **causal).shape == (2, 1, 3, 3)  # more than padding is hidden
