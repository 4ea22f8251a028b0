"""Samplers of negatives, the streaming frequency estimator, and what a batch says of its shares."""

import logging
import math

import numpy as np
import polars as pl
import pytest
import torch

from distill.batch import Ragged
from distill.data import (
    ExposedNegatives,
    Interactions,
    InteractionSource,
    Judged,
    LogUniformNegatives,
    MixedNegatives,
    PopularNegatives,
    RandomNegatives,
    StreamingFrequency,
)
from distill.data.feature_table import FeatureTable, Names

IDS = [
    {"name": "hist", "kind": "sequence", "side": "user", "vocabulary": "item_id"},
    {"name": "item_id", "kind": "categorical", "side": "item"},
]


def counted(*counts: int) -> Judged:
    """A split in which item i is taken ``counts[i]`` times."""
    items = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Judged(
        task="retrieval",
        queries=FeatureTable(Names(range(len(items))), {"user": torch.arange(len(items))}),
        candidates=FeatureTable(Names(range(len(counts))), {"item": torch.arange(len(counts))}),
        listed=Ragged(items, torch.arange(len(items) + 1)),
        labels=torch.ones(len(items)),
    )


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [  # methods-rec 1.5, by the counts 100, 10, 1
        (RandomNegatives(1), [0.333333, 0.333333, 0.333333]),
        (PopularNegatives(1, power=1.0), [0.900901, 0.090090, 0.009009]),
        (PopularNegatives(1), [0.826822, 0.147032, 0.026146]),
        (LogUniformNegatives(1), [0.500000, 0.292481, 0.207519]),
    ],
)
def test_shares_and_draws_follow_the_formula(sampler, expected):
    sampler.prepare(counted(100, 10, 1))
    assert sampler.shares(torch.arange(3)).tolist() == pytest.approx(expected, abs=1e-6)
    drawn = sampler.draw(torch.zeros(200_000, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert (torch.bincount(drawn.flatten()) / 200_000).tolist() == pytest.approx(expected, abs=5e-3)


def test_the_rarest_is_drawn_least_by_rank_whatever_its_row():
    sampler = LogUniformNegatives(1)
    sampler.prepare(counted(1, 100, 0, 10))
    shares = sampler.shares(torch.arange(4)).tolist()
    assert sorted(range(4), key=shares.__getitem__) == [2, 0, 3, 1] and sum(shares) == pytest.approx(1.0)


def test_what_train_never_lists_is_never_drawn_by_popularity():
    sampler = PopularNegatives(4)
    sampler.prepare(counted(3, 0, 2))
    assert 1 not in sampler.draw(torch.zeros(1000, dtype=torch.int64), torch.Generator().manual_seed(0))


def test_the_estimator_gives_the_worked_numbers():
    for rate, gaps in (
        (0.5, [50.5, 30.25, 20.125, 15.0625]),
        (0.01, [99.01, 98.1199, 97.238701, 96.366314]),
    ):
        estimator = StreamingFrequency(buckets=1, rate=rate)
        for step, gap in zip((1, 11, 21, 31), gaps, strict=True):
            estimator.update(np.array([0]), step)
            assert 1 / estimator.probability(np.array([0]))[0] == pytest.approx(gap, abs=1e-6)


def test_an_item_that_comes_twice_in_a_batch_counts_once():
    one, twice = (StreamingFrequency(buckets=16, rate=0.1) for _ in range(2))
    for step in (1, 2, 3):
        one.update(np.array([5]), step)
        twice.update(np.array([5, 5, 5]), step)
    assert one.gap.tolist() == twice.gap.tolist()


def test_the_estimator_finds_the_rates_and_more_hashes_bear_collisions():
    random = np.random.default_rng(0)
    rates = np.concatenate([np.full(5, 0.5), np.full(195, 0.02)])
    one, many = (StreamingFrequency(256, hashes=n, rate=0.02, start=50.0) for n in (1, 4))
    for step in range(1, 3001):
        items = np.flatnonzero(random.random(200) < rates)
        one.update(items, step)
        many.update(items, step)
    errors = [np.abs(np.log(e.probability(np.arange(200)) / rates)) for e in (one, many)]
    assert np.median(errors[1]) < 0.25
    assert errors[1].mean() < 0.6 * errors[0].mean()  # the largest gap is the one least disturbed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"buckets": 0}, "at least 1"), ({"buckets": 5, "rate": 1.0}, "between 0 and 1")],
)
def test_an_estimator_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        StreamingFrequency(**arguments)


def interactions(**arguments) -> Interactions:
    random = np.random.default_rng(0)
    rows = {
        "user_id": np.repeat(np.arange(40), 10),
        "item_id": np.minimum(random.pareto(1.0, 400) * 3, 29).astype(int),
        "timestamp": random.integers(0, 10_000, 400),
    }
    table = pl.DataFrame({"item_id": range(30)})
    return Interactions(pl.DataFrame(rows), IDS, items=table, catalogue="all", **arguments)


def test_log_q_is_the_share_of_the_pool_that_a_batch_is_drawn_from():
    data = interactions()
    source = data.train_source(32, 3, [MixedNegatives(48), RandomNegatives(2)])
    batch = source.batch(0, 0)
    share = data.popularity / data.popularity.sum()
    n = len(source.candidates.same.unique())  # what train does not know is one: it has equal content
    expected = (32 * share + 48 / n + 64 / n) / (32 + 48 + 64)
    assert batch.log_q.exp().tolist() == pytest.approx(expected[batch.candidate_ids].tolist(), rel=1e-5)


def test_mixed_negatives_have_the_share_of_the_papers_formula():
    share = (4 * 0.01 + 4 / 1000) / (4 + 4)  # methods-rec 1.6
    judged = counted(1, 99, *[0] * 998)
    source = InteractionSource(judged, 4, 1, [MixedNegatives(4)])
    source.prepare()
    found = source._log_q(torch.tensor([0]), 4, 0, 0)
    assert share == pytest.approx(0.0055)
    assert math.exp(found.item()) == pytest.approx(share, rel=1e-6)


def test_log_q_of_lists_alone_is_that_of_the_samplers():
    source = interactions(log_q="listed").train_source(32, 4, [RandomNegatives(3)])
    log_q = source.batch(0, 0).log_q
    assert log_q.exp().tolist() == pytest.approx([1 / len(source.candidates.same.unique())] * len(log_q))
    assert interactions(log_q="listed").train_source(32, 1).batch(0, 0).log_q is None


def test_a_sampler_that_cannot_say_its_share_leaves_log_q_out():
    class Silent(RandomNegatives):
        def shares(self, candidates):
            return None

    assert interactions().train_source(32, 4, [Silent(3)]).batch(0, 0).log_q is None


def streaming(data: Interactions):
    return data.train_source(16, 2, [RandomNegatives(1)], seed=3)


def test_estimated_frequencies_are_a_function_of_the_batchs_place():
    data = interactions(frequency=StreamingFrequency(64, hashes=2, rate=0.1, start=5.0))
    whole = streaming(data)
    steps = whole.steps(0)
    run = [whole.batch(*divmod(place, steps)).log_q for place in range(2 * steps)]
    resumed = streaming(data)
    assert torch.equal(resumed.batch(1, 3).log_q, run[steps + 3])  # never saw what was before
    assert torch.equal(resumed.batch(1, 4).log_q, run[steps + 4])
    assert torch.equal(whole.batch(0, 1).log_q, run[1])  # and back
    assert not torch.equal(run[1][:1], run[steps + 1][:1])


def test_estimated_shares_come_near_the_counted_ones():
    counts = interactions().train_source(16, 1)
    data = interactions(frequency=StreamingFrequency(4096, rate=0.02, start=10.0))
    source = data.train_source(16, 1)
    for place in range(300):
        batch = source.batch(*divmod(place, source.steps(0)))
    exact = counts._log_q(batch.candidate_ids, 16, 0, 0)
    often = data.popularity[batch.candidate_ids] > 20
    assert often.sum() >= 3 and (batch.log_q - exact)[often].abs().max() < 0.5


def test_exposed_negatives_were_shown_and_not_taken_and_warn(caplog):
    rows = pl.DataFrame(
        {
            "user_id": [1] * 8,
            "item_id": [1, 2, 3, 4, 5, 6, 7, 1],
            "timestamp": [1, 2, 3, 4, 5, 6, 7, 8],
            "stars": [5, 1, 5, 2, 5, 5, 1, 5],  # 7 was shown at the time of what is measured
        }
    )
    size = {"name": "size", "kind": "dense", "side": "item"}  # else 2 and 4, unknown to train, were one
    data = Interactions(
        rows,
        [*IDS, size],
        columns={"label": "stars"},
        at_least=4,
        items=rows.select("item_id", size="item_id").unique(),
        catalogue="all",
    )
    with caplog.at_level(logging.WARNING, "distill"):
        batch = data.train_source(8, 4, [ExposedNegatives(3)]).batch(0, 0)
    assert "no sample of the catalogue" in caplog.text
    names = data.split("train").candidates.ids
    for row, mask in zip(batch.candidate_ids[batch.index], batch.mask, strict=True):
        assert {names[i] for i in row[mask][1:].tolist()} == {"2", "4"}
    with pytest.raises(ValueError, match="does not say what was shown and not taken"):
        interactions().train_source(8, 4, [ExposedNegatives(3)]).batch(0, 0)
    assert list(ExposedNegatives(1).problems(None, interactions().split("train")))
