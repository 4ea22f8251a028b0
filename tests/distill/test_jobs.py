"""Commands side by side: no more than there is room for, each told of, and none left behind."""

import os
import signal
import sys
import threading
import time

import pytest

from distill.jobs import Job, run_jobs


@pytest.fixture
def heeds_interrupts():
    """As a shell's command in the foreground does; in the background it would inherit to ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def jobs(folder, *programs):
    return [
        Job([sys.executable, "-c", program], folder / f"{place}.txt", place)
        for place, program in enumerate(programs)
    ]


def alone(job, running) -> bool:
    return False


def test_all_are_run_and_told_of_with_their_exit_codes_and_words(tmp_path):
    ended = {}
    programs = ["print('a word')", "raise SystemExit(3)", "import os; print(os.environ['SAID'])"]
    run_jobs(
        jobs(tmp_path, *programs),
        fits=lambda job, running: len(running) < 2,
        finished=lambda job, code, seconds: ended.update({job.about: code}),
        environment={"SAID": "by us"},
    )
    assert ended == {0: 0, 1: 3, 2: 0}
    assert [(tmp_path / f"{place}.txt").read_text() for place in range(3)] == ["a word\n", "", "by us\n"]


def test_a_job_heeds_interrupts_although_we_ignore_them(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        program = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
        run_jobs(jobs(tmp_path, program), alone, lambda *_: None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "0.txt").read_text() == "True\n"


def test_no_more_run_than_there_is_room_for(tmp_path):
    """Each leaves a file while it runs and counts what is there; room grows once the first has ended."""
    program = (
        "import os, pathlib, time; mine = pathlib.Path(f'{os.environ[\"HERE\"]}/{os.getpid()}.run'); "
        "mine.touch(); time.sleep(1); print(len(list(mine.parent.glob('*.run')))); mine.unlink()"
    )
    done = []
    run_jobs(
        jobs(tmp_path, *[program] * 4),
        fits=lambda job, running: bool(done) and len(running) < 2,
        finished=lambda job, *_: done.append(job.about),
        environment={"HERE": str(tmp_path)},
    )
    seen = [int((tmp_path / f"{place}.txt").read_text()) for place in range(4)]
    assert done[0] == 0 and seen[0] == 1 and max(seen) <= 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_stopped_interrupts_what_runs_and_waits_for_it(number, tmp_path, heeds_interrupts):
    program = (
        "import sys, time\n"
        "try:\n"
        "    print('up', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(0.3); print('saved')"
    )

    def stop():
        while not (tmp_path / "0.txt").exists() or "up" not in (tmp_path / "0.txt").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs(tmp_path, program, "print('never')"), alone, lambda *_: None)
    assert (tmp_path / "0.txt").read_text() == "up\nsaved\n"
    assert not (tmp_path / "1.txt").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
