"""The two-tower: what it reads, what it refuses, what it computes, and that a saved one is the same."""

import json
import math
import subprocess
import sys

import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.batch import Batch, Ragged
from distill.data.feature_table import FeatureTable
from distill.errors import DataError
from distill.nn import MLPTower
from distill.outputs import Needs
from students import TwoTower
from tests.shop import fitted, items, public, shop, users

SCORES = Needs("scores", "in_batch", "queries", "candidates")


@pytest.fixture(scope="module")
def features():
    return fitted()


def said(model, batch):
    outputs = model.represent(batch.view(*model.reads.keys), SCORES)
    return model.compare(outputs, batch, SCORES)


def test_reads_what_serving_knows_of_each_side(features):
    queries, candidates, pair = TwoTower(features).reads.keys
    assert queries == ["user_id", "country", "age", "income", "history"]
    assert candidates == ["item_id", "genres", "price"]
    assert pair == []


def test_scores_are_cosines_over_the_temperature(features):
    model, batch = TwoTower(features, dim=8, temperature=0.1), shop(features).batch(0, 0)
    outputs = said(model, batch)
    torch.testing.assert_close(outputs.queries.norm(dim=1), torch.ones(8))
    product = outputs.queries @ outputs.candidates.T / 0.1
    torch.testing.assert_close(outputs.in_batch, product)
    torch.testing.assert_close(outputs.scores, product.gather(1, batch.index))
    dot = said(TwoTower(features, similarity="dot"), batch)
    assert (dot.queries.norm(dim=1) - 1).abs().min() > 1e-3
    torch.testing.assert_close(dot.in_batch, dot.queries @ dot.candidates.T)


def test_a_learned_temperature_starts_where_it_was_set_and_stays_below_its_limit(features):
    model = TwoTower(features, temperature=0.05, learned_temperature=True)
    assert model.scale().item() == pytest.approx(20.0)
    model.scale().backward()
    assert model.log_scale.grad.item() == pytest.approx(20.0)
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    assert model.scale().item() == pytest.approx(100.0)
    assert model.log_scale.dim() == 0, "so that it does not decay"


def test_without_an_item_tower_an_item_is_its_own_vector(features):
    model = TwoTower(features, item_tower=None, item_id="item_id", embedding_dim=8)
    assert model.dim == 8 and model.reads.keys[1] == ["item_id"]
    ids = features.encode(items(), ["item_id"]).columns["item_id"]
    table = model.tables.by_name()["item_id"].weight.detach()
    expected = torch.nn.functional.normalize(table[ids], dim=1)
    torch.testing.assert_close(model.encode_items(public(items())), expected)


def test_the_history_and_the_item_have_one_table(features):
    model = TwoTower(features)
    assert model.tables.names == ("user_id", "country", "income", "item_id", "genres")
    asked = [{**public(users(1))[0], "history": ["i3", "i5"]}]
    before = model.encode_users(asked)
    with torch.no_grad():
        model.tables.by_name()["item_id"].weight[
            features.encode(items(), ["item_id"]).columns["item_id"][3]
        ] += 1
    assert not torch.allclose(model.encode_users(asked), before)


def test_a_history_is_a_mean_and_an_empty_one_a_learned_vector(features):
    model = TwoTower(features, user_features=["history"])
    table = model.tables.by_name()["item_id"].weight
    batch = {"history": Ragged.of([[2, 4, 4], [], [3]])}
    rows = model.user_embedding(batch, model.tables.by_name())
    torch.testing.assert_close(rows[0], (table[2] + 2 * table[4]) / 3)
    assert rows[1].abs().max() == 0 and torch.equal(rows[2], table[3])
    rows.sum().backward()
    assert torch.equal(model.user_embedding.empty["history_"].grad, torch.ones(16))
    assert table.grad[0].abs().max() == 0, "padding never learns"


def test_each_user_and_item_of_a_batch_is_encoded_once(features, monkeypatch):
    model, batch = TwoTower(features), shop(features, batch_size=24).batch(0, 0)
    rows = []
    monkeypatch.setattr(model.item_tower, "forward", lambda x: rows.append(len(x)) or torch.randn(len(x), 64))
    said(model, batch)
    assert rows == [batch.sizes[2]] and batch.sizes[2] <= 15 < batch.mask.sum()


def test_unknown_ids_are_trained_and_only_in_training(features):
    model = TwoTower(features, unknown=0.5, user_features=["user_id"])
    columns = {"user_id": torch.full((1000,), 5)}
    table = model.tables.by_name()["user_id"].weight
    model.train()
    hidden = (model.user_embedding(columns, model.tables.by_name()) == table[1]).all(dim=1)
    assert 400 < hidden.sum() < 600
    model.eval()
    assert (model.user_embedding(columns, model.tables.by_name()) == table[5]).all()


