"""Texts read apart that attend to each other afterwards: the worked numbers, what is kept, classes."""

import dataclasses

import pytest
import torch

from distill.batch import Batch
from distill.errors import DataError
from distill.objectives import CrossEntropy
from distill.open import open_model
from distill.outputs import Needs
from students import VirtualInteraction
from students.virtual_interaction import fused, interact

QUERIES = ["what is a wing", "heart", "how does a ship flow in the river"]
PASSAGES = ["a wing is a surface in the flow of air", "the heart moves blood", "city", "old film " * 9]


def tensor(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def attention(queries, keys) -> torch.Tensor:
    """One pair, one head: [1, T, 2, 1, d], the queries scaled."""
    return torch.stack([queries / 2, keys], dim=1)[None, :, :, None]


def test_two_texts_have_the_numbers_worked_out_by_hand():
    """The third token of Y is padding, whatever it holds."""
    qx, ky = tensor([1, 0, 1, 0], [0, 2, 0, 0]), tensor([1, 1, 0, 0], [0, 1, 0, 1], [2, 0, 1, 0])
    qy, kx = tensor([1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]), tensor([1, 0, 1, 0], [0, 1, 0, 2])
    u, v = torch.eye(2)[None], tensor([2, 0], [0, 2], [5, 5])[None]
    masks = torch.tensor([[True, True]]), torch.tensor([[True, True, False]])
    read_u, read_v = interact((u, attention(qx, kx)), (v, attention(qy, ky)), masks)
    torch.testing.assert_close(read_u[0], tensor([1.244919, 0.755081], [1, 1]), atol=1e-6, rtol=0)
    u, v = read_u.mean(dim=1), read_v[:, :2].mean(dim=1)
    torch.testing.assert_close(u[0], torch.tensor([1.122459, 0.877541]), atol=1e-6, rtol=0)
    torch.testing.assert_close(v[0], torch.tensor([0.438770, 0.561230]), atol=1e-6, rtol=0)
    expected = [1.122459, 0.877541, 0.438770, 0.561230, 0.683689, 0.316311, 1.259915, 0.770078]
    assert fused(u, v)[0].tolist() == pytest.approx(expected, abs=2e-6)
    assert fused(u, v, square=False)[0, 6:].tolist() == pytest.approx([1.122459, 0.877541], abs=2e-6)


@pytest.fixture
def virtual(tiny_bert):
    def make(**arguments) -> VirtualInteraction:
        torch.manual_seed(0)
        return VirtualInteraction(tiny_bert(), precision="no", **arguments)

    return make


def batch_of(model, mask=((1, 1), (1, 0), (1, 1)), queries=QUERIES) -> Batch:
    texts = model.texts.batch_of(queries, PASSAGES)
    mask = torch.tensor(mask).bool()
    index = torch.tensor([[0, 2], [1, 3], [3, 0]])
    return dataclasses.replace(texts, index=index, mask=mask, labels=torch.tensor([[2.0, 1.0]] * 3))


def answer(model, batch, *fields):
    needs = Needs(*fields)
    return model.compare(model.represent(batch, needs), batch, needs)


def by_hand(model, query, passage) -> torch.Tensor:
    """The logits of one pair from the plain transformer's layers, one head at a time."""
    from transformers import AutoTokenizer

    backbone, folder = model.encoder.backbone, model.checkpoint
    layer, tokenizer = backbone.encoder.layer[-1].attention.self, AutoTokenizer.from_pretrained(folder)
    read = []
    for text in (query, passage):
        caught = []
        hook = layer.register_forward_hook(lambda _, given, out, c=caught: c.append(given[0]))
        with torch.no_grad():
            hidden = backbone(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1]
        hook.remove()
        before = caught[0][0, 1:-1]
        read.append((hidden, layer.query(before), layer.key(before)))
    (u, qu, ku), (v, qv, kv) = read
    size = u.shape[1] // 2
    heads = [slice(0, size), slice(size, 2 * size)]
    read_u = torch.cat([(qu[:, h] @ kv[:, h].T / size**0.5).softmax(-1) @ v[:, h] for h in heads], dim=1)
    read_v = torch.cat([(qv[:, h] @ ku[:, h].T / size**0.5).softmax(-1) @ u[:, h] for h in heads], dim=1)
    if not model.interaction:
        read_u, read_v = u, v
    if model.residual:
        read_u, read_v = read_u + u, read_v + v
    u, v = read_u.mean(0), read_v.mean(0)
    largest = torch.maximum(u, v)
    features = torch.cat([u, v, (u - v).abs(), largest**2 if model.square else largest])
    return model.heads["classifier"](features).detach()


@pytest.mark.parametrize("settings", [{}, {"residual": True, "square": False}, {"interaction": False}])
def test_logits_are_those_of_the_formula_over_the_plain_transformer(settings, virtual):
    model = virtual(classes=3, **settings)
    batch = batch_of(model)
    said = answer(model, batch, "classes").classes
    for row, place in batch.mask.nonzero().tolist():
        expected = by_hand(model, QUERIES[row], PASSAGES[batch.index[row, place]])
        torch.testing.assert_close(said[row, place], expected, atol=1e-5, rtol=1e-4)
    assert not said[1, 1].any()  # nothing is listed there


@pytest.mark.parametrize(
    ("classes", "fields"), [(1, {"scores"}), (2, {"scores", "classes"}), (3, {"classes"})]
)
def test_raw_pairs_are_scored_as_in_a_batch_each_text_read_once(classes, fields, virtual):
    """Nothing of a text depends on the other, nor on the batch: it may be read beforehand."""
    model = virtual(classes=classes).train()
    assert fields == model.provides & {"scores", "classes"} and "in_batch" not in model.provides
    assert {"query_attention", "candidate_tokens", "queries"} <= model.provides
    batch = batch_of(model)
    rows, places = batch.mask.nonzero(as_tuple=True)
    passages = [PASSAGES[i] for i in batch.index[rows, places]]
    found = model.score_pairs([QUERIES[row] for row in rows], passages)
    assert model.training and not found.requires_grad and model.score_pairs([], []).shape == (0,)
    said = answer(model.eval(), batch, *sorted(fields))
    expected = said.classes if classes == 3 else said.scores
    torch.testing.assert_close(found, expected[batch.mask].detach(), atol=1e-5, rtol=1e-5)
    if classes == 2:
        torch.testing.assert_close(said.scores[0, 0], said.classes[0, 0].log_softmax(-1)[1])
    pairs = zip(rows, passages, strict=True)
    alone = torch.cat([model.score_pairs([QUERIES[row]], [text]) for row, text in pairs])
    torch.testing.assert_close(alone, found, atol=1e-5, rtol=1e-5)


def test_attention_for_a_loss_comes_from_the_same_forward(virtual):
    model = virtual(classes=2)
    batch, runs = batch_of(model), []
    model.encoder.backbone.register_forward_hook(lambda *_: runs.append(1))
    needs = Needs("classes", "query_attention", "candidate_attention", layers=[0, 1])
    said = model.represent(batch, needs)
    assert len(runs) == 1 and said.query_attention.layers == (-1, 0, 1)
    torch.testing.assert_close(said.query_attention.layer(1).values, said.query_attention.layer(-1).values)
    assert model.compare(said, batch, needs).classes.shape == (3, 2, 2)


def test_it_learns_classes_through_the_maps(virtual):
    model = virtual(classes=3, dropout=0.0).train()
    batch = batch_of(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss, count = CrossEntropy()(answer(model, batch, "classes"), None, batch)
        (loss.sum() / count.sum()).backward()
        losses.append(loss.sum().item())
        assert model.encoder.backbone.encoder.layer[-1].attention.self.query.weight.grad.any()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


def test_a_saved_one_opens_with_equal_logits(virtual, tmp_path):
    settings = {"classes": 3, "residual": True, "square": False, "max_length": 20, "layers": 1}
    model = virtual(**settings)
    model.save_pretrained(tmp_path / "saved")
    again = open_model(tmp_path / "saved")
    assert isinstance(again, VirtualInteraction)
    assert (again.classes, again.residual, again.square, again.max_length) == (3, True, False, 20)
    again.precision = "no"
    pairs = QUERIES, PASSAGES[:3]
    torch.testing.assert_close(again.score_pairs(*pairs), model.score_pairs(*pairs), atol=0, rtol=0)
    with pytest.raises(ValueError, match="classes: 2, but the checkpoint was trained with 3"):
        VirtualInteraction(tmp_path / "saved", classes=2)


def test_a_text_without_a_token_is_refused(virtual):
    """The mean over nothing is no number."""
    model = virtual()
    with pytest.raises(DataError, match=r"query row 1 \(from 0\) has no token"):
        answer(model, batch_of(model, queries=["wing", "", "ship"]), "scores")


def test_it_provides_what_it_can_say(virtual):
    model = virtual()
    batch = batch_of(model)
    assert {"query_tokens", "queries", "scores"} <= model.provides and "layer_scores" not in model.provides
    for field in sorted(one for one in model.provides if "attention" not in one):
        assert getattr(answer(model, batch, field), field) is not None


def test_a_residual_of_nothing_is_refused(virtual):
    with pytest.raises(ValueError, match="with `interaction: false` there is nothing"):
        virtual(interaction=False, residual=True)


def test_prompts_of_the_checkpoint_can_be_taken_away(virtual, tmp_path):
    """As attention needs: a teacher that reads pairs has none."""
    model = virtual(query_prompt="query: ", candidate_prompt="")
    model.save_pretrained(tmp_path / "saved")
    again = VirtualInteraction(tmp_path / "saved")
    assert again.texts.query_prompt == "query: "
    bare = VirtualInteraction(tmp_path / "saved", query_prompt="")
    assert bare.texts.query_prompt == "" and bare.reads.keys == virtual().reads.keys != again.reads.keys


@pytest.mark.parametrize("classes", [0, -1])
def test_refuses_no_classes(classes, virtual):
    with pytest.raises(ValueError, match="classes must be at least 1"):
        virtual(classes=classes)
