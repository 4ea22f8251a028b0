import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from distill.batch import Columns, Ragged
from distill.data.judged import Judged, TextTable
from distill.errors import DataError, RecipeError
from distill.evaluation import evaluate_model, score_listed
from distill.model import Encoder


class Letters(Encoder):
    """A text's vector counts its letters a, b and c; it remembers what it was asked, and in which mode."""

    dim, provides, reads = 3, frozenset(), Columns()
    represent = save_pretrained = None

    def __init__(self):
        super().__init__()
        self.asked: list[str] = []

    def encode_queries(self, queries, progress=False):
        assert not self.training and not torch.is_grad_enabled()
        self.asked += queries
        return torch.tensor([[float(text.count(letter)) for letter in "abc"] for text in queries])

    encode_candidates = encode_queries


class Reader:
    """Scores a pair by -|difference of lengths|, reading both: it cannot search."""

    def __init__(self):
        self.asked: list[tuple[str, str]] = []

    def score_pairs(self, queries, candidates):
        pairs = list(zip(queries, candidates, strict=True))
        self.asked += pairs
        return torch.tensor([-float(abs(len(q) - len(c))) for q, c in pairs])


def judged(task, queries, candidates, listed, labels, name="toy") -> Judged:
    return Judged(
        task,
        TextTable([f"q{row}" for row in range(len(queries))], queries),
        candidates
        if isinstance(candidates, TextTable)
        else TextTable([*map(str, range(9))][: len(candidates)], candidates),
        Ragged.of(listed),
        torch.tensor(labels, dtype=torch.float32),
        name=name,
    )


def test_an_encoder_searches_the_whole_corpus():
    # Scores of q0 = "aab": 2, 4, 0, 5; of q1 = "c": 0, 0, 3, 1; q2 is not judged, q3 has no positive.
    split = judged(
        "retrieval", ["aab", "c", "a", "b"], ["a", "aa", "ccc", "aabc"], [[1, 2], [3], [], [0]], [2, 1, 1, 0]
    )
    result = evaluate_model(Letters(), split, ["MRR@10", "Recall@2", "MAP"])
    assert result.means == pytest.approx(
        {"MRR@10": 1 / 2, "Recall@2": (1 / 2 + 1) / 2, "MAP": ((1 / 2 + 2 / 4) / 2 + 1 / 2) / 2}
    )
    assert result.per_query["query"].tolist() == ["q0", "q1"]
    assert result.per_query["MRR@10"].tolist() == [0.5, 0.5]
    assert result.left_out == {"no judgement": 1, "no relevant candidate": 1}
    assert (result.queries, result.method) == (2, "exact search over all candidates")


def test_each_distinct_text_is_encoded_once_and_only_what_is_needed():
    model = Letters()
    split = judged("retrieval", ["a", "a", "unjudged"], ["b", "a", "b", "a"], [[0], [1], []], [1, 1])
    evaluate_model(model, split, ["nDCG@10"])
    assert sorted(model.asked) == ["a", "a", "b"]  # the query, and the two candidates


def test_a_model_in_training_is_measured_as_served_and_goes_back_to_training():
    model = Letters().train()
    evaluate_model(model, judged("retrieval", ["a"], ["a"], [[0]], [1]), ["P@1"])
    assert model.training


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_ties_go_to_the_lower_id_even_at_the_end_of_the_list(depth):
    """Equal texts and equal scores: "c" and "d" are alike, "b" scores the same; "a" is worst."""
    table = TextTable(["d", "c", "a", "b"], ["ab", "ab", "", "ba"])
    split = judged("retrieval", ["a"], table, [[1]], [1])
    found = evaluate_model(Letters(), split, [f"Recall@{depth}", f"MRR@{depth}"]).means
    assert found == {f"Recall@{depth}": float(depth >= 2), f"MRR@{depth}": 0.5 * (depth >= 2)}


def test_a_model_that_cannot_search_re_ranks_what_bm25_finds():
    corpus = ["red fish", "blue fish", "green tree", "fish red pond deep"]
    split = judged("retrieval", ["red fish"], corpus, [[0, 3]], [1, 1])
    model = Reader()
    result = evaluate_model(model, split, ["MRR@10", "Recall@10"], rerank=2)
    assert result.method == "first 2 of BM25, re-ranked"
    assert {text for _, text in model.asked} == {"red fish", "fish red pond deep"}
    assert result.means == {"MRR@10": 1.0, "Recall@10": 1.0}
    assert evaluate_model(model, split, ["Recall@10"], rerank=1).means == {"Recall@10": 0.5}


