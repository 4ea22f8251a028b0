"""A training that was interrupted, or died, ends where an uninterrupted one ends."""

import itertools
import math
import signal

import pyarrow as pa
import pytest

from distill.checkpoint import latest
from distill.data import NearestNegatives
from distill.errors import DataError
from tests.distill.training import (
    equal,
    graph,
    history,
    judged,
    source,
    stopping,
    trainer,
    weights,
)


def fit_whole(folder, given=None, dies_at=None, **settings):
    """Train with dropout, a frozen teacher in memory and a dev split, for four epochs of three batches."""
    made = graph(dropout=0.3)
    calls = []

    def evaluate():  # a function of the weights alone, up and down
        calls.append(1)
        if len(calls) == dies_at:
            raise MemoryError("gone")
        return {"MAP": math.sin(1e3 * sum(p.double().sum().item() for p in made.trainable().values()))}

    it = trainer(folder, made, given, evaluate, "MAP", epochs=4, weight_decay=0.1, **settings)
    return it.fit(), weights(made)


def lines_without_speed(folder):
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in history(folder)]


def assert_same_end(folder, found, whole_folder, expected):
    assert equal(found[1], expected[1])
    assert vars(found[0]).keys() - {"history_bytes"} == vars(expected[0]).keys() - {"history_bytes"}
    for name in ("step", "best", "best_step", "without_better", "dev", "stopped"):
        assert getattr(found[0], name) == getattr(expected[0], name)
    assert lines_without_speed(folder) == lines_without_speed(whole_folder)


@pytest.mark.parametrize("place", [1, 2, 5, 6])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_ends(place, accumulate, tmp_path):
    """Bit for bit, and interrupted twice."""
    expected = fit_whole(tmp_path / "whole", accumulate=accumulate)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt, match="a checkpoint is saved"):
            fit_whole(tmp_path / "stopped", stopping(source(), place), accumulate=accumulate)
    found = fit_whole(tmp_path / "stopped", accumulate=accumulate)
    assert_same_end(tmp_path / "stopped", found, tmp_path / "whole", expected)


@pytest.mark.parametrize("dies_at", [1, 3, 4])
def test_a_run_that_died_goes_on_from_its_last_checkpoint(dies_at, tmp_path):
    """Without warning: lines of the log after the checkpoint are written again, not twice."""
    settings = {"evaluate_every": 0.67, "checkpoint_every": 3}  # every 2 steps, every 3
    expected = fit_whole(tmp_path / "whole", **settings)
    with pytest.raises(MemoryError):
        fit_whole(tmp_path / "died", dies_at=dies_at, **settings)
    assert history(tmp_path / "died")[-1]["step"] == 2 * dies_at
    found = fit_whole(tmp_path / "died", **settings)
    assert_same_end(tmp_path / "died", found, tmp_path / "whole", expected)
    keys = [(line["step"], "dev/MAP" in line) for line in history(tmp_path / "died")]
    assert len(keys) == len(set(keys)) and keys == sorted(keys)


def mining(by="student", every=1):
    return source(negatives=[NearestNegatives(by, 2, top=4, every=every, margin=0.0)])


def lists_of(folder):
    """What was mined for each epoch: the candidates of each query."""
    paths = sorted((folder / "mined" / "negatives-0").iterdir())
    return [pa.ipc.open_file(path).read_all()["row"].to_pylist() for path in paths]


@pytest.mark.parametrize("every", [1, 2, None])
@pytest.mark.parametrize("place", [1, 3, 4, 5, 8])  # of three in an epoch
def test_a_run_with_mined_negatives_ends_where_an_uninterrupted_one_ends(place, every, tmp_path):
    """The student has learnt since its lists were mined: they must be read, not mined again."""
    expected = fit_whole(tmp_path / "whole", mining(every=every), checkpoint_every=1)
    mined = lists_of(tmp_path / "whole")
    assert len(mined) == {1: 4, 2: 2, None: 1}[every]
    assert all(one != other for one, other in itertools.pairwise(mined))
    with pytest.raises(KeyboardInterrupt, match="a checkpoint is saved"):
        fit_whole(tmp_path / "stopped", stopping(mining(every=every), place), checkpoint_every=1)
    found = fit_whole(tmp_path / "stopped", mining(every=every), checkpoint_every=1)
    assert_same_end(tmp_path / "stopped", found, tmp_path / "whole", expected)
    assert lists_of(tmp_path / "stopped") == mined
    assert expected[0].step == 12 and not equal(expected[1], fit_whole(tmp_path / "none")[1])


def test_a_run_that_died_after_mining_goes_on_from_before_it(tmp_path):
    """Its newest checkpoint is of the epoch before; figures of the lists are logged once."""
    settings = {"evaluate_every": 0.34, "checkpoint_every": 2}
    expected = fit_whole(tmp_path / "whole", mining(), **settings)
    with pytest.raises(MemoryError):  # after step 5, of the second epoch; saved at step 4
        fit_whole(tmp_path / "died", mining(), dies_at=5, **settings)
    found = fit_whole(tmp_path / "died", mining(), **settings)
    assert_same_end(tmp_path / "died", found, tmp_path / "whole", expected)
    figures = [line for line in history(tmp_path / "died") if "negatives[0]/rank" in line]
    assert [(line["step"], line["epoch"]) for line in figures] == [(0, 0.0), (3, 1.0), (6, 2.0), (9, 3.0)]
    assert {"negatives[0]/too close", "negatives[0]/score", "learning_rate"} <= set(figures[0])


def test_lists_that_a_run_needs_to_go_on_must_be_there(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit_whole(tmp_path, stopping(mining(), 5), checkpoint_every=1)
    (tmp_path / "mined" / "negatives-0" / "epoch-0001.arrow").unlink()
    with pytest.raises(DataError, match=r"data.negatives\[0\]: .*epoch-0001.arrow is missing"):
        fit_whole(tmp_path, mining())


def test_a_frozen_teacher_mines_once_and_batches_hold_what_it_found(tmp_path):
    made, given = graph(), mining("teacher", every=None)
    seen = []
    batch = given.batch
    given.batch = lambda epoch, step: seen.append(batch(epoch, step)) or seen[-1]
    trainer(tmp_path, made, given).fit()
    (found,) = lists_of(tmp_path)
    listed = judged().listed.tolist()
    brought = 0
    for it in seen:
        for query, index, mask in zip(it.query_ids.tolist(), it.index, it.mask, strict=True):
            rows = set(it.candidate_ids[index[mask]].tolist())
            assert rows <= set(listed[query]) | set(found[query])
            brought += len(rows - set(listed[query]))
    assert brought > 5


def test_the_second_ctrl_c_ends_at_once(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    made = source()
    batch = made.batch

    def stopped(epoch, step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return batch(epoch, step)

    made.batch = stopped
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, given=made).fit()
    assert latest(tmp_path / "checkpoints") is None
    with pytest.raises(KeyboardInterrupt):  # the handlers of before are back
        signal.raise_signal(signal.SIGINT)


def test_only_the_newest_checkpoint_is_kept(tmp_path):
    trainer(tmp_path, checkpoint_every=1).fit()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


def test_a_finished_training_is_not_repeated(tmp_path):
    first = graph()
    trainer(tmp_path, first).fit()
    before = (tmp_path / "history.jsonl").read_bytes()
    made = source()
    made.batch = lambda epoch, step: 1 / 0
    again = graph()
    assert trainer(tmp_path, again, made).fit().step == 6
    assert equal(weights(again), weights(first))
    assert (tmp_path / "history.jsonl").read_bytes() == before
