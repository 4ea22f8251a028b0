"""Interactions: order, filters, splits in time, histories, batches; small enough to check by hand."""

import gzip
import logging

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data import Interactions, MixedNegatives, RandomNegatives
from distill.data.interaction_log import by_time, histories, in_order, k_core, leave_last_out, shuffled_rings
from distill.errors import DataError, RecipeError
from students import TwoTower

IDS = [
    {"name": "user_id", "kind": "categorical", "side": "user"},
    {"name": "hist", "kind": "sequence", "side": "user", "vocabulary": "item_id", "max_length": 3},
    {"name": "item_id", "kind": "categorical", "side": "item"},
]
ROWS = pl.DataFrame(  # out of order; user 1 took 30 and 40 at one time
    {
        "user_id": [2, 1, 1, 2, 1, 1, 2, 1],
        "item_id": [10, 40, 10, 20, 30, 20, 30, 50],
        "timestamp": [5, 3, 1, 6, 3, 2, 7, 9],
    }
)


LABELLED = ROWS.with_columns(label=pl.lit(1), hour=pl.lit(0.5))
PART_ROWS = LABELLED.head(3)


def items_of(judged) -> list[list[int]]:
    names = list(judged.candidates.ids)
    return [[int(names[row]) for row in rows] for rows in judged.listed.tolist()]


def histories_of(data, judged) -> list[list]:
    values = [None, "?", *data.features.values("item_id")]
    return [[values[i] for i in row] for row in judged.queries.columns["hist"].tolist()]


def test_each_users_last_is_test_and_the_one_before_dev():
    data = Interactions(ROWS, IDS)
    train, dev, test = (data.split(name) for name in ("train", "dev", "test"))
    assert items_of(train) == [[10], [20], [30], [10]]
    assert (items_of(dev), items_of(test)) == ([[40], [20]], [[50], [30]])  # 30 and 40: in order of ids
    assert list(test.queries.ids) == ["1", "2"] and train.queries.ids[0] == "1@0"
    assert train.groups.tolist() == [0, 0, 0, 1]


def test_a_history_is_strictly_earlier_and_keeps_the_last():
    data = Interactions(ROWS, IDS)
    assert histories_of(data, data.split("train")) == [[], [10], [10, 20], []]
    assert histories_of(data, data.split("dev")) == [[10, 20], [10]]  # 30 came at the time of 40
    assert histories_of(data, data.split("test")) == [[20, 30, "?"], [10, 20]]  # 40 is not in train


def test_what_was_seen_is_never_what_is_looked_for():
    again = pl.concat([ROWS, pl.DataFrame({"user_id": [1], "item_id": [10], "timestamp": [99]})])
    test = Interactions(again, IDS).split("test")
    assert items_of(test)[0] == [10]
    names = list(test.candidates.ids)
    assert [[int(names[i]) for i in row] for row in test.seen.tolist()] == [[20, 30, 40, 50], [10, 20]]


def test_the_order_of_the_file_does_not_matter():
    one = Interactions(ROWS, IDS)
    other = Interactions(ROWS.sample(fraction=1.0, shuffle=True, seed=1), IDS)
    for name in one.splits:
        a, b = one.split(name), other.split(name)
        assert a.listed.tolist() == b.listed.tolist()
        assert np.array_equal(a.queries.keys(), b.queries.keys())


def test_vocabularies_are_of_train_alone():
    data = Interactions(ROWS, IDS)
    assert data.features.values("item_id") == [10, 20, 30]
    assert data.popularity.tolist() == [2, 1, 1, 0, 0]
    assert data.split("test").candidates.columns["item_id"].tolist() == [2, 3, 4, 1, 1]


def test_a_split_by_time_keeps_the_future_out():
    data = Interactions(ROWS, IDS, split="time", dev=0.25, test=0.25)
    parts = {name: items_of(data.split(name)) for name in ("train", "dev", "test")}
    assert parts == {"train": [[10], [20], [30], [40]], "dev": [[10, 20]], "test": [[50], [30]]}
    assert histories_of(data, data.split("train")) == [[], [10], [10, 20], [10, 20]]
    assert histories_of(data, data.split("test")) == [[20, 30, 40], [10, 20]]


