"""Sick teachers are found, each for what it has, and healthy ones are left in peace."""

import numpy as np
import pytest
import scipy

from distill import health
from distill.health import Said, ailments, examine, misheard


def teacher(lists=60, width=8, skill=2.0, seed=0, labelled=True) -> Said:
    """Logits that know one relevant candidate of each list, with luck of their own."""
    draw = np.random.default_rng(seed)
    labels = np.zeros((lists, width))
    labels[:, 0] = 1
    scores = draw.normal(0, 1.5, (lists, width)) + skill * labels + draw.normal(0, 1, (lists, 1))
    return Said(scores.ravel(), np.arange(lists).repeat(width), labels.ravel() if labelled else None)


def changed(said: Said, change) -> Said:
    return Said(change(said.scores), said.lists, said.labels)


def found(said: Said, held_out: Said | None = None) -> list[str]:
    return list(ailments(examine(said), None if held_out is None else examine(held_out)))


HEALTHY = {
    "logits": teacher(),
    "a weak one": teacher(lists=200, skill=0.8),
    "cosines": changed(teacher(), lambda s: 0.6 + 0.05 * s),
    "probabilities of an unsure one": changed(teacher(), lambda s: scipy.special.expit(s - 1)),
    "shifted far": changed(teacher(), lambda s: s + 1000),
    "bm25": changed(teacher(), lambda s: 8 * np.maximum(s + 3, 0)),
    "grades": changed(teacher(), lambda s: s.round().clip(0, 3)),
    "bm25 of few words": changed(teacher(), lambda s: 4 * np.maximum(s, 0)),
    "without labels": teacher(labelled=False),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_teacher_is_left_in_peace(name):
    assert found(HEALTHY[name]) == []


@pytest.mark.parametrize("seed", range(20))
def test_healthy_teachers_of_many_seeds_are_left_in_peace(seed):
    assert found(teacher(seed=seed), teacher(seed=seed + 100)) == []


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("constant", lambda s: np.full_like(s, 0.3), "the same of all candidates"),
        ("the same in a list", lambda s: np.arange(60).repeat(8).astype(float), "the same of all candidates"),
        ("shuffled", lambda s: np.random.default_rng(5).permutation(s), "cannot be told from a random one"),
        ("flipped", lambda s: -s, "in the wrong order"),
        ("saturated", lambda s: scipy.special.expit(12 * (s - 1)), "squashed"),
        ("cut", lambda s: s.clip(-0.5, 1), "squashed"),
        ("labels", lambda s: (s > 2).astype(float), "are ties"),
        ("thousandfold", lambda s: 1000 * s, "regression on them would diverge"),
        ("thousandfold cosines", lambda s: 1000 * (0.6 + 0.02 * s), "regression on them would diverge"),
        ("thousandfold near cosines", lambda s: 1000 * (0.8 + 0.01 * s), "regression on them would diverge"),
    ],
)
def test_a_sick_teacher_is_flagged_for_what_it_has(name, change, said):
    (line,) = found(changed(teacher(), change))
    assert said in line


def test_shuffled_teachers_are_flagged_on_every_seed_but_a_few():
    quiet = 0
    for seed in range(100):
        draw = np.random.default_rng(seed)
        quiet += not found(changed(teacher(seed=seed), draw.permutation))
    assert quiet <= 4  # one in a hundred is that lucky, one that unlucky


@pytest.mark.parametrize("lists", [5, 8, 12, 20, 30])
def test_of_few_lists_a_good_teacher_is_not_called_random(lists):
    """Too little is known then; only few of one that knows nothing are told from it."""
    told = sum(bool(found(teacher(lists=lists, seed=seed))) for seed in range(60))
    assert told <= 1
    flagged = [found(teacher(lists=lists, skill=0.0, seed=seed)) for seed in range(60)]
    assert all("random" in line or "wrong" in line for lines in flagged for line in lines)


def test_where_held_out_lists_are_too_few_those_of_training_decide():
    assert examine(teacher(lists=6, skill=0.8, seed=2)).order is None
    assert found(teacher(), teacher(lists=6, skill=0.8, seed=2)) == []
    (line,) = found(changed(teacher(), np.negative), teacher(lists=6, skill=0.8, seed=2))
    assert "in the wrong order" in line


def test_what_was_learnt_by_heart_is_seen_on_held_out_labels():
    (line,) = found(teacher(skill=9, lists=150), teacher(skill=1.2, lists=150))
    assert "it repeats what it was trained on" in line
    assert found(teacher(skill=9, lists=150), teacher(skill=4, lists=150, seed=1)) == []


def test_what_was_learnt_by_heart_is_seen_where_each_pair_is_for_itself():
    def of_pairs(noise, seed=0, n=1000):
        draw = np.random.default_rng(seed)
        labels = draw.random(n)
        return Said(labels + draw.normal(0, noise, n), np.arange(n), labels)

    (line,) = found(of_pairs(0.001), of_pairs(1.0, seed=1))
    assert "it repeats what it was trained on" in line
    assert found(of_pairs(0.1), of_pairs(0.15, seed=1)) == []
    assert found(of_pairs(0.1, n=12), of_pairs(0.4, seed=1, n=12)) == []


def test_held_out_labels_decide_where_there_are_both():
    """In sample even a teacher that knows nothing may know its labels."""
    assert any("random one" in line for line in found(teacher(skill=9), teacher(skill=0.0)))


