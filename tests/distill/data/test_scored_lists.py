"""Scores made elsewhere: the layouts of three tools become the same lists, and bad rows are named."""

import json

import datasets
import pyarrow as pa
import pytest

from distill.data import ScoredLists
from distill.errors import DataError

FLAG = [
    {"query": "a", "pos": ["x"], "neg": ["y", "z"], "pos_scores": [9.5], "neg_scores": [1, -2.25]},
    {"query": "b", "pos": ["y", "w"], "neg": [], "pos_scores": [3.0, 2.0], "neg_scores": [], "prompt": "p"},
]
SBERT = {
    "query": ["a", "b"],
    "positive": ["x", "y"],
    "negative_1": ["y", "x"],
    "negative_2": ["z", "z"],
    "label": [[9.5, 1.0, -2.25], [3.0, 2.0, 0.5]],
}
PYLATE = {
    "train": [
        {"query_id": "1", "document_ids": ["7", "8"], "scores": [0.5, 0.25]},
        {"query_id": "0", "document_ids": ["9"], "scores": [1.0]},
    ],
    "queries": [
        {"query_id": "0", "text": "a"},
        {"query_id": "1", "text": "b"},
        {"query_id": "2", "text": "c"},
    ],
    "documents": [{"document_id": str(i), "text": f"d{i}"} for i in range(6, 10)],
}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def told(judged, teacher="cross"):
    """Per query its text and [candidate, label, score] in order."""
    labels = [None] * len(judged.listed.values) if judged.labels is None else judged.labels.tolist()
    rows = list(zip(judged.listed.values.tolist(), labels, judged.scores[teacher].tolist(), strict=True))
    cuts = judged.listed.offsets.tolist()
    return [
        (text, [(judged.candidates.texts[row], label, score) for row, label, score in rows[start:end]])
        for text, start, end in zip(judged.queries.texts, cuts[:-1], cuts[1:], strict=True)
    ]


def pylate(**changes):
    tables = {name: pa.Table.from_pylist(rows) for name, rows in {**PYLATE, **changes}.items()}
    return ScoredLists(format="pylate", teacher="cross", **tables)


def test_the_jsonl_of_flag_embedding(tmp_path):
    data = ScoredLists(jsonl(tmp_path / "train.jsonl", FLAG), "flag_embedding", teacher="cross")
    assert told(data.split("train")) == [
        ("a", [("x", 1.0, 9.5), ("y", 0.0, 1.0), ("z", 0.0, -2.25)]),
        ("b", [("y", 1.0, 3.0), ("w", 1.0, 2.0)]),
    ]
    assert data.teachers == ("cross",) and data.split("train").candidates.texts == ["x", "y", "z", "w"]


def test_flag_embedding_without_scores_has_labels_only(tmp_path):
    rows = [{key: row[key] for key in ("query", "pos", "neg")} for row in FLAG]
    path = jsonl(tmp_path / "train.jsonl", rows)
    judged = ScoredLists(path).split("train")
    assert judged.labels.tolist() == [1, 0, 0, 1, 1] and judged.scores == {}
    with pytest.raises(DataError, match="there is no column 'pos_scores'"):
        ScoredLists(path, teacher="cross").split("train")


def test_columns_of_sentence_transformers():
    data = ScoredLists(datasets.Dataset.from_dict(SBERT), "sentence_transformers", teacher="cross")
    assert told(data.split("train")) == [
        ("a", [("x", 1.0, 9.5), ("y", 0.0, 1.0), ("z", 0.0, -2.25)]),
        ("b", [("y", 1.0, 3.0), ("x", 0.0, 2.0), ("z", 0.0, 0.5)]),
    ]


def test_a_list_column_of_sentence_transformers_and_other_names():
    rows = {
        "gold": [[2.0, 1.0], [0.5]],
        "docs": [["x", "y"], ["z"]],
        "question": ["a", "b"],
    }
    columns = {"query": "question", "scores": "gold"}
    data = ScoredLists(pa.table(rows), "sentence_transformers", teacher="cross", columns=columns)
    assert told(data.split("train")) == [
        ("a", [("x", None, 2.0), ("y", None, 1.0)]),
        ("b", [("z", None, 0.5)]),
    ]
    with pytest.raises(DataError, match="there is no column 'golden'; it has gold, docs, question"):
        columns = {"query": "question", "scores": "golden"}
        ScoredLists(pa.table(rows), "sentence_transformers", "cross", columns=columns).split("train")


@pytest.mark.parametrize("written", [lambda x: x, str, json.dumps], ids=["lists", "python", "json"])
def test_the_three_tables_of_pylate(written):
    """Lists may be written as text, as its own reader allows."""
    train = [{k: v if k == "query_id" else written(v) for k, v in row.items()} for row in PYLATE["train"]]
    judged = pylate(train=train).split("train")
    assert told(judged) == [("b", [("d7", None, 0.5), ("d8", None, 0.25)]), ("a", [("d9", None, 1.0)])]
    assert judged.candidates.texts == ["d7", "d8", "d9"]  # only what is listed


