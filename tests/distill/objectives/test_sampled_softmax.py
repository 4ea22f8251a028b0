import dataclasses
import math

import numpy as np
import pytest
import torch

from distill.batch import Batch, Ragged
from distill.errors import DataError
from distill.objectives import SampledSoftmax
from distill.outputs import Outputs


def listed(scores, labels=None, temperature=1.0):
    scores = torch.as_tensor(scores)
    batch = Batch.of_scores(*scores.shape, labels=None if labels is None else torch.tensor(labels))
    return SampledSoftmax(temperature, in_batch=False)(Outputs(scores=scores), None, batch)


def pairs(n, **changes):
    """A batch of n queries that list one positive each, query b candidate b."""
    return dataclasses.replace(Batch.of_scores(n, 1), **changes)


def in_batch(scores, batch, temperature=1.0):
    return SampledSoftmax(temperature)(Outputs(in_batch=torch.as_tensor(scores)), None, batch)


def nll(positive, *negatives):
    """-log softmax of a positive against negatives, written out."""
    return -math.log(math.exp(positive) / (math.exp(positive) + sum(math.exp(n) for n in negatives)))


def test_one_positive_of_a_list():
    loss, count = listed([[2.0, 1.0, 0.0, -1.0]])
    assert (loss.item(), count.item()) == (pytest.approx(0.440190, abs=1e-6), 1)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.458101), (0.05, 0.000168)])
def test_info_nce_of_two_queries(temperature, expected):
    loss, count = in_batch([[0.9, 0.2], [0.3, 0.7]], pairs(2), temperature)
    assert loss.mean().item() == pytest.approx(expected, abs=1e-6)
    assert count.tolist() == [1, 1]


def test_the_default_temperature_is_that_of_a_cosine_student():
    loss, _ = SampledSoftmax()(Outputs(in_batch=torch.tensor([[0.9, 0.2], [0.3, 0.7]])), None, pairs(2))
    assert loss.mean().item() == pytest.approx(0.000168, abs=1e-6)


def test_positives_of_one_query_are_not_each_others_negatives():
    loss, count = listed([[2.0, 1.0, 0.5, -1.0]], labels=[[1.0, 3.0, 0.0, 0.0]])
    expected = (nll(2.0, 0.5, -1.0) + nll(1.0, 0.5, -1.0)) / 2
    assert (loss.item(), count.item()) == (pytest.approx(expected, rel=1e-5), 1)


def test_in_batch_takes_listed_and_unlisted_candidates_as_negatives():
    batch = Batch(
        index=torch.tensor([[2, 0], [1, 3]]),
        mask=torch.ones(2, 2, dtype=torch.bool),
        query_ids=torch.arange(2),
        candidate_ids=torch.tensor([9, 8, 7, 6, 5]),  # nobody lists the last
        labels=torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
    )
    loss, _ = in_batch([[0.1, 0.2, 0.3, 0.4, 0.5], [1.0, 2.0, 3.0, 4.0, 5.0]], batch)
    second = (nll(2.0, 1.0, 3.0, 5.0) + nll(4.0, 1.0, 3.0, 5.0)) / 2
    assert loss.tolist() == pytest.approx([nll(0.3, 0.1, 0.2, 0.4, 0.5), second], rel=1e-5)


