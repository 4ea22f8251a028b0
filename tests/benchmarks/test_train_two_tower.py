"""The benchmark of two-towers gives both sides the same rows."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_the_peer_gets_the_rows_of_our_batches(data_root, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import train_two_tower as benchmark

    setting = benchmark.Setting(torch.device("cpu"), data_root, warm=1, steps=3)
    features, source = benchmark.films(setting)
    rows, sizes = benchmark.peer_rows(source, 2)
    assert {len(column) for column in rows.values()} == {2 * benchmark.ROWS}
    first = source.batch(0, 0)
    assert sizes[0] == int(first.mask.sum()) <= benchmark.ROWS
    user, place = first.mask.nonzero(as_tuple=True)
    films = first.candidates["movie_id"][first.index[user, place]]
    assert (rows["movie_id"][: sizes[0]] == films.numpy()).all()
    assert (rows["label"][: sizes[0]] == first.labels[user, place].numpy()).all()
    assert rows["hist_movie_id"][0].tolist()[:3] == first.queries["hist_movie_id"][0][:3].tolist()
    ours = benchmark.train_ours(setting, features, source, sizes, "no")
    assert len(ours.ends) == 3 and ours.rows == sum(sizes[1:3]) and ours.speed > 0
    sys.modules.pop("train_two_tower")
