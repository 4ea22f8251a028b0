"""The text encoder gives what the transformer gives, however texts are cut into chunks."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from distill.batch import Ragged
from distill.errors import RecipeError
from distill.nn import text_encoder
from distill.nn.text_encoder import (
    TextEncoder,
    chunk_count,
    dropout_arguments,
    in_slices,
    keep_layers,
    load_backbone,
    without_weights,
)
from distill.nn.tokenizer import TextTokenizer

FAMILIES = ["bert", "roberta", "distilbert", "modernbert", "qwen2"]
CHUNKS = [1, 16, 40, 100_000]


def mean(output, mask):
    return (output.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def encoder(folder, chunk_tokens=None, **arguments) -> TextEncoder:
    backbone = load_backbone(AutoModel, folder, **dropout_arguments(folder, 0.0), **arguments)
    return TextEncoder(backbone, TextTokenizer.from_pretrained(folder), chunk_tokens).eval()


def framed(encoder: TextEncoder, texts) -> Ragged:
    return encoder.tokenizer.frame(encoder.tokenizer.ids(texts), 32)


def alone(folder, texts) -> torch.Tensor:
    """The library's own answer for each text by itself: nothing is padded."""
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        inputs = [tokenizer(text, return_tensors="pt") for text in texts]
        return torch.cat([model(**given).last_hidden_state.mean(1) for given in inputs])


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_text_gets_the_vector_it_has_alone(name, chunk_tokens, family, texts):
    """Serving and learning: learning looks words up once for all chunks, and hands embeddings in."""
    ours = encoder(family(name), chunk_tokens)
    expected = alone(family(name), texts)
    assert expected.std(dim=0).mean() > 0.01
    with torch.no_grad():
        torch.testing.assert_close(ours(framed(ours, texts), None, mean), expected, atol=1e-5, rtol=1e-5)
    learning = ours(framed(ours, texts), None, mean)
    assert learning.requires_grad
    torch.testing.assert_close(learning.detach(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_one_padded_batch(name, family, texts):
    def gradients(model):
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    target = torch.randn(len(texts), 16)
    plain = AutoModel.from_pretrained(family(name)).eval()
    given = AutoTokenizer.from_pretrained(family(name))(texts, padding=True, return_tensors="pt")
    (mean(plain(**given), given["attention_mask"]) * target).sum().backward()
    expected = gradients(plain)
    assert len(expected) > 10
    for chunk_tokens in CHUNKS:
        ours = encoder(family(name), chunk_tokens)
        (ours(framed(ours, texts), None, mean) * target).sum().backward()
        found = gradients(ours.backbone)
        assert found.keys() == expected.keys()
        for parameter, gradient in expected.items():
            scale = gradient.abs().max().clamp(min=1)
            assert (found[parameter] - gradient).abs().max() < 2e-5 * scale, (parameter, chunk_tokens)


def test_learning_in_bf16_gives_nearly_the_gradient_of_float32(family, texts):
    target = torch.randn(len(texts), 16)
    gradients = []
    for bf16 in (False, True):
        ours = encoder(family("bert"), 16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            (ours(framed(ours, texts), None, mean) * target).sum().backward()
        gradients.append({n: p.grad for n, p in ours.backbone.named_parameters() if p.grad is not None})
    for name, exact in gradients[0].items():
        if exact.norm() > 1e-3:  # that of a key's bias is zero but for rounding
            assert torch.cosine_similarity(gradients[1][name].flatten(), exact.flatten(), dim=0) > 0.99, name


def test_two_trainings_from_one_seed_are_equal_bit_for_bit(family, texts):
    """With dropout, and several chunks at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        for seed in (1, 1, 2):
            ours = TextEncoder(
                load_backbone(AutoModel, family("bert")), TextTokenizer.from_pretrained(family("bert")), 8
            ).train()
            torch.manual_seed(seed)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                ours(framed(ours, texts), None, mean).square().sum().backward()
            found.append([p.grad for p in ours.parameters() if p.grad is not None])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


def test_learning_packed_gives_segments_their_gradient(family):
    """Segments follow their texts into the chunks."""
    found = []
    for chunk_tokens in (8, 100_000):
        ours = encoder(family("bert"), chunk_tokens)
        tokenizer = ours.tokenizer
        ids, types = tokenizer.frame_pairs(
            tokenizer.ids(["a cat", "query", "the mat"]),
            tokenizer.ids(["on", "a large model", "mat"]),
            32,
            16,
        )
        said = ours(ids, types, mean)
        said.square().sum().backward()
        found.append((said, ours.backbone.embeddings.token_type_embeddings.weight.grad))
    plain = encoder(family("bert"))
    with torch.no_grad():
        torch.testing.assert_close(found[0][0], plain(ids, types, mean), atol=1e-5, rtol=1e-5)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_segments_reach_the_transformer(family):
    ours = encoder(family("bert"), chunk_tokens=16)
    first, second = ["a cat", "query", "the mat"], ["on the mat", "a large model", "model"]
    ids, types = ours.tokenizer.frame_pairs(ours.tokenizer.ids(first), ours.tokenizer.ids(second), 32, 16)
    plain = AutoModel.from_pretrained(family("bert")).eval()
    given = AutoTokenizer.from_pretrained(family("bert"))(first, second, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = mean(plain(**given), given["attention_mask"])
        torch.testing.assert_close(ours(ids, types, mean), expected, atol=1e-5, rtol=1e-5)
        assert (ours(ids, None, mean) - expected).abs().max() > 1e-3


def test_cut_makes_chunks_of_few_shapes_within_the_budget(family):
    ours = encoder(family("bert"))
    lengths = torch.tensor([5, 1, 9, 2, 5, 20, 1, 8, 8])
    chunks = ours.cut(lengths, 24)
    assert [(lengths[rows].tolist(), length) for rows, length in chunks] == [
        ([20], 24),
        ([9], 16),
        ([8, 8, 5], 8),
        ([5, 2, 1], 8),
        ([1], 8),
    ]
    assert sorted(torch.cat([rows for rows, _ in chunks]).tolist()) == list(range(9))
    assert ours.cut(torch.tensor([30]), 8)[0][1] == 32  # a single text always fits
    most = ours.backbone.config.max_position_embeddings
    assert ours.cut(torch.tensor([most - 1]), 8)[0][1] <= most
    assert ours.cut(torch.tensor([], dtype=torch.int64), 10) == []


@pytest.mark.parametrize(
    "ids, threads, count",
    [(1, 2, 1), (1500, 2, 1), (3000, 2, 2), (4200, 2, 2), (5500, 2, 4), (4200, 1, 2), (20_000, 8, 16)],
)
def test_chunks_are_as_many_for_each_stream(ids, threads, count, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert chunk_count(ids, 2048) == count


def test_fewer_chunks_run_when_the_budget_is_larger(family, texts):
    calls = []
    for chunk_tokens in (1, 100_000):
        ours = encoder(family("bert"), chunk_tokens)
        count = []
        ours.backbone.register_forward_hook(lambda *_, count=count: count.append(1))
        ours(framed(ours, texts), None, mean)
        calls.append(len(count))
    assert calls == [len(texts), 1]


# the copy that serves


@pytest.fixture
def bf16(monkeypatch):
    """As on a device with native bf16, whatever this one has."""
    monkeypatch.setattr(text_encoder, "native_bf16", lambda device: True)
    return torch.autocast("cpu", dtype=torch.bfloat16)


def served(ours, ids, autocast):
    with torch.no_grad(), autocast:
        return ours(ids, None, mean)


def test_the_serving_copy_answers_in_bf16_and_only_without_gradient(family, texts, bf16):
    ours = encoder(family("bert"))
    ids = framed(ours, texts)
    with torch.no_grad():
        exact = ours(ids, None, mean)
    half = served(ours, ids, bf16)
    assert half.dtype == torch.float32  # what leaves the encoder
    assert 0 < (half - exact).abs().max() < 0.1
    assert next(ours.backbone.parameters()).dtype == torch.float32
    assert len(list(ours.parameters())) == len(list(ours.backbone.parameters()))  # the copy is no part of it
    assert not any("_half" in name for name in ours.state_dict())


def test_the_serving_copy_is_renewed_after_a_step(family, texts, bf16):
    """A fused optimiser changes weights without marking them: an old copy would answer for ever."""
    ours = encoder(family("bert"))
    ids = framed(ours, texts)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.1, fused=True)
    before = served(ours, ids, bf16)
    for _ in range(2):
        ours(ids, None, mean).square().sum().backward()
        optimizer.step()
        after = served(ours, ids, bf16)
        fresh = TextEncoder(copy.deepcopy(ours.backbone), ours.tokenizer).eval()
        torch.testing.assert_close(after, served(fresh, ids, bf16), atol=0, rtol=0)
        assert (after - before).abs().max() > 1e-3
        before = after


def test_the_serving_copy_is_kept_while_nothing_changes(family, texts, bf16):
    ours = encoder(family("bert"))
    ids = framed(ours, texts)
    served(ours, ids, bf16)
    copied = ours._half[1]
    served(ours, ids, bf16)
    assert ours._half[1] is copied
    with torch.no_grad():
        next(ours.parameters()).mul_(1.5)  # marked: a loaded checkpoint, another optimiser
    served(ours, ids, bf16)
    assert ours._half[1] is not copied


def test_bf16_keeps_the_direction_of_a_real_encoders_vectors(minilm, bf16):
    ours = encoder(minilm)
    texts = ["how a ship sails against the wind", "protein", "what is the capital of France? " * 8, "a b c"]
    ids = ours.tokenizer.frame(ours.tokenizer.ids(texts), 128)
    with torch.no_grad():
        exact = ours(ids, None, mean)
    cosines = nn.functional.cosine_similarity(served(ours, ids, bf16), exact)
    assert (cosines >= 0.999).all() and (cosines < 1).any()


# making a transformer


@pytest.mark.parametrize(("layers", "kept"), [(2, [0, 1]), ([0, -1], [0, 2]), ([2, 0], [2, 0])])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "qwen2"])
def test_keep_layers_leaves_the_chosen_ones_in_order(name, layers, kept, family, texts, tmp_path):
    def stack(model):
        (found,) = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        return [next(layer.parameters()) for layer in found]

    backbone = load_backbone(AutoModel, family(name))
    before = stack(backbone)
    keep_layers(backbone, layers)
    assert [next(i for i, p in enumerate(before) if p is q) for q in stack(backbone)] == kept
    assert backbone.config.num_hidden_layers == len(kept)
    backbone.save_pretrained(tmp_path)  # the configuration that is saved must fit
    ours = TextEncoder(backbone, TextTokenizer.from_pretrained(family(name))).eval()
    again = TextEncoder(load_backbone(AutoModel, tmp_path), ours.tokenizer).eval()
    with torch.no_grad():
        ids = framed(ours, texts)
        torch.testing.assert_close(again(ids, None, mean), ours(ids, None, mean))


@pytest.mark.parametrize("layers", [4, 0, -1, [3], [-4], [], [1, 1]])
def test_layers_that_are_not_there_are_refused(family, layers):
    with pytest.raises(RecipeError, match=r"layers: .* cannot be kept, the checkpoint has 3 layers"):
        keep_layers(load_backbone(AutoModel, family("bert")), layers)


def test_layers_of_two_kinds_keep_their_kind(family):
    backbone = load_backbone(AutoModel, family("modernbert"))
    kinds = [layer.attention_type for layer in backbone.layers]
    assert len(set(kinds)) == 2
    keep_layers(backbone, [0, 2])
    assert backbone.config.layer_types == [kinds[0], kinds[2]]


@pytest.mark.parametrize("layers", [[1, 2], [2, 0]])
def test_layers_that_would_not_open_again_are_refused(layers, family):
    """ModernBERT's first layer has no norm: another one in its place is lost when the model is loaded."""
    with pytest.raises(
        RecipeError, match="layers of ModernBertModel differ by their place; begin with layer 0"
    ):
        keep_layers(load_backbone(AutoModel, family("modernbert")), layers)


def test_two_stacks_of_one_height_are_not_guessed_between():
    from types import SimpleNamespace

    backbone = nn.Module()
    backbone.config = SimpleNamespace(num_hidden_layers=2)
    backbone.one, backbone.two = (nn.ModuleList(nn.Linear(1, 1) for _ in range(2)) for _ in range(2))
    with pytest.raises(RecipeError, match=r"2 lists have that length\); leave `layers` out"):
        keep_layers(backbone, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_is_set_wherever_the_configuration_names_it(name, family):
    arguments = dropout_arguments(family(name), 0.3)
    assert arguments and set(arguments.values()) == {0.3}
    assert dropout_arguments(family(name), None) == {}
    if name != "qwen2":  # has dropout in its attention alone
        backbone = load_backbone(AutoModel, family(name), **arguments)
        rates = {m.p for m in backbone.modules() if isinstance(m, nn.Dropout)}
        assert rates == {0.3}


def test_without_weights_has_the_architecture_and_no_numbers(family):
    with without_weights():
        backbone = load_backbone(AutoModel, family("bert"))
    assert {p.device.type for p in backbone.parameters()} == {"meta"}
    assert load_backbone(AutoModel, family("bert")).get_input_embeddings().weight.device.type == "cpu"


@pytest.mark.parametrize(("name", "most"), [("bert", 32), ("roberta", 32)])
def test_a_length_beyond_the_positions_is_refused(name, most, family):
    """RoBERTa counts positions from the padding's id: of its 34 rows it can use 32."""
    ours = encoder(family(name))
    ours.check_length("max_length", most)
    for length in (most + 1, 2, 0, -5):
        with pytest.raises(ValueError, match=f"max_length must be between 3 and {most} ids .* got {length}"):
            ours.check_length("max_length", length)


def test_slices_cover_all_rows():
    assert [range(7)[part] for part in in_slices(7, 3, False, "texts")] == [
        range(3),
        range(3, 6),
        range(6, 7),
    ]
