"""Queries and keys are heard while the fused kernel answers: the maps they give are the transformer's own."""

import pytest
import torch
from transformers import AutoModel

from distill.batch import Ragged
from distill.errors import RecipeError, RunError
from distill.nn.attention import can_listen, listening
from distill.nn.text_encoder import TextEncoder, checkpoint_activations
from distill.nn.tokenizer import TextTokenizer

FAMILIES = ["bert", "roberta", "distilbert", "modernbert", "qwen2", "grouped"]


def encoder(folder, **arguments) -> TextEncoder:
    backbone = AutoModel.from_pretrained(folder, **arguments).eval()
    return TextEncoder(backbone, TextTokenizer.from_pretrained(folder), chunk_tokens=24)


def hidden(output, mask):
    return output.last_hidden_state


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_heard_gives_the_transformers_own_maps(name, learning, family, texts):
    """Each text by itself, read eagerly, says what each of its tokens attends to in each layer."""
    ours = encoder(family(name))
    plain = AutoModel.from_pretrained(family(name), attn_implementation="eager").eval()
    ids = ours.tokenizer.frame(ours.tokenizer.ids(texts), 12)
    with torch.set_grad_enabled(learning):
        heard = ours.read(ids, layers=[0, -1, 1])["attention"].detach()
    assert ours.attention_sizes == {"layers": 3, "heads": 4 if name == "grouped" else 2}
    for row in range(len(ids)):
        with torch.no_grad():
            maps = plain(input_ids=ids[row][None].long(), output_attentions=True).attentions
        query, key = heard[ids.offsets[row] : ids.offsets[row + 1]].unbind(dim=2)
        products = torch.einsum("qlhd,klhd->lhqk", query, key)
        for place, layer in enumerate([0, 2, 1]):
            expected = maps[layer][0]
            allowed = expected > 0  # a causal or local layer hides some
            found = products[place].masked_fill(~allowed, -1e9).softmax(dim=-1)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_do_not_change_by_a_bit(name, learning, family, texts):
    ours = encoder(family(name))
    ids = ours.tokenizer.frame(ours.tokenizer.ids(texts), 12)
    with torch.set_grad_enabled(learning):
        alone = ours.read(ids, tokens={"hidden": hidden})["hidden"]
        beside = ours.read(ids, tokens={"hidden": hidden}, layers=[0, 1, 2])["hidden"]
    assert torch.equal(alone, beside)


def test_tokens_come_in_the_order_of_the_texts(family, texts):
    """However they were cut into chunks."""
    ours = encoder(family("bert"))
    ids = ours.tokenizer.frame(ours.tokenizer.ids(texts), 12)
    plain = AutoModel.from_pretrained(family("bert")).eval()
    with torch.no_grad():
        found = ours.read(ids, rows={"first": lambda o, m: o.last_hidden_state[:, 0]}, tokens={"all": hidden})
        for row in range(len(ids)):
            expected = plain(input_ids=ids[row][None].long()).last_hidden_state[0]
            part = found["all"][ids.offsets[row] : ids.offsets[row + 1]]
            torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found["first"][row], expected[0], atol=1e-5, rtol=1e-5)


def test_ids_that_nobody_attends_to_are_read_and_change_no_other(family):
    ours = encoder(family("bert"))
    ids = Ragged.of([[0, 5, 6, 2], [0, 7, 2]], dtype=torch.int32)
    more = Ragged.of([[0, 5, 6, 2, 3, 3], [0, 7, 2, 3, 3, 3]], dtype=torch.int32)
    with torch.no_grad():
        short = ours.read(ids, tokens={"all": hidden})["all"]
        long = ours.read(more, tokens={"all": hidden}, attended=ids.lengths)["all"]
    torch.testing.assert_close(long[[0, 1, 2, 3, 6, 7, 8]], short, atol=1e-6, rtol=1e-6)
    assert long.shape == (12, 16) and long[4:6].isfinite().all() and (long[4] - long[9]).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_pass_through_what_is_heard(checkpointed, family, texts):
    """Also where activations are computed again, which must not cut or double them."""
    ours = encoder(family("bert")).train()
    ours.backbone.config.hidden_dropout_prob = 0.0
    for module in ours.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    if checkpointed:
        checkpoint_activations(ours.backbone)
    ids = ours.tokenizer.frame(ours.tokenizer.ids(texts), 12)
    ours.read(ids, layers=[-1])["attention"].square().sum().backward()
    learnt = {name: p.grad.abs().sum().item() for name, p in ours.named_parameters() if p.grad is not None}
    assert sum(learnt.values()) > 0 and any("layer.2" in name and "query" in name for name in learnt)
    assert not any(learnt[name] for name in learnt if "layer.2.output" in name)  # behind the last attention
    reference = encoder(family("bert"))
    reference.read(ids, layers=[-1])["attention"].square().sum().backward()
    noise = 1e-7 * max(learnt.values())  # of key biases, which a softmax does not see
    for name, p in reference.named_parameters():
        if p.grad is not None:
            assert learnt.get(name, 0.0) == pytest.approx(p.grad.abs().sum().item(), rel=1e-4, abs=noise), (
                name
            )


def test_a_layer_that_is_not_there_and_an_attention_of_another_kind_are_refused(family, texts):
    ours = encoder(family("bert"))
    ids = ours.tokenizer.frame(ours.tokenizer.ids(texts), 12)
    with pytest.raises(RecipeError, match="attention of layer 3 is asked for, and there are 3 layers"):
        ours.read(ids, layers=[3])
    eager = encoder(family("bert"), attn_implementation="eager")
    assert not can_listen(eager.backbone) and eager.attention_sizes == {}
    with pytest.raises(RunError, match="passed 0 times"), listening(eager.backbone, [0]):
        eager.read(ids, rows={"first": lambda o, m: o.last_hidden_state[:, 0]})


def test_layers_that_see_their_neighbours_alone_do_not_teach_longer_pairs(family):
    """A softmax over all tokens of a side would be a map that the layer does not have."""
    ours = encoder(family("modernbert"))  # layers 1 and 2 see two ids on each side
    ours.check_whole_maps([0, 1, 2], 3)
    ours.check_whole_maps([0], 30)
    with pytest.raises(
        RecipeError, match=r"layer 1 of ModernBert.* 2 nearest ids .* a pair here has 4\. .*\[0\]"
    ):
        ours.check_whole_maps([0, 1], 4)
    with pytest.raises(RecipeError, match="Qwen2Model reads from left to right"):
        encoder(family("qwen2")).check_whole_maps([0], 3)


@pytest.mark.parametrize("enabled", [False, True])
def test_nothing_heard_is_of_the_kind_of_what_is_heard(enabled, family, texts):
    """Processes put their parts together, and one may have heard nothing."""
    ours = encoder(family("bert"))
    ids = ours.tokenizer.frame(ours.tokenizer.ids(texts), 12)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        heard, nothing = ours.read(ids, layers=[0, 2])["attention"], ours.no_attention([0, 2])
    assert (heard.dtype, heard.shape[1:]) == (nothing.dtype, nothing.shape[1:])
    assert (heard.dtype == torch.bfloat16) is enabled
