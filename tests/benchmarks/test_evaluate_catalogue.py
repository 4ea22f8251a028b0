"""The benchmark of catalogue evaluation, on a small catalogue: both sides find the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_small_catalogue(tmp_path):
    arguments = [
        "--quick",
        "--users",
        "60",
        "--items",
        "300",
        "--large",
        "500",
        "--dim",
        "8",
        "--rounds",
        "1",
    ]
    output = tmp_path / "result.json"
    said = subprocess.run(
        [sys.executable, "benchmarks/evaluate_catalogue.py", *arguments, "--output", str(output)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    result = json.loads(said.splitlines()[-1])
    assert result == json.loads(output.read_text())
    assert result["ratio"] > 0 and {"ours", "loop", "tight"} <= result["seconds"].keys()
    assert 0 < result["metrics"]["Recall@100"] < 1
    assert result["large"]["items"] == 500 and result["large"]["peak_gb"] >= result["large"]["libraries_gb"]