def test_a_split_that_leaks_time_says_so(caplog):
    with caplog.at_level(logging.INFO, "distill"):
        Interactions(ROWS, IDS).split("train")
    assert "of the train rows are later than the first row that is measured" in caplog.text
    assert "measured on rows earlier" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "distill"):
        Interactions(ROWS, IDS, split="time", dev=0.25, test=0.25).split("train")
    assert "later than" not in caplog.text
    test = pl.DataFrame({"user_id": [1], "item_id": [10], "timestamp": [0]})
    with caplog.at_level(logging.WARNING, "distill"):
        Interactions(ROWS, IDS, test=test).split("train")
    assert "1 users are measured on rows earlier than some they train on" in caplog.text


def test_without_times_a_history_is_a_set_without_the_target():
    rows = pl.DataFrame({"user_id": [1] * 6 + [2], "item_id": [*range(6), 3], "part": 0})
    test = pl.DataFrame({"user_id": [1], "item_id": [9]})
    data = Interactions(rows, IDS, columns={"time": None}, test=test)
    train = data.split("train")
    targets = [row[0] for row in items_of(train)]
    found = histories_of(data, train)
    assert len(targets) == 6 and len(items_of(data.split("dev"))[0]) == 1  # one of user 1's is dev
    dev = items_of(data.split("dev"))[0][0]
    for user, target, history in zip(train.groups.tolist(), targets, found, strict=True):
        assert len(history) == (3 if user == 0 else 0)
        assert target not in history and dev not in history and len(set(history)) == len(history)
    assert len({tuple(history) for history in found}) > 2  # not the same few for every target
    with pytest.raises(DataError, match="without times no interaction is a user's last"):
        Interactions(rows, IDS, columns={"time": None}).split("train")


def test_only_ratings_that_are_high_enough_count():
    rows = ROWS.with_columns(stars=pl.Series([5, 5, 2, 5, 5, 5, 1, 5]))
    data = Interactions(rows, IDS, columns={"label": "stars"}, at_least=4)
    assert items_of(data.split("test")) == [[50], [20]]
    with pytest.raises(DataError, match="at_least needs a label"):
        Interactions(ROWS, IDS, at_least=4).split("train")
    with pytest.raises(DataError, match="no interaction is left; lower at_least"):
        Interactions(rows, IDS, columns={"label": "stars"}, at_least=6).split("train")


def test_a_user_with_no_positive_is_left_out_and_said(caplog):
    rows = ROWS.with_columns(stars=(pl.col("user_id") == 1).cast(pl.Int8))
    with caplog.at_level(logging.INFO, "distill"):
        data = Interactions(rows, IDS, columns={"label": "stars"}, at_least=1)
        assert list(data.split("test").queries.ids) == ["1"]
    assert "1 users without an interaction that counts are left out" in caplog.text


def test_the_core_is_what_remains():
    users = np.array([0, 0, 0, 1, 1, 2])
    items = np.array([0, 1, 2, 0, 1, 2])
    # user 2 has one, so item 2 is left with one, so nothing of either stays
    assert k_core(users, items, 2).tolist() == [True, True, False, True, True, False]
    assert len(Interactions(ROWS, IDS, core=2).split("test").candidates) == 3


