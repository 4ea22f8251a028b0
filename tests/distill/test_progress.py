"""What is written while a training goes on, and what is said when one goes on elsewhere."""

import json

import pytest

from distill import progress as progress_module
from distill.checkpoint import latest
from distill.progress import History
from tests.distill.training import trainer


def test_history_is_begun_written_and_cut(tmp_path):
    history = History(tmp_path / "run" / "history.jsonl")
    history.start()
    size = history.write({"step": 1})
    assert history.write({"step": 2}) == history.path.stat().st_size > size
    history.cut(size)
    assert [json.loads(line) for line in history.path.read_text().splitlines()] == [{"step": 1}]
    history.start()
    assert history.path.read_text() == ""


def test_only_the_first_process_writes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(progress_module, "is_first", lambda: False)
    history = History(tmp_path / "history.jsonl")
    history.start()
    assert history.write({"step": 1}) == 0
    history.cut(0)
    assert not history.path.exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "precision",
            "bf16",
            "by a training with precision bf16, and it goes on with no: it will not end bit",
        ),
        (
            "processes",
            4,
            "by a training with processes 4, and it goes on with 1: it will not end bit for bit",
        ),
        ("precision", "no", ""),
    ],
)
def test_a_checkpoint_of_another_precision_is_named(key, value, said, tmp_path, caplog):
    trainer(tmp_path).fit()
    path = latest(tmp_path / "checkpoints") / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    trainer(tmp_path).fit()
    assert said in caplog.text and bool(said) is ("bit for bit" in caplog.text)
