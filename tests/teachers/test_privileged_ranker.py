"""The privileged ranker, and Privileged Features Distillation through the real graph."""

import json
import math

import pytest
import torch
from torch import nn

from distill.batch import Batch, Columns
from distill.data.features import Features
from distill.errors import DataError, RecipeError
from distill.graph import Arrow, DistillationGraph
from distill.model import Model
from distill.nn.cross_network import CrossNetwork
from distill.nn.target_attention import TargetAttention
from distill.objectives import BinaryCrossEntropy
from distill.outputs import Needs, Outputs
from distill.settings import TrainSettings
from distill.trainer import Trainer
from students import TwoTower
from teachers import PrivilegedRanker
from tests.shop import fitted, judged, shop

SCORES = Needs("scores")


@pytest.fixture(scope="module")
def features():
    return fitted()


def scores(model, batch):
    return model.represent(batch.view(*model.reads.keys), SCORES).scores


def test_reads_all_there_is_and_without_the_switch_what_serving_knows(features):
    assert PrivilegedRanker(features).reads.keys == (
        ["user_id", "country", "age", "income", "history", "loyalty"],
        ["item_id", "genres", "price", "returns"],
        ["hour", "dwell", "source"],
    )
    plain = PrivilegedRanker(features, privileged=False)
    assert plain.reads.keys[2] == ["hour"] and "loyalty" not in plain.tables.names


@pytest.mark.parametrize("body", ["dcn", "mlp"])
@pytest.mark.parametrize("history", ["mean", "attention"])
def test_scores_do_not_depend_on_what_else_is_in_the_batch(features, body, history):
    model = PrivilegedRanker(features, body=body, history=history, widths=(16, 8))
    batch = shop(features).batch(0, 0)
    whole = scores(model, batch)
    assert whole.shape == batch.mask.shape and whole.std() > 1e-3
    part = batch.select(torch.tensor([5, 1]), batch.index[[5, 1]].unique())
    torch.testing.assert_close(scores(model, part), whole[[5, 1]])


def test_a_privileged_value_changes_the_score_and_without_the_switch_it_does_not(features):
    batch = shop(features).batch(0, 0)
    for name in ("dwell", "source"):
        other = Batch(**{**vars(batch), "pair": {**batch.pair, name: batch.pair[name].flip(0)}})
        for privileged in (True, False):
            model = PrivilegedRanker(features, privileged=privileged)
            assert torch.equal(scores(model, other), scores(model, batch)) != privileged


def test_score_pairs_says_what_represent_says(features):
    model, split = PrivilegedRanker(features, history="attention"), judged(features)
    query = torch.arange(len(split.listed)).repeat_interleave(split.listed.lengths)
    said = model.score_pairs(
        split.queries.take(query), split.candidates.take(split.listed.values), split.pair
    )
    batch = shop(features, batch_size=24).batch(0, 0)
    keys = {(int(q), int(c)): s for q, c, s in zip(query, split.listed.values, said, strict=True)}
    asked = scores(model, batch)
    for b, n in batch.mask.nonzero().tolist():
        pair = int(batch.query_ids[b]), int(batch.candidate_ids[batch.index[b, n]])
        assert asked[b, n].item() == pytest.approx(keys[pair].item(), abs=1e-5)
    with pytest.raises(DataError, match="reads 'hour' of each pair"):
        model.score_pairs(split.queries.take(query), split.candidates.take(query % 15))
    assert model.score_pairs(
        split.queries[0:0], split.candidates[0:0], {k: v[:0] for k, v in split.pair.items()}
    ).shape == (0,)


def test_the_cross_network_multiplies_with_the_first_row():
    cross = CrossNetwork(3, layers=2)
    rows = torch.randn(4, 3)
    first = rows * cross.layers[0](rows) + rows
    torch.testing.assert_close(cross(rows), rows * cross.layers[1](first) + first)
    assert CrossNetwork(3, layers=1, rank=1)(rows).shape == (4, 3)


def test_target_attention_equals_a_loop_and_is_0_for_an_empty_history():
    attention = TargetAttention(2)
    history, target, lengths = torch.randn(5, 2), torch.randn(3, 2), torch.tensor([2, 0, 3])
    found = attention(history, lengths, target)
    expected, start = torch.zeros(3, 2), 0
    for i, length in enumerate(lengths.tolist()):
        for e in history[start : start + length]:
            v = target[i]
            expected[i] += attention.weight(torch.cat([e, v, e - v, e * v])[None])[0] * e
        start += length
    torch.testing.assert_close(found, expected)
    assert found[1].abs().max() == 0


def test_attention_needs_a_history_of_items():
    schema = [
        {"name": "age", "kind": "dense", "side": "user"},
        {"name": "price", "kind": "dense", "side": "item"},
    ]
    with pytest.raises(ValueError, match="attention needs a user's sequence that shares the vocabulary"):
        PrivilegedRanker(Features(schema), history="attention")


def test_shares_the_students_tables_but_its_own(features):
    student = TwoTower(features)
    ranker = PrivilegedRanker(features, tables=student.tables, own_tables=["user_id"])
    theirs, own = student.tables.by_name(), ranker.tables.by_name()
    assert own["item_id"] is theirs["item_id"] and own["country"] is theirs["country"]
    assert own["user_id"] is not theirs["user_id"] and "loyalty" in own and "loyalty" not in theirs
    graph = DistillationGraph({"student": student, "ranker": ranker}, [], ["student", "ranker"])
    assert sum("tables" in name for name in graph.trainable()) == len(theirs) + 1 + 3


