"""What the command says of wrong recipes and bad files, before any work."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.distill.workplace import DOCUMENTS, Workplace, distill, jsonl, mined, qrels


@pytest.fixture
def here(tmp_path, tiny_bert) -> Workplace:
    return Workplace(tmp_path, tiny_bert)


WRONG: list[tuple[dict[str, Any], str]] = [
    (mined("studnet"), r"data.negatives\[0\].by: there is no model 'studnet'. Did you mean 'student'\?"),
    (
        mined(checked_by="corss", margin=0.1),
        r"data.negatives\[0\].checked_by: there is no model 'corss'. Did you mean 'cross'\?",
    ),
    (mined("cross"), r"data.negatives\[0\].by: 'cross' \(CrossEncoder\) gives no single vector per text"),
    (mined(margn=0.1), r"data.negatives\[0\]: NearestNegatives has no argument 'margn'.*mean 'margin'\?"),
    (mined(margin="much"), r"data.negatives\[0\].margin: it should be a valid number, got 'much'"),
    (mined(margin=-1.0), r"data.negatives\[0\]: margin must be 0 or more, and finite, got -1.0"),
    (mined(count=200), r"data.negatives\[0\]: top \(100\) must be at least count \(200\)"),
    (
        {
            "data.negatives": [
                {
                    "type": "distill.data.BM25Negatives",
                    "count": 1,
                    "checked_by": "cross",
                    "margin": 0.1,
                    "every": 1,
                }
            ]
        },
        r"data.negatives\[0\].every: 'cross' will not learn, so it would find the same again",
    ),
    ({"trian": {}}, r"trian: there is no such key; .*Did you mean 'train'\?"),
    ({"train.learning_rate": "fast"}, r"train.learning_rate: .*valid number.*'fast'"),
    (
        {"train.select": "MRR"},
        r"train.select: 'MRR' is not measured; evaluate.metrics are nDCG@10, Recall@100",
    ),
    ({"train.learning_rates": {"studnet": 1}}, r"train.learning_rates: 'studnet'.* Did you mean 'student'\?"),
    (
        {
            "models.peer": {"ref": "student"},
            "losses.peer": {"type": "distill.objectives.ScoreKL", "from": "cross", "to": "peer"},
            "train.learning_rates": {"peer": 1},
        },
        r"train.learning_rates: all parameters of 'peer' are another node's",
    ),
    ({"models.student.type": "students.BiEncodre"}, r"models.student.type: .*Did you mean 'BiEncoder'\?"),
    ({"models.student.type": "os.system"}, r"'os.system' is outside of .*--trust os"),
    (
        {"models.student.layer": 1},
        r"models.student: BiEncoder has no argument 'layer'.*Did you mean 'layers'\?",
    ),
    ({"models.student.layers": "two"}, r"models.student.layers: it should be a valid integer, got 'two'"),
    ({"models.student.train": "no"}, r"models.student.train: it should be true or false, got 'no'"),
    (
        {"models.student.encoder": {"ref": "cros.encoder"}},
        r"no model 'cros' to refer to. Did you mean 'cross'\?",
    ),
    ({"models.student.encoder": {"ref": "cross.head"}}, r"'cross' does not share 'head'; it shares nothing"),
    ({"losses.labels.temprature": 2}, r"losses.labels: .*'temprature'.*Did you mean 'temperature'\?"),
    ({"losses.labels.temperature": -2}, r"losses.labels: temperature must be positive and finite, got -2"),
    (
        {"losses.ranking.from": "corss"},
        r"losses.ranking.from: there is no model 'corss'. Did you mean 'cross'\?",
    ),
    (
        {"losses.ranking.type": "distill.objectives.EmbeddingMatch"},
        r"losses.ranking: EmbeddingMatch needs candidates, queries from the teacher, but 'cross' \(Cross",
    ),
    ({"keep": "studnet"}, r"keep: there is no model 'studnet' to keep. Did you mean 'student'\?"),
    ({"models.student.train": False}, r"models.student: the node to keep must be trained"),
    ({"evaluate.metrics": ["NDGC@10"]}, r"evaluate.metrics: 'NDGC@10' is not a ranking metric.*'nDCG@10'\?"),
    ({"evaluate.metrics": ["Recall(cold=5)@10"]}, r"evaluate.metrics: 'Recall\(cold=5\)@10' needs how often"),
    ({"evaluate.references": ["popularity"]}, r"evaluate.references: .*popularity cannot be measured"),
    ({"evaluate.references": ["best"]}, r"evaluate.references.*'popularity'"),
    (
        {"data.negatives": [], "losses.labels": {"type": "distill.objectives.BPR", "to": "student"}},
        r"losses.labels: BPR tells listed positives from listed negatives, .*`in_batch: true`",
    ),
    (
        {"evaluate.split": "tset"},
        r"evaluate.split: no data set has a split 'tset'; there are data: train, test",
    ),
    ({"data.type": None}, r"data.type: this key is required"),
    ({"data.candidates": "three"}, r"data.candidates: it should be a valid integer, got 'three'"),
    ({"data.corpus": "nowhere.jsonl"}, r"corpus: there is no file or folder nowhere.jsonl"),
    ({"search": ["a"], "evaluate": {}}, r"search: .*give evaluate.metrics too"),
    ({"name": "../elsewhere"}, r"name: the name becomes a folder below the runs"),
    ({"baseline": "maybe"}, r"baseline: a baseline is true, false, or losses by name, got 'maybe'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: next(iter(value), "")[:40])
def test_a_wrong_recipe_is_refused_before_any_work(here, changes, message):
    done = here("run", here.recipe(changes))
    assert done.code == 2
    assert re.search(message, done.err), done.err
    assert len(re.findall("^error: ", done.err, re.M)) == 1
    assert "Traceback" not in done.err and done.out == ""
    assert not here.runs.exists()


def _missing_column(here: Workplace) -> dict[str, Any]:
    return {"data.corpus": {"path": here.corpus, "columns": {"text": "txet"}}}


def _empty_text(here: Workplace) -> dict[str, Any]:
    return {"data.corpus": jsonl(here.folder / "empty.jsonl", [*DOCUMENTS, {"_id": "e", "text": " "}])}


def _twice(here: Workplace) -> dict[str, Any]:
    return {"data.corpus": jsonl(here.folder / "twice.jsonl", [*DOCUMENTS, DOCUMENTS[3]])}


def _not_a_number(here: Workplace) -> dict[str, Any]:
    return {"data.qrels": qrels(here.folder / "nan.tsv", [("q0", "d0", 1), ("q1", "d1", "nan")])}


def _absent_document(here: Workplace) -> dict[str, Any]:
    return {"data.qrels": qrels(here.folder / "absent.tsv", [("q0", "d0", 1), ("q1", "d99", 1)])}


def _absent_query(here: Workplace) -> dict[str, Any]:
    return {"data.test": qrels(here.folder / "absent.tsv", [("q0", "d0", 1), ("q99", "d1", 1)])}


def _nothing_relevant(here: Workplace) -> dict[str, Any]:
    return {"data.test": qrels(here.folder / "none.tsv", [("q8", "d8", 0)])}


def _cut_table(here: Workplace) -> dict[str, Any]:
    file = here.folder / "cut.parquet"
    pq.write_table(pa.Table.from_pylist(DOCUMENTS), file)
    file.write_bytes(file.read_bytes()[:-200])
    return {"data.corpus": str(file)}


def _no_weights(here: Workplace) -> dict[str, Any]:
    folder = shutil.copytree(here.encoder, here.folder / "bare")
    (folder / "model.safetensors").unlink()
    return {"models.student.checkpoint": str(folder)}


def _cut_weights(here: Workplace) -> dict[str, Any]:
    folder = shutil.copytree(here.encoder, here.folder / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return {"models.student.checkpoint": str(folder)}


FILES = [
    (_missing_column, r"corpus.jsonl: there is no column 'txet' \(for 'text'\).*Did you mean 'text'\?"),
    (_empty_text, r"empty.jsonl, column 'text', row 20 .*: the document 'e' has no text"),
    (_twice, r"twice.jsonl, column '_id', row 20 .*: the id 'd3' stands there for the second time"),
    (_not_a_number, r"nan.tsv, column 'score', row 1 .*: 'nan' is not a finite number"),
    (_absent_document, r"absent.tsv, column 'corpus-id', row 1 .*: no document has the id 'd99'"),
    (_absent_query, r"absent.tsv, column 'query-id', row 1 .*: no query has the id 'q99'"),
    (_nothing_relevant, r"none.tsv \(test\): no query has a relevant candidate"),
    (_cut_table, r"cut.parquet: the file cannot be read as parquet .* may be cut short"),
    (_no_weights, r"models.student: checkpoint .*bare has no weights"),
    (_cut_weights, r"models.student: checkpoint .*cut: model.safetensors cannot be read"),
]


@pytest.mark.parametrize(("spoil", "message"), FILES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_file_is_refused_by_its_name_before_any_work(here, spoil, message):
    done = here("run", here.recipe(spoil(here)))
    assert (done.code, done.out) == (2, "")
    assert re.search(message, done.err), done.err
    assert len(done.err.splitlines()) == 1
    assert not here.runs.exists()


def test_all_mistakes_of_the_file_are_told_at_once(here):
    recipe = here.recipe({"foo": 1, "models.student.layer": 1, "losses.ranking.from": "corss", "keep": "me"})
    done = here("check", recipe, "train.epoch=3")
    assert done.code == 2
    lines = done.err.splitlines()
    expected = ("train.epoch:", "foo:", "models.student:", "losses.ranking.from:", "keep:")
    assert len(lines) == len(expected)
    assert all(any(key in line for line in lines) for key in expected)


def test_all_mistakes_of_data_measures_and_graph_are_told_at_once(here):
    changes = _twice(here) | _no_weights(here) | {"losses.labels.temperature": 0, "train.select": "MAP"}
    done = here("check", here.recipe(changes))
    assert done.code == 2
    lines = done.err.splitlines()
    expected = ("twice.jsonl", "models.student:", "losses.labels:", "train.select:")
    assert len(lines) == len(expected)
    assert all(any(key in line for line in lines) for key in expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\ndata: [\n", r"recipe.yaml, line 3: not valid YAML"),
        ("name: x\nname: y\n", r'recipe.yaml, line 2: not valid YAML: found duplicate key "name"'),
        ("- a\n", r"recipe.yaml must be a mapping with the keys name, data"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(here, text, message):
    file = here.folder / "recipe.yaml"
    file.write_text(text)
    done = here("check", file)
    assert done.code == 2 and re.search(message, done.err) and len(done.err.splitlines()) == 1


def test_bad_usage_exits_with_2():
    assert distill("chekc").code == 2
    assert distill("check", "quickstart", "--trsut", "x").code == 2
    wrong = distill("check", "quikstart")
    assert wrong.code == 2 and "Did you mean 'quickstart'?" in wrong.err
    assert distill("check", "quickstart", "epochs").code == 2
