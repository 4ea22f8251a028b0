"""The ``distill`` command. Exit codes: 0 done, 1 the run failed, 2 the input is wrong.

Messages go to stderr, results to stdout. What is heavy is imported inside a command, so that help is fast.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from distill.asking import answer, encoded_items, encoder_of, index_folder, read_corpus, user_of
from distill.console import markdown_table, print_table, quiet_libraries, reported, say
from distill.errors import RunError, UserError

app = typer.Typer(
    help="From powerful models to small ones, for search and recommendation, by recipe.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A name of ours, or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe, such as train.epochs=3."),
]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A run, a folder, package:NAME/FOLDER or a Hub name.")
]
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust", metavar="PKG", help="A package whose classes a recipe may name; repeatable."),
]
RunsFolder = Annotated[Path, typer.Option("--runs", metavar="FOLDER", help="The folder of all runs.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")]
RUNS = Path("runs")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ends in SystemExit, with the exit code, or, one of several processes, at once."""
    app(args=None if argv is None else list(argv), prog_name="distill")


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what another recipe left under this name.")
    ] = False,
    trust: Trust = None,
    runs: RunsFolder = RUNS,
    debug: Debug = False,
) -> None:
    """Train (teachers first), evaluate, save, report; goes on where an earlier run stopped."""
    with reported(debug):
        from distill.processes import is_first
        from distill.run import Runs

        quiet_libraries()
        all_runs = Runs(runs, trust or (), overwrite)
        folder = all_runs.run(all_runs.load(recipe, overrides or ()))
        if is_first():
            _show(folder)


@app.command()
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    sample: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of a recipe: ask frozen teachers about the lists of so many queries of train and of dev, "
            "and say how healthy they are; what they answer is kept. 0: ask nothing.",
        ),
    ] = 64,
    trust: Trust = None,
    runs: RunsFolder = RUNS,
    debug: Debug = False,
) -> None:
    """Find all mistakes of a recipe or a study without training, and say what it will cost."""
    with reported(debug):
        from distill.run import Runs
        from distill.study import is_study

        quiet_libraries()
        all_runs = Runs(runs, trust or ())
        if is_study(recipe):
            _check_study(recipe, overrides or (), all_runs)
            return
        plan = all_runs.check(all_runs.load(recipe, overrides or ()))
        splits = [(name, split, *map(str, sizes.values())) for name, split, sizes in plan.splits()]
        sizes = next(plan.splits(), ("", "", {}))[2]
        print_table(["data", "split", *sizes], splits, text_columns=2)
        nodes = [
            (name, kind, "trained" if trained else "frozen", provides, f"{size / 1e6:.1f}")
            for name, kind, size, trained, provides in plan.nodes()
        ]
        print_table(["model", "type", "", "provides", "M parameters"], nodes, text_columns=4)
        print_table(["loss", "way", "objective", "weight"], list(plan.arrows()), text_columns=3)
        sides = zip(("queries", "candidates", "pairs"), plan.graph.columns().keys, strict=True)
        told = [f"{side} {', '.join(keys)}" for side, keys in sides if keys]
        print(f"columns: {'; '.join(told) or 'none'}")
        print("\n".join([plan.training(), *plan.costs(all_runs.judged(plan))]))
        if sample:
            _checkup(all_runs.checkup(plan, sample))


@app.command()
def ablate(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A name of ours, or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Keys of the study, such as seeds=[1]; of all recipes: set.train.epochs=3.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many trainings at a time.")] = 1,
    memory: Annotated[
        float | None,
        typer.Option(min=0, help="GB for all jobs together; without it, what is free.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace runs of variants that have changed, and take none from elsewhere."
        ),
    ] = False,
    finished: Annotated[
        bool, typer.Option("--finished", help="Train nothing: compare the trainings that are finished.")
    ] = False,
    trust: Trust = None,
    runs: RunsFolder = RUNS,
    debug: Debug = False,
) -> None:
    """Train variants of a recipe over seeds, and compare them with paired tests; goes on where it stopped."""
    with reported(debug):
        from distill.ablate import Ablation
        from distill.processes import is_first
        from distill.run import Runs
        from distill.study_table import lines, table

        quiet_libraries()
        all_runs = Runs(runs, trust or (), overwrite)
        ablation = Ablation(all_runs, all_runs.load_study(study, overrides or ()), jobs, memory)
        results = ablation.run(train=not finished)
        if is_first():
            print_table(*table(results), text_columns=2 + (len(results["data"]) > 1))
            print("\n".join([*lines(results), f"study folder: {ablation.folder}"]))
        if ablation.failed:
            raise RunError(
                f"{len(ablation.failed)} trainings failed, see above; the same command tries them again."
            )


