"""Feature schemas: what is refused, what is fitted on train, what rows become, what is on disk."""

import json
import sys

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from distill.data import Feature, Features
from distill.data.feature_table import text_hash
from distill.errors import DataError

SCHEMA = [
    {"name": "user", "kind": "categorical", "side": "user"},
    {"name": "age", "kind": "dense", "side": "user", "buckets": 4},
    {"name": "income", "kind": "dense", "side": "user", "transform": "log_standard", "fill": 0.0},
    {"name": "hist", "kind": "sequence", "side": "user", "vocabulary": "item", "max_length": 3},
    {"name": "item", "kind": "categorical", "side": "item"},
    {"name": "genres", "kind": "sequence", "side": "item", "separator": "|"},
    {"name": "brand", "kind": "categorical", "side": "item", "hash_buckets": 10},
    {"name": "dwell", "kind": "dense", "side": "context", "privileged": True, "transform": "standard"},
]
USERS = pl.DataFrame({"user": ["a", "b", "c"], "age": [10, 20, 30], "income": [1.0, None, 3.0]})
ITEMS = pd.DataFrame({"item": [10, 20, 30], "genres": ["x|y", "y", ""], "brand": ["p", "q", None]})
PAIRS = pl.DataFrame({"dwell": [1.0, 2.0, 3.0]})


@pytest.fixture
def features() -> Features:
    return Features(SCHEMA).fit(user=USERS, item=ITEMS, context=PAIRS)


def user(**changed) -> dict:
    return {"user": "a", "age": 20, "income": 1.0, "hist": [10], **changed}


def encoded(features: Features, **changed) -> dict:
    return {
        name: column.tolist()
        for name, column in features.encode([user(**changed)], features.side("user")).columns.items()
    }


def test_ids_begin_at_two_and_an_unknown_category_is_one(features):
    assert encoded(features, user="b")["user"] == [3]
    assert encoded(features, user="nobody")["user"] == encoded(features, user=None)["user"] == [1]
    assert (features.size("user"), features.size("brand")) == (5, 12)
    assert features.values("item") == [10, 20, 30]


def test_a_history_shares_the_ids_of_its_items_and_keeps_the_last(features):
    assert features.size("hist") == features.size("item")
    assert encoded(features, hist=[10, 20, 99, 30])["hist"] == [[3, 1, 4]]  # 10 is beyond the limit
    assert encoded(features, hist=[])["hist"] == encoded(features, hist=None)["hist"] == [[]]


def test_a_sequence_may_be_one_text(features):
    genres = features.encode(ITEMS, ["genres"]).columns["genres"]
    assert genres.tolist() == [[2, 3], [3], []]
    assert features.size("genres") == 4  # x and y; an empty text holds none


def test_numbers_are_scaled_and_cut_by_what_train_says(features):
    train = np.log1p(np.array([1.0, 0.0, 3.0]))
    expected = (np.log1p(3.0) - train.mean()) / train.std()
    assert encoded(features, income=3.0)["income"] == pytest.approx([expected], rel=1e-6)
    assert encoded(features, income=None)["income"] == encoded(features, income=0.0)["income"]
    assert [encoded(features, age=age)["age"][0] for age in (-5, 16, 24, 99)] == [2, 3, 4, 5]
    assert features.size("age") == 6
    assert features.encode(PAIRS, ["dwell"]).columns["dwell"].tolist() == pytest.approx(
        [-(1.5**0.5), 0.0, 1.5**0.5]
    )


def test_a_side_without_privileged_features_by_default(features):
    assert features.side("context") == ()
    assert [f.name for f in features.side("context", privileged=True)] == ["dwell"]


def test_rare_categories_are_unknown():
    column = Feature(name="zip", kind="categorical", side="user", min_count=2)
    fitted = Features([column]).fit(user=pl.DataFrame({"zip": ["a", "a", "b"]}))
    assert fitted.encode([{"zip": "a"}, {"zip": "b"}], ["zip"]).columns["zip"].tolist() == [2, 1]


