"""The benchmark of mining's memory runs small, finds what a matrix product finds, and says what it held."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "mine_negatives.py"


@pytest.mark.slow
def test_mining_stays_within_its_bound(tmp_path):
    """200,000 vectors of 256 numbers in two pieces: 205 MB, of which 134 at most are in memory at a time."""
    written = tmp_path / "result.json"
    options = ["--quick", "--rows", "200000", "--queries", "50", "--dim", "256", "--output", str(written)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(written.read_text())
    assert result["recall"] == 1.0 and result["figures"]["rank"] > 1
    assert result["within"] and result["libraries_gb"] < result["peak_gb"] < result["libraries_gb"] + 1.0