@app.command()
def score(
    recipe: RecipeName,
    overrides: Overrides = None,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Score nothing; remove from the store what the checkpoints of these teachers said with "
            "other weights, prompts, lengths or precision than they have in this recipe.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --prune: remove without asking.")] = False,
    trust: Trust = None,
    runs: RunsFolder = RUNS,
    debug: Debug = False,
) -> None:
    """Ask the frozen teachers of a recipe about its training data, and keep what they say; no training."""
    with reported(debug):
        from distill.processes import is_first
        from distill.run import Runs

        quiet_libraries()
        all_runs = Runs(runs, trust or ())
        scoring = all_runs.scoring(all_runs.load(recipe, overrides or ()))
        if prune:
            if is_first():
                _prune(scoring, yes)
            return
        rows = [
            (*row[:3], *("" if number is None else f"{number:,}" for number in row[3:]))
            for row in scoring.score()
        ]
        print_table(["teacher", "data", "what", "in all", "known before", "asked now"], rows, text_columns=3)
        print(f"teacher store: {scoring.store}")


@app.command("list")
def list_(
    kind: Annotated[
        Literal["recipes", "studies", "objectives", "models", "data", "metrics", "runs"] | None,
        typer.Argument(help="What to list; without it, everything.", show_default=False),
    ] = None,
    runs: RunsFolder = RUNS,
    debug: Debug = False,
) -> None:
    """What a recipe can name, and the runs there are: one line each."""
    with reported(debug):
        from distill.listing import KINDS, listed

        for each in KINDS if kind is None else [kind]:
            lines = list(listed(each, runs))
            if kind is None:
                print(f"{each}:")
            width = max((len(name) for name, _ in lines), default=0)
            for name, line in lines:
                print(f"{'' if kind else '  '}{name:<{width}}  {line}".rstrip())


@app.command()
def evaluate(
    model: ModelName,
    recipe: RecipeName,
    overrides: Overrides = None,
    split: Annotated[str | None, typer.Option(help="Measure this split, not the recipe's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    trust: Trust = None,
    runs: RunsFolder = RUNS,
    debug: Debug = False,
) -> None:
    """Measure a saved model on the data of a recipe."""
    with reported(debug):
        from distill.open import open_model
        from distill.results import HEADER, row
        from distill.run import Runs

        quiet_libraries()
        all_runs = Runs(runs, trust or ())
        chosen = [*(overrides or ()), *([f"evaluate.split={split}"] if split else [])]
        loaded = all_runs.load(recipe, chosen)
        measured = all_runs.evaluate(open_model(model, runs), loaded)
        if as_json:
            print(json.dumps({"model": model, **measured}, indent=1))
            return
        metrics = list(measured["metrics"])
        what = "pairs" if measured["task"] == "pairs" else "queries"
        print(f"{measured['name']}: {measured['method']}, {measured['queries']:,} {what}")
        print_table([HEADER[0], *metrics, *HEADER[1:]], [row(model, measured, metrics)])
        for reason, count in measured["left_out"].items():
            if count:
                print(_left_out(reason, count))


def _left_out(reason: str, count: int) -> str:
    """What an evaluation left out, in words: queries with a reason, or users of one metric."""
    reason, _, metric = reason.partition(", of ")
    who = reason if reason.startswith("users") else f"queries with {reason}"
    return f"left out{f' of {metric}' if metric else ''}: {count:,} {who}"


@app.command()
def index(
    model: ModelName,
    corpus: Annotated[
        str,
        typer.Argument(
            help="A parquet, jsonl, json, csv or tsv file, a folder, a Hub name; or a recipe, whose "
            "candidates are taken."
        ),
    ],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="The folder to write.")] = Path("index"),
    factory: Annotated[str, typer.Option(help="Of Faiss: Flat, HNSW32, IVF1024,PQ32, ...")] = "Flat",
    text_column: Annotated[str, typer.Option(help="Its name in the corpus.")] = "text",
    id_column: Annotated[str, typer.Option(help="Its name in the corpus.")] = "_id",
    title_column: Annotated[
        str | None, typer.Option(help="Put before the text; of items: what is shown.", show_default=False)
    ] = None,
    runs: RunsFolder = RUNS,
    debug: Debug = False,
) -> None:
    """Build a Faiss index of a corpus: of texts, or of items with the columns that a two-tower reads."""
    with reported(debug):
        import torch

        from distill.index import ABOUT, Index
        from distill.open import model_folder
        from distill.recipe import recipe_names
        from distill.run import Runs

        if output.exists() and not (output / ABOUT).is_file() and (output.is_file() or any(output.iterdir())):
            raise UserError(f"{output} is there and is no index; name another folder with --output.")
        quiet_libraries()
        encoder = encoder_of(model, runs)
        if corpus in recipe_names() or Path(corpus).suffix in (".yaml", ".yml"):
            all_runs = Runs(runs)
            found = all_runs.candidates(all_runs.load(corpus, overrides or ()))
            ids, texts = list(found.ids), getattr(found, "texts", None)
            vectors = encoder.encode_candidates(found.take(torch.arange(len(found))), progress=True)
        elif overrides:
            raise UserError(f"{' '.join(overrides)}: keys of a recipe, but {corpus} is none.")
        elif hasattr(encoder, "encode_items"):
            ids, texts, vectors = encoded_items(encoder, corpus, id_column, title_column)
        else:
            ids, texts = read_corpus(corpus, id_column, text_column, title_column)
            say(f"encoding {len(texts):,} texts")
            vectors = encoder.encode_candidates(texts, progress=True)
        local = Path(model).expanduser().is_dir() or (runs / model).is_dir()
        name = str(model_folder(model, runs).resolve()) if local else model
        made = Index.build(vectors, ids, texts, factory=factory, model=name)
        made.save(output)
        tokens = "" if made.tokens is None else f" of {len(made.tokens.values):,} tokens"
        print(f"{output}: {len(made):,} candidates{tokens}, {made.dim} dimensions, {factory}")


