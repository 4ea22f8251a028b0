"""The benchmark of preparing interactions runs small: both sides find the same, and the last line says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "prepare_interactions.py"


def test_both_sides_prepare_the_same(tmp_path):
    written = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick", "--sizes", "2000", "6000", "--output", str(written)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(written.read_text())
    assert [size["rows"] for size in result["sizes"]] == [2000, 6000]
    assert result["ratio"] > 0 and result["sizes"][0]["found"]["history"] > 0
