"""Run recipes over seeds, keep the raw results as JSON, and write the tables of recipes/README.md from them.

    python benchmarks/recipes.py run text/wikiqa_student --set models.student.layers=[0,5]
    python benchmarks/recipes.py compare text/scifact_student
    python benchmarks/recipes.py study studies/privileged
    python benchmarks/recipes.py table

Each run is an ordinary ``distill run`` or ``distill ablate`` under ``runs/``; its figures are copied to
``benchmarks/results/recipes/NAME.json``, one file per recipe, overrides and seed, those of a study to
``benchmarks/results/studies/NAME.json``, with its table, its plot and every query's value, and how all
seeds with teachers compare with all without to ``benchmarks/results/compared/NAME.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import shutil
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "recipes"
STUDIES = RESULTS.parent / "studies"
COMPARED = RESULTS.parent / "compared"
README = Path(__file__).parent.parent / "recipes" / "README.md"
KEPT = ("keep", "steps", "best_step", "dev", "cost", "models", "references", "comparison")
MOST_ROWS = 40  # of a study's table in README: of a longer one its first metric stands there
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
STUDY = re.compile(
    r"(?P<begin><!-- study (?P<name>\w+): begin -->).*?(?P<end><!-- study (?P=name): end -->)", re.DOTALL
)


def run(recipe: str, seeds: list[int], overrides: list[str], variant: str, also: str | None = None) -> None:
    """Run one recipe for each seed and keep what it measured, ``also`` what it kept on another split."""
    from distill.open import open_model
    from distill.recipe import load_recipe
    from distill.run import Runs

    name = _name(recipe, variant)
    for seed in seeds:
        own = name == recipe and not overrides and seed == load_recipe(recipe).train.seed  # others ask for it
        own_name = [] if own else [f"train.seed={seed}", f"name={name}-seed{seed}"]
        loaded = load_recipe(recipe, [*overrides, *own_name])
        folder = Runs().run(loaded)
        metrics = json.loads((folder / "metrics.json").read_text())
        result = {
            "recipe": recipe,
            "variant": variant,
            "overrides": overrides,
            "seed": seed,
            "command": " ".join(["distill run", recipe, *overrides, *own_name]),
            "environment": json.loads((folder / "environment.json").read_text()),
            **{key: metrics[key] for key in KEPT if key in metrics},
        }
        if also:
            other = load_recipe(recipe, [*overrides, *own_name, f"evaluate.split={also}"])
            kept = open_model(str(folder / metrics["keep"]))
            result["also"] = {also: Runs().evaluate(kept, other)["metrics"]}
        path = RESULTS / f"{name.replace('/', '.')}.seed{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def compare(recipe: str, seeds: list[int], variant: str) -> None:
    """The student with teachers less the one without, each query's value averaged over the runs of all seeds.

    Where test queries share their answers with train queries, these and the others also apart.
    """
    import pandas as pd

    from distill.evaluation.significance_of_pairs import compare_trainings, unit
    from distill.recipe import load_recipe

    name = _name(recipe, variant)
    own = load_recipe(recipe).train.seed
    folders = [
        Path("runs") / (recipe if seed == own and not variant else f"{name}-seed{seed}") for seed in seeds
    ]
    measured = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    keep = measured[0]["keep"]
    metric = next(iter(measured[0]["models"][keep]["metrics"]))
    frames = [pd.read_parquet(folder / "per_query.parquet") for folder in folders]
    sides = [[frame[frame["model"] == model] for frame in frames] for model in ("baseline", keep)]
    if (found := compare_trainings(*sides, metric)) is None:
        raise SystemExit(f"{metric} has no value per query, and is no metric of pairs that can be tested")
    result = {"metric": metric, "seeds": seeds, "of": unit(sides[0][0]), **found._asdict()}
    known = _with_known_answer(recipe)
    if known is not None and 0 < sum(known.values()) < len(known):
        for group, is_in in (("answer known from train", True), ("answer new", False)):
            chosen = [frame[frame["query"].map(known) == is_in] for frame in frames]
            means = pd.concat(chosen).groupby("model", sort=False)[metric].mean()
            result[group] = {"queries": chosen[0]["query"].nunique(), **means.to_dict()}
    COMPARED.mkdir(parents=True, exist_ok=True)
    path = COMPARED / f"{name.replace('/', '.')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path.read_text())


def _with_known_answer(recipe: str) -> dict[str, bool] | None:
    """By test query, whether an answer of its is that of a train query; None: they search other tables."""
    from distill.build import Builder
    from distill.plan import split_to_measure
    from distill.recipe import load_recipe

    loaded = load_recipe(recipe)
    data = Builder().data(loaded)
    if (measured := split_to_measure(loaded, data)) is None:
        return None
    part = data[measured[0]]
    train, test = part.split("train"), part.split(measured[1])
    if not hasattr(test, "positives") or train.candidates is not test.candidates:
        return None
    known = set(train.positives.values.tolist())
    answers = test.positives.values.split(test.positives.lengths.tolist())
    return {
        str(query): not known.isdisjoint(own.tolist())
        for query, own in zip(test.queries.ids, answers, strict=True)
    }


def study(name: str, jobs: int = 1, train: bool = True) -> None:
    """Run a study, ``jobs`` trainings at a time, and keep what it found; or what is finished of it."""
    from distill.ablate import Ablation
    from distill.run import Runs

    runs = Runs()
    ablation = Ablation(runs, runs.load_study(name), jobs)
    ablation.run(train)
    if ablation.failed:
        raise SystemExit(f"{len(ablation.failed)} trainings failed: {ablation.failed}")
    STUDIES.mkdir(parents=True, exist_ok=True)
    for kept in ("results.json", "results.md", "plot.png", "per_query.parquet"):
        to = (STUDIES / Path(name).name).with_suffix(Path(kept).suffix)
        shutil.copyfile(ablation.folder / kept, to)


def tables() -> None:
    """Put what was found between the marks in recipes/README.md."""
    text = README.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    text = "\n".join([before, *_of_recipes(), after])
    README.write_text(STUDY.sub(_of_study, text))


def _of_study(marks: re.Match) -> str:
    path = STUDIES / f"{marks['name']}.md"
    if not path.exists():
        return marks[0]
    lines = path.read_text().strip().splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    if len(rows) > MOST_ROWS:
        first = rows[0].split("|")[2]  # of variant, metric, ...
        lines = [line for line in lines if line not in rows or line.split("|")[2] == first]
        lines += ["", f"Other metrics: [`{path.name}`](../benchmarks/results/studies/{path.name})."]
    return "\n".join([marks["begin"], *lines, marks["end"]])


def _of_recipes() -> list[str]:
    """The lines of the table of all recipes."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        groups.setdefault((result["recipe"], result["variant"]), []).append(result)
    lines = [
        "| recipe | metric | seeds | without teachers | kept model | difference, p | teachers, references "
        "| gap closed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (recipe, variant), results in sorted(groups.items()):
        name = _name(recipe, variant)
        metric = next(iter(results[0]["models"][results[0]["keep"]]["metrics"]))

        def of(model: str, results=results, metric=metric) -> list[float]:
            return [{**r["models"], **r.get("references", {})}[model]["metrics"][metric] for r in results]

        keep = results[0]["keep"]
        teachers = [name for name in results[0]["models"] if name not in (keep, "baseline")]
        has_baseline = "baseline" in results[0]["models"]
        closed = "-"
        if teachers and has_baseline:
            best = max(statistics.mean(of(name)) for name in teachers)
            base, student = statistics.mean(of("baseline")), statistics.mean(of(keep))
            closed = f"{(student - base) / (best - base):.0%}" if best > base else "teachers no better"
        cells = [
            f"`{recipe}`{f' {variant}' if variant else ''}",
            metric,
            str(len(results)),
            _spread(of("baseline")) if has_baseline else "-",
            _spread(of(keep)),
            _difference(name, metric, of(keep), of("baseline") if has_baseline else []),
            ", ".join(f"{n} {_spread(of(n))}" for n in [*teachers, *results[0].get("references", {})]) or "-",
            closed,
        ]
        lines.append(f"| {' | '.join(cells)} |")
        for split, measured in results[0].get("also", {}).items():
            for other in list(measured)[:2]:
                values = [r["also"][split][other] for r in results]
                cells = [f"... {split}", other, str(len(values)), "-", _spread(values), "-", "-", "-"]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def _name(recipe: str, variant: str) -> str:
    """Of the runs and results of a recipe's variant; "" is the recipe itself."""
    return f"{recipe}-{variant}".rstrip("-").replace(" ", "_")


def _difference(name: str, metric: str, taught: list[float], alone: list[float]) -> str:
    """What ``compare`` found of these results, if it was asked."""
    path = COMPARED / f"{name.replace('/', '.')}.json"
    if not path.exists():
        return "-"
    c = json.loads(path.read_text())
    difference = statistics.mean(taught) - statistics.mean(alone)
    if c["metric"] != metric or not math.isclose(c["difference"], difference, abs_tol=1e-9):
        raise SystemExit(f"{path} compares other results than these; `compare` the seeds again")
    return f"{c['difference']:+.4f} ({c['low']:+.4f} to {c['high']:+.4f}), {c['p_value']:.2g}"


def _spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(set(values)) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("recipe")
    one.add_argument("--set", nargs="+", default=[], dest="overrides", help="key=value of the recipe")
    one.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    one.add_argument("--also", metavar="SPLIT", help="measure the kept model on this one too")
    one.add_argument("--variant", default="", help="what to call these overrides in the table")
    both = commands.add_parser("compare", help="with and without teachers, over runs that are there")
    both.add_argument("recipe")
    both.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    both.add_argument("--variant", default="", help="as it was called for `run`")
    several = commands.add_parser("study")
    several.add_argument("study", help="such as studies/privileged")
    several.add_argument("--jobs", type=int, default=1, help="how many trainings at a time")
    several.add_argument("--finished", action="store_true", help="train nothing")
    commands.add_parser("table")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.command == "run":
        run(arguments.recipe, arguments.seeds, arguments.overrides, arguments.variant, arguments.also)
    elif arguments.command == "compare":
        compare(arguments.recipe, arguments.seeds, arguments.variant)
    elif arguments.command == "study":
        study(arguments.study, arguments.jobs, not arguments.finished)
    else:
        tables()


if __name__ == "__main__":
    main()