def test_a_known_positive_is_no_negative_and_no_positive_either():
    """Candidate 1 is relevant to query 0 too; the id 99 is not in the batch."""
    batch = pairs(
        3,
        candidate_ids=torch.tensor([30, 10, 20]),
        known_positives=Ragged.of([[30, 10, 99], [10], [5, 20]]),
    )
    scores = torch.tensor([[1.0, 9.0, 2.0], [0.0, 1.0, 2.0], [1.0, 0.0, 0.5]], requires_grad=True)
    loss, _ = in_batch(scores, batch)
    expected = [nll(1.0, 2.0), nll(1.0, 0.0, 2.0), nll(0.5, 1.0, 0.0)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    loss.sum().backward()
    assert (scores.grad == 0).nonzero().tolist() == [[0, 1]]


def test_a_candidate_held_once_weighs_as_often_as_it_was_drawn():
    """Two queries that both drew negative 9 lose the same with and without its copy."""
    scores = torch.tensor([[1.0, 0.5, 2.0], [0.2, 0.8, -1.0]])  # the positives, then candidate 9
    once = Batch(
        index=torch.tensor([[0, 2], [1, 2]]),
        mask=torch.ones(2, 2, dtype=torch.bool),
        query_ids=torch.arange(2),
        candidate_ids=torch.tensor([7, 8, 9]),
        labels=torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
        draws=torch.tensor([1, 1, 2]),
    )
    twice = dataclasses.replace(
        once,
        index=torch.tensor([[0, 2], [1, 3]]),
        candidate_ids=torch.tensor([7, 8, 9, 90]),
        draws=None,
    )
    copied = in_batch(torch.cat([scores, scores[:, 2:]], dim=1), twice)
    torch.testing.assert_close(in_batch(scores, once), copied)


def test_a_positive_drawn_twice_is_still_one_positive():
    batch = pairs(2, draws=torch.tensor([5, 1]))
    loss, _ = in_batch([[0.9, 0.2], [0.3, 0.7]], batch)
    expected = [nll(0.9, 0.2), nll(0.7, *[0.3] * 5)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("over_batch", [True, False])
def test_a_query_without_a_positive_says_nothing(over_batch):
    batch = Batch.of_scores(2, 2, labels=torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    scores = torch.randn(2, 4 if over_batch else 2).requires_grad_()
    student = Outputs(in_batch=scores) if over_batch else Outputs(scores=scores)
    loss, count = SampledSoftmax(0.01, in_batch=over_batch)(student, None, batch)
    loss.sum().backward()
    assert loss[1] == 0 and count.tolist() == [1, 0]
    assert scores.grad.isfinite().all() and not scores.grad[1].any()


def test_a_list_of_positives_alone_says_nothing():
    loss, count = listed([[2.0, 1.0]], labels=[[1.0, 1.0]])
    assert loss.tolist() == count.tolist() == [0]


def test_gradient_raises_the_positive_and_most_lowers_the_hardest_negative():
    scores = torch.tensor([[0.0, 1.0, -1.0]], requires_grad=True)
    listed(scores).loss.backward()
    assert scores.grad[0, 0] < 0 < scores.grad[0, 2] < scores.grad[0, 1]


def test_a_hopeless_positive_at_a_cold_temperature_stays_finite():
    scores = torch.tensor([[-1.0, 1.0]], requires_grad=True)
    loss, _ = listed(scores, temperature=0.001)
    loss.backward()
    assert loss.item() == pytest.approx(2000.0) and scores.grad.isfinite().all()


def test_only_in_batch_negatives_compare_queries_with_each_other():
    assert SampledSoftmax().across and not SampledSoftmax(in_batch=False).across


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_a_temperature_that_divides_by_nothing(temperature):
    """A negative one would rank positives last, with a loss that falls as it should."""
    with pytest.raises(ValueError, match="temperature must be positive"):
        SampledSoftmax(temperature)


def corrected(log_q, batch=None, scores=((2.0, 1.0, 0.5),), q=(0.5, 0.4, 0.1), in_batch=True):
    """One query, its positive first, of three candidates sampled with the probabilities q."""
    if batch is None:
        batch = Batch(
            index=torch.tensor([[0, 1, 2]]),
            mask=torch.ones(1, 3, dtype=torch.bool),
            query_ids=torch.arange(1),
            candidate_ids=torch.arange(3),
            labels=torch.tensor([[1.0, 0.0, 0.0]]),
        )
    batch = dataclasses.replace(batch, log_q=torch.tensor(q).log())
    scores = torch.as_tensor(scores)
    student = Outputs(in_batch=scores) if in_batch else Outputs(scores=scores)
    return SampledSoftmax(1.0, in_batch, log_q=log_q)(student, None, batch).loss


CORRECTED = {"none": 0.464369, "all": 0.946044, "negatives": 1.423349, "refined": 0.200302}


@pytest.mark.parametrize("over_batch", [True, False])
@pytest.mark.parametrize(("log_q", "expected"), CORRECTED.items())
def test_the_sampling_probability_is_taken_out_in_one_of_three_ways(log_q, expected, over_batch):
    assert corrected(log_q, in_batch=over_batch).item() == pytest.approx(expected, abs=2e-6)


def test_the_correction_comes_after_the_temperature():
    """Cosines 1, 0.5, 0.25 at 0.5: dividing log q by the temperature too would make it 1.967541."""
    batch = dataclasses.replace(
        Batch.of_scores(1, 3), log_q=torch.tensor([0.5, 0.4, 0.1]).log(), index=torch.tensor([[0, 1, 2]])
    )
    loss = SampledSoftmax(0.5, log_q="all")(
        Outputs(in_batch=torch.tensor([[1.0, 0.5, 0.25]])), None, batch
    ).loss
    assert loss.item() == pytest.approx(0.946044, abs=2e-6)


def test_the_refined_correction_equals_its_formula_written_out_in_numpy():
    """Where the positive's share is not one half, which its complement would equal."""
    s, q = np.array([2.0, 1.0, 0.5]), np.array([0.2, 0.4, 0.1])
    corrected_scores = s[1:] - np.log(q[1:] / (1 - q[0]))
    ratio = np.log(np.exp(corrected_scores).sum()) - s[0]
    odds = np.exp([s[0], *(corrected_scores - np.log(2))])
    expected = (1 - odds[0] / odds.sum()) * ratio
    assert corrected("refined", q=tuple(q.tolist())).item() == pytest.approx(expected, rel=1e-5)


def test_the_refined_weight_passes_no_gradient():
    scores = torch.tensor([[2.0, 1.0, 0.5]], requires_grad=True)
    corrected("refined", scores=scores).backward()
    assert scores.grad[0, 0].item() == pytest.approx(-0.440638, abs=2e-6)


@pytest.mark.parametrize("log_q", CORRECTED)
def test_a_candidate_drawn_twice_counts_as_its_copies_would_under_a_correction(log_q):
    def of(candidates, draws):
        return Batch(
            index=torch.tensor([[0]]),
            mask=torch.ones(1, 1, dtype=torch.bool),
            query_ids=torch.arange(1),
            candidate_ids=torch.arange(candidates),
            labels=torch.ones(1, 1),
            draws=draws,
        )

    once = corrected(log_q, of(3, torch.tensor([1, 2, 1])))
    copied = corrected(log_q, of(4, None), [[2.0, 1.0, 1.0, 0.5]], (0.5, 0.4, 0.4, 0.1))
    torch.testing.assert_close(once, copied)


def test_a_known_positive_is_no_negative_under_a_correction_either():
    batch = Batch(
        index=torch.tensor([[0]]),
        mask=torch.ones(1, 1, dtype=torch.bool),
        query_ids=torch.arange(1),
        candidate_ids=torch.tensor([5, 6, 7, 8]),
        labels=torch.ones(1, 1),
        known_positives=Ragged.of([[5, 8]]),
    )
    loss = corrected("refined", batch, [[2.0, 1.0, 0.5, 9.0]], (0.5, 0.4, 0.1, 0.2))
    assert loss.item() == pytest.approx(CORRECTED["refined"], abs=2e-6)


@pytest.mark.parametrize("log_q", ["all", "negatives", "refined"])
def test_a_correction_needs_a_probability_of_every_candidate(log_q):
    with pytest.raises(DataError, match="data set '' does not say how likely"):
        SampledSoftmax(log_q=log_q)(Outputs(in_batch=torch.zeros(2, 2)), None, pairs(2))
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(DataError, match="the sampling probability of candidate 1 "):
            corrected(log_q, q=(0.5, wrong, 0.1))


def test_refuses_a_correction_it_does_not_know():
    with pytest.raises(ValueError, match="log_q must be one of none, all, negatives, refined; got 'yi'"):
        SampledSoftmax(log_q="yi")
