"""One run: training, its baseline, their measures, the files. Next: ``trainer.py``, ``measure.py``."""

from __future__ import annotations

import json
import logging
import platform
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from distill.build import Builder
from distill.data.judged import Judged
from distill.errors import DataError, RunError
from distill.evaluation import Evaluation, evaluate_reference
from distill.evaluation.significance import CONFIDENCE
from distill.evaluation.significance_of_pairs import compare_trainings, unit
from distill.graph import DistillationGraph
from distill.hub.card import Kind, model_card
from distill.hub.files import atomic_write_text
from distill.hub.own import opens
from distill.measure import entry_of, measure, why_not
from distill.model import Encoder, Model
from distill.paths import replacing
from distill.plan import (
    baseline_losses,
    heard_by,
    split_to_measure,
)
from distill.processes import first_goes_first, in_shares, is_first, wait, world
from distill.settings import Recipe, TrainSettings
from distill.trainer import Progress, Trainer

log = logging.getLogger("distill")

FINISHED = "metrics.json"  # is written last


class OneRun:
    """One run, from built objects to files: called again, it goes on from its newest checkpoint.

    Args:
        recipe: Was checked (``plan.py``).
        folder: Its own, which only this run writes to.
        builder: Finds the models of other recipes, which are there.
    """

    def __init__(self, recipe: Recipe, folder: Path, builder: Builder):
        self.recipe, self.folder, self.builder = recipe, folder, builder
        self.data = builder.data(recipe)
        self.measured = split_to_measure(recipe, self.data)
        self._latest: dict[bytes, Tensor] = {}  # see measure

    def run(self) -> None:
        recipe = self.recipe
        graph = self.builder.graph(recipe)
        progress = self._train(graph, self.folder, recipe.train)
        if is_first():
            graph.nodes[recipe.keep].save_pretrained(self.folder / recipe.keep)
            for name in sorted(graph.trained - {recipe.keep}):
                graph.nodes[name].save_pretrained(self.folder / "teachers" / name)
        student = graph.nodes[recipe.keep]
        evaluations = {recipe.keep: self._evaluate(recipe.keep, student)}
        for name in graph.nodes if recipe.evaluate.teachers and self.measured is not None else ():
            if problem := why_not(graph.nodes[name], self._judged(), student, recipe.evaluate.metrics):
                log.info("%s is not measured: %s", name, problem)
            elif name != recipe.keep:
                evaluations[name] = self._evaluate(name, graph.nodes[name], student)
        references: dict[str, Evaluation] = {
            name: evaluate_reference(name, self._judged(), recipe.evaluate.metrics)
            for name in (recipe.evaluate.references if self.measured is not None else ())
        }
        models: dict[str, Model] = dict(graph.nodes)
        if (losses := baseline_losses(recipe)) is not None:
            log.info(
                "the same %s without teachers: same data, seed and %d steps", recipe.keep, progress.steps
            )
            alone = self.builder.graph(recipe, losses)
            own = recipe.baseline_train.model_dump(exclude_none=True)
            settings = recipe.train.model_copy(update=own)
            self._train(alone, self.folder / "baseline", settings, progress.steps)
            models["baseline"] = alone.nodes[recipe.keep]
            if is_first():
                models["baseline"].save_pretrained(self.folder / "baseline" / recipe.keep)
            evaluations["baseline"] = self._evaluate("the student without teachers", models["baseline"])
        if recipe.search:
            self._index(graph.nodes[recipe.keep])
        if is_first():
            self._write(models, evaluations, references, progress)
        wait()

    def _train(
        self, graph: DistillationGraph, folder: Path, settings: TrainSettings, steps: int | None = None
    ) -> Progress:
        """Train a graph on the data sets that any of its arrows hears."""
        recipe = self.recipe
        heard = heard_by(graph, self.data)
        source = self.builder.source(recipe, self.data, heard)
        graph.check({name: self.data[name].split("train").labels is not None for name in heard})
        with first_goes_first():  # it leaves the ids of texts in a cache
            source.prepare(*graph.columns())
        dev = self._dev()
        metrics = recipe.evaluate.metrics
        trainer = Trainer(
            graph,
            source,
            settings,
            folder,
            evaluate=(lambda: self._measure(graph.nodes[recipe.keep], dev).means)
            if dev and metrics
            else None,
            select=recipe.train.select or next(iter(metrics), None),
            steps=steps,
        )
        return trainer.fit()

    def _dev(self) -> Judged | None:
        data = self.data[self.measured[0]] if self.measured else None
        return data.split("dev") if data is not None and "dev" in data.splits else None

    def _measure(
        self, model: Model, judged: Judged, bar: bool = False, first: Model | None = None
    ) -> Evaluation:
        return measure(model, judged, self.recipe.evaluate, self._dev(), bar, first, self._latest)

    def _evaluate(self, name: str, model: Model, first: Model | None = None) -> Evaluation | None:
        if self.measured is None:
            return None
        log.info("measuring %s on %s", name, self.measured[1])
        try:
            return self._measure(model, self._judged(), sys.stderr.isatty(), first)
        except DataError as error:  # the data was checked before, so it is the model
            raise RunError(f"{name} cannot be measured: {error} Lower train.learning_rate.") from error

    def _judged(self) -> Judged:
        """The split that is measured."""
        assert self.measured is not None
        return self.data[self.measured[0]].split(self.measured[1])

    def _index(self, model: Model) -> None:
        from distill.index import Index

        assert isinstance(model, Encoder)  # was checked
        candidates = self._judged().candidates
        log.info("building an index of %s candidates", f"{len(candidates):,}")
        rows = candidates.take(torch.arange(len(candidates)))
        vectors = in_shares(partial(model.encode_candidates, progress=True), rows)
        if is_first():
            texts = getattr(candidates, "texts", None)
            index = Index.build(vectors, candidates.ids, texts, model=f"../{self.recipe.keep}")
            index.save(self.folder / "index")

    def _write(
        self,
        models: Mapping[str, Model],
        evaluations: Mapping[str, Evaluation | None],
        references: Mapping[str, Evaluation],
        progress: Progress,
    ) -> None:
        recipe = self.recipe
        measures: dict[str, Any] = {}
        frames = []
        for name, evaluation in evaluations.items():
            judged = None if evaluation is None else self._judged()
            measures[name] = entry_of(models[name], evaluation, judged)
            if evaluation is not None:
                frames.append(evaluation.per_query.assign(model=name))
        frames += [evaluation.per_query.assign(model=name) for name, evaluation in references.items()]
        if frames:
            with replacing(self.folder / "per_query.parquet") as partial:
                pd.concat(frames, ignore_index=True).to_parquet(partial, index=False)
        result = {
            "name": recipe.name,
            "keep": recipe.keep,
            "seed": recipe.train.seed,
            "steps": progress.steps,
            "best_step": progress.best_step,
            "dev": progress.dev,
            "cost": progress.cost(),
            "health": progress.health,
            "models": measures,
            "references": {name: evaluation.to_json() for name, evaluation in references.items()},
            "comparison": self._comparison(evaluations),
        }
        card = self._card(measures, models[recipe.keep])
        atomic_write_text(self.folder / recipe.keep / "README.md", card)
        atomic_write_text(self.folder / "README.md", card)
        atomic_write_text(self.folder / FINISHED, json.dumps(result, indent=1))  # it marks the end
        for folder in (self.folder, self.folder / "baseline"):
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def _comparison(self, evaluations: Mapping[str, Evaluation | None]) -> dict[str, Any] | None:
        """The student with and without teachers on the same queries, users or pairs, in the first metric that
        can be tested."""
        keep, alone = evaluations[self.recipe.keep], evaluations.get("baseline")
        if keep is None or alone is None:
            return None
        for metric in self.recipe.evaluate.metrics:
            if (found := compare_trainings([alone.per_query], [keep.per_query], metric)) is not None:
                of = unit(keep.per_query)
                return {"metric": metric, "confidence": CONFIDENCE, "of": of, **found._asdict()}
        return None

    def _card(self, measures: Mapping[str, Mapping[str, Any]], model: Model) -> str:
        recipe = self.recipe
        base = recipe.models[recipe.keep].get("checkpoint")
        return model_card(
            recipe.name,
            "own" if opens(self.folder / recipe.keep) is not None else _kind_of(model),
            recipe.model_dump(mode="json"),
            recipe.keep,
            {name: entry["metrics"] for name, entry in measures.items() if "metrics" in entry},
            command=f"distill run {recipe.name}",
            dataset=" ".join(self.measured) if self.measured else "",
            base_model=base if isinstance(base, str) else None,
        )


def _kind_of(model: Model) -> Kind:
    """What a model card calls it."""
    if hasattr(model, "parts"):
        return "combined"
    if hasattr(model, "features"):
        return "recommender"
    if not isinstance(model, Encoder):
        return "cross_encoder"
    return "multi_vector" if model.search == "maxsim" else "encoder"


def environment() -> dict[str, Any]:
    """What a run's figures depend on, besides its recipe."""
    packages = ("torch", "transformers", "datasets", "accelerate", "faiss-cpu", "tokenizers", "numpy")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": world(),
        "packages": {name: metadata.version(name) for name in packages},
    }
