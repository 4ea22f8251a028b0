"""The plot of a study: how far each variant is from its baseline, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.paths import replacing


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw what ``results.json`` says, a panel per data set, in the metric that decides.

    Dots are single seeds, bars the interval over queries, users or pairs.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "the plot needs matplotlib: pip install 'distill-search[plots]'; all else is there without it."
        ) from error
    panels = {data: found for data, found in results["data"].items() if _compared(found)}
    if not panels:
        return
    most = max(len(_compared(found)) for found in panels.values())
    figure = Figure(figsize=(7.0, len(panels) * (1.2 + 0.35 * most)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (data, found) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True
    ):
        _panel(axes, found, data or results["study"], results["confidence"])
    with replacing(path) as new:
        figure.savefig(new, format="png", dpi=150)


def _compared(found: Mapping[str, Any]) -> dict[str, Any]:
    """The variants that were tested, by name."""
    metric = found["metrics"][0]
    return {name: entry for name, entry in found["variants"].items() if metric in entry.get("tests", {})}


def _panel(axes: Any, found: Mapping[str, Any], title: str, confidence: float) -> None:
    metric, tested = found["metrics"][0], _compared(found)
    axes.axvline(0, color="0.6", linewidth=1)
    for row, entry in enumerate(tested.values()):
        test, other = entry["tests"][metric], found["variants"][entry["against"]]
        axes.plot([test["low"], test["high"]], [row, row], color="C0", linewidth=2)
        axes.plot(test["difference"], row, "o", color="C0", markersize=7)
        before = dict(zip(other["seeds"], other["metrics"][metric]["values"], strict=True))
        after = dict(zip(entry["seeds"], entry["metrics"][metric]["values"], strict=True))
        single = [after[seed] - before[seed] for seed in after if seed in before]
        axes.plot(single, [row] * len(single), ".", color="C1", markersize=5)
    names = [f"{name} - {entry['against']}" for name, entry in tested.items()]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first above
    unit = next(entry["tests"][metric]["of"] for entry in tested.values())
    axes.set_xlabel(f"difference in {metric} ({confidence:.0%} interval over {unit}; dots: seeds)")
    axes.set_title(title)
