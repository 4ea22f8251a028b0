"""Gradient boosting: what it learns from, what it says of its own training rows, and its folder."""

import sys
from dataclasses import replace

import pytest
import torch

from distill.batch import Ragged
from distill.checkup import health_at_start
from distill.errors import DataError, RecipeError, RunError
from distill.graph import Arrow, DistillationGraph
from distill.objectives import BinaryCrossEntropy
from distill.outputs import Needs
from distill.settings import TrainSettings
from distill.store import RecalledBatches, TeacherMemory
from distill.trainer import Trainer
from students import TwoTower
from tests.shop import fitted, shop

pytest.importorskip("lightgbm")
from teachers import GradientBoosting

SCORES = Needs("scores")
SMALL = {"trees": 8, "least": 2, "leaves": 4, "folds": 3, "learning_rate": 0.3}


@pytest.fixture(scope="module")
def features():
    return fitted()


@pytest.fixture(scope="module")
def source(features):
    return shop(features, batch_size=24)


@pytest.fixture
def model(features, source):
    made = GradientBoosting(features, **SMALL)
    made.fit(source)
    return made


def of_pairs(judged):
    query = torch.arange(len(judged.listed)).repeat_interleave(judged.listed.lengths)
    return judged.queries.take(query), judged.candidates.take(judged.listed.values), judged.pair


def test_reads_the_columns_of_a_ranker_and_learns_from_the_labels(model, source):
    assert model.reads.keys[2] == ["hour", "dwell", "source"]
    scores = model.score_pairs(*of_pairs(source.judged))
    labels = source.judged.labels > 0
    assert scores[labels].min() > scores[~labels].max(), "dwell tells the label"
    assert scores.max() > 1.0, "logits, no probabilities"


def test_its_own_training_rows_are_scored_by_trees_that_have_not_seen_their_users(model, source):
    batch = source.batch(0, 0)
    said = model.represent(batch.view(*model.reads.keys), SCORES).scores
    whole = model.score_pairs(*of_pairs(source.judged))
    labels = source.judged.labels
    listed, same, right = source.judged.listed, 0, 0
    for b, n in batch.mask.nonzero().tolist():
        query, item = batch.query_ids[b], int(batch.candidate_ids[batch.index[b, n]])
        entry = int(listed.offsets[query]) + listed[int(query)].tolist().index(item)
        right += bool((said[b, n] > 0) == (labels[entry] > 0))
        same += said[b, n].item() == whole[entry].item()
    assert same < 10 and right > 0.9 * batch.mask.sum() > 50
    elsewhere = replace(batch, source="dev")
    other = model.represent(elsewhere.view(*model.reads.keys), SCORES).scores
    assert not torch.equal(other, said)


def test_a_fold_holds_all_rows_of_a_user(features, source):
    """A label that only the user tells cannot be learnt from other users: out of fold it is not known."""
    judged = source.judged
    private = torch.randperm(12, generator=torch.Generator().manual_seed(1)) % 2
    query = torch.arange(24).repeat_interleave(4)
    labels = private[judged.groups][query].float()
    quiet = {name: torch.zeros_like(column) for name, column in judged.pair.items()}
    lonely = type(source)(replace(judged, labels=labels, pair=quiet), 24, candidates=4, name="shop")
    model = GradientBoosting(features, **{**SMALL, "trees": 30})
    model.fit(lonely)
    whole = model.score_pairs(*of_pairs(lonely.judged))
    assert ((whole > 0) == (labels > 0)).float().mean() > 0.9
    out = model.out_of_fold
    own = out.instead_of(whole, query, judged.listed.values)
    assert ((own > 0) == (labels > 0)).float().mean() < 0.8


def test_the_same_twice(features, source, model):
    again = GradientBoosting(features, **SMALL)
    assert again.identity is None, "who it is follows from what it has learnt"
    again.fit(source)
    assert again.identity == model.identity
    other = GradientBoosting(features, **{**SMALL, "seed": 1})
    other.fit(source)
    assert other.identity != model.identity