def test_agreement_is_counted_right():
    """Two lists: 2 of 3 comparisons right, then 1 of 1; what is tied counts half, that is 0."""
    said = Said(
        np.array([3.0, 1.0, 2.0, 4.0, 5.0, 5.0]), np.array([0, 0, 0, 0, 1, 1]), np.array([1, 0, 0, 0, 0, 1.0])
    )
    health = examine(said)
    assert health.agreement == pytest.approx(((2 - 1) / 3 + 0) / 2) and health.lists == 2
    assert health.luck is None  # of two lists nothing is said
    assert health.ties == pytest.approx((0 + 1) / 2)


def test_long_lists_are_counted_as_short_ones_are():
    draw = np.random.default_rng(0)
    scores, others = draw.integers(0, 40, 400).astype(float), draw.integers(0, 5, 400).astype(float)
    one, two = np.triu_indices(400, 1)
    direction = np.sign(others[one] - others[two])
    wanted = (np.sign(scores[one] - scores[two]) * direction).sum() / np.abs(direction).sum()
    assert health._concordance(scores, others) == pytest.approx(wanted, abs=1e-12)
    assert health._concordance(np.ones(400), others) == 0.0


def test_graded_pairs_agree_over_all_of_them():
    draw = np.random.default_rng(0)
    labels = draw.uniform(size=50)
    said = Said(labels + draw.normal(0, 0.1, 50), np.arange(50), labels)
    health = examine(said)
    assert health.agreement == pytest.approx(scipy.stats.kendalltau(said.scores, labels).statistic)
    assert found(said) == [] and "wrong order" in found(changed(said, np.negative))[0]
    assert "random one" in found(changed(said, np.random.default_rng(1).permutation))[0]


def test_the_temperature_is_that_at_which_it_is_right():
    """Labels drawn from the softmax of scores at 3: whatever the scale, that is found again."""
    draw = np.random.default_rng(0)
    scores = draw.normal(0, 6, (2000, 6))
    chosen = (scores / 3 + draw.gumbel(size=scores.shape)).argmax(1)
    labels = np.eye(6)[chosen]
    lists = np.arange(2000).repeat(6)
    for scale in (1.0, 1000.0, 0.01):
        said = Said(scale * scores.ravel(), lists, labels.ravel())
        assert examine(said).temperature == pytest.approx(3 * scale, rel=0.08)
    unlabelled = examine(Said(scores.ravel(), lists))
    assert unlabelled.temperature == pytest.approx(unlabelled.in_list)
    assert (
        examine(Said(scores.ravel(), lists, np.random.default_rng(1).permutation(labels).ravel())).temperature
        is None
    )


def test_a_temperature_that_hides_the_teacher_is_named():
    health = examine(HEALTHY["cosines"])
    (flat,), (sharp,) = (list(misheard(health, temperature)) for temperature in (5.0, 0.0005))
    assert "nearly even over a list; a temperature near 0.0" in flat and "nearly one candidate" in sharp
    assert list(misheard(health, 0.05)) == [] and list(misheard(examine(teacher()), 1.0)) == []


def pairs_of(draw, n: int, share: float, skill: float = 1.0) -> Said:
    """Scores of pairs each for itself, a share of them relevant."""
    labels = np.zeros(n)
    labels[: max(1, round(n * share))] = 1
    return Said(draw.normal(size=n) + skill * labels, np.arange(n), labels)


@pytest.mark.parametrize(
    "made",
    [
        lambda draw: teacher(lists=64, width=2, seed=int(draw.integers(2**31))),
        lambda draw: teacher(lists=8, width=2, seed=int(draw.integers(2**31))),
        lambda draw: pairs_of(draw, 512, 0.02),
        lambda draw: pairs_of(draw, 100, 0.1),
    ],
    ids=["lists of two", "few lists of two", "rare clicks", "few pairs"],
)
def test_a_healthy_teacher_is_not_called_sick_more_often_than_luck_would_have_it(made):
    draw = np.random.default_rng(3)
    flagged = sum(bool(found(made(draw), made(draw))) for _ in range(300))
    assert flagged <= 12  # of 300; SURE allows 3 of each thing that is said


def test_the_error_of_pairs_is_that_of_many_draws():
    draw = np.random.default_rng(0)
    said = [pairs_of(draw, 200, 0.1, skill=0.0) for _ in range(500)]
    agreements = [health.agreement_of(one, one.labels) for one in said]
    errors = {one.error for one in agreements}
    assert len(errors) == 1 and agreements[0].error == pytest.approx(
        np.std([one.mean for one in agreements]), rel=0.1
    )


def test_few_lists_on_one_side_are_as_sure_as_coins_are():
    said = Said(np.tile([0.0, 1.0], 7), np.arange(7).repeat(2), np.tile([0, 1], 7))
    luck = [examine(Said(sign * said.scores, said.lists, said.labels)).luck for sign in (1, -1, 0)]
    assert luck == [2 / 128, 2 / 128, 1.0]


def test_a_bit_below_nothing_is_not_the_wrong_order():
    """As candidates are that the teacher itself has mined: those it was wrong about are left."""
    said = teacher(lists=800, skill=-0.25, seed=1)
    assert -0.2 < examine(said).agreement < 0 and examine(said).luck < health.SURE
    (line,) = found(said)
    assert "cannot be told from a random one" in line
    assert "wrong order" in found(pairs_of(np.random.default_rng(0), 400, 0.5, skill=-1.0))[0]


def test_where_no_temperature_suits_none_is_suggested():
    negated = changed(teacher(), lambda s: -1000 * s)
    assert examine(negated).temperature is None
    assert any(line.endswith("divide them") for line in found(negated))
    assert next(misheard(examine(changed(teacher(), lambda s: -s)), 1000.0)).endswith("over a list")


def test_a_teacher_that_is_always_right_is_heard_as_one_without_labels():
    right = teacher(skill=40.0)
    assert examine(right).temperature == examine(right).in_list
