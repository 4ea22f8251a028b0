"""What the data sets make of their tables: who lists whom, with which label, in which split."""

import pandas as pd
import pyarrow as pa
import pytest
import torch

from distill.data import Groups, Retrieval, TextPairs, Texts, summary
from distill.data.splits import choose, given_splits
from distill.errors import DataError

CORPUS = pa.table({"_id": ["d1", "d2", "d3"], "title": ["One", "", "Three"], "text": ["first", "second", ""]})
QUERIES = pa.table({"_id": ["q1", "q2", "q3"], "text": ["a", "b", "c"]})


def qrels(*rows):
    return pd.DataFrame(rows, columns=["query-id", "corpus-id", "score"])


def listed(judged):
    """{query text: {candidate text: label}}."""
    rows = judged.listed.tolist()
    labels = iter(judged.labels.tolist())
    texts = judged.candidates.texts
    return {
        q: {texts[c]: next(labels) for c in row} for q, row in zip(judged.queries.texts, rows, strict=True)
    }


def test_retrieval_joins_the_title_and_reads_who_is_relevant():
    data = Retrieval(CORPUS, QUERIES, qrels(("q2", "d3", 0), ("q1", "d1", 1), ("q2", "d2", 2)))
    judged = data.split("train")
    assert data.splits == ("train",) and judged.task == "retrieval"
    assert judged.candidates.texts == ["One first", "second", "Three"]
    assert listed(judged) == {"a": {"One first": 1.0}, "b": {"Three": 0.0, "second": 2.0}}
    assert summary(judged) == {
        "queries": 2,
        "candidates": 3,
        "listed": 3,
        "positives": 2,
        "words per query": 1.0,
        "words per candidate": 1.3,
    }


def test_retrieval_splits_share_one_corpus():
    one, two = qrels(("q1", "d1", 1)), qrels(("q2", "d2", 1))
    for data in (
        Retrieval(CORPUS, QUERIES, {"train": one, "test": two}),
        Retrieval(CORPUS, QUERIES, one, test=two),
    ):
        assert data.splits == ("train", "test")
        assert data.split("test").queries.ids == ["q2"]
        assert data.split("test").candidates is data.split("train").candidates
        assert data.split("test") is data.split("test")
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        data.split("dev")


def test_qrels_may_leave_out_the_score_and_repeat_a_row():
    pairs = pa.table({"query-id": ["q1", "q1"], "corpus-id": ["d1", "d1"]})
    assert listed(Retrieval(CORPUS, QUERIES, pairs).split("train")) == {"a": {"One first": 1.0}}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("q9", "d1", 1)], r"column 'query-id', row 0 .*no query has the id 'q9' in queries"),
        ([("q1", "d1", 1), ("q1", "d9", 1)], r"column 'corpus-id', row 1 .*no document has the id 'd9'"),
        ([("q1", "d1", 1), ("q1", "d1", 0)], "query 'q1' and document 'd1' are judged twice"),
        ([("q1", "d1", float("nan"))], "row 0 .*not a finite number"),
    ],
)
def test_qrels_that_do_not_fit_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        Retrieval(CORPUS, QUERIES, qrels(*rows)).split("train")


def test_a_document_without_text_is_refused_or_left_out():
    corpus = pa.table({"_id": ["d1", "d2"], "text": [" ", "second"]})
    rows = qrels(("q1", "d1", 1), ("q2", "d2", 1))
    with pytest.raises(DataError, match=r"row 0 .*the document 'd1' has no text.*drop_empty: true"):
        Retrieval(corpus, QUERIES, rows).split("train")
    judged = Retrieval(corpus, QUERIES, rows, drop_empty=True).split("train")
    assert judged.candidates.ids == ["d2"] and judged.queries.ids == ["q2"]


def test_duplicate_ids_and_empty_queries_are_refused():
    with pytest.raises(DataError, match="the id 'd1' stands there for the second time"):
        Retrieval(pa.table({"_id": ["d1", "d1"], "text": ["x", "y"]}), QUERIES, qrels(("q1", "d1", 1))).split(
            "train"
        )
    with pytest.raises(DataError, match=r"queries.*row 0.*the text is empty"):
        Retrieval(CORPUS, pa.table({"_id": ["q1"], "text": [""]}), qrels(("q1", "d1", 1))).split("train")


