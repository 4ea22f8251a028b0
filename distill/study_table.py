"""What a study found: figures and tests per variant, and the table of them. Next: ``study_plot.py``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from distill.errors import DataError
from distill.evaluation import merit
from distill.evaluation.significance import CONFIDENCE, POWER, detectable, holm
from distill.evaluation.significance_of_pairs import compare_trainings, unit
from distill.hub.files import read_json
from distill.results import NOTHING

RESULTS = "results.json"
Place = tuple[str, str, int]  # data set, variant, seed


@dataclass(frozen=True)
class Measured:
    """What one finished cell reached and cost."""

    metrics: Mapping[str, float | None]
    dev: Mapping[str, float]
    per_query: pd.DataFrame
    cost: Mapping[str, Any]
    queries_per_second: float | None = None
    latency_ms: float | None = None  # median, of one query by itself
    teachers: Mapping[str, Mapping[str, float | None]] | None = None  # metrics of those that were measured


def measured_in(folder: Path) -> Measured:
    """Read a finished run."""
    said = read_json(folder / "metrics.json")
    models, keep = said["models"], said["keep"]
    path = folder / "per_query.parquet"
    frame = pd.read_parquet(path) if path.exists() else pd.DataFrame({"model": []})
    return Measured(
        models[keep].get("metrics", {}),
        said["dev"],
        frame[frame["model"] == keep].reset_index(drop=True),
        said.get("cost", {}),
        models[keep].get("queries_per_second"),
        models[keep].get("latency_ms", {}).get("median"),
        {name: e.get("metrics", {}) for name, e in models.items() if name not in (keep, "baseline")},
    )


def tabulate(
    study: str,
    variants: Mapping[str, str | None],
    metrics: Mapping[str, Sequence[str]],
    measured: Mapping[Place, Measured],
    resamples: int = 9999,
    chosen_on_tested: Collection[str] = (),
    choose: bool = True,
) -> dict[str, Any]:
    """Everything that a study found, as plain data.

    A variant is compared with its baseline over the seeds that both have finished: each query's value is
    averaged over these seeds, then compared query by query. Holm's correction is over all comparisons of the
    study in one metric. The winner is the variant that is best on dev, whatever it is compared with; its test
    against the study's baseline is not corrected for the others, since dev chose it.

    Args:
        variants: Each with the variant it is compared with; None: the study's baseline.
        metrics: By data set; the first decides.
        measured: What the finished cells reached.
        resamples: Of each interval and each test.
        chosen_on_tested: Data sets whose dev is what was measured: the best is told there, without a test.
        choose: Name a winner, and test it; not while trainings are missing.
    """
    sets: dict[str, dict[str, Any]] = {
        data: {
            "metrics": list(names),
            "variants": {
                name: _summary(_cells(measured, data, name), names)
                for name in variants
                if _cells(measured, data, name)
            },
            "teachers": _teachers(measured, data),
        }
        for data, names in metrics.items()
    }
    for data, found in sets.items():
        for name, entry in found["variants"].items():
            if (against := variants[name]) is not None:
                pairs = _paired(measured, data, against, name)
                entry |= {"against": against, "tests": {}}
                try:
                    tested = {metric: _tested(pairs, metric, resamples) for metric in found["metrics"]}
                    entry["tests"] = {metric: test for metric, test in tested.items() if test}
                except DataError as error:
                    entry["not_compared"] = str(error)
    for metric in dict.fromkeys(metric for names in metrics.values() for metric in names):
        _correct([
            entry["tests"][metric]
            for found in sets.values()
            for entry in found["variants"].values()
            if metric in entry.get("tests", {})
        ])  # fmt: skip
    for data, found in sets.items():
        winner = _winner(found, variants) if choose else None
        if winner is not None:
            winner["test"] = None
            if data not in chosen_on_tested and winner["variant"] != winner["against"]:
                pairs = _paired(measured, data, winner["against"], winner["variant"])
                try:
                    winner["test"] = _tested(pairs, winner["metric"], resamples, len(sets))
                except DataError as error:
                    winner["not_compared"] = str(error)
            winner["chosen_on_tested"] = data in chosen_on_tested
        found["winner"] = winner
    _correct([f["winner"]["test"] for f in sets.values() if f["winner"] and f["winner"]["test"]])
    return {"study": study, "confidence": CONFIDENCE, "power": POWER, "data": sets}


def _cells(measured: Mapping[Place, Measured], data: str, variant: str) -> dict[int, Measured]:
    """A variant's finished cells by seed."""
    return {seed: cell for (d, v, seed), cell in measured.items() if (d, v) == (data, variant)}