def test_encodes_dictionaries_and_frames_alike(features):
    model, rows = TwoTower(features), public(users())
    expected = model.encode_users(rows)
    assert expected.shape == (24, 64) and expected.std(dim=0).mean() > 1e-3
    for frame in (pl.DataFrame(rows), pd.DataFrame(rows)):
        torch.testing.assert_close(model.encode_users(frame), expected)
    table = features.encode(users(), features.side("user", privileged=True))
    torch.testing.assert_close(model.encode_queries(table), expected)
    torch.testing.assert_close(model.encode_users(rows[3]), expected[3:4])
    assert model.encode_users(rows[:0]).shape == (0, 64)


def test_an_unknown_user_with_an_empty_history_has_a_vector(features):
    stranger = {**public(users(1))[0], "user_id": "nobody", "country": "atlantis", "history": []}
    vector = TwoTower(features).encode_users([stranger])
    assert vector.isfinite().all() and vector.norm().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"user_features": ["loyalty"]}, "user_features: 'loyalty' cannot be read: it is privileged"),
        ({"item_features": ["returns"]}, "item_features: 'returns' cannot be read: it is privileged"),
        ({"user_features": ["hour"]}, "'hour' cannot be read: it belongs to a pair of user and item"),
        ({"user_features": ["price"]}, "it belongs to the item, not to the user"),
        ({"user_features": ["contry"]}, "no feature 'contry'.*Did you mean 'country'"),
        ({"user_features": []}, "there is none that serving knows"),
        ({"similarity": "l2"}, "similarity must be cosine or dot"),
        ({"temperature": 0.0}, "temperature must be at least 0.01"),
        ({"temperature": math.nan}, "temperature must be at least 0.01"),
        ({"user_tower": None}, "a tower is `mlp` or an object"),
        ({"user_tower": "dcn"}, "a tower is `mlp` or an object"),
        ({"user_tower": MLPTower([8]), "item_tower": MLPTower([9])}, "vectors of one size, got user_tower 8"),
        ({"item_tower": None, "dim": 64}, "vectors of one size, got embedding_dim 16, dim 64"),
        ({"item_tower": None, "item_id": "genres"}, "'genres' is none: there are item_id"),
        ({"embedding_dim": 0}, "size of an embedding must be at least 1"),
        ({"unknown": 1.0}, "unknown must be a share"),
    ],
)
def test_refuses_to_be_built(features, arguments, message):
    with pytest.raises(ValueError, match=message):
        TwoTower(features, **arguments)


def test_refuses_to_be_asked_with_what_only_training_knows(features):
    """Serving cannot give it, so a caller who has it measures something that will never be served."""
    model, batch = TwoTower(features), shop(features).batch(0, 0)
    with pytest.raises(DataError, match="the column 'loyalty': it is privileged"):
        model.encode_users(users())
    with pytest.raises(DataError, match="the column 'returns': it is privileged"):
        model.encode_items(pl.DataFrame(items()))
    with pytest.raises(DataError, match="the column 'hour': it belongs to a pair"):
        model.encode_users([{**public(users(1))[0], "hour": "h0"}])
    asked = public(users(2))
    with pytest.raises(
        DataError, match=r"row 1 \(counted from 0\): .* the column 'loyalty': it is privileged"
    ):
        model.encode_users([asked[0], {**asked[1], "loyalty": 1.0}])
    with pytest.raises(DataError, match=r"row 1 \(counted from 0\): a NoneType, not a dictionary"):
        model.encode_users([asked[0], None])
    with pytest.raises(DataError, match=r"column 'history', row 1 .*values of several types"):
        model.encode_users([asked[0], {**asked[1], "history": ["i1", 2]}])
    with pytest.raises(DataError, match="'loyalty'"):
        model.represent(batch, SCORES)
    with pytest.raises(DataError, match="'age'"):
        model.encode_users([{k: v for k, v in public(users(1))[0].items() if k != "age"}])
    with pytest.raises(DataError, match="rows have no column 'country'"):
        model.encode_queries(features.encode(users(), ["user_id"]))


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(24)), seed=st.integers(0, 3))
def test_permuting_what_only_training_knows_changes_nothing(order, seed):
    features = _same()
    torch.manual_seed(seed)
    model = TwoTower(features, dim=8)
    table = features.encode(users(), features.side("user", privileged=True))
    goods = features.encode(items(), features.side("item", privileged=True))
    batch = shop(features, batch_size=24).batch(0, 0)
    rows, places = torch.tensor(order), torch.tensor(order) % 15
    mixed = FeatureTable(table.ids, {**table.columns, "loyalty": table.columns["loyalty"][rows]})
    other = FeatureTable(goods.ids, {**goods.columns, "returns": goods.columns["returns"][places]})
    assert torch.equal(model.encode_queries(mixed), model.encode_queries(table))
    assert torch.equal(model.encode_candidates(other), model.encode_candidates(goods))
    shuffled = Batch(
        batch.index,
        batch.mask,
        batch.query_ids,
        batch.candidate_ids,
        queries={**batch.queries, "loyalty": batch.queries["loyalty"][rows]},
        candidates={**batch.candidates, "returns": batch.candidates["returns"].flip(0)},
        pair={name: column[rows] for name, column in batch.pair.items()},
    )
    for field, value in said(model, batch).given():
        assert torch.equal(value, getattr(said(model, shuffled), field))


