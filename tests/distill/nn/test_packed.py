"""Texts end to end answer, and learn, as texts padded."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, CamembertModel, RobertaConfig, XLMRobertaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distill.nn import packed
from distill.nn.attention import use_attention
from distill.nn.cpu_training import prepare_for_cpu
from distill.nn.packed import FIRST_POSITION, Packing, first_position, packed_attention, takes_packed
from distill.nn.text_encoder import checkpoint_activations

LENGTHS = torch.tensor([70, 33, 33, 32, 9, 4, 4, 1])


def torchs(query, key, value, scale):
    """Each text by itself, with torch's own attention."""
    found = []
    for q, k, v in zip(*(x.split(LENGTHS.tolist()) for x in (query, key, value)), strict=True):
        by_head = [x.transpose(0, 1)[None] for x in (q, k, v)]
        found.append(
            sdpa_attention_forward(nn.Identity(), *by_head, None, scaling=scale, is_causal=False)[0][0]
        )
    return torch.cat(found)


def answers(attend, dtype, rounded):
    generator = torch.Generator().manual_seed(3)
    leaves = [torch.randn(186, 2, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    out = attend(*(rounded(leaf) for leaf in leaves))[:186]
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [out, *(leaf.grad for leaf in leaves)]


def test_attention_in_float32_is_torchs_in_value_and_gradient():
    packing = Packing(LENGTHS)
    ours = answers(lambda *x: packed_attention(*x, packing, 0.3, 0.0), torch.float32, packing.rounded)
    theirs = answers(lambda *x: torchs(*x, 0.3), torch.float32, lambda x: x)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-5)


def test_attention_in_bf16_is_near():
    packing = Packing(LENGTHS)
    ours = answers(lambda *x: packed_attention(*x, packing, 0.3, 0.0), torch.bfloat16, packing.rounded)
    theirs = answers(lambda *x: torchs(*x, 0.3), torch.float32, lambda x: x)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.cosine_similarity(our.float().flatten(), their.flatten(), dim=0) > 0.999


def test_the_gradient_of_dropped_attention_is_that_of_its_factors(monkeypatch):
    """In float64, against differences, with factors that stay."""

    def factors(x, p):
        return (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) >= p).to(x.dtype) / (1 - p)

    monkeypatch.setattr(packed, "dropout_factors", factors)
    packing = Packing(torch.tensor([3, 2, 2]))
    leaves = [torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    torch.autograd.gradcheck(lambda *x: packed_attention(*x, packing, 0.7, 0.4), leaves)
    dropped, kept = (packed_attention(*leaves, packing, 0.7, p) for p in (0.4, 0.0))
    assert (dropped - kept).abs().max() > 0.01


def test_what_rounds_a_packing_off_belongs_to_no_text():
    packing = Packing(LENGTHS)
    rows = packing.rounded(torch.randn(186, 2, 8))
    assert len(rows) == 256 and not rows[186:].any()
    assert not packed_attention(rows, rows, rows, packing, 1.0, 0.0)[186:].any()


def test_buckets_hold_neighbours_of_nearly_one_length(monkeypatch):
    monkeypatch.setattr(packed, "BUCKET_IDS", 64)
    buckets = Packing(LENGTHS).buckets
    assert [(b.length, b.lengths.tolist()) for b in buckets] == [
        (96, [70]),
        (64, [33]),
        (64, [33]),
        (32, [32, 9]),
        (32, [4, 4]),
        (32, [1]),
    ]
    assert [b.full for b in buckets] == [False] * 6 and Packing(torch.tensor([32, 32])).buckets[0].full
    assert [b.rows.stop for b in buckets] == LENGTHS.cumsum(0)[[0, 1, 2, 4, 6, 7]].tolist()


def test_padded_rows_come_back_with_their_gradient():
    packing = Packing(LENGTHS)
    rows = torch.randn(186, 3, requires_grad=True)
    padded = packing.padded(packing.rounded(rows))
    for bucket, part in zip(packing.buckets, padded, strict=True):
        assert torch.equal(part[bucket.mask], rows[bucket.rows]) and not part[~bucket.mask].any()
    torch.cat([2.0 * part.flatten() for part in padded]).sum().backward()
    assert torch.equal(rows.grad, torch.full_like(rows, 2.0))
    assert packing.positions.tolist() == [place for length in LENGTHS for place in range(length)]


@pytest.mark.parametrize("name", [*FIRST_POSITION])
def test_each_transformer_of_the_list_answers_packed_as_alone(name, family):
    if name in ("BertModel", "RobertaModel"):
        model = AutoModel.from_pretrained(family(name.removesuffix("Model").lower())).eval()
    else:
        config = RobertaConfig.from_pretrained(family("roberta"))
        model = (
            {"CamembertModel": CamembertModel, "XLMRobertaModel": XLMRobertaModel}[name]
            ._from_config(config, attn_implementation="sdpa")
            .eval()
        )
    assert type(model).__name__ == name
    prepare_for_cpu(model)
    use_attention(model)
    assert takes_packed(model)
    texts = [torch.randint(4, 20, (length,)) for length in (9, 5, 2)]
    packing = Packing(torch.tensor([9, 5, 2]))
    with torch.no_grad():
        expected = torch.cat([model(input_ids=text[None]).last_hidden_state[0] for text in texts])
        found = model(
            input_ids=packing.rounded(torch.cat(texts))[None],
            position_ids=packing.rounded(packing.positions + first_position(model))[None],
            packing=packing,
        ).last_hidden_state[0, :16]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_others_are_padded(family):
    for name in ("modernbert", "qwen2", "distilbert"):
        model = AutoModel.from_pretrained(family(name))
        prepare_for_cpu(model)
        use_attention(model)
        assert not takes_packed(model)
    assert not takes_packed(AutoModel.from_pretrained(family("bert")))  # whose attention is torch's
    model = AutoModel.from_pretrained(family("bert"))
    prepare_for_cpu(model)
    use_attention(model)
    checkpoint_activations(model)
    assert not takes_packed(model)  # its dropout would be drawn anew