def test_ids_of_pylate_may_be_numbers():
    train = [{"query_id": 1, "document_ids": [7, 8], "scores": [0.5, 0.25]}]
    queries = [{"query_id": 1, "text": "b"}]
    documents = [{"document_id": i, "text": f"d{i}"} for i in range(6, 10)]
    judged = pylate(train=train, queries=queries, documents=documents).split("train")
    assert told(judged) == [("b", [("d7", None, 0.5), ("d8", None, 0.25)])]


def test_a_share_of_the_queries_is_held_out_without_scores():
    rows = [{**FLAG[0], "query": f"q{i}"} for i in range(60)]
    data = ScoredLists(pa.Table.from_pylist(rows), teacher="cross", dev=0.25, seed=2)
    train, dev = data.split("train"), data.split("dev")
    assert sorted(train.queries.texts + dev.queries.texts) == sorted(row["query"] for row in rows)
    assert (
        5 < len(dev.queries) < 25
        and dev.scores == {}
        and len(train.scores["cross"]) == 3 * len(train.queries)
    )


BAD = {
    "not a number": ({"pos_scores": [float("nan")]}, r"'pos_scores', row 1 .*nan at place 0 .*not a finite"),
    "infinite": ({"neg_scores": [1.0, float("inf")]}, r"'neg_scores', row 1 .*inf at place 1 .*not a finite"),
    "missing": ({"neg_scores": [1.0, None]}, r"'neg_scores', row 1 .*None at place 1"),
    "margins": ({"neg_scores": [1.0]}, r"'neg_scores', row 1 .*1 scores for 2 candidates.*Margins"),
    "too many": ({"pos_scores": [1.0, 2.0]}, r"'pos_scores', row 1 .*2 scores for 1 candidates"),
    "no list": ({"neg": "words"}, r"'neg', row 1 .*'words' is not a list"),
    "empty text": ({"neg": ["y", " "]}, r"'neg', row 1 .*' ' at place 1 of the list is no text"),
    "nothing listed": (
        {"pos": [], "neg": [], "pos_scores": [], "neg_scores": []},
        r"'pos', row 1 .*lists no candidate",
    ),
}


@pytest.mark.parametrize("spoil", BAD)
def test_a_bad_row_of_flag_embedding_is_named(spoil, tmp_path):
    changes, message = BAD[spoil]
    path = jsonl(tmp_path / "train.jsonl", [FLAG[0], {**FLAG[0], **changes}])
    with pytest.raises(DataError, match=message) as error:
        ScoredLists(path, teacher="cross").split("train")
    assert str(error.value).startswith(path)


def test_scores_of_sentence_transformers_that_are_no_lists_or_margins_are_refused():
    for label, message in (
        ([0.5, 0.25], r"'label', row 0 .*0.5 is not a list"),
        ([[1.0, 2.0], [1.0, 2.0]], r"'label', row 0 .*2 scores for 3 candidates.*Margins are not enough"),
    ):
        with pytest.raises(DataError, match=message):
            ScoredLists(pa.table({**SBERT, "label": label}), "sentence_transformers", "cross").split("train")
    bare = pa.table({k: v for k, v in SBERT.items() if k != "label"})
    with pytest.raises(DataError, match="no column has scores"):
        ScoredLists(bare, "sentence_transformers", "cross").split("train")
    numbered = pa.table({**SBERT, "rank": [1, 2]})
    with pytest.raises(DataError, match="'rank' holds int64, not text"):
        ScoredLists(numbered, "sentence_transformers", "cross").split("train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": [{"query_id": "1", "document_ids": ["7", "99"], "scores": [1.0, 2.0]}]},
            r"'document_ids', row 0 .*there is no document_id '99' in",
        ),
        (
            {"train": [{"query_id": "55", "document_ids": ["7"], "scores": [1.0]}]},
            r"'query_id', row 0 .*there is no query_id '55' in",
        ),
        (
            {"train": [{"query_id": "1", "document_ids": ["7"], "scores": [float("nan")]}]},
            r"'scores', row 0 .*nan at place 0",
        ),
        ({"documents": PYLATE["documents"] * 2}, r"the id '6' stands there for the second time"),
        ({"queries": [{"query_id": "1", "text": ""}]}, r"'text', row 0 .*the text is empty"),
    ],
)
def test_a_bad_row_of_pylate_is_named(changes, message):
    with pytest.raises(DataError, match=message):
        pylate(**changes).split("train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "flagembedding"}, "format must be one of flag_embedding, sentence_transformers, pylate"),
        ({"format": "pylate"}, "pylate takes both tables, the others neither"),
        ({"queries": "x.jsonl"}, "pylate takes both tables, the others neither"),
        ({"columns": {"scores": "s"}}, r"columns has no key \['scores'\]; flag_embedding takes query, pos"),
        ({"task": "pairs"}, "task must be rerank or retrieval"),
        ({"train": None}, "no split is given"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScoredLists(**{"train": "train.jsonl", **arguments})
