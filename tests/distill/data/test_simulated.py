"""The simulated privileged feature: the inverted U, and the data set of the recipe."""

import numpy as np
import pytest

from distill.data import SimulatedPrivileged
from distill.data.simulated import simulate


def test_the_student_gains_then_loses_as_the_teacher_gets_better():
    """Yang et al.: rise, peak and fall. The shape is asserted, over 6 of the 40 repetitions."""
    strengths = [(0.0, 0.0), (1.0, 0.0), (1.0, 0.5), (1.0, 2.0), (1.0, 4.0)]
    runs = {s: [simulate(*s, seed=seed, test=4000) for seed in range(6)] for s in strengths}
    teacher, student, direct, variance = (
        [np.mean([getattr(run, name) for run in runs[s]]) for s in strengths]
        for name in ("teacher", "student", "direct", "variance")
    )
    assert student[0] < student[1] < student[2]  # rise
    assert student[2] > student[3] > student[4]  # fall, while
    assert teacher[1] < teacher[2] < teacher[3] <= teacher[4]  # the teacher gets better
    assert student[2] > direct[2] + 0.015 and max(student) == student[2]
    assert variance == sorted(variance)  # what it says gets harder


def test_the_strength_of_z_changes_nothing_but_z():
    weak, strong = SimulatedPrivileged(a=0.0, c=0.0), SimulatedPrivileged(a=1.0, c=4.0)
    for name in ("train", "test"):
        one, other = weak.split(name), strong.split(name)
        assert (one.labels == other.labels).all()
        assert np.array_equal(one.queries.keys(), other.queries.keys())
        assert not (one.pair["z"] == other.pair["z"]).any()
    z, y = strong.split("test").pair["z"], strong.split("test").labels
    assert z[y == 1].mean() - z[y == 0].mean() > 7


def test_its_batches_hold_the_privileged_column_apart():
    data = SimulatedPrivileged(train=40, dim=3)
    features = data.features
    assert [f.name for f in features.side("context")] == []
    source = data.train_source(16)
    source.prepare(features.side("user"), features.side("item"), features.side("context", privileged=True))
    batch = source.batch(0, 0)
    assert set(batch.queries) == {"x00", "x01", "x02"} and batch.pair["z"].shape == (16, 1)
    assert features.size("item") == 3
    with pytest.raises(ValueError, match="must be finite"):
        SimulatedPrivileged(c=float("inf"))