def test_99_others_that_the_user_never_took():
    rows = pl.DataFrame({"user_id": [1, 1, 1, 2, 2, 2], "item_id": [1, 2, 3, 4, 5, 6], "timestamp": range(6)})
    data = Interactions(rows, IDS, items=pl.DataFrame({"item_id": range(1, 300)}), catalogue="all")
    judged = data.split("test_99")
    assert judged.task == "rerank"
    for user, listed in zip((1, 2), items_of(judged), strict=True):
        assert len(set(listed)) == len(listed) == 100
        assert listed[0] == 3 * user and not set(listed[1:]) & {3 * user - 2, 3 * user - 1, 3 * user}
    assert judged.labels.tolist() == [1.0, *[0.0] * 99] * 2
    again = Interactions(rows, IDS, items=pl.DataFrame({"item_id": range(1, 300)}), catalogue="all")
    assert again.split("test_99").listed.tolist() == judged.listed.tolist()
    few = items_of(Interactions(ROWS, IDS).split("test_99"))  # of five items user 1 took all
    assert few[0] == [50] and sorted(few[1]) == [30, 40, 50]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=40),
    st.integers(1, 4),
)
def test_histories_are_those_of_a_loop(rows, longest):
    users, items, times = (np.array(column) for column in zip(*rows, strict=True))
    order = in_order(users, items, times)
    assert order.tolist() == sorted(range(len(rows)), key=lambda r: (users[r], times[r], items[r], r))
    users, items, times = users[order], items[order], times[order]
    starts, lengths = histories(users, times, users, times, longest)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        expected = [r for r in range(len(rows)) if users[r] == users[row] and times[r] < times[row]]
        assert list(range(start, start + length)) == expected[-longest:]
    parts = leave_last_out(users)
    for user in set(users.tolist()):
        own = parts[users == user].tolist()
        assert own == ([0] * (len(own) - 2) + [1, 2] if len(own) > 2 else [0, 2][: len(own)])
    cut = by_time(times, 0.2, 0.2)
    assert all(times[cut == 0].max(initial=-1) < t for t in times[cut > 0])
    assert all(times[cut == 1].max(initial=-1) < t for t in times[cut == 2])


def test_times_too_far_apart_for_one_number_are_ranked():
    users, times = np.array([0, 0, 2**30]), np.array([-(2**62), 2**62, 5])
    assert in_order(users, np.zeros(3, int), times).tolist() == [0, 1, 2]
    assert histories(users, times, users, times, 5)[1].tolist() == [0, 1, 0]


def test_a_ring_gives_every_other_item_once():
    users, items = np.array([0, 0, 0, 2]), np.array([5, 6, 7, 8])
    rings, own, starts, counts = shuffled_rings(users, items, 3, 50, seed=0)
    for row in range(3):
        assert sorted([*rings[own[row] : own[row] + 2].tolist(), items[row]]) == [5, 6, 7]
    assert counts.tolist() == [3, 0, 1] and sorted(rings[starts[0] : starts[0] + 3].tolist()) == [5, 6, 7]


@pytest.mark.parametrize(
    ("frame", "arguments", "message"),
    [
        (ROWS.rename({"item_id": "movie"}), {}, "interactions: there is no column 'item_id'"),
        (
            ROWS.with_columns(user_id=pl.Series([2, None, 1, 2, 1, 1, 2, 1])),
            {},
            "row 1 .*: the id is missing",
        ),
        (ROWS.with_columns(timestamp=pl.Series(["1"] * 7 + ["x"])), {}, "row 7 .*: 'x' is no time"),
        (ROWS.with_columns(timestamp=pl.Series([True] * 8)), {}, "holds Boolean, which is no time"),
        (ROWS.with_columns(user_id=[[1]] * 8), {}, "ids are whole numbers or words"),
        (ROWS.head(0), {}, "the table is empty"),
        (
            ROWS,
            {"users": pl.DataFrame({"user_id": [1]})},
            "row 0 .*: there is no row for 2 in the table of users",
        ),
        (
            ROWS.with_columns(user_id=pl.Series([2.0, 1.0, None, 1.7, 1.0, 1.0, 2.0, 1.0])),
            {},
            r"interactions, column 'user_id', row 3 \(counted from 0\): 1.7 is no id",
        ),
        (
            ROWS,
            {"items": pl.DataFrame({"item_id": [10.0, 20.5, 30.0, 40.0, 50.0]})},
            "items, column 'item_id', row 1 .*: 20.5 is no id",
        ),
        (ROWS, {"items": pl.DataFrame({"item_id": [1, 1]})}, "the id 1 stands there more than once"),
        (ROWS, {"users": pl.DataFrame({"user_id": ["1", "2"]})}, "give ids of one type"),
        (
            ROWS,
            {"features": [*IDS, {"name": "age", "kind": "dense", "side": "user"}]},
            "leave the feature out",
        ),
    ],
)
def test_a_table_that_cannot_be_is_named(frame, arguments, message):
    with pytest.raises(DataError, match=message):
        Interactions(frame, arguments.pop("features", IDS), **arguments).split("train")


