import pytest
import torch

from distill.batch import Ragged
from distill.data.judged import Judged, TextTable
from distill.evaluation import stored
from distill.measure import measure
from distill.settings import EvaluateSettings
from students import BiEncoder

PASSAGES = ["a wing lifts", "the flow of a fluid", "a shell under load"]


def split(queries: list[str], passages: list[str] = PASSAGES) -> Judged:
    """Each query's relevant passage is the one in its place."""
    return Judged(
        "retrieval",
        TextTable([f"q{row}" for row in range(len(queries))], queries),
        TextTable([f"p{row}" for row in range(len(passages))], passages),
        Ragged.of([[row] for row in range(len(queries))]),
        torch.ones(len(queries)),
        name="a split",
    )


@pytest.fixture
def student(tiny_bert, monkeypatch):
    """One that learns, and the texts that it encoded."""
    model, encoded = BiEncoder(tiny_bert()), []
    encode = BiEncoder.encode_candidates

    def watched(self, candidates, progress=False):
        encoded.append(list(candidates))
        return encode(self, candidates, progress)

    monkeypatch.setattr(BiEncoder, "encode_candidates", watched)
    return model, encoded


SETTINGS = EvaluateSettings(metrics=["nDCG@10", "MRR@10"])


def test_candidates_of_one_step_are_encoded_once_for_all_splits(student):
    model, encoded = student
    latest = {}
    dev = measure(model, split(["wing"]), SETTINGS, None, latest=latest)
    test = measure(model, split(["load", "flow"]), SETTINGS, None, latest=latest)
    assert len(encoded) == 1
    for found, queries in ((dev, ["wing"]), (test, ["load", "flow"])):
        assert found.means == measure(model, split(queries), SETTINGS, None).means
    assert len(encoded) == 3  # nobody holds them


def test_what_has_learnt_and_other_texts_are_encoded_anew(student, tiny_bert):
    model, encoded = student
    latest = {}
    measure(model, split(["wing"]), SETTINGS, None, latest=latest)
    measure(model, split(["wing"], PASSAGES[::-1]), SETTINGS, None, latest=latest)  # by place
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    measure(model, split(["wing"], PASSAGES[::-1]), SETTINGS, None, latest=latest)
    shorter = BiEncoder(tiny_bert(), max_length=3)
    shorter.load_state_dict(model.state_dict())
    measure(shorter, split(["wing"], PASSAGES[::-1]), SETTINGS, None, latest=latest)
    assert len(encoded) == 4 and len(latest) == 1


def test_more_vectors_than_may_be_held_are_not(student, monkeypatch):
    model, encoded = student
    monkeypatch.setattr(stored, "KEPT_BYTES", 3 * model.dim * 4 - 1)
    for latest in ({}, {}):
        measure(model, split(["wing"]), SETTINGS, None, latest=latest)
        assert not latest
    assert len(encoded) == 2


def test_a_run_encodes_its_candidates_once_where_it_keeps_the_last_step(tmp_path, tiny_bert, student):
    from distill.recipe import check_recipe
    from distill.run import Runs

    _, encoded = student
    (tmp_path / "corpus.jsonl").write_text(
        "".join(f'{{"_id": "p{row}", "text": "{text}"}}\n' for row, text in enumerate(PASSAGES))
    )
    (tmp_path / "queries.jsonl").write_text(
        "".join(f'{{"_id": "q{row}", "text": "{text}"}}\n' for row, text in enumerate(PASSAGES))
    )
    for name, rows in (("train", (0, 1)), ("dev", (1,)), ("test", (2,))):
        lines = "".join(f"q{row}\tp{row}\t1\n" for row in rows)
        (tmp_path / f"{name}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    recipe = check_recipe(
        {
            "name": "searched",
            "data": {
                "type": "distill.data.Retrieval",
                "path": str(tmp_path),
                "corpus": "corpus.jsonl",
                "queries": "queries.jsonl",
                "qrels": "train.tsv",
                "dev": "dev.tsv",
                "test": "test.tsv",
            },
            "models": {"student": {"type": "students.BiEncoder", "checkpoint": str(tiny_bert())}},
            "losses": {"labels": {"type": "distill.objectives.SampledSoftmax", "to": "student"}},
            "train": {"epochs": 1, "batch_size": 2, "learning_rate": 1e-3, "evaluate_every": 1},
            "evaluate": {"metrics": ["nDCG@10"]},
        },
        "",
    )
    Runs(tmp_path / "runs").run(recipe)
    assert len(encoded) == 1 and sorted(encoded[0]) == sorted(PASSAGES)
