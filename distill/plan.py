"""What a run will do and cost, known before it starts: what ``distill check`` prints. Next: ``run.py``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from distill.batch import Readable
from distill.build import Builder
from distill.data.dataset import DataSet
from distill.data.judged import Judged, Table, TextTable, summary
from distill.data.mixture import Mixture
from distill.data.source import JudgedSource, Source
from distill.errors import Mistakes, RecipeError
from distill.evaluation import check_measurable
from distill.evaluation.references import check_reference
from distill.graph import DistillationGraph
from distill.measure import can_be_measured, why_not
from distill.model import Encoder, Model
from distill.nn.text_encoder import without_weights
from distill.nn.tokenizer import TextColumn
from distill.optimizer import rate_problems
from distill.outputs import STORABLE, Needs
from distill.pieces import piece_problems
from distill.processes import world
from distill.recipe import nearest
from distill.settings import Recipe
from distill.store import judged_sources
from distill.trainer import steps_of

SAMPLE = 500  # texts whose ids are counted, for the estimate


@dataclass(frozen=True)
class Plan:
    """A recipe that was checked: its graph (without weights), its data, and where batches will come from."""

    recipe: Recipe
    graph: DistillationGraph
    data: Mapping[str, DataSet]
    source: Source
    steps: int  # optimiser steps, unless `minutes` cuts them

    def splits(self) -> Iterator[tuple[str, str, dict[str, int | float]]]:
        """Data set, split and its sizes, of each split that trains or is measured."""
        used = ("train", "dev", self.recipe.evaluate.split)
        for name, data in self.data.items():
            for split in data.splits:
                if split in used:
                    yield name, split, summary(data.split(split))

    def nodes(self) -> Iterator[tuple[str, str, int, bool, str]]:
        """Name, type, number of parameters, whether it is trained, and what it provides, of each node."""
        for name, node in self.graph.nodes.items():
            spec = self.recipe.models[name]
            kind = spec.get("type") or f"ref: {spec['ref']}"
            size = sum(parameter.numel() for parameter in node.parameters())
            yield name, kind, size, name in self.graph.trained, ", ".join(sorted(node.provides))

    def arrows(self) -> Iterator[tuple[str, str, str, str]]:
        """Name, way, objective and weight of each arrow."""
        for arrow in self.graph.arrows:
            way = f"{arrow.tail or 'labels'} -> {arrow.head}"
            yield arrow.name, way, type(arrow.objective).__name__, str(arrow.weight)

    def training(self) -> str:
        """How long the training is, in words."""
        train = self.recipe.train
        own = {name: source.batch_size for name, source in judged_sources(self.source).items()}
        sizes = {size: [name for name in own if own[name] == size] for size in own.values()}
        told = [f"{size} ({', '.join(names)})" for size, names in sizes.items()]
        batch = " or ".join(told) if len(told) > 1 else str(*sizes or [train.batch_size])
        batch += " queries" + (f" x {train.accumulate}" if train.accumulate > 1 else "")
        length = "" if train.steps else f" ({train.epochs:g} epochs)"
        cut = "" if train.steps or not train.minutes else f", as many as fit into {train.minutes:g} minutes"
        shared = f", shared by {world()} processes" if world() > 1 else ""
        return f"{self.steps:,} steps of {batch}{length}{cut}{shared}"

    def lines(self) -> list[str]:
        """What will happen, in a few lines."""
        named = len(self.data) > 1
        lines = [
            f"  {f'{name} ' if named else ''}{split}: {sizes['queries']:,} queries, "
            f"{sizes['candidates']:,} candidates, {sizes['listed']:,} pairs listed"
            for name, split, sizes in self.splits()
        ]
        lines += [
            f"  {name}: {kind}, {'trained' if trained else 'frozen'}, {size / 1e6:.1f} M parameters"
            for name, kind, size, trained, _ in self.nodes()
        ]
        lines += [f"  {name}: {way}, {kind}" for name, way, kind, _ in self.arrows()]
        lines.append(f"  {self.training()}")
        if self.recipe.baseline is not False:
            lines.append(f"  then {self.recipe.keep} without teachers, as many steps, to compare with")
        return lines

    def costs(self, judged: Mapping[tuple[str, str], int] | None = None) -> list[str]:
        """What each node reads: ids per epoch where it is trained, texts or pairs where it is asked once.

        ``judged``: (data set, node) -> how many of its texts or pairs the teacher store knows.
        """
        lines: list[str] = []
        for name, source in judged_sources(self.source).items():
            where = f"{name}: " if len(self.data) > 1 else ""
            arrows = [arrow for arrow in self.graph.arrows if arrow.data is None or name in arrow.data]
            for node in self.graph.asked(arrows):
                if not self.graph.nodes[node].of:
                    lines += self._costs(node, source, where, (judged or {}).get((name, node)))
            lines += _places(source, where)
            for sampler in source.negatives:
                told = sampler.costs(self.graph, source.judged, source.query_rows)
                lines += [f"{where}{line}" for line in told]
            if source.topics is not None:
                lines.append(f"{where}{source.topics.costs(source.judged)}")
        return lines

    def _costs(self, name: str, source: JudgedSource, where: str, judged: int | None) -> Iterator[str]:
        node, apart = self.graph.nodes[name], isinstance(self.graph.nodes[name], Encoder)
        times = self.source.repeat[source.name] if isinstance(self.source, Mixture) else 1
        queries, listed = len(source.query_rows), len(source.query_rows) * source.width
        texts = len(source.candidate_rows) if not queries else listed
        q, c = (_mean_ids(table, columns, node) for table, columns in _sides(node, source))
        what, unit = ("texts", "ids") if isinstance(source.candidates, TextTable) else ("rows", "rows")
        if name in self.graph.trained:
            ids = times * (queries * q + texts * c if apart else listed * (q + c))
            yield f"{where}{name} reads about {ids:,.0f} {unit} an epoch"
            if (rows := self.recipe.train.gradient_cache) is not None:
                size = min(source.batch_size, queries or texts)
                most = size * source.width if queries else size
                chunks = -(-size // rows) * (apart and queries > 0) + -(-most // rows)
                yield (
                    f"{where}{name} caches its gradient: up to {chunks:,} chunks of {rows:,} "
                    f"{what if apart else 'pairs'} a batch, each read twice, about a third more compute"
                )
            return
        apart = apart and node.represents(Needs("scores")).fields <= STORABLE  # else its scores are kept
        known = "" if judged is None else f"; {judged:,} of them are judged already"
        given = name in source.scored
        if apart and (not given or source.negatives):
            once = queries + len(source.candidate_rows)
            ids = queries * q + len(source.candidate_rows) * c
            yield f"{where}{name} is asked once about {once:,} {what}, about {ids:,.0f} {unit}{known}"
        elif given:
            yield f"{where}{name} is not run on what is listed: its scores come with the data"
        else:
            pairs = int(source.lists.rows.lengths[source.query_rows].sum())
            ids = pairs * (q + c)
            yield f"{where}{name} is asked once about {pairs:,} pairs, about {ids:,.0f} {unit}{known}"
        if source.negatives and not apart:
            pairs = times * listed
            yield f"{where}{name} is asked up to {pairs:,} pairs an epoch as samplers draw them, each once"


def plan_of(recipe: Recipe, builder: Builder) -> Plan:
    """Check everything that can be checked without weights: names, data, measures, the graph, its baseline's.

    Raises:
        UserError: All mistakes of names; where there are none, all of data, measures and graph.
    """
    builder.check(recipe)
    data: dict[str, DataSet] = {}
    labelled: dict[str, bool] = {}
    graph = plan = None
    mistakes = Mistakes()
    with mistakes:
        data = builder.data(recipe)
    for name, part in data.items():
        if "train" in part.splits:
            with mistakes:
                labelled[name] = part.split("train").labels is not None
    with mistakes:
        check_measures(recipe, data)
    with mistakes, without_weights():
        graph = builder.graph(recipe)
        graph.check(labelled)
        check_uses(recipe, graph, data)
    with mistakes, without_weights():
        if (losses := baseline_losses(recipe)) is not None:
            builder.graph(recipe, losses).check(labelled)
    if graph is not None and len(labelled) == sum("train" in part.splits for part in data.values()):
        with mistakes:
            source = builder.source(recipe, data, heard_by(graph, data))
            check_samplers(source, graph)
            check_scores(graph, source)
            check_lists(graph, source)
            check_batches(graph, source)
            check_log_q(graph, source)
            plan = Plan(recipe, graph, data, source, steps_of(recipe.train, source.steps(0)))
    mistakes.report()
    assert plan is not None  # else there was a mistake
    return plan


def baseline_losses(recipe: Recipe) -> dict[str, dict[str, Any]] | None:
    """The losses of the same student without teachers; None: the recipe asks for no baseline."""
    if recipe.baseline is False:
        return None
    if isinstance(recipe.baseline, Mapping):
        return dict(recipe.baseline)
    losses = {
        name: arrow
        for name, arrow in recipe.losses.items()
        if arrow.get("from", "labels") == "labels" and arrow["to"] == recipe.keep
    }
    if not losses:
        raise RecipeError(
            "baseline: no loss of this recipe leads from the labels to the student, so there is nothing "
            "to train it on alone; give the baseline's losses under `baseline:`."
        )
    return losses


def heard_by(graph: DistillationGraph, data: Mapping[str, DataSet]) -> list[str]:
    """The data sets with a train split that some arrow hears."""
    with_train = [name for name, part in data.items() if "train" in part.splits]
    return [n for n in with_train if any(arrow.data is None or n in arrow.data for arrow in graph.arrows)]


def check_measures(recipe: Recipe, data: Mapping[str, DataSet]) -> None:
    """Refuse metrics, or splits to measure, that would fail after the training."""
    metrics = recipe.evaluate.metrics
    if not data or (measured := split_to_measure(recipe, data)) is None:
        if recipe.search:
            raise RecipeError(
                "search: the candidates of evaluate.split are searched; give evaluate.metrics too."
            )
        return
    part, select, mistakes = data[measured[0]], recipe.train.select, Mistakes()
    if select is not None and select not in metrics:
        mistakes.add(
            f"train.select: '{select}' is not measured; evaluate.metrics are {', '.join(metrics)}."
            f"{nearest(select, metrics)}"
        )
    dev: Judged | None = None
    if "dev" in part.splits:
        with mistakes:
            dev = part.split("dev")
    for reference in recipe.evaluate.references:
        with mistakes:
            try:
                check_reference(reference, part.split(measured[1]))
            except RecipeError as error:
                raise RecipeError(f"evaluate.references: {error}") from error
    for name in (measured[1], "dev"):
        with mistakes:
            try:
                if name in part.splits:
                    check_measurable(part.split(name), metrics, dev)
            except RecipeError as error:
                raise RecipeError(f"evaluate.metrics: {error}") from error
    mistakes.report()


def check_uses(recipe: Recipe, graph: DistillationGraph, data: Mapping[str, DataSet]) -> None:
    """Refuse what a checked graph cannot be used for, and settings of nodes that it does not train."""
    kept, mistakes = graph.nodes[recipe.keep], Mistakes()
    for problem in piece_problems(graph, recipe.train.gradient_cache is not None, world() > 1):
        mistakes.add(problem)
    seen = [column.key for side in kept.reads for column in side if getattr(column, "privileged", False)]
    if recipe.keep == "student" and seen:
        mistakes.add(
            f"models.student reads what only training knows: {', '.join(seen)}. A student is served without; "
            f"say `privileged: false`, or keep it under another name (`keep:`)."
        )
    if recipe.evaluate.metrics and not can_be_measured(kept):
        mistakes.add(
            f"evaluate.metrics: models.{recipe.keep} provides only {', '.join(sorted(kept.provides))}, from "
            f"which nothing can be ranked; remove the metrics."
        )
    elif data and (measured := split_to_measure(recipe, data)) is not None:
        part = data[measured[0]]
        for split in dict.fromkeys((measured[1], *(("dev",) if "dev" in part.splits else ()))):
            if problem := why_not(kept, part.split(split), metrics=recipe.evaluate.metrics):
                mistakes.add(
                    f"evaluate.metrics: models.{recipe.keep} cannot be measured on '{split}': {problem}. "
                    f"Measure it on listed candidates, or remove the metrics."
                )
    if recipe.search and (not isinstance(kept, Encoder) or kept.search == "own"):
        mistakes.add(
            f"search: models.{recipe.keep} ({type(kept).__name__}) compares query and candidate by more than "
            f"vectors, so it has no index; remove `search`."
        )
    for problem in rate_problems(recipe.train, graph):
        mistakes.add(problem)
    mistakes.report()


def check_samplers(source: Source, graph: DistillationGraph) -> None:
    """Refuse samplers of negatives that cannot work with this graph and their data."""
    mistakes, sources = Mistakes(), judged_sources(source)
    for name, part in sources.items():
        place = "data" if name == "data" else f"data.{name}"
        for i, sampler in enumerate(part.negatives):
            for problem in sampler.problems(graph, part.judged):
                mistakes.add(f"{place}.negatives[{i}].{problem}")
        for problem in part.topics.problems(graph, part.judged) if part.topics is not None else ():
            mistakes.add(f"{place}.topics.{problem}")
    mistakes.report()


def check_scores(graph: DistillationGraph, source: Source) -> None:
    """Refuse scores of the data that nobody would hear, and to ask a recorded teacher."""
    mistakes = Mistakes()
    for name, part in judged_sources(source).items():
        for teacher in part.scored:
            if teacher in graph.trained:
                mistakes.add(
                    f"models.{teacher}: it is trained, so its scores in the data set '{name}' would not be "
                    f"heard; take them out of the data set, or `train: true` out of the model."
                )
        arrows = [arrow for arrow in graph.arrows if arrow.data is None or name in arrow.data]
        for node in graph.asked(arrows):
            if not graph.nodes[node].recorded:
                continue
            cure = "Give the model a type and checkpoint that can be asked"
            if node not in part.scored:
                mistakes.add(
                    f"models.{node}: the data set '{name}' has no scores of it, and a recorded teacher "
                    f"cannot be asked. {cure}, name its scores there, or limit its losses with `data:`."
                )
            elif part.negatives:
                mistakes.add(
                    f"models.{node}: samplers add negatives to the data set '{name}', and a recorded teacher "
                    f"cannot be asked about them. {cure}, or take `negatives` out of the data set."
                )
    mistakes.report()


def check_lists(graph: DistillationGraph, source: Source) -> None:
    """Refuse losses that compare what a query lists where there will never be two, or never a negative."""
    mistakes = Mistakes()
    for name, part in judged_sources(source).items():
        labels = part.judged.labels
        alike = (
            labels is not None
            and len(labels) > 0
            and not part.negatives
            and not (part.lists.most and bool((labels < 1).any()))
        )
        for arrow in graph.arrows:
            where, kind = f"losses.{arrow.name}", type(arrow.objective).__name__
            if arrow.data is not None and name not in arrow.data:
                continue
            if alike and arrow.objective.contrasts:
                mistakes.add(
                    f"{where}: {kind} tells listed positives from listed negatives, but the data set "
                    f"'{name}' lists positives only and draws no negatives. Give it `negatives`, or take a "
                    f"loss with `in_batch: true`."
                )
            elif 0 < part.width < arrow.objective.least_listed:
                mistakes.add(
                    f"{where}: {kind} compares the candidates of a list with each other, and lists of the "
                    f"data set '{name}' hold one. Give it `negatives` and `candidates` of at least 2, or "
                    f"limit the arrow with `data:`."
                )
    mistakes.report()


def check_log_q(graph: DistillationGraph, source: Source) -> None:
    """Refuse a correction by sampling probabilities that the data cannot tell."""
    mistakes = Mistakes()
    for name, part in judged_sources(source).items():
        for arrow in graph.arrows:
            heard = arrow.data is None or name in arrow.data
            if heard and arrow.objective.corrects and (why := part.no_log_q()):
                mistakes.add(f"losses.{arrow.name}.log_q: in the data set '{name}' {why}; leave out log_q.")
    mistakes.report()


def check_batches(graph: DistillationGraph, source: Source) -> None:
    """Refuse batches too small for what an objective compares in them."""
    mistakes = Mistakes()
    for name, part in judged_sources(source).items():
        size = min(part.batch_size, len(part.query_rows))
        for arrow in graph.arrows:
            heard = arrow.data is None or name in arrow.data
            if heard and size < (least := arrow.objective.least_queries):
                mistakes.add(
                    f"losses.{arrow.name}: {type(arrow.objective).__name__} compares the queries of a batch "
                    f"with each other, at least {least}, and a batch of data set '{name}' holds {size}. "
                    f"Raise its batch_size (train.batch_size), or limit the arrow with `data:`."
                )
    mistakes.report()


def split_to_measure(recipe: Recipe, data: Mapping[str, DataSet]) -> tuple[str, str] | None:
    """The data set and split that are measured; None: the recipe names no metrics."""
    wanted, split = recipe.evaluate.data, recipe.evaluate.split
    if not recipe.evaluate.metrics:
        return None
    if wanted is not None and wanted not in data:
        raise RecipeError(f"evaluate.data: there is no data set '{wanted}'; there are {', '.join(data)}.")
    for name in [wanted] if wanted is not None else data:
        if split in data[name].splits:
            return name, split
    raise RecipeError(
        f"evaluate.split: no data set has a split '{split}'; there are "
        + "; ".join(f"{name}: {', '.join(part.splits)}" for name, part in data.items())
        + "."
    )


def _places(source: JudgedSource, where: str) -> Iterator[str]:
    """How many negatives of its own a query lists, where samplers only bring what these leave free."""
    if source.listing and source.labelled and len(source.query_rows):
        own = source.lists.others()[source.query_rows].clamp(max=source.width - 1).double().mean().item()
        if own:
            yield (
                f"{where}of a query's {source.width - 1} negatives {own:.1f} are its own listed ones, and "
                f"samplers bring the others (`listed_negatives` says how many)"
            )


def _sides(node: Model, source: JudgedSource) -> Iterator[tuple[Table, Sequence[Readable]]]:
    return zip((source.queries, source.candidates), node.reads[:2], strict=True)


def _mean_ids(table: Table, columns: Sequence[Readable], node: Model) -> float:
    """Ids per text, estimated from a sample and cut at the node's maximum length; of a row of features 1."""
    if not isinstance(table, TextTable):
        return 1.0
    texts = table.texts[:: max(1, len(table) // SAMPLE)]
    if not texts:
        return 0.0
    longest = getattr(node, "max_length", None)
    lengths = [cast(TextColumn, column).encode(texts).lengths.clamp(max=longest) for column in columns]
    return sum(float(length.float().mean()) for length in lengths)