def test_whole_floats_are_ids():
    floats = ROWS.with_columns(pl.col("user_id", "item_id").cast(pl.Float64))
    assert items_of(Interactions(floats, IDS).split("test")) == [[50], [30]]


NAN = float("nan")


@pytest.mark.parametrize(
    ("side", "feature", "values", "message"),
    [
        ("user", {"kind": "dense"}, [1.0, NAN], "users, column 'x', row 1 .*nan is no finite number"),
        ("user", {"kind": "categorical"}, [1.0, 2.5], "users, column 'x', row 1 .*2.5 is no category"),
        ("item", {"kind": "dense"}, [1.0, 1.0, 1.0, NAN, 1.0], "items, column 'x', row 3 "),
        ("context", {"kind": "dense"}, [1.0] * 7 + [NAN], "interactions, column 'x', row 7 "),
        ("context", {"kind": "categorical"}, [1.0] * 6 + [0.5, 1.0], "interactions, column 'x', row 6 "),
    ],
)
def test_a_feature_that_cannot_be_names_the_row_as_given(side, feature, values, message):
    """Encoding comes after sorting and filtering: its rows are those of no file."""
    x = pl.Series("x", values)
    users = pl.DataFrame({"user_id": [2, 1]}).with_columns(x if side == "user" else [])
    items = pl.DataFrame({"item_id": [50, 40, 30, 20, 10]}).with_columns(x if side == "item" else [])
    rows = ROWS.with_columns(x if side == "context" else [])
    schema = [*IDS, {"name": "x", "side": side, **feature}]
    with pytest.raises(DataError, match=message):
        Interactions(rows, schema, users=users, items=items).split("train")


@pytest.mark.parametrize("part", ["dev", "test"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (PART_ROWS.drop("item_id"), ": there is no column 'item_id'; it has user_id, timestamp, label, hour"),
        (PART_ROWS.drop("timestamp"), ": there is no column 'timestamp'"),
        (PART_ROWS.drop("label"), ": there is no column 'label'"),
        (PART_ROWS.drop("hour"), ": there is no column 'hour'"),
        (
            PART_ROWS.with_columns(user_id=pl.Series([1, 2, None])),
            ", column 'user_id', row 2 .*id is missing",
        ),
        (
            PART_ROWS.with_columns(item_id=pl.Series([10.0, 20.5, 30.0])),
            ", column 'item_id', row 1 .*20.5 is no id",
        ),
        (
            PART_ROWS.with_columns(timestamp=pl.Series([1.0, NAN, 2.0])),
            ", column 'timestamp', row 1 .*no time",
        ),
        (
            PART_ROWS.with_columns(label=pl.Series([1.0, 0.0, NAN])),
            ", column 'label', row 2 .*no finite number",
        ),
        (PART_ROWS.with_columns(label=pl.Series([1, 2, 0])), ", column 'label', row 1 .*neither 0 nor 1"),
        (
            PART_ROWS.with_columns(hour=pl.Series([1.0, NAN, 2.0])),
            ", column 'hour', row 1 .*no finite number",
        ),
    ],
)
def test_a_part_that_is_a_table_of_its_own_is_named(part, changed, message):
    hour = {"name": "hour", "kind": "dense", "side": "context"}
    tables = {"dev": PART_ROWS, "test": PART_ROWS} | {part: changed}
    with pytest.raises(DataError, match=f"^{part}{message}"):
        Interactions(LABELLED, [*IDS, hour], task="pairs", split="time", **tables).split("train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "random"}, "split must be last or time"),
        ({"dev": 0.1}, "give split: time"),
        ({"split": "time", "dev": 0.6, "test": 0.4}, "leave something to train"),
        ({"task": "pairs"}, "impressions are split by time"),
        ({"columns": {"users": "u"}}, r"columns has no key .* Did you mean 'user'"),
        ({"core": -1}, "must not be negative"),
    ],
)
def test_settings_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Interactions(ROWS, IDS, **arguments)


