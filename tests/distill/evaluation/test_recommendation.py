"""Evaluation where queries are users and candidates items: what was seen, context, users, references."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit
from torch import Tensor

from distill.batch import Columns, Ragged
from distill.data.judged import Judged, Table
from distill.errors import DataError, RecipeError
from distill.evaluation import check_measurable, compare, evaluate_model, evaluate_reference, score_listed
from distill.measure import measure, why_not
from distill.settings import EvaluateSettings


@dataclass(frozen=True)
class Numbers(Table):
    """Rows of features: as vectors, they are their own encoding."""

    ids: list[str]
    rows: Tensor  # [n, D]

    @property
    def same(self) -> Tensor:
        _, place = self.rows.unique(dim=0, return_inverse=True)
        first = torch.full((len(self.rows),), len(self.rows)).scatter_reduce(
            0, place, torch.arange(len(self.rows)), "amin"
        )
        return first[place]

    def take(self, rows: Tensor) -> Tensor:
        return self.rows[rows]

    def keys(self) -> np.ndarray:
        raise NotImplementedError


class Towers:
    """Vectors are the rows; scores as served are twice their products."""

    search = "dot"

    def scale(self) -> float:
        return 2.0

    def encode_queries(self, queries, progress=False):
        return queries.float()

    encode_candidates = encode_queries


class Ranker:
    """Reads user and item together; with ``context``, adds that feature of the pair."""

    def __init__(self, *context: str):
        self.reads = Columns(pair=[SimpleNamespace(key=name) for name in context])
        self.provides, self.measurable = frozenset({"scores"}), True
        self.asked: list[tuple[int, list[str]]] = []

    def score_pairs(self, queries, candidates, pair):
        self.asked.append((len(queries), sorted(pair)))
        scores = -(queries - candidates).abs().sum(dim=1)
        return scores + sum(pair[column.key] for column in self.reads.pair)


def judged(task="retrieval", users=((1.0,),), items=((3.0,), (2.0,), (1.0,), (0.0,)), **others) -> Judged:
    return Judged(
        task,
        Numbers([f"u{row}" for row in range(len(users))], torch.tensor(users)),
        Numbers([f"i{row}" for row in range(len(items))], torch.tensor(items)),
        name="toy",
        **others,
    )


def test_a_search_leaves_out_what_a_user_has_seen():
    """Everybody would be shown i0, i1, i2, i3 in this order; two users alike have seen other things."""
    split = judged(
        users=[[1.0]] * 3,
        listed=Ragged.of([[2], [3], [1]]),
        labels=torch.ones(3),
        seen=Ragged.of([[0, 1], [2, 2], []]),
    )
    result = evaluate_model(Towers(), split, ["MRR", "HitRate@1"])
    assert result.per_query["MRR"].tolist() == [1.0, 1 / 3, 1 / 2]
    assert result.means["HitRate@1"] == pytest.approx(1 / 3)
    assert result.method == "exact search over all candidates, seen left out"


def test_a_user_who_has_seen_nearly_all_is_shown_what_is_left():
    split = judged(listed=Ragged.of([[3]]), labels=torch.ones(1), seen=Ragged.of([[0, 1, 2]]))
    assert evaluate_model(Towers(), split, ["MRR", "P@4"]).means == {"MRR": 1.0, "P@4": 0.25}


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_of_items_that_are_alike_only_those_seen_are_left_out(depth):
    """i0, i1 and i2 are alike and best. u0 has seen i0 and i1, u1 all three."""
    split = judged(
        users=[[1.0], [1.0]],
        items=[[3.0], [3.0], [3.0], [1.0], [2.0]],
        listed=Ragged.of([[2, 4], [4]]),
        labels=torch.ones(3),
        seen=Ragged.of([[1, 0], [0, 1, 2]]),
    )
    result = evaluate_model(Towers(), split, [f"Recall@{depth}", f"MRR@{depth}"])
    assert result.per_query[f"Recall@{depth}"].tolist() == [min(depth, 2) / 2, 1.0]
    assert result.per_query[f"MRR@{depth}"].tolist() == [1.0, 1.0]


def test_search_with_seen_equals_a_sort_of_all_scores():
    draw = torch.Generator().manual_seed(0)
    users, items = (torch.randint(-2, 3, (n, 3), generator=draw).float() for n in (40, 90))
    seen = [torch.randperm(90, generator=draw)[: 2 * row].tolist() for row in range(40)]
    wanted = [next(item for item in range(89, -1, -1) if item not in of) for of in seen]
    split = judged(
        users=users.tolist(),
        items=items.tolist(),
        listed=Ragged.of([[item] for item in wanted]),
        labels=torch.ones(40),
        seen=Ragged.of(seen),
    )
    result = evaluate_model(Towers(), split, ["MRR", "Recall@10"])
    every = users @ items.T
    for row, of in enumerate(seen):
        every[row, of] = -torch.inf
    by_id = torch.tensor(sorted(range(90), key=lambda row: f"i{row}"))
    order = by_id[every[:, by_id].argsort(dim=1, descending=True, stable=True)]
    ranks = 1 + (order == torch.tensor(wanted)[:, None]).int().argmax(dim=1)
    assert result.per_query["MRR"].tolist() == pytest.approx((1 / ranks).tolist())
    assert result.means["Recall@10"] == pytest.approx(float((ranks <= 10).float().mean()))


def test_a_target_that_was_seen_is_refused_before_any_work():
    split = judged(listed=Ragged.of([[2, 1]]), labels=torch.tensor([0.0, 1.0]), seen=Ragged.of([[2, 1]]))
    with pytest.raises(DataError, match="toy: query 'u0' has seen candidate 'i1', which is relevant"):
        check_measurable(split, ["MRR"])


def test_metrics_of_the_catalogue_read_the_popularity_of_the_split():
    split = judged(
        users=[[1.0], [-1.0]],
        listed=Ragged.of([[1], [0]]),
        labels=torch.ones(2),
        popularity=torch.tensor([9, 4, 0, 1]),
    )
    metrics = ["Coverage@2", "AveragePopularity@1", "HitRate(cold=4)@2"]
    result = evaluate_model(Towers(), split, metrics)  # u0 sees i0, i1; u1 sees i3, i2
    assert result.means == {"Coverage@2": 1.0, "AveragePopularity@1": 5.0, "HitRate(cold=4)@2": 1.0}
    assert result.per_query["HitRate(cold=4)@2"].isna().tolist() == [False, True]
    with pytest.raises(RecipeError, match="'AveragePopularity@1' needs how often"):
        check_measurable(replace(split, popularity=None), metrics)


CLICKS = dict(
    users=[[1.0], [2.0], [2.0]],
    listed=Ragged.of([[0, 1], [0, 1], [2]]),
    labels=torch.tensor([1.0, 0, 0, 1, 1]),
    groups=torch.tensor([7, 9, 9]),
)


def test_scores_are_as_served_where_they_are_read_as_logits():
    split = judged("pairs", **CLICKS)
    expected = 2 * torch.tensor([3.0, 2, 6, 4, 2])
    assert score_listed(Towers(), split).tolist() == expected.tolist()
    right = expit((expected * (2 * CLICKS["labels"] - 1)).double().numpy())
    assert evaluate_model(Towers(), split, ["Logloss"]).means["Logloss"] == pytest.approx(
        -np.log(right).mean()
    )


def test_click_metrics_are_told_per_user():
    """User 7 is one query, 9 two: its AUC is over 0, 1, 1 with the scores 6, 4, 2."""
    result = evaluate_model(Towers(), judged("pairs", **CLICKS), ["AUC", "GAUC", "Logloss"])
    assert result.per_query["query"].tolist() == ["7", "9"]
    assert result.per_query["weight"].tolist() == [2, 3]
    assert result.per_query["GAUC"].tolist() == [1.0, 0.0]
    assert result.means["GAUC"] == pytest.approx(2 / 5)
    assert (result.queries, result.left_out) == (5, {"users with labels of one kind, of GAUC": 0})
    one = evaluate_model(Ranker(), judged("pairs", **CLICKS), ["GAUC", "Logloss"])
    found = compare(result.per_query, one.per_query, "GAUC")
    assert found.difference == pytest.approx(one.means["GAUC"] - result.means["GAUC"])
    found = compare(result.per_query, one.per_query, "Logloss")
    assert found.difference == pytest.approx(one.means["Logloss"] - result.means["Logloss"])


def test_without_users_gauc_is_within_each_query():
    split = judged("pairs", **{**CLICKS, "groups": None})
    result = evaluate_model(Towers(), split, ["GAUC"])
    assert result.means["GAUC"] == pytest.approx((2 * 1 + 2 * 0) / 4)
    assert result.left_out == {"users with labels of one kind, of GAUC": 1}
    assert list(evaluate_model(Towers(), split, ["AUC"]).per_query) == [
        "query",
        "candidate",
        "score",
        "label",
    ]


def test_context_reaches_a_model_that_reads_it_and_no_other():
    """The pair of u0 and i0 is listed twice, at two hours; without context it is scored once."""
    split = judged(
        "pairs",
        listed=Ragged.of([[0, 0, 1]]),
        labels=torch.tensor([1.0, 0, 0]),
        pair={"hour": torch.tensor([5.0, 1.0, 2.0]), "dwell": torch.tensor([9.0, 9.0, 9.0])},
    )
    model = Ranker("hour")
    assert score_listed(model, split).tolist() == [-2 + 5, -2 + 1, -1 + 2]
    assert model.asked == [(3, ["hour"])]
    blind = Ranker()
    assert score_listed(blind, split).tolist() == [-2, -2, -1]
    assert blind.asked == [(2, [])]
    with pytest.raises(DataError, match=r"Ranker reads features of a listed pair \(hour, place\), which toy"):
        score_listed(Ranker("hour", "place"), split)


def test_listed_candidates_are_ordered_with_their_context():
    """The 99-negatives protocol in small: only what is listed is ranked, seen or not."""
    split = judged(
        "rerank",
        listed=Ragged.of([[3, 1, 2, 2]]),
        labels=torch.tensor([1.0, 0, 0, 0]),
        pair={"hour": torch.tensor([0.5, 3.0, 0.0, 9.0])},
        seen=Ragged.of([[3]]),
    )
    assert evaluate_model(Ranker(), split, ["MRR"]).means == {"MRR": 1 / 3}  # i2, then i1 and i3 by id
    assert evaluate_model(Ranker("hour"), split, ["MRR"]).means == {"MRR": 1 / 3}  # i1 2, i2 0, i3 -0.5


def test_a_ranker_re_ranks_what_a_model_that_can_search_finds():
    split = judged(listed=Ragged.of([[2]]), labels=torch.ones(1), seen=Ragged.of([[0]]))
    result = evaluate_model(Ranker(), split, ["MRR"], rerank=2, rerank_from=Towers())
    assert (result.method, result.means) == ("first 2 of Towers, re-ranked", {"MRR": 1.0})
    with pytest.raises(RecipeError, match="reads texts only"):
        evaluate_model(Ranker(), split, ["MRR"])


def test_why_a_model_cannot_be_measured_on_a_split():
    search, pairs = judged(listed=Ragged.of([[2]]), labels=torch.ones(1)), judged("pairs", **CLICKS)
    assert (
        why_not(Ranker("hour"), pairs)
        == why_not(Ranker(), pairs)
        == why_not(Ranker(), search, Towers())
        == ""
    )
    assert "nothing finds the candidates" in why_not(Ranker(), search)
    assert "(hour), which a search cannot know" in why_not(Ranker("hour"), search, Towers())
    with pytest.raises(RecipeError, match=r"a Ranker cannot search.*; measure it on listed candidates"):
        measure(Ranker(), search, EvaluateSettings(metrics=["MRR"]), None)
    settings = EvaluateSettings(metrics=["MRR"], rerank=3)
    assert measure(Ranker(), search, settings, None, first=Towers()).means == {"MRR": 1.0}


def test_popularity_and_chance_are_measured_as_models_are():
    popularity = torch.tensor([4, 9, 9, 0])
    split = judged(
        users=[[1.0], [2.0]],
        listed=Ragged.of([[0], [2]]),
        labels=torch.ones(2),
        seen=Ragged.of([[1], []]),
        popularity=popularity,
    )
    result = evaluate_reference("popularity", split, ["MRR"])  # u0: i2, i0; u1: i1, i2
    assert result.per_query["MRR"].tolist() == [0.5, 0.5] and result.per_query["query"].tolist() == [
        "u0",
        "u1",
    ]
    listed = replace(
        split, task="rerank", listed=Ragged.of([[0, 3], [2, 1]]), labels=torch.tensor([1.0, 0, 1, 0])
    )
    assert evaluate_reference("popularity", listed, ["MRR"]).per_query["MRR"].tolist() == [1.0, 0.5]
    clicks = replace(judged("pairs", **CLICKS), popularity=popularity)
    assert evaluate_reference("popularity", clicks, ["GAUC", "Logloss"]).means == {
        "GAUC": pytest.approx(3 / 5)
    }


def test_chance_finds_each_item_as_often():
    n, users = 50, 4000
    split = judged(
        users=torch.arange(users)[:, None].float().tolist(),
        items=torch.arange(n)[:, None].float().tolist(),
        listed=Ragged.of([[row % n] for row in range(users)]),
        labels=torch.ones(users),
        popularity=torch.arange(n),
    )
    result = evaluate_reference("random", split, ["Recall@10", "Coverage@10", "AveragePopularity@10"])
    assert result.means["Recall@10"] == pytest.approx(10 / n, abs=0.02)
    assert result.means["Coverage@10"] == 1.0
    assert result.means["AveragePopularity@10"] == pytest.approx((n - 1) / 2, rel=0.05)
    assert (
        evaluate_reference("random", split, ["MRR"], seed=1).means
        != evaluate_reference("random", split, ["MRR"]).means
    )


@pytest.mark.parametrize(
    ("name", "message"), [("popularity", "toy does not say how often"), ("best", "'best' is not")]
)
def test_a_reference_that_cannot_be_is_refused(name, message):
    with pytest.raises(RecipeError, match=message):
        evaluate_reference(name, judged(listed=Ragged.of([[2]]), labels=torch.ones(1)), ["MRR"])


def test_users_may_be_named_in_one_frame_with_other_models(tmp_path):
    """As in per_query.parquet, where every model's rows stand below each other."""
    frames = [
        evaluate_model(model, judged("pairs", **CLICKS), ["GAUC"]).per_query.assign(
            model=type(model).__name__
        )
        for model in (Towers(), Ranker())
    ]
    pd.concat(frames).to_parquet(tmp_path / "per_query.parquet")
    read = pd.read_parquet(tmp_path / "per_query.parquet")
    towers, ranker = (read[read["model"] == name] for name in ("Towers", "Ranker"))
    assert compare(towers, ranker, "GAUC") == compare(*frames, "GAUC")