def test_bm25_reads_chinese_and_survives_a_query_without_words():
    split = judged("retrieval", ["红色的鱼", "?"], ["大树", "红鱼"], [[1], [0]], [1, 1])
    assert evaluate_model(Reader(), split, ["R@1"], rerank=1).per_query["R@1"].tolist() == [1.0, 1.0]


def test_an_encoder_may_be_the_first_stage():
    split = judged("retrieval", ["aa"], ["bb", "aaaa", "a"], [[2]], [1])
    result = evaluate_model(Reader(), split, ["MRR@10"], rerank=2, rerank_from=Letters())
    assert result.method == "first 2 of Letters, re-ranked"
    assert result.means == {"MRR@10": 1.0}  # "a" is nearer in length than "aaaa"; "bb" was not found


def test_a_first_stage_that_ends_within_ties_takes_the_lower_ids():
    table = TextTable(["d", "b", "a"], ["ab", "ba", "ab"])  # all three score the same
    split = judged("retrieval", ["aa", "a"], table, [[0], [1]], [1, 1])
    found = evaluate_model(Reader(), split, ["R@9"], rerank=2, rerank_from=Letters())
    assert found.per_query["R@9"].tolist() == [0.0, 1.0]  # "d" is third


@pytest.mark.parametrize("model", [Letters(), Reader()])
def test_the_listed_candidates_are_put_in_order(model):
    # Letters scores q0's list 1, 4; Reader scores it -1, -2. The text "a" of q1 is judged and alone.
    split = judged("rerank", ["aa", "a", "b"], ["a", "aaaa", "z"], [[0, 1], [0], [2]], [1, 0, 1, 0])
    result = evaluate_model(model, split, ["MRR"])
    assert result.per_query["MRR"].tolist() == ([0.5, 1.0] if isinstance(model, Letters) else [1.0, 1.0])
    assert result.left_out == {"no judgement": 0, "no relevant candidate": 1}


def test_a_candidate_listed_twice_counts_once():
    split = judged("rerank", ["a"], ["aa", "a"], [[0, 0, 1, 1]], [0, 0, 0, 1])
    assert evaluate_model(Letters(), split, ["MRR"]).means == {"MRR": 0.5}


@pytest.mark.parametrize("model", [Letters(), Reader()])
def test_scores_of_listed_pairs_are_aligned_and_each_distinct_pair_is_scored_once(model):
    split = judged("pairs", ["a", "aab", "a"], ["a", "ab"], [[0, 1], [1], [0]], [0, 0, 0, 0])
    expected = [1, 1, 3, 1] if isinstance(model, Letters) else [0, -1, -1, 0]
    model.asked.clear()
    assert score_listed(model, split).tolist() == expected
    assert len(model.asked) == len(set(model.asked)) + isinstance(
        model, Letters
    )  # "a" as query and as candidate


def test_graded_pairs_are_measured_by_correlation():
    split = judged("pairs", ["a", "aa", "aaa"], ["a"], [[0], [0], [0]], [0.5, 2.5, 5.0])
    result = evaluate_model(Letters(), split, ["Spearman"])
    assert result.means == pytest.approx({"Spearman": 1.0})
    assert result.per_query["score"].tolist() == [1.0, 2.0, 3.0]
    assert result.queries == 3


class Sorter:
    """Logits of three classes of a pair: no, one or more letters more in the candidate."""

    def score_pairs(self, queries, candidates):
        more = [min(2, max(0, len(c) - len(q))) for q, c in zip(queries, candidates, strict=True)]
        return 3.0 * torch.nn.functional.one_hot(torch.tensor(more), 3).float()


def test_pairs_of_several_classes_are_decided_by_the_likeliest_and_need_no_development_split():
    split = judged("pairs", ["a", "aa", "a"], ["a", "ab", "abcd"], [[0], [2], [1]], [0, 2, 2])
    result = evaluate_model(Sorter(), split, ["Accuracy", "F1"])
    assert result.means["Accuracy"] == pytest.approx(2 / 3) and result.threshold is None
    assert result.per_query["Accuracy"].tolist() == [1, 1, 0]
    assert result.per_query["score"].tolist() == [0, 2, 1]
    assert result.method == "the likeliest class per pair"
    with pytest.raises(RecipeError, match="AUC is not defined for pairs of more than two classes"):
        evaluate_model(Sorter(), split, ["Accuracy", "AUC"])


def test_binary_pairs_are_decided_by_a_threshold_of_the_development_split():
    dev = judged("pairs", ["a", "aaaa"], ["a"], [[0], [0]], [0, 1])  # scores 1 and 4: threshold 2.5
    test = judged("pairs", ["aa", "aaa", "a"], ["a"], [[0], [0], [0]], [1, 1, 0])  # scores 2, 3, 1
    result = evaluate_model(Letters(), test, ["AUC", "Accuracy", "F1"], threshold_from=dev)
    assert result.threshold == 2.5
    assert result.means == pytest.approx({"AUC": 1.0, "Accuracy": 2 / 3, "F1": 2 / 3})
    assert result.per_query["Accuracy"].tolist() == [0.0, 1.0, 1.0]


