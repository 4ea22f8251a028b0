"""Killed at any moment, and gone on with: the store, and what is trained from it, end as if nothing had been.

The processes are forks of this one, stopped by SIGKILL: no handler runs, nothing is tidied up.
"""

import os
import random
import signal
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from distill.batch import Ragged
from distill.data import Judged, RandomNegatives, TextSource, TextTable
from distill.graph import Arrow, DistillationGraph
from distill.objectives import EmbeddingMatch, SampledSoftmax, ScoreKL
from distill.settings import TrainSettings
from distill.store import RecalledBatches, TeacherMemory
from distill.trainer import Trainer
from students import BiEncoder
from teachers import CrossEncoder

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
WORDS = "wing flow heat sea ship blood cell gene river city film tree fire music heart".split()


@pytest.fixture
def parts(tiny_bert, monkeypatch):
    """A graph with a teacher of pairs and one of texts, and lists with samplers; blocks are small."""
    monkeypatch.setattr("distill.store.TEXTS_AT_ONCE", 2)
    monkeypatch.setattr("distill.store.PAIRS_AT_ONCE", 60)  # of four batches
    lists = [[(5 * q + 7 * i) % 60 for i in range(4)] for q in range(20)]
    source = TextSource(
        Judged(
            "rerank",
            TextTable([str(q) for q in range(20)], [f"what is {WORDS[q % 15]} {q}" for q in range(20)]),
            TextTable(
                [str(c) for c in range(60)], [" ".join(WORDS[c % 7 : c % 15]) + f" {c}" for c in range(60)]
            ),
            Ragged.of(lists),
            torch.tensor([float(i == 0) for row in lists for i in range(len(row))]),
        ),
        batch_size=2,
        candidates=7,
        negatives=[RandomNegatives(3)],
        seed=3,
    )
    torch.manual_seed(0)
    nodes = {
        "student": BiEncoder(tiny_bert(layers=1, seed=1)),
        "encoder": BiEncoder(tiny_bert(layers=1, seed=2)),
        "cross": CrossEncoder(tiny_bert(layers=1, num_labels=1)),
    }
    arrows = [
        Arrow("vectors", EmbeddingMatch(), "student", "encoder"),
        Arrow("pairs", ScoreKL(), "student", "cross"),
        Arrow("labels", SampledSoftmax(), "student"),
    ]
    graph = DistillationGraph(nodes, arrows, ["student"])
    source.prepare(*graph.columns())
    return graph, source


def fill(parts, folder):
    """What ``distill score`` does for two epochs."""
    graph, source = parts
    memory = TeacherMemory(graph, {"data": source})
    memory.fill()
    batches = RecalledBatches(memory, source)
    for place in range(20):
        batches.batch(*divmod(place, 10))
    (folder / "asked").write_text(str(sum(memory.asked.values())))


def ask_listed(parts, folder):
    graph, source = parts
    TeacherMemory(graph, {"data": source}).fill()


def train(parts, folder):
    graph, source = parts
    settings = TrainSettings(
        epochs=4, mixed_precision="no", checkpoint_every=2, learning_rate=1e-3, log_every=1
    )
    Trainer(graph, source, settings, folder / "run").fit()
    save_file({name: p.detach().clone() for name, p in graph.trainable().items()}, folder / "end.safetensors")


def forked(work, parts, folder: Path) -> int:
    """Do ``work`` in another process; returns its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        signal.alarm(300)  # whatever hangs ends
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # its own is shared with forks, and with one killed inside a bar
        os.environ["DISTILL_STORE"] = str(folder / "store")
        slow_writing()
        work(parts, folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def slow_writing() -> None:
    """Write blocks in two halves, so that some kills come between them."""

    def write(path, data):
        with open(path, "wb") as file:
            file.write(memoryview(data)[: len(data) // 2])
            file.flush()
            time.sleep(0.02)
            file.write(memoryview(data)[len(data) // 2 :])

    Path.write_bytes = write


def finished(pid: int) -> bool:
    _, status = os.waitpid(pid, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def done(folder: Path) -> int:
    """How many blocks are written, and how many steps are logged."""
    history = folder / "run/history.jsonl"
    lines = history.read_bytes().count(b"\n") if history.exists() else 0
    return len(list((folder / "store").rglob("*.arrow"))) + lines


def kill_at_random(work, parts, folder: Path, times: int, most: int) -> int:
    """Start ``work`` again and again, kill it after up to ``most`` more blocks; how often it was killed."""
    random.seed(7)
    killed = 0
    for _ in range(times):
        pid = forked(work, parts, folder)
        goal = done(folder) + random.randint(0, most)
        while done(folder) < goal and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
        time.sleep(random.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed += os.WIFSIGNALED(status)
    return killed


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_store_that_is_killed_twenty_times_is_byte_for_byte_that_of_one_run(parts, tmp_path):
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    assert finished(forked(fill, parts, tmp_path / "whole"))
    assert kill_at_random(fill, parts, tmp_path / "killed", times=20, most=1) == 20
    assert 0 < done(tmp_path / "killed") < done(tmp_path / "whole")  # it was in the middle to the last
    assert finished(forked(fill, parts, tmp_path / "killed"))
    whole, killed = (bytes_of(tmp_path / name / "store") for name in ("whole", "killed"))
    assert len(whole) > 40 and killed == whole
    assert int((tmp_path / "killed/asked").read_text()) > 0
    assert finished(forked(fill, parts, tmp_path / "killed"))
    assert (tmp_path / "killed/asked").read_text() == "0" and bytes_of(tmp_path / "killed/store") == whole


def test_a_training_that_is_killed_ends_with_the_same_store_and_weights(parts, tmp_path):
    """Its teachers are asked about drawn pairs while it trains; it hears bit for bit what it would have."""
    (tmp_path / "whole").mkdir()
    assert finished(forked(train, parts, tmp_path / "whole"))
    (tmp_path / "killed").mkdir()
    assert finished(forked(ask_listed, parts, tmp_path / "killed"))  # so that it is killed while it trains
    assert kill_at_random(train, parts, tmp_path / "killed", times=12, most=3) == 12
    assert finished(forked(train, parts, tmp_path / "killed"))
    assert bytes_of(tmp_path / "killed/store") == bytes_of(tmp_path / "whole/store")
    killed, whole = (load_file(tmp_path / name / "end.safetensors") for name in ("killed", "whole"))
    assert killed.keys() == whole.keys() and all(torch.equal(killed[name], whole[name]) for name in whole)


def test_what_a_kill_in_the_middle_of_a_write_left_is_swept_away(parts, tmp_path):
    def die(path, data):
        with open(path, "wb") as file:
            file.write(memoryview(data)[:100])
            file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def fill_and_die(parts, folder):
        Path.write_bytes = die
        fill(parts, folder)

    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    assert not finished(forked(fill_and_die, parts, tmp_path / "killed"))
    left = [path.name for path in (tmp_path / "killed/store").rglob("*.tmp")]
    assert len(left) == 1
    for name in ("killed", "whole"):
        assert finished(forked(fill, parts, tmp_path / name))
    assert bytes_of(tmp_path / "killed/store") == bytes_of(tmp_path / "whole/store")