_kept = []


def _same():
    """Hypothesis asks often; the features are fitted once."""
    if not _kept:
        _kept.append(fitted())
    return _kept[0]


def test_a_saved_one_is_the_same_in_a_new_process(features, tmp_path):
    model = TwoTower(
        features,
        user_tower=MLPTower([12, 6], dropout=0.1, activation="prelu"),
        item_tower=MLPTower([6]),
        learned_temperature=True,
        user_features=["user_id", "history"],
    )
    with torch.no_grad():
        model.log_scale.fill_(1.5)
    model.save_pretrained(tmp_path / "model")
    again = TwoTower.from_pretrained(tmp_path / "model")
    assert torch.equal(again.encode_items(public(items())), model.encode_items(public(items())))
    assert again.scale().item() == pytest.approx(math.exp(1.5)) and again.arguments == model.arguments
    (tmp_path / "rows.json").write_text(json.dumps(public(users())))
    code = (
        "import json; from students import TwoTower; "
        f"rows = json.load(open({str(tmp_path / 'rows.json')!r})); "
        f"print(TwoTower.from_pretrained({str(tmp_path / 'model')!r}).encode_users(rows).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), model.encode_users(public(users())))
    files = {path.suffix for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors", ".arrow"}, "nothing pickled"
    with pytest.raises(DataError, match="it is privileged"):
        again.encode_users(users())


def test_nothing_of_a_privileged_column_is_exported_but_its_name(features, tmp_path):
    """And what a teacher may read decides nothing of which checkpoint fits."""
    model = TwoTower(features, dim=8)
    model.save_pretrained(tmp_path / "model")
    told = json.loads((tmp_path / "model/features/features.json").read_text())
    hidden = {f.name for f in features.schema if f.privileged}
    assert hidden == {one["name"] for one in told["withheld"]} and len(hidden) == 4
    assert not hidden & {feature["name"] for feature in told["schema"]} and not hidden & {*told["numbers"]}
    files = {path.stem for path in (tmp_path / "model/features/vocabulary").iterdir()}
    assert files and not files & hidden
    again = TwoTower.from_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match="'loyalty': it is privileged"):
        again.encode_users([{**users()[0], "loyalty": "l1"}])
    again.save_pretrained(tmp_path / "again")
    with pytest.raises(DataError, match="'loyalty': it is privileged"):
        TwoTower.from_pretrained(tmp_path / "again").encode_users([users()[0]])
    TwoTower(features.public(), dim=8, checkpoint=tmp_path / "model")


def test_a_checkpoint_with_other_features_is_refused(features, tmp_path):
    model = TwoTower(features)
    model.save_pretrained(tmp_path / "model")
    again = TwoTower(features, checkpoint=tmp_path / "model")
    assert torch.equal(again.encode_items(public(items())), model.encode_items(public(items())))
    other = fitted()
    other.fit(
        user=pl.DataFrame(users(20)).drop("history"),
        item=pl.DataFrame(items()),
        context=pl.DataFrame({"hour": ["h0"], "dwell": [0.1], "source": ["s0"]}),
    )
    with pytest.raises(DataError, match="the ids of both would not mean the same"):
        TwoTower(other, checkpoint=tmp_path / "model")
    with pytest.raises(DataError, match="of another shape than in this model"):
        TwoTower(features, dim=32, checkpoint=tmp_path / "model")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 99, "the format is 99, and this version of Distill reads 1"),
        ("type", "students.Other", "holds a students.Other, not a students.TwoTower"),
        ("model_type", "bert", "no model over features"),
    ],
)
def test_what_another_version_or_class_wrote_is_refused(features, tmp_path, key, value, message):
    TwoTower(features).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(DataError, match=message):
        TwoTower.from_pretrained(tmp_path / "model")


def test_a_folder_from_a_stranger_imports_only_ours(features, tmp_path):
    TwoTower(features).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["arguments"]["user_tower"]["type"] = "os.system"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"outside of distill.*user_tower=\.\.\."):
        TwoTower.from_pretrained(tmp_path / "model")
    again = TwoTower.from_pretrained(tmp_path / "model", user_tower=MLPTower((256, 128, 64)))
    assert again.dim == 64


def test_weights_that_are_cut_short_are_refused(features, tmp_path):
    TwoTower(features).save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be read"):
        TwoTower.from_pretrained(tmp_path / "model")