def test_a_hash_is_the_same_on_every_machine(features):
    assert text_hash(["", "p", "wörd"]).tolist() == [0, 12391152580654509242, 14990286584707108769]
    ids = features.encode(ITEMS, ["brand"]).columns["brand"]
    assert ids.tolist() == [11, 5, 1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"user": 7}, "column 'user' holds whole numbers, but it was fitted on words"),
        ({"hist": ["x"]}, "column 'hist' holds words, but it was fitted on whole numbers"),
        ({"hist": 5}, "column 'hist' holds Int64, not lists"),
        ({"age": float("nan")}, r"column 'age', row 0 \(counted from 0\): nan is no finite number"),
        ({"hist": [10.0, 1.5]}, r"rows, column 'hist', row 0 .*1.5 is no category"),
        ({"age": "old"}, "column 'age' holds String, not numbers"),
        ({"age": None}, "column 'age', row 0 .* None is no finite number"),
    ],
)
def test_a_wrong_value_is_named(features, changed, message):
    with pytest.raises(DataError, match=message):
        encoded(features, **changed)


def test_a_missing_column_is_named(features):
    rows = [user(), {"user": "a", "agee": 3, "income": 1.0, "hist": []}]
    with pytest.raises(DataError, match=r"row 1 .* there is no 'age'; .* Did you mean 'agee'"):
        features.encode(rows, features.side("user"))
    with pytest.raises(DataError, match="there is no column 'genres'"):
        features.encode(ITEMS[["item"]], features.side("item"))


def test_a_row_that_is_unlike_the_others_is_named(features):
    for changed, column in (({"user": 3}, "user"), ({"hist": ["x"]}, "hist"), ({"hist": [10, "x"]}, "hist")):
        rows = [user(), user(user=None), user(**changed), user()]
        with pytest.raises(DataError, match=rf"rows, column '{column}', row 2 .*values of several types"):
            features.encode(rows, features.side("user"))
    with pytest.raises(DataError, match=r"rows, row 1 \(counted from 0\): a NoneType, not a dictionary"):
        features.encode([user(), None], features.side("user"))
    floats = [user(hist=None), user(hist=[10.0, 20.0]), user(hist=[10.0, 1.5])]
    with pytest.raises(DataError, match=r"column 'hist', row 2 .*1.5 is no category"):
        features.encode(pl.DataFrame(floats), features.side("user"))


def test_what_is_not_asked_for_is_not_looked_at(features):
    table = features.encode([{"user": "a", "dwell": float("nan")}], ["user"])
    assert list(table.columns) == ["user"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "dense", "max_length": 3}, r"features\[0\] \('x'\): a dense feature takes no max_length"),
        ({"kind": "sequence", "side": "context"}, "belongs to a user or an item"),
        ({"kind": "text", "side": "item"}, "a text feature needs one"),
        ({"kind": "dense", "buckets": 3, "transform": "log"}, "leave one of them out"),
        ({"vocabulary": "y"}, "there is no feature 'y'"),
        ({"colum": "y"}, r"colum: a feature has no such key. Did you mean 'column'"),
        ({"name": "two words"}, "name: String should match"),
    ],
)
def test_a_feature_that_cannot_be(changed, message):
    with pytest.raises(ValueError, match=message):
        Features([{"name": "x", "kind": "categorical", "side": "user", **changed}])


def test_a_student_does_not_share_the_ids_of_a_privileged_feature():
    secret = Feature(name="bought", kind="categorical", side="item", privileged=True)
    shared = Feature(name="hist", kind="sequence", side="user", vocabulary="bought")
    with pytest.raises(ValueError, match="'bought', which is privileged"):
        Features([secret, shared])
    assert Features([secret, shared.model_copy(update={"privileged": True})])


def test_saved_features_are_the_same(features, tmp_path):
    features.save(tmp_path)
    loaded = Features.load(tmp_path)
    assert loaded.fingerprint == features.fingerprint
    for side, rows in (("user", [user(hist=[20, 5])]), ("item", ITEMS), ("context", PAIRS)):
        one, other = (f.encode(rows, f.side(side, privileged=True)).columns for f in (features, loaded))
        assert {k: v.tolist() for k, v in one.items()} == {k: v.tolist() for k, v in other.items()}


