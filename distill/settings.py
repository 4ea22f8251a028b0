"""The schema of a recipe: what its keys are and what they mean. Next: ``recipe.py``, which reads one."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from distill.nn.precision import Precision


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def below_the_runs(name: str) -> str:
    if not name or PurePath(name).is_absolute() or {"..", "."} & set(name.split("/")):
        raise ValueError("the name becomes a folder below the runs; write one like `mine` or `text/mine`")
    return name


class TrainSettings(_Strict):
    """How the graph is trained.

    Batches hold ``batch_size`` queries, over all processes; an optimiser step takes ``accumulate`` of them.
    With ``gradient_cache`` (GradCache) trained models see so many texts or pairs at a time, each twice: large
    batches fit into memory, with the same gradient, for about a third more compute. The learning rate
    rises over the first ``warmup`` of the steps and then follows ``schedule``. The dev split is measured
    every ``evaluate_every`` epochs, and the model with the best ``select`` there is kept. Embedding tables
    have an optimiser of their own (``distill.optimizer.RowAdagrad``): warm-up and schedule hold for them,
    ``learning_rate``, ``weight_decay`` and ``clip`` do not.
    """

    epochs: Annotated[float, Field(gt=0)] = 1.0
    steps: Annotated[int, Field(gt=0)] | None = None  # instead of epochs
    minutes: Annotated[float, Field(gt=0)] | None = None  # epochs are cut to fit, by the speed measured
    batch_size: Annotated[int, Field(gt=0)] = 32
    accumulate: Annotated[int, Field(gt=0)] = 1
    gradient_cache: Annotated[int, Field(gt=0)] | None = None  # texts or pairs at a time; null: all at once
    learning_rate: Annotated[float, Field(gt=0)] = 2.0e-5
    learning_rates: dict[str, Annotated[float, Field(gt=0)]] = {}  # of single nodes, by name
    table_learning_rate: Annotated[float, Field(gt=0)] = 0.05  # of embedding tables, which Adagrad moves
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip: Annotated[float, Field(gt=0)] | None = 1.0  # norm of all gradients together
    mixed_precision: Precision = "auto"
    store: Literal["float32", "float16"] = "float32"  # in which the teacher store keeps scores and vectors
    seed: int = 1
    evaluate_every: Annotated[float, Field(gt=0)] | None = 1.0  # epochs; null: never
    select: str | None = None  # metric on dev; null: the first of evaluate.metrics
    patience: Annotated[int, Field(gt=0)] | None = None  # evaluations without a better one before it stops
    checkpoint_every: Annotated[int, Field(gt=0)] | None = None  # steps; null: each evaluation, or 5 minutes
    log_every: Annotated[int, Field(gt=0)] = 10  # steps
    trackers: list[str] = []  # of Accelerate: tensorboard, wandb, ...
    deterministic: bool = False


class EvaluateSettings(_Strict):
    """What is measured after training, on which split of which data set."""

    split: str = "test"
    data: str | None = None  # with several data sets: the one to measure; null: the first that has the split
    metrics: list[str] = []
    teachers: bool = True  # measure them too
    rerank: Annotated[int, Field(gt=0)] = 100  # a model that cannot be indexed re-ranks so many of BM25's
    references: list[Literal["popularity", "random"]] = []  # measured beside the models


class BaselineTrain(_Strict):
    """What may differ for the baseline: it is not to be measured at settings that suit teachers better."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None  # null: that of train, as for the others
    evaluate_every: Annotated[float, Field(gt=0)] | None = None
    patience: Annotated[int, Field(gt=0)] | None = None


class Recipe(_Strict):
    """One YAML file: data, models, losses, and how to train and measure.

    ``models`` and ``losses`` are kept as data; ``build.py`` turns them into objects. ``baseline`` gives the
    losses of the same student trained without teachers, on the same data, steps and seed; ``true`` takes
    the recipe's own losses that start at the labels. ``baseline_train`` gives it a learning rate and
    evaluations of its own.
    """

    name: str
    data: dict[str, Any]
    models: dict[str, dict[str, Any]]
    losses: dict[str, dict[str, Any]]
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    baseline: bool | dict[str, dict[str, Any]] = False
    baseline_train: BaselineTrain = BaselineTrain()
    keep: str = "student"
    # sample queries, or users as mappings, answered from an index of the test candidates at the end
    search: list[str | dict[str, Any]] = []

    _below_the_runs = field_validator("name")(below_the_runs)

    @field_validator("baseline", mode="before")
    @classmethod
    def _a_word_or_losses(cls, baseline: Any) -> Any:
        if not isinstance(baseline, bool | dict):
            raise ValueError("a baseline is true, false, or losses by name")
        return baseline

    @model_validator(mode="after")
    def _something_to_train(self) -> Recipe:
        if not self.data:
            raise ValueError("data: a recipe needs at least one data set")
        if not self.models:
            raise ValueError("models: a recipe needs at least one")
        if not self.losses:
            raise ValueError("losses: a recipe needs at least one")
        return self

    @property
    def data_sets(self) -> dict[str, dict[str, Any]]:
        """The data sets by name; a single one is called ``data``."""
        return {"data": self.data} if "type" in self.data else self.data


class Changes(_Strict):
    """Changes of a recipe: ``drop`` takes keys out (with dots), then ``set`` gives keys whole values."""

    drop: list[str] = []
    set: dict[str, Any] = {}


class Variant(Changes):
    """One variant of a study, and the variant it is compared with, where that is not the study's baseline."""

    against: str | None = None


class DataSet(Changes):
    """One data set of a study: another recipe, or changes of the study's, which every variant then has."""

    recipe: str | None = None


class Study(_Strict):
    """Variants of a recipe over seeds: one YAML file below ``recipes/studies``, or of your own.

    Every variant starts from the same student, sees each data set in the same order, and takes as many
    steps as the recipe does, unless it sets ``train.steps`` or ``train.epochs`` itself. ``drop`` and ``set``
    of the study hold for all of them. The first of ``metrics`` decides.
    """

    name: str
    recipe: str
    variants: Annotated[dict[str, Variant], Field(min_length=2)]
    baseline: str
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [1, 2, 3]
    data: dict[str, DataSet] = {}
    metrics: list[str] = []  # none: all that the recipe measures
    drop: list[str] = []
    set: dict[str, Any] = {}

    _below_the_runs = field_validator("name")(below_the_runs)

    @field_validator("variants", "data")
    @classmethod
    def _become_folders(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if not re.fullmatch(r"[\w+-]+", name):
                raise ValueError(f"the name '{name}' becomes a folder; use letters, digits, _, + and - in it")
        folded = [name.casefold() for name in named]
        if twice := [name for name in named if folded.count(name.casefold()) > 1]:
            raise ValueError(f"{' and '.join(twice)} are one name to some file systems; rename one")
        return named

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands twice; its runs would be the same, and count twice")
        return seeds