def test_the_result_is_written_whole_and_as_plain_types(tmp_path, monkeypatch):
    result = evaluate_model(Letters(), judged("pairs", ["a", "b"], ["c"], [[0], [0]], [1, 2]), ["Spearman"])
    assert math.isnan(result.means["Spearman"])
    assert json.loads(json.dumps(result.to_json(), allow_nan=False)) == {
        "name": "toy",
        "task": "pairs",
        "method": "a score per pair",
        "queries": 2,
        "threshold": None,
        "asked": None,
        "metrics": {"Spearman": None},
        "left_out": {},
    }


def test_what_cannot_be_measured_is_said_before_the_work():
    pairs = judged("pairs", ["a"], ["a"], [[0]], [1])
    search = judged("retrieval", ["a"], ["a"], [[0]], [1])
    model = Letters()
    with pytest.raises(RecipeError, match="Did you mean 'nDCG@10'"):
        evaluate_model(model, search, ["NDGC@10"])
    with pytest.raises(RecipeError, match="not a metric of pairs"):
        evaluate_model(model, pairs, ["nDCG@10"])
    with pytest.raises(RecipeError, match="threshold_from"):
        evaluate_model(model, pairs, ["Accuracy"])
    with pytest.raises(DataError, match="toy has texts only"):
        evaluate_model(model, judged("texts", ["a"], [], [[]], []), ["nDCG@10"])
    with pytest.raises(DataError, match="toy: no query has a relevant candidate"):
        evaluate_model(model, judged("rerank", ["a"], ["a"], [[0]], [0]), ["nDCG@10"])
    with pytest.raises(DataError, match="toy has no labels"):
        evaluate_model(
            model, Judged("rerank", *[TextTable(["x"], ["a"])] * 2, Ragged.of([[0]]), name="toy"), ["AP"]
        )
    with pytest.raises(TypeError, match="object can neither"):
        evaluate_model(object(), search, ["nDCG@10"])
    assert model.asked == []


def test_on_a_real_collection_the_search_equals_bm25_of_everything_re_ranked(data_root):
    """Re-ranking the whole corpus with the encoder's own scores is a search by another road."""
    corpus = pd.read_parquet(data_root / "cranfield/corpus.parquet")
    asked = pd.read_parquet(data_root / "cranfield/queries.parquet").head(40)
    qrels = pd.read_parquet(data_root / "cranfield/qrels.parquet").query("score > 0")
    row = {str(name): place for place, name in enumerate(corpus["_id"])}
    by_query = qrels.groupby(qrels["query-id"].astype(str))["corpus-id"]
    relevant = {query: [row[str(name)] for name in names] for query, names in by_query}
    listed = [relevant.get(str(query), []) for query in asked["_id"]]
    split = Judged(
        "retrieval",
        TextTable(asked["_id"].astype(str).tolist(), asked["text"].tolist()),
        TextTable(corpus["_id"].astype(str).tolist(), (corpus["title"] + " " + corpus["text"]).tolist()),
        Ragged.of(listed),
        torch.ones(sum(map(len, listed))),
    )

    class Both(Letters):
        def score_pairs(self, queries, candidates):
            return (self.encode_queries(queries) * self.encode_queries(candidates)).sum(dim=1)

    reader = Both().eval()
    searched = evaluate_model(reader, split, ["nDCG@10", "MAP"], top_k=len(corpus))
    alone = type("Reader", (), {"score_pairs": staticmethod(reader.score_pairs)})()
    reranked = evaluate_model(alone, split, ["nDCG@10", "MAP"], rerank=len(corpus))
    pd.testing.assert_frame_equal(searched.per_query, reranked.per_query)
    assert 0 < searched.means["MAP"] < 1


def test_a_threshold_between_neighbouring_scores_decides_each_pair_as_the_mean_does():
    """Halfway between two neighbours of float32 there is none: compared as such, it would be one of them."""
    low = np.nextafter(np.float32(0.1), np.float32(1))
    scores = {"a": float(low), "b": float(np.nextafter(low, np.float32(1)))}

    class Table:
        def score_pairs(self, queries, candidates):
            return torch.tensor([scores[text] for text in candidates])

    split = judged("pairs", ["x", "y"], ["a", "b"], [[0], [1]], [0, 1])
    result = evaluate_model(Table(), split, ["Accuracy"], threshold_from=split)
    assert result.means["Accuracy"] == result.per_query["Accuracy"].mean() == 1.0