def test_queries_held_out_are_in_one_split_only_and_stay_there():
    queries = pa.table({"_id": [str(i) for i in range(400)], "text": [f"query {i}" for i in range(400)]})
    rows = qrels(*((str(i), "d1", 1) for i in range(400)))
    data = Retrieval(CORPUS, queries, rows, dev=0.2, test=0.1)
    parts = {name: set(data.split(name).queries.ids) for name in data.splits}
    assert len(parts["train"] | parts["dev"] | parts["test"]) == 400 == sum(map(len, parts.values()))
    assert 50 < len(parts["dev"]) < 110 and 20 < len(parts["test"]) < 65
    fewer = Retrieval(CORPUS, queries.slice(0, 200), rows.head(200), dev=0.2, test=0.1)
    assert set(fewer.split("dev").queries.ids) == {i for i in parts["dev"] if int(i) < 200}
    other = Retrieval(CORPUS, queries, rows, dev=0.2, test=0.1, seed=1)
    assert set(other.split("dev").queries.ids) != parts["dev"]


def test_shares_that_cannot_be_are_refused():
    for given in (
        {"train": "x", "dev": 1.5},
        {"train": "x", "dev": 0},
        {"train": "x", "dev": 0.5, "test": 0.5},
    ):
        with pytest.raises(ValueError, match="share"):
            given_splits(given)
    with pytest.raises(ValueError, match="no train table"):
        given_splits({"dev": 0.1, "test": "x"})
    with pytest.raises(ValueError, match="no split is given"):
        given_splits({"train": None})
    with pytest.raises(ValueError, match="given twice"):
        Retrieval(CORPUS, QUERIES, {"train": "x", "dev": "y"}, dev="z")
    assert sum(sum(choose(["a", "b", "c"], name, {"dev": 0.4}, 0)) for name in ("train", "dev")) == 3


ROWS = pa.table(
    {
        "question": ["a", "b", "a", "a"],
        "sentence": ["x", "x", "y", "z"],
        "label": [0, 1, 1, 0],
        "cross": [0.1, 0.2, 0.3, 0.4],
    }
)
COLUMNS = {"query": "question", "candidate": "sentence"}


def test_groups_gather_the_rows_of_a_query():
    judged = Groups(train=ROWS, columns=COLUMNS, scores={"cross": "cross"}).split("train")
    assert listed(judged) == {"a": {"x": 0.0, "y": 1.0, "z": 0.0}, "b": {"x": 1.0}}
    torch.testing.assert_close(judged.scores["cross"], torch.tensor([0.1, 0.3, 0.4, 0.2]))
    assert judged.task == "rerank" and judged.candidates.texts == ["x", "y", "z"]


def test_groups_by_query_id():
    rows = ROWS.append_column("qid", pa.array([1, 2, 3, 3]))
    judged = Groups(train=rows, columns={**COLUMNS, "query_id": "qid"}).split("train")
    assert judged.queries.texts == ["a", "b", "a"] and judged.listed.tolist() == [[0], [0], [1, 2]]
    with pytest.raises(DataError, match=r"'question', row 1 .*query_id '1' has another text"):
        rows = ROWS.append_column("qid", pa.array([1, 1, 3, 3]))
        Groups(train=rows, columns={**COLUMNS, "query_id": "qid"}).split("train")


def test_a_split_may_have_columns_of_its_own_and_do_without_teachers():
    test = pa.table({"Q": ["a"], "S": ["x"], "L": [1]})
    spec = {"path": test, "columns": {"query": "Q", "candidate": "S", "label": "L"}}
    data = Groups(train=ROWS, test=spec, columns=COLUMNS, scores={"cross": "cross"})
    assert listed(data.split("test")) == {"a": {"x": 1.0}} and data.split("test").scores == {}
    with pytest.raises(DataError, match="there is no column 'crosss'"):
        Groups(train=ROWS, columns=COLUMNS, scores={"cross": "crosss"}).split("train")


def test_groups_of_positives_only_can_be_searched():
    data = Groups(train=ROWS, dev=0.5, columns={**COLUMNS, "label": None}, task="retrieval")
    judged = [data.split(name) for name in data.splits if name]
    assert [j.task for j in judged] == ["retrieval"] * 2
    assert all(bool((j.labels == 1).all()) for j in judged)


def test_a_score_that_is_no_number_is_refused():
    rows = pa.table({"query": ["a", "a"], "candidate": ["x", "y"], "label": [1, 0], "c": [0.5, float("nan")]})
    with pytest.raises(DataError, match=r"column 'c', row 1 .*nan is not a finite number"):
        Groups(train=rows, scores={"cross": "c"}).split("train")


PAIRS = pa.table({"a": ["x", "x", "y"], "b": ["p", "q", "r"], "label": [0.0, 5.0, 2.5]})
NAMES = {"text1": "a", "text2": "b"}


def test_pairs_are_scaled_and_stay_rows():
    judged = TextPairs(train=PAIRS, columns=NAMES, label_scale=[0, 5]).split("train")
    assert judged.queries.texts == ["x", "x", "y"] and judged.listed.tolist() == [[0], [1], [2]]
    assert judged.labels.tolist() == [0.0, 1.0, 0.5] and judged.task == "pairs"
    assert TextPairs(train=PAIRS, columns={**NAMES, "label": None}).split("train").labels is None


