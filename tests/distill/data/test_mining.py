"""The formulas of mining in numbers a reader can check, and lists that come back from disk or are refused."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from distill.batch import Ragged
from distill.data.mining import Limits, Mined, fingerprint, highest_allowed, turns

POSITIVE = [0.8, -2.0, math.nan]


def test_the_highest_score_allowed_equals_the_formula_in_numpy():
    s = np.array(POSITIVE[:2])
    for margin, relative in ((0.1, None), (None, 0.05), (0.1, 0.05), (0.0, 0.5)):
        expected = np.minimum(
            s - margin if margin is not None else np.inf,
            s - relative * np.abs(s) if relative is not None else np.inf,
        )
        found = highest_allowed(torch.tensor(POSITIVE), margin, relative)
        assert found[:2].numpy() == pytest.approx(expected)
        assert found[2] == math.inf  # without a positive nothing is too high


def test_the_relative_margin_is_below_a_negative_positive_too():
    """A plain share of a score below 0 lies above it: candidates better than the positive would pass."""
    assert highest_allowed(torch.tensor([-2.0]), None, 0.05).item() == pytest.approx(-2.1)


def test_what_is_exactly_at_the_margin_may_stay_and_at_keep_below_not():
    scores = torch.tensor([[0.75, 0.5, 0.25]])
    assert Limits(margin=0.5).broken(scores, torch.tensor([1.0])).tolist() == [[True, False, False]]
    assert Limits(keep_below=0.5).broken(scores, torch.tensor([1.0])).tolist() == [[True, True, False]]
    both = Limits(margin=0.0, keep_below=0.3)
    assert both.broken(scores, torch.tensor([0.6])).tolist() == [[True, True, False]]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"margin": -0.1}, "margin must be 0 or more"),
        ({"margin": math.nan}, "margin must be 0 or more"),
        ({"relative_margin": 1.0}, "relative_margin must be at least 0 and below 1"),
        ({"relative_margin": -0.05}, "relative_margin must be at least 0 and below 1"),
        ({"keep_below": math.inf}, "keep_below must be finite"),
    ],
)
def test_limits_that_cannot_be_are_refused(limits, message):
    """Above the positive, or not a number: such a margin would let every false negative through."""
    with pytest.raises(ValueError, match=message):
        Limits(**limits)


def drawn_order(scores, strata, seed=0, mask=None):
    scores = torch.tensor([scores])
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else torch.tensor([mask])
    order = turns(scores, mask, strata, torch.Generator().manual_seed(seed))
    return order.masked_fill(~mask, math.inf).argsort(dim=1)[0].tolist()


def test_strata_take_turns_however_many_candidates_they_hold():
    scores = [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.5, 1.0]  # three strata: 0-5, 6, 7
    firsts = [drawn_order(scores, 3, seed) for seed in range(60)]
    assert all({6, 7} < set(order[:3]) for order in firsts)  # one of each before a second of any
    others = [(set(order[:3]) - {6, 7}).pop() for order in firsts]
    assert set(others) == set(range(6))  # any of the full stratum
    assert {order[0] for order in firsts} > {6, 7}  # and any stratum begins


def test_a_stratum_without_candidates_is_passed_over_and_so_is_padding():
    assert sorted(drawn_order([0.0, 0.1, 1.0, 9.9], 4, mask=[True] * 3 + [False])[:2])[1] == 2
    assert sorted(drawn_order([3.0, 3.0, 3.0], 5)) == [0, 1, 2]  # no range at all
    for seed in range(20):
        assert drawn_order([0.0, 1.0, -50.0, 50.0], 2, seed, [True, True, False, False])[2:] == [2, 3]


# on disk


def mined(score=0.5) -> Mined:
    return Mined(
        queries=torch.tensor([2, 5]),
        rows=Ragged.of([[7, 1], []], dtype=torch.int32),
        ranks=torch.tensor([1, 4], dtype=torch.int32),
        scores=torch.tensor([score, -1.0]),
        positive=torch.tensor([0.9, math.nan]),
        removed=torch.tensor([2, 3], dtype=torch.int32),
    )


def test_lists_come_back_as_they_were_if_they_are_those_asked_for(tmp_path):
    path, lists = tmp_path / "a" / "b.arrow", mined()
    lists.save(path, "key", "state")
    for state in ("state", None):
        found = Mined.load(path, "key", state)
        assert found.rows.tolist() == [[7, 1], []]
        for name in ("queries", "ranks", "scores", "positive", "removed"):
            one, other = getattr(found, name), getattr(lists, name)
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert Mined.load(path, "other", "state") is None and Mined.load(path, "key", "other") is None
    assert Mined.load(tmp_path / "none.arrow", "key", None) is None
    assert [file.name for file in path.parent.iterdir()] == ["b.arrow"]
    table = pa.ipc.open_file(path).read_all().to_pydict()  # any reader of Arrow sees what was mined
    assert table["row"] == [[7, 1], []] and table["query"] == [2, 5]


@pytest.mark.parametrize("how", ["cut", "a bit", "no arrow"])
def test_a_damaged_file_is_told(how, tmp_path):
    path = tmp_path / "lists.arrow"
    mined(0.5).save(path, "key", "state")
    data = bytearray(path.read_bytes())
    if how == "a bit":
        data[data.index(np.float32(0.5).tobytes() + np.float32(-1.0).tobytes())] ^= 1
    path.write_bytes({"cut": data[:-40], "a bit": data, "no arrow": b"{}"}[how])
    with pytest.raises(ValueError, match=r"lists\.arrow is damaged"):
        Mined.load(path, "key", None)


def test_figures_are_means_over_what_was_kept():
    assert Mined.join([mined(), mined(1.5)]).figures() == pytest.approx(
        {"per query": 1.0, "rank": 2.5, "score": 0.0, "positive score": 0.9, "too close": 10.0,
         "queries without": 2.0}
    )  # fmt: skip


class Settings(nn.Module):
    def __init__(self, prompt="q: ", scale=1.0):
        super().__init__()
        self.prompt = prompt
        self.linear = nn.Linear(2, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(2) * scale)
            self.linear.bias.zero_()


def test_a_fingerprint_is_of_weights_and_settings_but_not_of_the_moment():
    assert fingerprint(Settings()) == fingerprint(Settings().eval())
    assert len({fingerprint(Settings(*x)) for x in (("q: ",), ("p: ",), ("q: ", 1.0001))}) == 3
    assert json.dumps(fingerprint(Settings().to(torch.bfloat16))) != json.dumps(fingerprint(Settings()))
