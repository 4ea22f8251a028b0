import pytest
from torch import nn

from distill.evaluation import latency, queries_per_second, size_in_mb


def test_a_shared_parameter_is_counted_once_and_half_precision_as_float32():
    first, second = nn.Linear(1000, 500, bias=False), nn.Linear(1000, 500, bias=False)
    assert size_in_mb(nn.ModuleList([first, second]).half()) == 4.0
    second.weight = first.weight
    assert size_in_mb(nn.ModuleList([first, second])) == 2.0


class Clocked(nn.Module):
    """Each call takes as long as it says: the first is slow, one is disturbed."""

    def __init__(self, clock: list[float]):
        super().__init__()
        self.clock, self.seconds = clock, iter([9.0, 2.0, 0.5, 7.0, 2.0, 1.0])

    def encode_queries(self, queries):
        assert not self.training
        self.clock[0] += next(self.seconds)


def test_the_rate_is_the_median_without_the_warm_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    model = Clocked(clock).train()
    assert queries_per_second(model, ["a"] * 10, repeats=5) == 5.0
    assert model.training


def test_latency_is_of_each_query_by_itself_without_the_warm_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert latency(Clocked(clock), [["a"], ["b"], ["c"], ["d"], ["e"]]) == pytest.approx((2000.0, 6000.0))


def test_nothing_to_time_is_refused():
    with pytest.raises(ValueError, match="need a query"):
        latency(Clocked([0.0]), [])
    with pytest.raises(ValueError, match="need a query"):
        queries_per_second(Clocked([0.0]), [])