def test_another_vocabulary_has_another_fingerprint(features):
    other = Features(SCHEMA).fit(user=USERS, item=ITEMS.assign(item=[10, 20, 31]), context=PAIRS)
    assert other.fingerprint != features.fingerprint


@pytest.mark.parametrize("version", [0, 2, None])
def test_an_unknown_format_says_why_it_does_not_open(features, tmp_path, version):
    features.save(tmp_path)
    told = json.loads((tmp_path / "features.json").read_text())
    (tmp_path / "features.json").write_text(json.dumps({**told, "format": version}))
    with pytest.raises(DataError, match=f"format {version} is not known .* formats 1 to 1"):
        Features.load(tmp_path)


def test_text_vectors_that_are_missing_or_damaged_are_named(tmp_path):
    title = Feature(name="title", kind="text", side="item", encoder="any")
    features = Features([title])
    features._vocabularies, features._vectors = {"title": pl.Series(["a"])}, {"title": torch.ones(3, 2)}
    features.save(tmp_path)
    file = tmp_path / "text_vectors.safetensors"
    assert Features.load(tmp_path).text_vectors("title").shape == (3, 2)
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(DataError, match=r"text_vectors.safetensors: .* save the model again, or copy"):
        Features.load(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"text_vectors.safetensors: .* save the model again, or copy"):
        Features.load(tmp_path)


def test_a_fraction_among_categories_is_named_without_a_row_where_none_is_known():
    age = Feature(name="age", kind="categorical", side="user")
    with pytest.raises(DataError, match=r"^users, column 'age': 2.5 is no category"):
        Features([age]).fit(user=pl.DataFrame({"age": [1.0, 1.0, 2.5]}))


def test_a_damaged_folder_is_named(features, tmp_path):
    features.save(tmp_path)
    (tmp_path / "vocabulary" / "item.arrow").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"item.arrow: the vocabulary cannot be read"):
        Features.load(tmp_path)
    (tmp_path / "features.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match="is damaged"):
        Features.load(tmp_path)


def test_without_polars_one_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(DataError, match=r"pip install 'distill-search\[recsys\]'"):
        Features(SCHEMA).fit(user=[], item=[], context=[])


def test_equal_rows_are_found_by_content(features):
    rows = [user(hist=[10, 20]), user(hist=[20, 10]), user(hist=[10, 20]), user(hist=[10])]
    table = features.encode(rows, features.side("user"))
    assert table.same.tolist() == [0, 1, 0, 3]
    assert table[1:3].same.tolist() == [0, 1]
    assert np.array_equal(table.keys()[1:3], table[1:3].keys())


def test_unfitted_features_say_so():
    with pytest.raises(RuntimeError, match="'user' has no vocabulary: fit the features first"):
        Features(SCHEMA).size("user")
    with pytest.raises(DataError, match="the item side has features, but no train rows"):
        Features(SCHEMA).fit(user=USERS, context=PAIRS)
    income = Feature(name="income", kind="dense", side="user", transform="standard")
    with pytest.raises(DataError, match=r"users, column 'income', row 1 .*nan is no finite number"):
        Features([income]).fit(user=pl.DataFrame({"income": [1.0, float("nan")]}))


def test_a_text_feature_has_the_vectors_of_its_encoder(minilm):
    item = Feature(name="title", kind="text", side="item", encoder=str(minilm))
    fitted = Features([item]).fit(item=pl.DataFrame({"title": ["a river", "a city"]}))
    vectors = fitted.text_vectors("title")
    assert vectors.shape == (4, 384) and not vectors[:2].any()
    assert torch.allclose(vectors[2:].norm(dim=1), torch.ones(2), atol=1e-5)
    rows = fitted.encode([{"title": "a river"}, {"title": "a lake"}], ["title"]).columns["title"]
    assert rows.tolist() == [3, 1]  # in order of the texts; what is unknown has no vector