def test_a_saved_one_has_its_tables_with_it(features, tmp_path):
    student = TwoTower(features)
    model = PrivilegedRanker(features, tables=student.tables, own_tables=["user_id"], history="attention")
    model.save_pretrained(tmp_path / "ranker")
    batch = shop(features).batch(0, 0)
    for again in (
        PrivilegedRanker.from_pretrained(tmp_path / "ranker"),
        PrivilegedRanker(features, history="attention", checkpoint=tmp_path / "ranker"),
    ):
        assert torch.equal(scores(again, batch), scores(model, batch))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"body": "resnet"}, "body must be dcn or mlp"),
        ({"history": "last"}, "history must be mean or attention"),
        ({"own_tables": ["user"]}, "own_tables: it reads no feature 'user'"),
        ({"widths": [0]}, "widths must be one or more sizes"),
        ({"dropout": 1.0}, "dropout must be a probability below 1"),
        ({"activation": "swish"}, "activation must be one of relu"),
        ({"cross_layers": 0}, "a cross network needs a layer"),
    ],
)
def test_refuses(features, arguments, message):
    with pytest.raises(ValueError, match=message):
        PrivilegedRanker(features, **arguments)


def test_shared_tables_must_be_of_the_same_features_and_size(features):
    student = TwoTower(features, embedding_dim=8)
    with pytest.raises(ValueError, match="must be that of the shared tables, 8"):
        PrivilegedRanker(features, tables=student.tables, embedding_dim=16)
    assert PrivilegedRanker(features, tables=student.tables).tables.dim == 8
    frozen = {"student": student, "ranker": PrivilegedRanker(features, tables=student.tables)}
    arrow = Arrow("soft", BinaryCrossEntropy(), "student")
    with pytest.raises(RecipeError, match=r"models\.ranker: it is frozen but shares parameters"):
        DistillationGraph(frozen, [arrow], ["student"]).check()


class Says(Model):
    """One number for every pair."""

    reads = Columns()
    provides = frozenset({"scores"})

    def __init__(self, score):
        super().__init__()
        self.score = nn.Parameter(torch.tensor(score))

    def represent(self, batch, needs):
        return Outputs(scores=self.score.expand(batch.mask.shape))

    def save_pretrained(self, folder):
        raise NotImplementedError


def pfd(student, teacher, weight=0.5):
    """Hard labels for both, and after a warm-up of a fifth the teacher's soft ones for the student."""
    hard, soft = [[0, 1], [0.2, 1], [0.2, 1 - weight]], [[0, 0], [0.2, 0], [0.2, weight]]
    arrows = [
        Arrow("labels", BinaryCrossEntropy(), "student", weight=hard),
        Arrow("ranker_labels", BinaryCrossEntropy(), "ranker"),
        Arrow("soft", BinaryCrossEntropy(), "student", "ranker", weight=soft),
    ]
    return DistillationGraph({"student": student, "ranker": teacher}, arrows, ["student", "ranker"])


def test_privileged_features_distillation_as_the_worked_example_has_it():
    """Logits 0 of the student and 2 of the teacher, label 1, half of the weight on each."""
    student, teacher = Says(0.0), Says(2.0)
    graph, batch = pfd(student, teacher), Batch.of_scores(1, 1)
    losses = graph(batch, 0.5)
    assert losses["labels"].loss.item() == pytest.approx(0.693147, abs=1e-6)
    assert losses["soft"].loss.item() == pytest.approx(0.693147, abs=1e-6)
    assert losses["ranker_labels"].loss.item() == pytest.approx(0.126928, abs=1e-6)
    weights = {arrow.name: arrow.weight_at(0.5) for arrow in graph.arrows}
    total = sum(weights[name] * loss.loss.sum() for name, loss in losses.items())
    assert total.item() == pytest.approx(0.693147 + 0.126928, abs=1e-6)
    total.backward()
    assert student.score.grad.item() == pytest.approx(-0.440399, abs=1e-6)
    assert teacher.score.grad.item() == pytest.approx(1 / (1 + math.exp(-2)) - 1, abs=1e-6), "its labels only"
    student.score.grad = None
    during = graph(batch, 0.1)
    assert "soft" not in during, "closed in the warm-up"
    during["labels"].loss.sum().backward()
    assert student.score.grad.item() == pytest.approx(-0.5)


def test_trained_together_with_shared_tables(features, tmp_path):
    """Both learn, the teacher better than the student can: it sees what tells the label."""
    torch.manual_seed(0)
    student = TwoTower(features, dim=8, similarity="dot")
    ranker = PrivilegedRanker(features, student.tables, own_tables=["user_id"], widths=(16,))
    graph = pfd(student, ranker)
    graph.check({"shop": True})
    settings = TrainSettings(steps=60, learning_rate=0.02, evaluate_every=None, mixed_precision="no")
    Trainer(graph, shop(features), settings, tmp_path).fit()
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines[0]["weight/labels"] == 1.0 and "loss/soft" not in lines[0]
    assert lines[-1]["weight/labels"] == lines[-1]["weight/soft"] == 0.5
    assert lines[-1]["loss/ranker_labels"] < 0.1 < lines[-1]["loss/labels"]
    assert lines[-1]["loss/labels"] < lines[0]["loss/labels"]
    assert student.tables.by_name()["item_id"] is ranker.tables.by_name()["item_id"]
