"""The data sets as they are published: their known sizes, and batches from them."""

import pytest
import torch

from distill.data import BM25Negatives, Groups, RandomNegatives, Retrieval, TextPairs, TextSource, summary

pytestmark = pytest.mark.slow


def sizes(data, split):
    told = summary(data.split(split))
    return told["queries"], told["candidates"], told["listed"], told["positives"]


def test_scifact(data_root):
    root = data_root / "scifact"
    data = Retrieval(
        root / "corpus.parquet",
        root / "queries.parquet",
        root / "qrels_train.parquet",
        test=root / "qrels_test.parquet",
    )
    assert sizes(data, "train") == (809, 5183, 919, 919) and sizes(data, "test") == (300, 5183, 339, 339)
    source = data.train_source(64, 8, [BM25Negatives(4), RandomNegatives(4)], seed=1)
    batch = source.batch(0, 0)
    assert batch.sizes[:2] == (64, 8) and batch.mask.all() and (batch.labels.sum(1) == 1).all()
    known = [set(row) for row in batch.known_positives.tolist()]
    rows = batch.candidate_ids[batch.index].tolist()
    assert all(row[0] in k and not k & set(row[1:]) for row, k in zip(rows, known, strict=True))


def test_cranfield_has_two_empty_documents_and_judged_irrelevant_ones(data_root):
    root = data_root / "cranfield"
    tables = [root / f"{name}.parquet" for name in ("corpus", "queries", "qrels")]
    assert sizes(Retrieval(*tables, drop_empty=True), "train") == (225, 1398, 1836, 1611)


def test_wikiqa(data_root):
    root = data_root / "wikiqa"
    names = {"query": "Question", "candidate": "Sentence", "label": "Label", "query_id": "QuestionID"}
    data = Groups(
        train=root / "train_tokenized.parquet",
        dev={"path": root / "dev.parquet", "columns": names},
        test={"path": root / "test.parquet", "columns": names},
        columns={"query": "question", "candidate": "sentence"},
    )
    assert [sizes(data, name)[0] for name in data.splits] == [2118, 296, 633]
    assert [sizes(data, name)[2:] for name in data.splits] == [(20360, 1040), (2733, 140), (6165, 293)]
    source = TextSource(data.split("train"), 128, 8)
    labels = torch.cat([source.batch(0, step).labels for step in range(source.steps(0))])
    assert labels.shape == (2118, 8) and int(labels[:, 0].sum()) == 873 and not labels[:, 1:].any()


@pytest.mark.parametrize(
    ("name", "columns", "scale", "rows"),
    [
        ("stsb", {"text1": "sentence1", "text2": "sentence2", "label": "score"}, [0, 5], 5749),
        (
            "sick",
            {"text1": "sentence_A", "text2": "sentence_B", "label": "relatedness_score"},
            [1, 5],
            4500,
        ),
    ],
)
def test_pairs(data_root, name, columns, scale, rows):
    judged = TextPairs(data_root / name / "train.parquet", columns=columns, label_scale=scale).split("train")
    assert len(judged.queries) == rows and judged.labels.min() == 0 and judged.labels.max() == 1
    assert TextSource(judged, 32).batch(0, 0).sizes[:2] == (32, 1)


def test_pairs_with_words_for_labels(data_root):
    classes = ["not_entailment", "entailment"]
    columns = {"text1": "sentence1", "text2": "sentence2"}
    judged = TextPairs(data_root / "rte" / "train.parquet", columns=columns, classes=classes).split("train")
    assert summary(judged)["listed"] == 2490 and 0.4 < judged.labels.mean() < 0.6