def test_pairs_bring_the_scores_of_a_teacher():
    rows = pa.table({"text1": ["x", "y"], "text2": ["a", "b"], "label": [0.0, 1.0], "cross": [2.5, -1.0]})
    judged = TextPairs(train=rows, scores={"cross": "cross"}).split("train")
    assert judged.scores["cross"].tolist() == [2.5, -1.0]
    wrong = rows.set_column(3, "cross", pa.array([2.5, float("nan")]))
    with pytest.raises(DataError, match=r"'cross', row 1 .*not a finite number"):
        TextPairs(train=wrong, scores={"cross": "cross"}).split("train")


def test_pair_labels_may_be_words():
    rows = pa.table({"text1": ["x"] * 3, "text2": ["a", "b", "c"], "label": ["no", "yes", "perhaps"]})
    judged = TextPairs(train=rows, classes=["no", "perhaps", "yes"]).split("train")
    assert judged.labels.tolist() == [0.0, 2.0, 1.0]
    with pytest.raises(DataError, match=r"row 2 .*'perhaps' is none of the classes no, yes"):
        TextPairs(train=rows, classes=["no", "yes"]).split("train")


def test_words_are_labels_of_groups_too_and_the_first_is_not_relevant():
    rows = pa.table({"query": ["a", "a"], "candidate": ["x", "y"], "label": ["no", "yes"]})
    assert Groups(train=rows, classes=["no", "yes"]).split("train").labels.tolist() == [0.0, 1.0]
    with pytest.raises(DataError, match=r"row 1 .*'yes' is none of the classes no, maybe"):
        Groups(train=rows, classes=["no", "maybe"]).split("train")
    with pytest.raises(ValueError, match="two labels or more"):
        Groups(train=rows, classes=["yes"])


def test_labels_outside_their_scale_are_refused():
    """Similarities of 0 to 5 taken for probabilities would train without a word."""
    with pytest.raises(DataError, match=r"row 1 .*5 lies outside 0 to 1.*label_scale"):
        TextPairs(train=PAIRS, columns=NAMES).split("train")
    with pytest.raises(ValueError, match="label_scale must be"):
        TextPairs(train=PAIRS, label_scale=[5, 0])
    with pytest.raises(ValueError, match="columns has no key"):
        TextPairs(train=PAIRS, columns={"query": "a"})


def test_texts_are_distinct_and_not_empty():
    table = pa.table({"t": ["One. Two", "", "One."], "u": ["z", "Two", None]})
    judged = Texts([table, {"path": ROWS, "columns": ["sentence"]}], columns=["t", "u"]).split("train")
    assert judged.candidates.texts == ["One. Two", "One.", "z", "Two", "x", "y"]
    assert judged.task == "texts" and len(judged.queries) == 0 and judged.labels is None
    cut = Texts(table, columns=["t"], side="queries", sentences=True).split("train")
    assert cut.queries.texts == ["One.", "Two"] and len(cut.candidates) == 0 and len(cut.listed) == 2


def test_columns_in_a_list_are_one_text():
    table = pa.table({"title": ["On x", None, "On y"], "text": ["It is x.", "No title.", ""]})
    texts = Texts(table, columns=[["title", "text"], "title"]).split("train").candidates.texts
    assert texts == ["On x It is x.", "No title.", "On y", "On x"]


def test_crops_are_new_runs_of_a_texts_words():
    table = pa.table({"text": ["a b c d e f g h", "c d", "x"]})
    texts = Texts(table, crops=20, crop_words=(2, 3)).split("train").candidates.texts
    assert texts[:3] == ["a b c d e f g h", "c d", "x"] and len(set(texts)) == len(texts) > 5
    assert all(2 <= len(piece.split()) <= 3 and piece in "a b c d e f g h" for piece in texts[3:])
    again, other = (Texts(table, crops=20, crop_words=(2, 3), seed=seed).split("train") for seed in (0, 1))
    assert again.candidates.texts == texts != other.candidates.texts
    for wrong in ({"crops": -1}, {"crops": 1, "crop_words": (3, 2)}, {"crops": 1, "crop_words": (0, 2)}):
        with pytest.raises(ValueError, match="crops must be 0 or more"):
            Texts(table, **wrong)


def test_a_limit_draws_by_the_seed():
    table = pa.table({"text": [str(i) for i in range(100)]})
    some = [Texts(table, limit=10, seed=seed).split("train").candidates.texts for seed in (0, 0, 1)]
    assert len(some[0]) == 10 and some[0] == some[1] != some[2]
    with pytest.raises(DataError, match="hold no text at all"):
        Texts(pa.table({"text": ["", None]})).split("train")
