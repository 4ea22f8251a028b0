"""The table of a run, and how much of the gap between student and teacher was closed."""

from __future__ import annotations

import re
from typing import Any

import pytest

from distill.results import results


def run(metric: str = "nDCG@10", **values: float | None) -> dict[str, Any]:
    """A ``metrics.json``: the value of one metric by model."""
    models = {name: {"metrics": {metric: value}, "size_mb": 12.34} for name, value in values.items()}
    return {"keep": "student", "models": models}


def test_teachers_come_first_and_the_student_alone_last():
    table = results(run(student=0.5, cross=0.6, other=None, baseline=0.4))
    assert table.header == ["model", "nDCG@10", "size in MB", "queries/s", "ms/query"]
    assert table.rows == [
        ["cross", "0.6000", "12.3", "—", "—"],
        ["other", "—", "12.3", "—", "—"],
        ["student", "0.5000", "12.3", "—", "—"],
        ["student without teachers", "0.4000", "12.3", "—", "—"],
    ]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"student": 0.55, "cross": 0.6, "weak": 0.3, "baseline": 0.4}, "75% .* to cross"),
        ({"student": 0.7, "cross": 0.6, "baseline": 0.4}, "150%"),
        ({"student": 0.35, "cross": 0.6, "baseline": 0.4}, "-25%"),
        ({"student": 0.5, "cross": 0.4, "baseline": 0.4}, "not defined, cross is no better"),
        ({"metric": "ECE", "student": 0.05, "cross": 0.01, "baseline": 0.06}, "20% .* to cross"),
        (
            {"metric": "Calibration", "student": 0.8, "cross": 1.0, "baseline": 0.64},
            "50% .* to cross",  # log 0.8 is half of log 0.64
        ),
        (
            {"metric": "Logloss", "student": 0.3, "cross": 0.2, "weak": 0.9, "baseline": 0.6},
            "75% .* to cross",
        ),
    ],
)
def test_the_gap_is_the_way_from_the_student_alone_to_the_best_teacher(values, said):
    """(student - alone) / (best teacher - alone); Logloss falls as a model gets better."""
    assert re.search(said, results(run(**values)).gap)


@pytest.mark.parametrize("values", [{"student": 0.5, "cross": 0.6}, {"student": 0.5, "baseline": 0.4}])
def test_without_a_teacher_or_a_baseline_there_is_no_gap(values):
    assert results(run(**values)).gap == ""


def test_the_student_is_compared_with_itself_without_teachers():
    comparison = {"metric": "MAP", "difference": 0.0123, "low": 0.001, "high": 0.02, "p_value": 0.0312}
    comparison |= {"queries": 1234, "confidence": 0.95}
    lines = results(run(student=0.5, baseline=0.4) | {"comparison": comparison}).lines
    assert lines == [
        "student with teachers - without: +0.0123 MAP "
        "(95% interval +0.0010 to +0.0200, p = 0.031, 1,234 queries)"
    ]


def test_a_run_without_metrics_still_has_a_table():
    table = results({"keep": "student", "models": {"student": {"size_mb": 1.0}}})
    assert (table.header, table.rows) == (
        ["model", "size in MB", "queries/s", "ms/query"],
        [["student", "1.0", "—", "—"]],
    )


def test_references_come_first_and_are_no_teachers():
    references = {
        "popularity": {"metrics": {"nDCG@10": 0.9, "AveragePopularity@10": 1234.56}},
        "random": {"metrics": {"nDCG@10": 0.1}},
    }
    table = results(run(student=0.5, baseline=0.4) | {"references": references})
    assert table.rows[:2] == [["popularity", "0.9000", "—", "—", "—"], ["random", "0.1000", "—", "—", "—"]]
    assert [row[0] for row in table.rows[2:]] == ["student", "student without teachers"]
    assert table.gap == ""


def test_a_count_has_fewer_digits_than_a_share():
    assert results(run("AveragePopularity@10", student=1234.56)).rows[0][1] == "1,234.6"


def test_users_are_called_users():
    comparison = {"metric": "GAUC", "difference": 0.01, "low": 0.0, "high": 0.02, "p_value": 0.03}
    comparison |= {"queries": 12, "of": "users", "confidence": 0.95}
    assert results(run(student=0.5) | {"comparison": comparison}).compared.endswith("p = 0.03, 12 users)")
