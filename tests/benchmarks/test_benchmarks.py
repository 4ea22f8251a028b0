"""Each benchmark runs on a tiny model and tiny data, and ends with the line of JSON that it promises."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from students import BiEncoder

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("sentence_transformers") is None, reason="the peer is not installed"
    ),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """WikiQA and SciFact as the benchmarks read them, made of a few words."""
    folder = tmp_path_factory.mktemp("data")
    words, chance = ["river", "sea", "ship", "water", "air", "fire", "light", "heart"], random.Random(0)

    def text(length):
        return " ".join(chance.choice(words) for _ in range(length))

    groups = [(text(5), text(chance.randint(4, 12)), 0) for _ in range(40)]
    rows = [(question, f"{text(6)} {i}", i == 0) for question, *_ in groups for i in range(9)]
    tables = {
        "wikiqa/train_tokenized": pd.DataFrame(rows, columns=["question", "sentence", "label"]),
        "scifact/corpus": pd.DataFrame({"title": [text(3)] * 12, "text": [text(40) for _ in range(12)]}),
    }
    for name, table in tables.items():
        (folder / name).parent.mkdir()
        table.to_parquet(folder / f"{name}.parquet")
    return folder


def last_line(name, tiny_bert, data, tmp_path, *options):
    """What ``benchmarks/NAME.py --quick`` prints last, parsed; the same must be in the file it writes."""
    BiEncoder(tiny_bert()).save_pretrained(tmp_path / "model")
    written = tmp_path / "result.json"
    always = ["--quick", "--model", str(tmp_path / "model"), "--output", str(written)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *always, *options],
        env={**os.environ, "DISTILL_DATA": str(data), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(written.read_text())
    assert result["benchmark"] == name and result["machine"]["threads"] == 1
    return result


def last_line_beside_a_peer(*given):
    result = last_line(*given, "--device", "cpu", "--rounds", "1")
    assert result["peak_tflops"]["float32"] > 0
    return result


def test_training(tiny_bert, data, tmp_path):
    result = last_line_beside_a_peer(
        "train_text", tiny_bert, data, tmp_path, "--steps", "2", "--curve-steps", "3"
    )
    sides = result["sides"]
    assert set(sides) == {"peer", "ours", "peer_bf16", "ours_float32"}
    speed = {name: side["tokens_per_second"] for name, side in sides.items()}
    assert result["ratio"] == pytest.approx(speed["ours"] / speed["peer"], abs=1e-3)
    assert result["ratio_bf16"] == pytest.approx(speed["ours"] / speed["peer_bf16"], abs=1e-3)
    assert (sides["peer"]["precision"], sides["peer_bf16"]["precision"]) == ("no", "bf16")
    assert sides["ours_float32"]["precision"] == "no"
    for side in sides.values():
        assert len(side["loss"]) == 5 and side["seconds_including_setup"] > side["seconds"][0]
        assert result["tokens"] == pytest.approx(side["tokens_per_second"] * side["seconds"][0], rel=1e-2)
    curves = result["curves"]
    assert len(curves["peer"]) == 3
    assert curves["peer"][0] > 0.01, "a loss of nothing would agree whatever the sides do"
    assert curves["ours"] == pytest.approx(curves["peer"], abs=1e-3)
    assert curves["agree"]


def test_encoding(tiny_bert, data, tmp_path):
    result = last_line_beside_a_peer(
        "encode_text", tiny_bert, data, tmp_path, "--texts", "20", "--documents", "10"
    )
    sets = result["sets"]
    assert (sets["short"]["texts"], sets["long"]["texts"]) == (20, 10)
    assert result["ratio"] == min(sets["short"]["ratio"], sets["long"]["ratio"])
    assert result["share_of_peak"] == sets["long"]["ours"]["share_of_peak"] >= 0
    assert result["least_cosine"] > 0.99
    for found in sets.values():
        assert found["ratio"] == pytest.approx(
            found["ours"]["texts_per_second"] / found["peer"]["texts_per_second"], rel=1e-2
        )


def test_memory_with_a_cached_gradient(tiny_bert, data, tmp_path):
    result = last_line("gradient_cache", tiny_bert, data, tmp_path)
    assert result["queries"] == 64 and result["cached"]["rows"] == 32
    assert [one["rows"] for one in result["without"]] == [None, None]
    assert result["peak_gb"] == result["cached"]["peak_gb"] >= result["cached"]["loaded_gb"] > 0
    assert result["cached"]["ids"] > result["without"][1]["ids"] > result["without"][0]["ids"] > 0


def test_listening_to_attention(tiny_bert, data, tmp_path):
    result = last_line("attention", tiny_bert, data, tmp_path, "--device", "cpu", "--rounds", "2")
    seconds = result["seconds"]
    assert {len(runs) for runs in seconds.values()} == {2}
    assert set(seconds) == {"alone", "last", "all", "learning", "learning_all"}
    assert result["ratio"] == pytest.approx(min(seconds["last"]) / min(seconds["alone"]), abs=1e-3)
    ratio = min(seconds["learning_all"]) / min(seconds["learning"])
    assert result["ratio_learning"] == pytest.approx(ratio, abs=1e-3)
    assert result["pairs"] > 0 and result["tokens"] > result["pairs"]