def test_times_may_be_dates_words_or_numbers():
    seconds = ROWS["timestamp"]
    for times in (
        seconds.cast(pl.String),
        seconds.cast(pl.Float64) + 0.5,
        (seconds * 1_000_000).cast(pl.Datetime("us")),
        (seconds * 1_000_000).cast(pl.Datetime("us")).dt.to_string("%Y-%m-%d %H:%M:%S"),
    ):
        data = Interactions(ROWS.with_columns(timestamp=times), IDS)
        assert items_of(data.split("test")) == [[50], [30]]


def test_files_frames_and_column_names(tmp_path):
    other = ROWS.rename({"user_id": "u", "item_id": "i", "timestamp": "t"})
    other.write_csv(tmp_path / "rows.csv")
    other.write_parquet(tmp_path / "rows.parquet")
    other.write_ndjson(tmp_path / "rows.jsonl")
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress((tmp_path / "rows.csv").read_bytes()))
    schema = [{**f, "column": {"user_id": "u", "item_id": "i"}.get(f["name"])} for f in IDS]
    names = {"user": "u", "item": "i", "time": "t"}
    for spec in (*sorted(tmp_path.iterdir()), other.lazy(), other.to_pandas(), other.to_arrow()):
        data = Interactions(spec, schema, columns=names)
        assert items_of(data.split("test")) == [[50], [30]], spec
    two = [
        {"path": str(tmp_path / "rows.csv"), "columns": {"user_id": "u", "item_id": "i", "timestamp": "t"}}
    ]
    assert items_of(Interactions(two, IDS).split("test")) == [[50], [30]]
    (tmp_path / "rows.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:200])
    with pytest.raises(DataError, match=r"rows.parquet: the table cannot be read"):
        Interactions(tmp_path / "rows.parquet", schema, columns=names).split("train")


CLICKS = pd.DataFrame(
    {
        "user_id": [1, 1, 1, 1, 1, 1, 2, 2, 2],
        "item_id": [10, 20, 10, 30, 20, 40, 10, 20, 30],
        "timestamp": [1, 2, 3, 4, 5, 6, 1, 2, 9],
        "label": [0, 1, 0, 0, 0, 1, 1, 0, 1],
        "dwell": [0.0, 3.0, 0.1, 0.2, 0.3, 4.0, 5.0, 0.1, 2.0],
    }
)
DWELL = {"name": "dwell", "kind": "dense", "side": "context", "privileged": True}


def clicks(frame=CLICKS, **arguments) -> Interactions:
    return Interactions(frame, [*IDS, DWELL], task="pairs", split="time", dev=0.0, test=0.12, **arguments)


@pytest.mark.parametrize("name", ["clicks.csv", "clicks.csv.gz", "clicks.tsv.gz"])
def test_labels_of_packed_csv_files_are_numbers(tmp_path, name):
    CLICKS.to_csv(tmp_path / name, index=False, sep="\t" if ".tsv" in name else ",")
    assert clicks(tmp_path / name).split("train").labels.tolist() == [1, 0, 1, 0, 0, 0, 1, 0]
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
        with pytest.raises(DataError, match=f"{name}.*cannot be read"):
            clicks(tmp_path / name).split("train")


def test_impressions_with_one_history_are_one_query():
    data = clicks()
    train = data.split("train")
    # user 1 clicks 20 at 2: what came up to then has no history, what came after has [20]
    assert items_of(train) == [[20, 10], [40, 10, 30, 20], [10], [20]]
    assert train.labels.tolist() == [1, 0, 1, 0, 0, 0, 1, 0]
    assert histories_of(data, train) == [[], [20], [], [10]]
    assert train.pair["dwell"].tolist() == pytest.approx([3.0, 0.0, 4.0, 0.1, 0.2, 0.3, 5.0, 0.1])
    assert train.groups.tolist() == [0, 0, 1, 1]
    assert items_of(data.split("test")) == [[30]]


def test_a_query_is_no_wider_than_asked_and_lists_no_item_twice():
    narrow = items_of(clicks(width=2).split("train"))
    assert max(map(len, narrow)) == 2 and sum(map(len, narrow)) == 8
    twice = CLICKS.assign(item_id=[10, 20, 10, 10, 10, 40, 10, 20, 30])
    lists = items_of(clicks(twice).split("train"))
    assert all(len(set(row)) == len(row) for row in lists) and sum(map(len, lists)) == 8


def test_a_label_of_impressions_is_zero_or_one():
    with pytest.raises(DataError, match=r"column 'label', row 3 .*: the label 2 is neither 0 nor 1"):
        clicks(CLICKS.assign(label=[0, 1, 0, 2, 0, 1, 1, 0, 1])).split("train")
    with pytest.raises(DataError, match=r"column 'label', row 3 .* no finite number"):
        clicks(CLICKS.assign(label=[0, 1, 0, None, 0, 1, 1, 0, 1])).split("train")
    leak = {"name": "label", "kind": "categorical", "side": "context"}
    with pytest.raises(DataError, match="the label 'label' is a context feature too"):
        Interactions(CLICKS, [*IDS, leak], task="pairs", split="time").split("train")


def test_impressions_that_differ_in_privileged_features_are_different_queries():
    train = clicks().split("train")
    changed = clicks(CLICKS.assign(dwell=CLICKS.dwell + 1)).split("train")
    assert not (train.queries.keys() == changed.queries.keys()).any()
    assert train.queries.take(torch.arange(4)).columns.keys() == {"user_id", "hist"}


def test_a_batch_lists_all_impressions_with_what_belongs_to_each():
    data = clicks()
    source = data.train_source(8, 4)
    source.prepare(
        data.features.side("user"), data.features.side("item"), data.features.side("context", True)
    )
    batch = source.batch(0, 0)
    train = data.split("train")
    assert batch.labels.sum() == 3 and batch.mask.sum() == 8 and batch.log_q is None
    for row, query in enumerate(batch.query_ids.tolist()):
        listed = batch.candidate_ids[batch.index[row]][batch.mask[row]]
        assert listed.tolist() == train.listed[query].tolist()
        here = slice(int(train.listed.offsets[query]), int(train.listed.offsets[query + 1]))
        assert torch.equal(batch.pair["dwell"][row][batch.mask[row]], train.pair["dwell"][here])
        assert torch.equal(batch.labels[row][batch.mask[row]], train.labels[here])
    assert (batch.pair["dwell"][~batch.mask] == 0).all()
    asked = source.gather(batch.query_ids, batch.candidate_ids, batch.index, batch.mask)
    assert torch.equal(asked.pair["dwell"], batch.pair["dwell"])  # found again by query and candidate
    with pytest.raises(ValueError, match=r"a query lists 4 items, which is more than candidates \(3\)"):
        data.train_source(8, 3)


def test_a_model_gets_only_the_columns_it_reads():
    data = clicks()
    source = data.train_source(8, 4)
    source.prepare(data.features.side("user"), data.features.side("item"))
    batch = source.batch(0, 0)
    assert (set(batch.queries), set(batch.candidates), batch.pair) == ({"user_id", "hist"}, {"item_id"}, {})
    with pytest.raises(RecipeError, match=r"there is no user feature 'dwell'"):
        source.prepare(data.features.side("context", privileged=True))


def catalogue(users: int = 30, items: int = 40) -> Interactions:
    random = np.random.default_rng(0)
    rows = {
        "user_id": np.repeat(np.arange(users), 12),
        "item_id": np.minimum(random.pareto(1.0, users * 12) * 3, items - 1).astype(int),
        "timestamp": random.integers(0, 10_000, users * 12),
    }
    table = pl.DataFrame({"item_id": range(items)})
    return Interactions(pl.DataFrame(rows), IDS, items=table, catalogue="all")


def test_no_known_positive_of_a_user_is_drawn_as_a_negative():
    data = catalogue()
    train = data.split("train")
    taken = [set() for _ in range(30)]
    for user, rows in zip(train.groups.tolist(), train.listed.tolist(), strict=True):
        taken[user] |= set(rows)
    source = data.train_source(64, 6, [RandomNegatives(5)])
    for step in range(source.steps(0)):
        batch = source.batch(0, step)
        listed = batch.candidate_ids[batch.index]
        for user, row, mask, known in zip(
            train.groups[batch.query_ids].tolist(),
            listed,
            batch.mask,
            batch.known_positives.tolist(),
            strict=True,
        ):
            negatives = row[mask][1:].tolist()
            assert not set(negatives) & taken[user] and len(set(negatives)) == len(negatives)
            assert set(known) == taken[user]
        assert (batch.labels[:, 0] == 1).all() and (batch.labels[:, 1:] == 0).all()


def test_batches_are_a_function_of_their_place_and_change_with_the_epoch():
    data = catalogue()
    one, other = (data.train_source(32, 4, [RandomNegatives(3)], seed=5) for _ in range(2))
    for _source in (one, other):
        _source.prepare(data.features.side("user"), data.features.side("item"))
    again = other.batch(1, 2)
    assert torch.equal(one.batch(1, 2).index, again.index)
    assert torch.equal(one.batch(1, 2).queries["hist"].values, again.queries["hist"].values)
    rows = {
        epoch: torch.cat([one.batch(epoch, s).query_ids for s in range(one.steps(0))]) for epoch in (0, 1)
    }
    assert not torch.equal(rows[0], rows[1]) and torch.equal(rows[0].sort().values, rows[1].sort().values)
    drawn = {}
    for epoch in (0, 1):
        batches = [one.batch(epoch, step) for step in range(one.steps(0))]
        drawn[epoch] = {
            int(query): set(batch.candidate_ids[places[1:]].tolist())
            for batch in batches
            for query, places in zip(batch.query_ids, batch.index, strict=True)
        }
    assert sum(drawn[0][query] != drawn[1][query] for query in drawn[0]) > len(drawn[0]) / 2


def test_a_user_who_took_everything_has_no_negative():
    rows = pl.DataFrame(
        {"user_id": [1] * 5 + [2] * 3, "item_id": [*range(5), 1, 2, 3], "timestamp": [*range(5), 0, 1, 2]}
    )
    data = Interactions(rows, IDS)
    items = len(data.split("train").candidates)
    full = pl.concat(
        [rows, pl.DataFrame({"user_id": [3] * 7, "item_id": [0, 1, 2, 3, 4, 0, 1], "timestamp": range(7)})]
    )
    source = Interactions(full, IDS).train_source(16, 4, [RandomNegatives(3)])
    batch = source.batch(0, 0)
    of_three = source.judged.groups[batch.query_ids] == 2
    assert items == 5 and batch.mask[of_three].sum() == of_three.sum()  # the positives alone


def test_background_candidates_are_nobodys():
    source = catalogue().train_source(16, 1, [MixedNegatives(20)])
    batch = source.batch(0, 0)
    assert batch.mask.shape == (16, 1) and len(batch.candidate_ids) > len(batch.index.unique())
    assert int(batch.draws.sum()) == 16 + 20


class Reader:
    """Texts' vectors: how long they are, and how many there were."""

    def encode_candidates(self, texts):
        return torch.tensor([[float(len(text)), len(texts)] for text in texts])


def test_an_item_that_train_lacks_has_its_text_and_a_tower_reads_it(tmp_path, monkeypatch):
    """Cold items differ by their texts alone; a saved student knows them too."""
    monkeypatch.setattr("distill.open.open_model", lambda name: Reader())
    title = {"name": "title", "kind": "text", "side": "item", "encoder": "reader"}
    titles = pl.DataFrame({"item_id": [10, 20, 30, 40, 50], "title": ["a", "bb", "ccc", "dddd", "eeeee"]})
    data = Interactions(ROWS, [*IDS, title], items=titles)
    assert data.features.values("item_id") == [10, 20, 30]  # 40 and 50 are dev's and test's
    assert data.features.values("title") == ["a", "bb", "ccc", "dddd", "eeeee"]
    assert data.features.text_vectors("title")[2:].tolist() == [[1, 5], [2, 5], [3, 5], [4, 5], [5, 5]]
    torch.manual_seed(0)
    student = TwoTower(data.features, dim=4)
    catalogue = data.split("test").candidates
    vectors = student.encode_candidates(catalogue)
    cold = [list(catalogue.ids).index(name) for name in ("40", "50")]
    assert catalogue.columns["item_id"][cold].tolist() == [1, 1]
    assert not torch.allclose(vectors[cold[0]], vectors[cold[1]], atol=1e-3)
    student.save_pretrained(tmp_path / "student")
    again = TwoTower.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(again.encode_items(titles), vectors)