def test_without_the_switch_it_reads_what_serving_knows(features, source):
    model = GradientBoosting(features, privileged=False, **SMALL)
    model.fit(source)
    assert model.reads.keys == (
        ["user_id", "country", "age", "income", "history"],
        ["item_id", "genres", "price"],
        ["hour"],
    )


def test_a_history_is_its_length_its_last_item_and_how_often_it_holds_the_candidate(features):
    model = GradientBoosting(features)
    model.sides = [[f for f in side if f.name in ("history", "item_id")] for side in model.sides]
    users = {"history": Ragged.of([[3, 4, 3], []])}
    rows = model._matrix(
        users, {"item_id": torch.tensor([3, 9])}, {}, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    )
    assert rows.tolist() == [[3, 3, 2, 3], [3, 3, 0, 9], [0, 0, 0, 3]]


def test_a_saved_one_says_the_same(model, features, source, tmp_path):
    model.save_pretrained(tmp_path / "boosting")
    pairs = of_pairs(source.judged)
    for again in (
        GradientBoosting.from_pretrained(tmp_path / "boosting"),
        GradientBoosting(features, checkpoint=tmp_path / "boosting"),
    ):
        torch.testing.assert_close(again.score_pairs(*pairs), model.score_pairs(*pairs))
        again.fit(source)
        assert again.out_of_fold is None, "it is not fitted again"
    assert {p.suffix for p in (tmp_path / "boosting").rglob("*") if p.is_file()} == {
        ".json",
        ".txt",
        ".arrow",
    }
    (tmp_path / "boosting" / "trees.txt").write_text("tree\n")
    with pytest.raises(DataError, match=r"trees\.txt cannot be read"):
        GradientBoosting.from_pretrained(tmp_path / "boosting")


def test_teaches_through_the_store(features, source, tmp_path, monkeypatch):
    """Fitted before the first step; the store keeps what it said of the listed pairs, out of fold."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    teacher = GradientBoosting(features, **SMALL)
    graph = DistillationGraph(
        {"student": TwoTower(features), "boosting": teacher},
        [Arrow("soft", BinaryCrossEntropy(), "student", "boosting")],
        ["student"],
    )
    graph.check({"shop": True})
    settings = TrainSettings(steps=3, evaluate_every=None, mixed_precision="no")
    Trainer(graph, source, settings, tmp_path / "run").fit()
    memory = TeacherMemory(graph, {"shop": source})
    assert memory.count(memory.listeners[0], "pair") == (96, 96)
    batch = RecalledBatches(memory, source).batch(0, 0)
    live = teacher.represent(batch.view(*teacher.reads.keys), SCORES).scores
    torch.testing.assert_close(batch.stored["boosting"].scores, live)
    health = health_at_start(memory)["teachers"][0]  # of pairs: one order of all, not one in each user's few
    assert source.judged.task == "pairs" and (health["pairs"], health["lists"]) == (96, 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda labels: labels * 3, "needs labels 0 and 1, but pair 0 .* has 3"),
        (lambda labels: torch.ones_like(labels), "listed pairs with label 0 and with label 1.*only 1"),
        (lambda labels: None, "and the data has none"),
    ],
)
def test_labels_that_it_cannot_learn_from(features, source, labels, message):
    given = replace(source.judged, labels=labels(source.judged.labels))
    with pytest.raises(DataError, match=message):
        GradientBoosting(features, **SMALL).fit(type(source)(given, 8, name="shop"))


def test_refuses(features, source, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="folds must be at least 2"):
        GradientBoosting(features, folds=1)
    with pytest.raises(ValueError, match="needs a tree, two leaves and a row"):
        GradientBoosting(features, trees=0)
    model, pairs = GradientBoosting(features), of_pairs(source.judged)
    with pytest.raises(RunError, match="was not fitted"):
        model.score_pairs(*pairs)
    with pytest.raises(RunError, match="was not fitted"):
        model.save_pretrained(tmp_path / "none")
    with pytest.raises(DataError, match="reads 'hour' of each pair"):
        model.score_pairs(*pairs[:2])
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(RecipeError, match=r"pip install 'distill-search\[recsys\]'"):
        GradientBoosting(features)
