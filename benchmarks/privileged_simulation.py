"""How good should a teacher be? The inverted U of privileged features, in a simulation: JSON and a plot.

    python benchmarks/privileged_simulation.py

Runs ``recsys/simulated`` for several c, how much of the label the privileged feature holds, and seeds of data
and training. Writes ``benchmarks/results/privileged_simulation.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "privileged_simulation.json"
PLOT = RESULT.with_suffix(".png")
MODELS = {
    "ranker": "ranker, which sees z",
    "student": "student taught by it",
    "baseline": "student without teachers",
}


def measure(cs: list[float], seeds: list[int]) -> dict:
    """Test AUC [c][seed] of each model."""
    from distill.one_run import environment
    from distill.recipe import load_recipe
    from distill.run import Runs

    found: dict = {"recipe": "recsys/simulated", "metric": "AUC", "c": cs, "seeds": seeds}
    found |= {model: [] for model in MODELS} | {"environment": environment()}
    with tempfile.TemporaryDirectory() as folder:
        for c in cs:
            for model in MODELS:
                found[model].append([])
            for seed in seeds:
                own = [f"data.c={c}", f"data.seed={seed}", f"train.seed={seed}", f"name=c{c}-seed{seed}"]
                run = Runs(Path(folder)).run(load_recipe("recsys/simulated", own))
                models = json.loads((run / "metrics.json").read_text())["models"]
                for model in MODELS:
                    found[model][-1].append(models[model]["metrics"]["AUC"])
    return found


def plot(found: dict, path: Path) -> None:
    """The student above, with and without the ranker; the ranker below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True, height_ratios=[2, 1])
    for axes, models in ((above, ("student", "baseline")), (below, ("ranker",))):
        for model in models:
            means = [statistics.mean(values) for values in found[model]]
            spread = [statistics.stdev(values) / len(values) ** 0.5 for values in found[model]]
            axes.errorbar(range(len(means)), means, yerr=spread, marker="o", capsize=3, label=MODELS[model])
        axes.legend()
        axes.set_ylabel("test AUC")
    below.set_xticks(range(len(found["c"])), [f"{c:g}" for c in found["c"]])
    below.set_xlabel("c: how much of the label the privileged feature z holds")
    above.set_title(f"mean and standard error over {len(found['seeds'])} seeds of data and training")
    figure.savefig(path, format="png", dpi=120)


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--c", nargs="+", type=float, default=[0, 0.25, 0.5, 1, 2, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(1, 11)))
    arguments = parser.parse_args()
    found = measure(arguments.c, arguments.seeds)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    plot(found, PLOT)
    for c, *values in zip(found["c"], *(found[model] for model in MODELS), strict=True):
        said = zip(MODELS, map(statistics.mean, values), strict=True)
        print(f"c {c:g}: " + ", ".join(f"{model} {value:.4f}" for model, value in said))
    print(json.dumps({model: [round(statistics.mean(v), 4) for v in found[model]] for model in MODELS}))


if __name__ == "__main__":
    main()
