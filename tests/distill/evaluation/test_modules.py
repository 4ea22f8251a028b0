from pathlib import Path

import evaluate
import pytest

from distill.evaluation import Qrels, Run, pairs, ranking
from distill.evaluation import modules as folder

PREDICTIONS = [
    {"candidates": ["a", "b", "c"], "scores": [0.25, 0.75, 0.5]},
    {"candidates": ["b", "a"], "scores": [0.5, 0.5]},
]
REFERENCES = [{"candidates": ["a", "c"], "labels": [1, 2]}, {"candidates": ["b"], "labels": [1]}]
METRICS = ["nDCG@10", "MRR@10", "MAP"]


def plain_means() -> dict[str, float]:
    run = Run([0, 0, 0, 1, 1], ["a", "b", "c", "b", "a"], [0.25, 0.75, 0.5, 0.5, 0.5])
    return ranking(run, Qrels([0, 0, 1], ["a", "c", "b"], [1, 2, 1]), METRICS).means


def load(name: str, how: str) -> evaluate.Metric:
    """The module as an import gives it, or as ``evaluate.load`` makes it of its file."""
    if how == "class":
        return getattr(folder, name)()
    return evaluate.load(str(Path(folder.__file__).with_name(f"{name.lower()}.py")))


@pytest.mark.parametrize("how", ["class", "path"])
def test_the_ranking_module_equals_the_plain_function(how):
    module = load("Ranking", how)
    assert module.compute(predictions=PREDICTIONS, references=REFERENCES, metrics=METRICS) == plain_means()
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        module.add_batch(predictions=[prediction], references=[reference])
    assert module.compute(metrics=METRICS) == plain_means()


@pytest.mark.parametrize("how", ["class", "path"])
def test_the_pairs_module_equals_the_plain_function(how):
    scores, labels, metrics = [0.9, 0.8, 0.1, 0.3], [1, 0, 0, 1], ["Spearman", "AUC", "Accuracy", "F1"]
    module = load("Pairs", how)
    expected = pairs(scores, labels, metrics, threshold=0.5)
    assert module.compute(predictions=scores, references=labels, metrics=metrics, threshold=0.5) == expected
    module.add_batch(predictions=scores[:3], references=labels[:3])
    module.add(prediction=scores[3], reference=labels[3])
    assert module.compute(metrics=metrics, threshold=0.5) == expected


@pytest.mark.parametrize("how", ["class", "path"])
def test_the_modules_know_users_and_the_catalogue(how):
    scores, labels, users = [0.9, 0.8, 0.3, 0.4, 0.1, 0.2], [1, 0, 1, 0, 0, 1], list("AABBBC")
    measured = load("Pairs", how).compute(
        predictions=scores, references=labels, metrics=["GAUC", "ECE"], groups=users
    )
    assert measured == pairs(scores, labels, ["GAUC", "ECE"], groups=users)
    measured = load("Ranking", how).compute(
        predictions=PREDICTIONS,
        references=REFERENCES,
        metrics=["Coverage@1", "AveragePopularity@1", "HitRate(cold=1)@2"],
        popularity={"a": 4, "b": 1, "c": 2, "d": 0},
    )
    # b and a are first, equal scores by id; only b is cold, and is second for the one who wants it
    assert measured == {"Coverage@1": 0.5, "AveragePopularity@1": 2.5, "HitRate(cold=1)@2": 1.0}
