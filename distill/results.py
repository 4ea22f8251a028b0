"""What a finished run reached, as one table: from ``metrics.json``, so it can be shown again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.evaluation.metrics import higher_is_better

NOTHING = "—"
HEADER = ("model", "size in MB", "queries/s")  # the metrics stand after the first


@dataclass(frozen=True)
class Results:
    """The table of a run: a row per model, the teachers first, then the student with and without them."""

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
        rows=[row(name, models[key], metrics) for key, name in names.items()],
        gap=_gap(models, keep, order[:-1], metrics[0]) if metrics else "",
        compared=_compared(measured.get("comparison"), keep),
    )


def row(name: str, entry: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """A model's row: its name, metrics, size and speed."""
    values = entry.get("metrics", {})
    numbers = [NOTHING if values.get(m) is None else f"{values[m]:.4f}" for m in metrics]
    speed = entry.get("queries_per_second")
    return [name, *numbers, f"{entry['size_mb']:.1f}", NOTHING if speed is None else f"{speed:,.0f}"]


def _compared(comparison: Mapping[str, Any] | None, keep: str) -> str:
    """Whether teachers helped, or the student was lucky with its queries."""
    if comparison is None:
        return ""
    c = comparison
    return (
        f"{keep} with teachers - without: {c['difference']:+.4f} {c['metric']} "
        f"({c['confidence']:.0%} interval {c['low']:+.4f} to {c['high']:+.4f}, p = {c['p_value']:.2g}, "
        f"{c['queries']:,} queries)"
    )


def _gap(models: Mapping[str, Any], keep: str, teachers: Sequence[str], metric: str) -> str:
    """How much of the way from the student alone to the best teacher the student went, in words."""
    values = {name: models[name].get("metrics", {}).get(metric) for name in models}
    known = {name: values[name] for name in teachers if values[name] is not None}
    alone, student = values.get("baseline"), values[keep]
    if not known or alone is None or student is None:
        return ""
    sign = 1 if higher_is_better(metric) else -1
    best = max(known, key=lambda name: sign * known[name])
    if sign * (known[best] - alone) <= 0:
        return f"gap closed: not defined, {best} is no better in {metric} than the {keep} alone"
    share = (student - alone) / (known[best] - alone)
    return f"gap closed: {share:.0%} of the way in {metric} from {keep} without teachers to {best}"
