"""One run at a time in a folder: the second is told who is there, a dead one's lock is no lock."""

import os
import subprocess
import sys
import textwrap

import pytest

from distill.errors import UserError
from distill.lock import LOCK, only_run_in


def test_the_second_is_told_who_runs_there(tmp_path):
    with only_run_in(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).read_text().startswith(f"{os.getpid()} on ")
        said = rf"run is in use: process {os.getpid()} on .* runs there. Wait for it"
        with pytest.raises(UserError, match=said), only_run_in(tmp_path / "run"):
            raise AssertionError("both are in")
        assert (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "run" / LOCK).exists()
    with only_run_in(tmp_path / "run"):
        pass


def test_another_folder_is_another_matter(tmp_path):
    with only_run_in(tmp_path / "a"), only_run_in(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    script = """
        import os, pathlib, sys
        from distill.lock import only_run_in
        with only_run_in(pathlib.Path(sys.argv[1])):
            os._exit(9)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], check=False)
    assert not (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} ")
    with only_run_in(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} on ")
    assert not (tmp_path / LOCK).exists()


def test_a_run_that_fails_lets_go(tmp_path):
    with pytest.raises(KeyError), only_run_in(tmp_path):
        raise KeyError
    with only_run_in(tmp_path):
        pass


def test_where_files_cannot_be_locked_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.lock.fcntl", None)
    with only_run_in(tmp_path / "run"):
        assert not (tmp_path / "run" / LOCK).exists()