@pytest.mark.parametrize("metrics", [["nDCG@3", "MRR", "Recall@5"], ["AP@4", "HitRate@2", "R(cold=20)@5"]])
def test_places_alone_give_what_whole_rankings_give(metrics):
    """Coverage reads all that is shown; without it only relevant candidates are placed."""
    draw = torch.Generator().manual_seed(1)
    listed = Ragged.of([torch.randperm(50, generator=draw)[: 1 + row % 4].tolist() for row in range(30)])
    entries = len(listed.values)
    split = judged(
        users=torch.randint(-2, 3, (30, 2), generator=draw).float().tolist(),
        items=(torch.arange(50)[:, None] * torch.tensor([1.0, 0.001])).tolist(),
        listed=Ragged.of([row * 2 for row in listed.tolist()]),  # each twice, with two labels
        labels=torch.randint(0, 3, (2 * entries,), generator=draw).float(),
        seen=Ragged.of([[item for item in range(0, 50, 3) if item not in of] for of in listed.tolist()]),
        popularity=torch.arange(50),
    )
    for top_k in (4, 1000):
        alone = evaluate_model(Towers(), split, metrics, top_k=top_k)
        whole = evaluate_model(Towers(), split, [*metrics, "Coverage@2"], top_k=top_k)
        pd.testing.assert_frame_equal(alone.per_query, whole.per_query)