def _summary(cells: Mapping[int, Measured], metrics: Sequence[str]) -> dict[str, Any]:
    """Means over seeds, and their spread."""
    cost = [cell.cost for cell in cells.values()]
    answers = [sum(one.get("teacher_answers", {}).values()) for one in cost]
    return {
        "seeds": list(cells),
        "metrics": {
            metric: _spread([cell.metrics.get(metric) for cell in cells.values()]) for metric in metrics
        },
        "dev": {metric: _spread([cell.dev.get(metric) for cell in cells.values()]) for metric in metrics},
        "cost": {
            "seconds": _mean([one.get("seconds") for one in cost]),
            "tokens": _mean([one.get("tokens") for one in cost]),
            "teacher_answers": _mean(answers),
            "teacher_calls": sum(sum(one.get("teacher_calls", {}).values()) for one in cost),
            "teacher_seconds": round(sum(one.get("teacher_seconds", 0.0) for one in cost), 2),
        },
        "queries_per_second": _mean([cell.queries_per_second for cell in cells.values()]),
        "latency_ms": _mean([cell.latency_ms for cell in cells.values()]),
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return {
        "mean": statistics.mean(known) if known else None,
        "spread": statistics.stdev(known) if len(known) > 1 else None,  # over seeds
        "values": [None if value is None or math.isnan(value) else value for value in values],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _teachers(measured: Mapping[Place, Measured], data: str) -> list[dict[str, Any]]:
    """Metrics of the teachers by the first cell of each variant; equal ones of several variants are one."""
    found: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    for (of, variant, _), cell in measured.items():
        for name, metrics in (cell.teachers or {}).items() if of == data else ():
            if (name, variant) in seen:
                continue
            seen.add((name, variant))
            alike = [one for one in found if one["teacher"] == name and one["metrics"] == metrics]
            if alike:
                alike[0]["variants"].append(variant)
            else:
                found.append({"teacher": name, "variants": [variant], "metrics": dict(metrics)})
    return found


def _paired(
    measured: Mapping[Place, Measured], data: str, against: str, variant: str
) -> list[tuple[Measured, Measured]]:
    """Baseline and variant of each seed that both have finished."""
    before, after = _cells(measured, data, against), _cells(measured, data, variant)
    return [(before[seed], after[seed]) for seed in after if seed in before]


def _tested(
    pairs: Sequence[tuple[Measured, Measured]], metric: str, resamples: int, tests: int = 1
) -> dict[str, Any] | None:
    """Interval and test of one comparison; None: it cannot be told what queries or pairs differ in.

    ``tests``: for how many the smallest detectable difference allows.
    """
    told = [(before.metrics.get(metric), after.metrics.get(metric)) for before, after in pairs]
    values = [(a, b) for a, b in told if a is not None and b is not None and not math.isnan(a + b)]
    if not pairs or len(values) < len(pairs):  # undefined where a model collapsed
        return None
    before, after = ([pair[side].per_query for pair in pairs] for side in (0, 1))
    if (found := compare_trainings(before, after, metric, resamples)) is None:
        return None
    return found._asdict() | {
        "of": unit(before[0]),
        "seeds": len(pairs),
        "better": sum(merit(metric, b) > merit(metric, a) for a, b in values),  # on how many seeds
        "detectable": detectable(found.spread, found.queries, (1 - CONFIDENCE) / tests),
    }


def _correct(tests: Sequence[dict[str, Any]]) -> None:
    """Add the p-value that counts how many tests there are."""
    for test, corrected in zip(tests, holm([test["p_value"] for test in tests]), strict=True):
        test["p_holm"] = corrected


def _winner(found: Mapping[str, Any], variants: Mapping[str, str | None]) -> dict[str, Any] | None:
    """The variant that is best on dev, and the baseline that it is to be tested against.

    Of those whose dev is known for every seed: one that failed on some would win by the others.
    """
    metric = found["metrics"][0]
    dev = {name: entry["dev"][metric] for name, entry in found["variants"].items()}
    seeds = max((len(one["values"]) for one in dev.values()), default=0)
    known = {name: [value for value in one["values"] if value is not None] for name, one in dev.items()}
    whole = {name: values for name, values in known.items() if values and len(values) == seeds}
    if not whole:
        return None
    best = max(whole, key=lambda name: statistics.mean(merit(metric, value) for value in whole[name]))
    baseline = next(name for name, against in variants.items() if against is None)
    return {
        "variant": best,
        "against": baseline,
        "metric": metric,
        "dev": dev[best]["mean"],
        "of": len(whole),
        "left_out": [name for name in variants if name in known and name not in whole],
    }


def table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a study's table, from what ``results.json`` says: a row per metric and variant."""
    sets = results["data"]
    several = len(sets) > 1
    confidence = f"{results['confidence']:.0%} interval"
    header = [
        *(["data"] if several else []),
        "variant",
        "metric",
        "mean",
        "± seeds",
        "difference",
        confidence,
    ]
    header += [
        "p",
        "p (Holm)",
        "detectable",
        "seeds better",
        "answers",
        "M tokens",
        "seconds",
        "queries/s",
        "ms/query",
    ]
    rows = []
    for data, found in sets.items():
        for place, metric in enumerate(found["metrics"]):
            for name, entry in found["variants"].items():
                value, test = entry["metrics"][metric], entry.get("tests", {}).get(metric)
                told = _told(test) if test else [NOTHING] * 6
                cost = _cost(entry) if place == 0 else [""] * 5
                where = [data] if several else []
                rows.append(
                    [*where, name, metric, _four(value["mean"]), _four(value["spread"]), *told, *cost]
                )
    return header, rows


def _told(test: Mapping[str, Any]) -> list[str]:
    return [
        f"{test['difference']:+.4f}",
        f"{test['low']:+.4f} to {test['high']:+.4f}",
        f"{test['p_value']:.2g}",
        f"{test['p_holm']:.2g}",
        f"{test['detectable']:.4f}",
        f"{test['better']} of {test['seeds']}",
    ]


def _cost(entry: Mapping[str, Any]) -> list[str]:
    cost, speed, alone = entry["cost"], entry["queries_per_second"], entry.get("latency_ms")
    tokens, seconds = cost["tokens"], cost["seconds"]
    return [
        f"{cost['teacher_answers']:,.0f}",
        NOTHING if tokens is None else f"{tokens / 1e6:.2f}",
        NOTHING if seconds is None else f"{seconds:,.0f}",
        NOTHING if speed is None else f"{speed:,.0f}",
        NOTHING if alone is None else f"{alone:.1f}",
    ]


def _four(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """What stands below the table: teachers, the winner and its test, what was left out or failed."""
    for data, found in results["data"].items():
        where = f"{data}: " if data else ""
        named = [one["teacher"] for one in found["teachers"]]
        for one in found["teachers"]:
            name, metrics = one["teacher"], one["metrics"]
            values = ", ".join(f"{metric} {_four(metrics.get(metric))}" for metric in found["metrics"])
            within = f" in {', '.join(one['variants'])}" if named.count(name) > 1 else ""
            yield f"{where}teacher {name}{within}: {values}"
        for name, entry in found["variants"].items():
            if "not_compared" in entry:
                yield f"{where}{name} is not compared with {entry['against']}: {entry['not_compared']}"
        if not results.get("missing"):
            yield f"{where}{_won(found.get('winner'), results['power'])}"
    yield (
        f"Differences are over queries, users or pairs, averaged over seeds; detectable: what such a test, "
        f"not corrected for the others, would find with {results['power']:.0%} power; answers: texts and "
        f"pairs that frozen teachers were heard about; tokens and seconds: of one training, without asking "
        f"what the store keeps; queries/s: of many together; ms/query: of one by itself, the median."
    )
    if results.get("missing"):
        yield (
            f"{results['missing']} of {results['cells']} trainings are not finished; no winner is named, and "
            f"tested, before they are."
        )
    if results.get("jobs", 1) > 1:
        yield f"{results['jobs']} trainings ran at a time, which seconds and queries/s suffer from."
    for cell, folder in results.get("taken", {}).items():
        yield f"{cell} is the equal run that lies in {folder}."
    for cell, teachers in results.get("outdated", {}).items():
        yield f"{cell} was trained before {' and '.join(teachers)} was made again, or removed since."
    for cell, why in results.get("failed", {}).items():
        yield f"failed: {cell}: {why}"


def _won(winner: Mapping[str, Any] | None, likely: float) -> str:
    if winner is None:
        return "no winner: dev was not measured, so there is nothing fair to choose by"
    metric, test, best = winner["metric"], winner["test"], winner["variant"]
    chosen = f"winner: {best}, the best of {winner['of']} on dev ({metric} {winner['dev']:.4f})"
    if winner.get("left_out"):
        chosen += f", without {', '.join(winner['left_out'])}, whose dev is not known for all seeds"
    if winner["chosen_on_tested"]:
        return f"{chosen}, which is what is measured here: its p must count the others (Holm's, above)"
    if best == winner["against"]:
        return f"{chosen}: the baseline itself, so nothing is tested"
    if "not_compared" in winner:
        return f"{chosen}; no test of {metric}: {winner['not_compared']}"
    if test is None:
        return (
            f"{chosen}; no test of {metric}: nothing says how queries or pairs differ in it, or no seed is "
            f"finished on both sides"
        )
    difference, interval, *_ = _told(test)
    return (
        f"{chosen}; tested once against {winner['against']}: {difference} {metric} ({interval}, "
        f"p = {test['p_holm']:.2g}, {test['queries']:,} {test.get('of', 'queries')}). With {likely:.0%} "
        f"power this test would find a difference of {test['detectable']:.4f}."
    )
