"""Several processes do what one does, end together, and speak with one voice."""

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distill import processes
from distill.checkpoint import latest
from distill.recipe import check_recipe
from distill.run import Runs
from tests.distill.several import CASES, fit, step

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = float(os.environ.get("DISTILL_TEST_PATIENCE", 120))  # seconds
WORDS = ["wing", "heart", "ship", "city", "film", "tree", "fire", "blood", "sea", "music", "apple", "dog"]

pytestmark = pytest.mark.slow


def launch(n, *arguments, cwd=REPOSITORY):
    """Run a module in n processes, as a user does, to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--multi_gpu", f"--num_processes={n}", f"--main_process_port={port}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{cwd}"},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    return process.returncode, out, err


@pytest.fixture(scope="module", params=[2, 4])
def several(request, tmp_path_factory):
    """What each of two, and of four, processes found; and the folder they left."""
    folder = tmp_path_factory.mktemp("several")
    code, _, err = launch(request.param, "tests.distill.several", folder)
    assert code == 0, err
    return [load_file(folder / f"{rank}.safetensors") for rank in range(request.param)], folder


def test_losses_and_gradients_are_those_of_one_process(several):
    found, _ = several
    assert all(int(one["world"]) == len(found) for one in found)
    for name in CASES:
        expected = step(name)
        for cache in (None, 3):
            for rank, one in enumerate(found):
                mine = {
                    key.removeprefix(f"{name}|{cache}|"): value
                    for key, value in one.items()
                    if key.startswith(f"{name}|{cache}|")
                }
                assert mine.keys() == expected.keys()
                for key, value in expected.items():
                    where = f"{name}, {cache}, process {rank}: {key}: "
                    torch.testing.assert_close(
                        mine[key], value, atol=1e-5, rtol=1e-5, msg=lambda m, where=where: where + m
                    )


def test_all_processes_have_the_same_parameters_bit_for_bit(several):
    found, _ = several
    for one in found[1:]:
        assert one.keys() == found[0].keys()
        assert all(torch.equal(value, found[0][key]) for key, value in one.items())


def test_a_stopped_training_ends_where_an_unstopped_one_ends(several):
    """Ctrl-C reached one process; with dropout, whose numbers differ from process to process."""
    (first, *_), folder = several
    whole = {key.removeprefix("whole|"): value for key, value in first.items() if key.startswith("whole|")}
    assert whole and all(torch.equal(first[f"resumed|{key}"], value) for key, value in whole.items())
    states = load_file(latest(folder / "stopped" / "checkpoints") / "random.safetensors")
    assert states.keys() == {"cpu", *(f"cpu.{rank}" for rank in range(1, len(several[0])))}
    assert not torch.equal(states["cpu"], states["cpu.1"])


def test_another_number_of_processes_goes_on_and_says_so(several, caplog, tmp_path):
    found, folder = several
    shutil.copytree(folder / "stopped", tmp_path, dirs_exist_ok=True)
    assert fit(tmp_path)
    assert f"was left by a training with processes {len(found)}, and it goes on with 1" in caplog.text


def test_rows_and_words_reach_all_processes(several):
    found, _ = several
    for one in found:
        assert one["gathered"].flatten().tolist() == [
            i + 10 * rank for rank in range(len(found)) for i in range(rank + 1)
        ]
        assert one["in_shares"].tolist() == [0, 2, 4, 6, 8, 10, 12]
        assert one["ragged_in_shares"].tolist() == [1, 2, 2, 4, 5, 5]


# the command

MODULE = '''
import os, signal, time
from pathlib import Path
import torch
from distill import processes
from distill.objectives.base import Objective
from distill.outputs import Needs
from distill.processes import rank

speaks = processes.speaks
processes.speaks = lambda: time.sleep(2) or speaks()  # the launcher ends the others before they have spoken


class Happens(Objective):
    """Says nothing; at its third call something happens, once, in one process."""

    def __init__(self, what: str, where: int):
        super().__init__(student_needs=Needs("queries"))
        self.what, self.where, self.calls = what, where, 0

    def count(self, batch):
        return torch.ones(len(batch.query_ids))

    def loss(self, student, teacher, batch):
        self.calls += 1
        if self.calls == 3 and rank() == self.where and not Path("happened").exists():
            Path("happened").touch()
            if self.what == "crash":
                raise ValueError("boom")
            if self.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getppid(), signal.SIGINT)  # the launcher
        return student.queries.sum(dim=-1) * 0
'''


@pytest.fixture
def workplace(tmp_path):
    """A folder with a table per split, and a package with an objective in which something happens."""
    for split, offset in (("train", 0), ("dev", 1), ("test", 2)):
        lines = [
            json.dumps(
                {
                    "query": f"what is a {word}",
                    "candidate": f"{WORDS[(place + step * (offset + 1)) % len(WORDS)]} of {split}",
                    "label": int(step == 0),
                }
            )
            for place, word in enumerate(WORDS)
            for step in range(3)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    (tmp_path / "happening.py").write_text(textwrap.dedent(MODULE))
    return tmp_path


def recipe(workplace, tiny_bert, happens=None, mined=False):
    """A student, a trained peer and a cross-encoder; written as ``recipe.yaml`` and returned."""
    student = {"type": "students.BiEncoder", "checkpoint": str(tiny_bert(layers=1)), "dropout": 0.0}
    losses = {
        "labels": {"type": "distill.objectives.SampledSoftmax", "to": "student"},
        "scores": {"type": "distill.objectives.ScoreKL", "from": "cross", "to": "student"},
    }
    if happens is not None:
        losses["happens"] = {"type": "happening.Happens", "to": "student", **happens}
    document = {
        "name": "mine",
        "data": {"type": "distill.data.Groups", "path": str(workplace)}
        | {split: f"{split}.jsonl" for split in ("train", "dev", "test")},
        "models": {
            "student": student,
            "cross": {"type": "teachers.CrossEncoder", "checkpoint": str(tiny_bert(layers=1, num_labels=1))},
        },
        "losses": losses,
        "train": {
            "epochs": 2,
            "batch_size": 5,
            "learning_rate": 1e-3,
            "mixed_precision": "no",
            "log_every": 1,
            "gradient_cache": 4,
        },
        "evaluate": {"metrics": ["nDCG@10", "MRR@10"]},
    }
    if mined:
        sampler = {"type": "distill.data.NearestNegatives", "by": "student", "count": 3, "top": 8, "every": 1}
        document["data"] |= {"negatives": [sampler], "candidates": 5}
    (workplace / "recipe.yaml").write_text(json.dumps(document))
    return check_recipe(document, "")


def run(workplace, n=2):
    return launch(n, "distill", "run", "recipe.yaml", "--trust", "happening", cwd=workplace)


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_run_of_two_processes_is_that_of_one(workplace, tiny_bert):
    document = recipe(workplace, tiny_bert)
    code, out, err = run(workplace)
    assert code == 0, err
    assert out.count("run folder:") == 1 and out.count("student") == 1
    assert "shared by 2 processes" in err and err.count("step 1 of 6") <= 1
    found, alone = workplace / "runs" / "mine", Runs(workplace / "alone").run(document)
    assert {path.name for path in found.iterdir()} == {path.name for path in alone.iterdir()} | {"results.md"}
    for line, expected in zip(history(found), history(alone), strict=True):
        for key in expected.keys() - {"tokens_per_second"}:
            assert line[key] == pytest.approx(expected[key], abs=1e-4 if "norm" in key else 1e-5), key
    measured, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (found, alone))
    for name in ("student", "cross"):
        mine, alone = measured["models"][name], expected["models"][name]
        assert mine["metrics"] == pytest.approx(alone["metrics"], abs=1e-6)
        assert mine["queries"] == alone["queries"]


def test_processes_share_mining_and_the_teachers_answers(workplace, tiny_bert, monkeypatch):
    """The lists that are mined, what the store holds and the losses are those of one process."""
    monkeypatch.setenv("DISTILL_CACHE", str(workplace / "cache"))  # where nothing is known
    document = recipe(workplace, tiny_bert, mined=True)
    code, _, err = run(workplace)
    assert code == 0, err
    monkeypatch.setenv("DISTILL_CACHE", str(workplace / "another"))
    found, alone = workplace / "runs" / "mine", Runs(workplace / "alone").run(document)
    lists = sorted(path.relative_to(found) for path in found.glob("mined/*/*.arrow"))
    assert [path.name for path in lists] == ["epoch-0000.arrow", "epoch-0001.arrow"]
    ours, theirs = (pa.ipc.open_file(folder / lists[0]).read_all() for folder in (found, alone))
    assert ours["row"].equals(theirs["row"])
    np.testing.assert_allclose(*(t["score"].combine_chunks().values for t in (ours, theirs)), atol=1e-5)
    for line, expected in zip(history(found), history(alone), strict=True):
        if (
            line["step"] <= 3
        ):  # then weights that agree but to rounding mine, and a rank may turn on the last bit
            for key in ("loss", "loss/labels", "loss/scores"):
                assert line.get(key) == pytest.approx(expected.get(key), abs=1e-5), key


def test_processes_score_once_what_one_then_knows(workplace, tiny_bert, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(workplace / "cache"))  # where nothing is known
    document = recipe(workplace, tiny_bert)
    code, out, err = launch(2, "distill", "score", "recipe.yaml", cwd=workplace)
    assert code == 0, err
    assert out.count("teacher store:") == 1
    asked = next(line for line in out.splitlines() if "pairs" in line and "cross" in line).split()
    assert asked[-1] == asked[-3] != "0"  # all of them, now
    (row,) = [row for row in Runs().scoring(document).score() if row[0] == "cross"]
    assert row[-1] == 0 and row[-2] == row[-3] == int(asked[-1])


def test_a_process_that_crashes_ends_the_run_with_its_message(workplace, tiny_bert):
    recipe(workplace, tiny_bert, {"what": "crash", "where": 1})
    code, out, err = run(workplace)
    assert code != 0 and "run folder" not in out
    assert err.count("error: ValueError: boom") == 1
    assert "another process" not in err
    assert [line["step"] for line in history(workplace / "runs" / "mine") if "loss" in line] == [1, 2]


def test_a_process_that_is_killed_ends_the_run_with_a_message(workplace, tiny_bert):
    recipe(workplace, tiny_bert, {"what": "kill", "where": 1})
    code, _, err = run(workplace)
    assert code != 0
    assert err.count("error: another process of this run ended without a word") == 1


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_goes_on(workplace, tiny_bert):
    """The launcher gets it, and passes it on to all."""
    recipe(workplace, tiny_bert, {"what": "stop", "where": 0})
    code, _, err = run(workplace)
    assert code != 0
    assert err.count("interrupted: stopped after step") == 1 and "a checkpoint is saved" in err
    saved = latest(workplace / "runs" / "mine" / "checkpoints")
    step = json.loads((saved / "state.json").read_text())["progress"]["step"]
    assert 3 <= step < 6
    code, out, err = run(workplace)
    assert code == 0, err
    assert f"going on from step {step} of 6" in err and out.count("run folder:") == 1
    lines = [line for line in history(workplace / "runs" / "mine") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


# alone


def test_alone_nothing_is_gathered_summed_or_waited_for():
    rows = torch.randn(3, 2, requires_grad=True)
    assert processes.gather(rows) is rows and processes.gather_shares(rows, 3) is rows
    assert processes.in_shares(len, [1, 2]) == 2 and processes.share(5) == slice(0, 5)
    assert processes.from_first("it") == "it" and processes.any_of(True, False) == (True, False)
    assert (processes.world(), processes.rank(), processes.is_first()) == (1, 0, True)
    parameter = nn.Parameter(torch.ones(2))
    processes.sum_gradients([parameter])
    assert parameter.grad is None
    with processes.first_goes_first():
        processes.wait()


@pytest.mark.parametrize(("n", "world"), [(0, 3), (1, 4), (7, 2), (8, 3), (100, 7)])
def test_shares_cover_all_rows_once_and_evenly(n, world, monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: world)
    parts = [range(n)[processes.share(n, rank)] for rank in range(world)]
    assert [row for part in parts for row in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
