"""What a finished run reached, as one table: from ``metrics.json``, so it can be shown again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.evaluation.metrics import merit

NOTHING = "—"
HEADER = ("model", "size in MB", "queries/s", "ms/query")  # the metrics stand after the first


@dataclass(frozen=True)
class Results:
    """The table of a run: references and teachers first, then the student with and without its teachers."""

    header: list[str]
    rows: list[list[str]]
    gap: str  # in words, "" where it is not defined
    compared: str = ""  # with and without teachers, on the same queries, in words

    @property
    def lines(self) -> list[str]:
        """What stands below the table."""
        return [line for line in (self.gap, self.compared) if line]


def results(measured: Mapping[str, Any]) -> Results:
    """The table of a run's ``metrics.json``."""
    models, keep = measured["models"], measured["keep"]
    metrics = list(models[keep].get("metrics", {}))
    order = [name for name in models if name not in (keep, "baseline")] + [keep]
    names = {name: name for name in order}
    if "baseline" in models:
        names["baseline"] = f"{keep} without teachers"
    return Results(
        header=[HEADER[0], *metrics, *HEADER[1:]],
        rows=[row(name, entry, metrics) for name, entry in measured.get("references", {}).items()]
        + [row(name, models[key], metrics) for key, name in names.items()],
        gap=_gap(models, keep, order[:-1], metrics[0]) if metrics else "",
        compared=_compared(measured.get("comparison"), keep),
    )


def row(name: str, entry: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """A model's row: its name, metrics, size and speed."""
    values = entry.get("metrics", {})
    numbers = [_number(values.get(metric)) for metric in metrics]
    size, speed, alone = (entry.get(key) for key in ("size_mb", "queries_per_second", "latency_ms"))
    return [
        name,
        *numbers,
        NOTHING if size is None else f"{size:.1f}",
        NOTHING if speed is None else f"{speed:,.0f}",
        NOTHING if alone is None else f"{alone['median']:.1f}",
    ]


def _number(value: float | None) -> str:
    """A share with four digits, a count (the popularity of what is shown) with one."""
    if value is None:
        return NOTHING
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def _compared(comparison: Mapping[str, Any] | None, keep: str) -> str:
    """Whether teachers helped, or the student was lucky with its queries."""
    if comparison is None:
        return ""
    c = comparison
    return (
        f"{keep} with teachers - without: {c['difference']:+.4f} {c['metric']} "
        f"({c['confidence']:.0%} interval {c['low']:+.4f} to {c['high']:+.4f}, p = {c['p_value']:.2g}, "
        f"{c['queries']:,} {c.get('of', 'queries')})"
    )


def _gap(models: Mapping[str, Any], keep: str, teachers: Sequence[str], metric: str) -> str:
    """How much of the way from the student alone to the best teacher the student went, in words."""
    values = {name: models[name].get("metrics", {}).get(metric) for name in models}
    known = {name: values[name] for name in teachers if values[name] is not None}
    alone, student = values.get("baseline"), values[keep]
    if not known or alone is None or student is None:
        return ""
    merits = {name: merit(metric, value) for name, value in known.items()}
    best = max(merits, key=lambda name: merits[name])
    start = merit(metric, alone)
    if not merits[best] > start:
        return f"gap closed: not defined, {best} is no better in {metric} than the {keep} alone"
    share = (merit(metric, student) - start) / (merits[best] - start)
    return f"gap closed: {share:.0%} of the way in {metric} from {keep} without teachers to {best}"