@app.command()
def search(
    folder: Annotated[
        Path, typer.Argument(metavar="INDEX", help="The folder of an index, or a run or model beside one.")
    ],
    queries: Annotated[list[str] | None, typer.Argument(help="None: one per line of stdin.")] = None,
    user: Annotated[
        list[str] | None,
        typer.Option(metavar="JSON", help="A user's features and history, for a two-tower; repeatable."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another model than the one that made the index.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Hits per query.")] = 10,
    runs: RunsFolder = RUNS,
    debug: Debug = False,
) -> None:
    """Ask an index."""
    with reported(debug):
        quiet_libraries()
        asked: list[Any] = [user_of(text) for text in user or ()] or list(queries or ())
        asked = asked or [line.strip() for line in sys.stdin if line.strip()]
        if not asked:
            raise UserError("no query: give one as an argument, or one per line of stdin.")
        answer(index_folder(folder, runs), asked, k, model, runs)


def _checkup(found: Any) -> None:
    """The health of teachers: their figures, how far they agree, who was not asked, then what is wrong."""
    from distill.checkup import HEADER

    if found.patients:
        print_table(HEADER, [patient.row() for patient in found.patients], text_columns=3)
    not_asked = (f"{name} was not asked: {why}" for name, why in found.not_asked.items())
    for line in (*found.between, *not_asked, *(f"warning: {one}" for one in found.warnings)):
        print(line)


def _check_study(spec: str, overrides: Sequence[str], runs: Any) -> None:
    """What the variants of a study do, and how much of it is done."""
    from distill.ablate import Ablation

    study = runs.load_study(spec, overrides)
    ablation = Ablation(runs, study)
    cells, plans = ablation.check()
    several = len({plan.data for plan in plans}) > 1
    header = ["variant", "compared with", "losses", "frozen teachers", "hears", "steps"]
    rows = []
    for plan in plans:
        words = map(", ".join, (plan.losses, plan.teachers, plan.hears))
        rows.append([plan.variant, plan.against or "", *words, f"{plan.steps:,}"])
    if several:
        header, rows = ["data", *header], [[plan.data, *row] for plan, row in zip(plans, rows, strict=True)]
    print_table(header, rows, text_columns=len(header) - 1)
    finished = ablation.finished(cells)
    print(f"{len(cells)} trainings, seeds {', '.join(map(str, study.seeds))}; {len(finished)} are finished")
    for cell, folder in ablation.taken(finished).items():
        print(f"{cell} is taken from {folder}")
    costs = dict.fromkeys(
        f"{plan.data}: {line}" if several else line for plan in plans for line in plan.costs
    )
    print("\n".join(costs))


def _prune(scoring: Any, yes: bool) -> None:
    """Show what the store holds of the recipe's teachers under other settings, ask, and remove it."""
    from distill.store_files import remove

    found = scoring.outdated()
    if not found:
        print("nothing to remove: the store holds these teachers with these settings only")
        return
    rows = [(name, str(folder), f"{size / 1e6:,.1f}") for name, folder, size in found]
    print_table(["teacher", "folder", "MB"], rows, text_columns=2)
    if not yes and not sys.stdin.isatty():
        raise UserError("nothing is removed without a yes: add --yes.")
    if yes or typer.confirm("Remove these?", err=True):
        for _, folder, _ in found:
            remove(folder)
        print(f"removed {sum(size for *_, size in found) / 1e6:,.1f} MB")


def _show(folder: Path) -> None:
    """The table of a finished run, on stdout and as ``results.md``, and its answers to sample queries."""
    from distill.hub.files import atomic_write_text, read_json
    from distill.recipe import read_yaml
    from distill.results import results

    table = results(read_json(folder / "metrics.json"))
    text = markdown_table(table.header, table.rows)
    atomic_write_text(folder / "results.md", "\n\n".join([text, *table.lines]) + "\n")
    print_table(table.header, table.rows)
    for line in table.lines:
        print(line)
    print(f"run folder: {folder}")
    if queries := read_yaml(folder / "recipe.yaml").get("search"):
        print()
        answer(folder / "index", queries, 3, None, RUNS)
