"""From a recipe's data to objects: a mapping with ``type`` is a call, all else is data."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distill.arguments import wrong_value
from distill.data.dataset import DataSet
from distill.data.mixture import Mixture
from distill.data.source import JudgedSource, Source
from distill.data.topics import Topics
from distill.errors import Mistakes, RecipeError, UserError
from distill.graph import Arrow, DistillationGraph
from distill.model import Model
from distill.objectives.base import Objective
from distill.recipe import nearest
from distill.settings import Recipe

OURS = frozenset({"distill", "teachers", "students"})
NODE_KEYS = ("type", "train", "of")
ARROW_KEYS = ("type", "from", "to", "weight", "detach", "data")
FROM_LABELS = ("from", "labels")  # an arrow's tail that is no model
RUN_FOLDERS = ("baseline", "checkpoints", "index", "logs", "mined", "teachers")
SOURCE_KEYS = (
    "batch_size",
    "candidates",
    "negatives",
    "with_positive",
    "listed_negatives",
    "topics",
    "repeat",
    "path",
)  # of any data set: batches, and where files lie


@dataclass
class Builder:
    """Makes the objects of one recipe; the mistakes of several parts are told in one error.

    Args:
        trusted: Packages that a ``type`` may name, besides ours.
        run_folder: Gives the folder of the model that another recipe makes, for ``{run: NAME}``; None where
            it is not made yet, and starts from no checkpoint.
    """

    trusted: Collection[str] = ()
    run_folder: Callable[[str], str | Path | None] | None = None
    problems: list[str] = field(default_factory=list)
    known: dict[str, DataSet] = field(default_factory=dict)  # the data sets, once they are built

    def check(self, recipe: Recipe) -> None:
        """The first look: every type exists, every argument has a name its type knows. Builds nothing."""
        if mistakes := self.mistakes(recipe):
            raise RecipeError("\n".join(mistakes))

    def mistakes(self, recipe: Recipe) -> list[str]:
        """What ``check`` finds wrong, a line each."""
        self.problems.clear()
        one = not any(isinstance(node, Mapping) and "type" in node for node in recipe.data.values())
        for name, node in {"data": recipe.data}.items() if one else recipe.data_sets.items():
            where = "data" if one else self._place(recipe, name)
            self._check_call(node, where, SOURCE_KEYS, DataSet)
            if isinstance(node, Mapping) and not isinstance(node.get("negatives", []), list):
                self.problems.append(f"{where}.negatives: it should be a list of samplers.")
            if isinstance(node, Mapping) and "topics" in node:
                self._check_call(node["topics"], f"{where}.topics", (), Topics)
            for place, key, model in self._nodes_of_samplers(node):
                if model not in recipe.models:
                    self._say(f"{where}.{place}.{key}", f"there is no model '{model}'.", model, recipe.models)
        for name, node in recipe.models.items():
            self._check_name(name, f"models.{name}", (*RUN_FOLDERS, "labels"))  # no model may be called so
            if set(node) == {"ref"}:
                self._check_ref(node["ref"], recipe, f"models.{name}.ref", whole=True)
                continue
            self._check_call(node, f"models.{name}", ("train",), Model)
            for below in _names(node.get("of")):
                if below not in recipe.models:
                    self._say(f"models.{name}.of", f"there is no model '{below}'.", below, recipe.models)
            for key, value in node.items():
                if isinstance(value, Mapping) and set(value) == {"ref"}:
                    self._check_ref(value["ref"], recipe, f"models.{name}.{key}")
        baseline = recipe.baseline if isinstance(recipe.baseline, Mapping) else {}
        for where, losses in (("losses", recipe.losses), ("baseline", baseline)):
            for name, arrow in losses.items():
                self._check_name(name, f"{where}.{name}")
                self._check_call(arrow, f"{where}.{name}", ARROW_KEYS[1:], Objective)
                for key in ("from", "to"):
                    end = arrow.get(key)
                    if end is not None and (key, end) != FROM_LABELS and str(end) not in recipe.models:
                        self._say(f"{where}.{name}.{key}", f"there is no model '{end}'.", end, recipe.models)
                if "to" not in arrow:
                    self.problems.append(
                        f"{where}.{name}.to: this key is required; it names the node that learns."
                    )
        if recipe.keep not in recipe.models:
            self._say("keep", f"there is no model '{recipe.keep}' to keep.", recipe.keep, recipe.models)
        return list(dict.fromkeys(self.problems))

    def _nodes_of_samplers(self, node: Any) -> Iterator[tuple[str, str, str]]:
        """The nodes that a data set's samplers and topics name: where these stand, by which key, the node."""
        node = node if isinstance(node, Mapping) else {}
        samplers = node.get("negatives")
        places = {
            f"negatives[{i}]": one for i, one in enumerate(samplers if isinstance(samplers, list) else [])
        }
        for place, sampler in {**places, "topics": node.get("topics")}.items():
            try:
                target = self._locate(sampler.get("type"), "") if isinstance(sampler, Mapping) else None
            except RecipeError:
                continue  # said with the sampler itself
            for key in getattr(target, "names_nodes", ()):
                if isinstance(sampler.get(key), str):
                    yield place, key, sampler[key]

    def build(self, node: Any, where: str) -> Any:
        """Objects for a recipe node that refers to no other node."""
        if isinstance(node, list):
            return [self.build(item, f"{where}[{i}]") for i, item in enumerate(node)]
        if not isinstance(node, Mapping):
            return node
        if set(node) == {"run"}:
            if self.run_folder is None:
                raise RecipeError(f"{where}.run: '{node['run']}' names a run, and there are none here.")
            try:
                folder = self.run_folder(node["run"])
            except RecipeError as error:
                raise RecipeError(f"{where}.run: {error}") from error
            return None if folder is None else str(folder)
        if set(node) == {"data"}:
            return self._features(node["data"], f"{where}.data")
        arguments = {key: self.build(value, f"{where}.{key}") for key, value in node.items() if key != "type"}
        return self._call(node["type"], arguments, where) if "type" in node else arguments

    def data(self, recipe: Recipe) -> dict[str, DataSet]:
        """The data sets by name."""
        data, mistakes = {}, Mistakes()
        for name, node in recipe.data_sets.items():
            with mistakes:
                own = inspect.signature(self._locate(node["type"], self._place(recipe, name))).parameters
                arguments = {
                    k: v if k == "path" else _below(node.get("path"), v)
                    for k, v in node.items()
                    if k not in SOURCE_KEYS or (k == "path" and k in own)
                }
                data[name] = self.build(arguments, self._place(recipe, name))
                for teacher in data[name].teachers:
                    if teacher not in recipe.models:
                        there = ", ".join(recipe.models)
                        mistakes.add(
                            f"{self._place(recipe, name)}: it brings scores of '{teacher}', and there is no "
                            f"such model; there are {there}.{nearest(teacher, recipe.models)}"
                        )
        mistakes.report()
        self.known = data
        return data

    def _features(self, name: Any, where: str) -> Any:
        """The features of a data set, which a model asks for with ``{data: NAME}``."""
        if name not in self.known:
            there = ", ".join(self.known) or "none"
            raise RecipeError(
                f"{where}: there is no data set '{name}'; there are {there}.{nearest(str(name), self.known)}"
            )
        try:
            return self.known[name].features
        except UserError as error:
            raise type(error)(f"{where}: {error}") from error

    def source(self, recipe: Recipe, data: Mapping[str, DataSet], heard: Collection[str]) -> Source:
        """Batches of the train splits of the ``heard`` data sets; several are mixed."""
        if not heard:
            raise RecipeError(
                "data: no arrow hears a data set with a train split, so there is nothing to train on."
            )
        sources: dict[str, JudgedSource] = {}
        repeat: dict[str, int] = {}
        for name in heard:
            node = recipe.data_sets[name]
            arguments = {
                k: self.build(node[k], f"{self._place(recipe, name)}.{k}")
                for k in SOURCE_KEYS[:-1]
                if k in node
            }
            arguments = {
                "batch_size": recipe.train.batch_size,
                "seed": recipe.train.seed,
                "name": name,
                **arguments,
            }
            topics, repeat[name] = arguments.pop("topics", None), arguments.pop("repeat", 1)
            taken = inspect.signature(data[name].train_source).parameters
            if unknown := sorted(set(arguments) - set(taken)):
                kind = type(data[name]).__name__
                raise RecipeError(f"{self._place(recipe, name)}.{unknown[0]}: {kind} has no such setting.")
            try:
                sources[name] = data[name].train_source(**arguments)
                sources[name].topics = topics
            except (ValueError, TypeError) as error:
                raise RecipeError(f"{self._place(recipe, name)}: {error}") from error
        if len(sources) == 1 and set(repeat.values()) == {1}:
            return next(iter(sources.values()))
        try:
            return Mixture(sources, recipe.train.seed, repeat=repeat)
        except ValueError as error:
            raise RecipeError(f"data: {error}") from error

    @staticmethod
    def _place(recipe: Recipe, name: str) -> str:
        return "data" if "type" in recipe.data else f"data.{name}"

    def models(self, recipe: Recipe) -> tuple[dict[str, Model], set[str]]:
        """The nodes by name, and which of them are trained."""
        built: dict[str, Model] = {}
        trained: set[str] = set()

        def node_of(name: str, path: tuple[str, ...]) -> Model:
            if name in path:
                raise RecipeError(f"models: {' -> '.join((*path, name))} refer to each other.")
            if name not in built:
                spec = recipe.models[name]
                if set(spec) == {"ref"}:
                    built[name] = node_of(spec["ref"], (*path, name))
                    trained.update({name} if spec["ref"] in trained else ())
                else:
                    built[name] = make(name, spec, (*path, name))
                    trained.update({name} if spec.get("train", name == recipe.keep) else ())
            return built[name]

        def make(name: str, spec: Mapping[str, Any], path: tuple[str, ...]) -> Model:
            where = f"models.{name}"
            arguments: dict[str, Any] = {}
            for key, value in spec.items():
                if key in NODE_KEYS:
                    continue
                if isinstance(value, Mapping) and set(value) == {"ref"}:
                    other, _, attribute = value["ref"].partition(".")
                    arguments[key] = getattr(node_of(other, path), attribute)
                else:
                    arguments[key] = self.build(value, f"{where}.{key}")
            if "of" in spec:
                arguments["of"] = {below: node_of(below, path) for below in _names(spec["of"])}
            torch.manual_seed(recipe.train.seed)  # a student starts alike whatever stands beside it
            return self._call(spec["type"], arguments, where)

        mistakes = Mistakes()
        for name in recipe.models:
            with mistakes:
                node_of(name, ())
        mistakes.report()
        return {name: built[name] for name in recipe.models}, trained

    def graph(
        self, recipe: Recipe, losses: Mapping[str, Mapping[str, Any]] | None = None
    ) -> DistillationGraph:
        """The graph of a recipe; with other ``losses``, only of the nodes that these, or the data, reach."""
        arrows, mistakes = [], Mistakes()
        for name, spec in (recipe.losses if losses is None else losses).items():
            with mistakes:
                arrows.append(self._arrow(name, spec, "losses" if losses is None else "baseline"))
        if losses is not None:
            sets = recipe.data_sets.values()
            mining = [model for node in sets for _, _, model in self._nodes_of_samplers(node)]
            recipe = recipe.model_copy(update={"models": reached(recipe, losses, mining)})
        nodes: dict[str, Model] = {}
        trained: set[str] = set()
        with mistakes:
            nodes, trained = self.models(recipe)
        mistakes.report()
        torch.manual_seed(recipe.train.seed)
        return DistillationGraph(nodes, arrows, trained, recipe.keep)

    def _arrow(self, name: str, spec: Mapping[str, Any], section: str) -> Arrow:
        where = f"{section}.{name}"
        arguments = {k: self.build(v, f"{where}.{k}") for k, v in spec.items() if k not in ARROW_KEYS}
        return Arrow(
            name=name,
            objective=self._call(spec["type"], arguments, where),
            head=spec["to"],
            tail=None if spec.get("from") == "labels" else spec.get("from"),
            labels=spec.get("from") == "labels",
            weight=spec.get("weight", 1.0),
            detach=spec.get("detach", True),
            data=tuple(_names(spec["data"])) if "data" in spec else None,
        )

    def _call(self, type_name: str, arguments: Mapping[str, Any], where: str) -> Any:
        target = self._locate(type_name, where)
        try:
            return target(**arguments)
        except UserError as error:
            raise type(error)(f"{where}: {error}") from error
        except (ValueError, TypeError, OSError) as error:  # OSError: a configuration that is none
            raise RecipeError(f"{where}: {error}") from error

    def _check_call(self, node: Any, where: str, extra: Collection[str], base: type | None = None) -> None:
        """Type and argument names of a node and of all typed nodes inside."""
        if not isinstance(node, Mapping) or "type" not in node:
            self.problems.append(
                f"{where}.type: this key is required; it names a class, such as {_example(base)}."
            )
            return
        try:
            target = self._locate(node["type"], where)
        except RecipeError as error:
            self.problems.append(str(error))
            return
        if base is not None and not (inspect.isclass(target) and issubclass(target, base)):
            self.problems.append(
                f"{where}.type: {node['type']} is no {base.__name__}, such as {_example(base)}."
            )
            return
        parameters = inspect.signature(target).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for key, value in node.items():
            if key not in ("type", *extra, *parameters) and not free:
                known = [name for name in parameters if name != "self"]
                self._say(
                    where,
                    f"{target.__name__} has no argument '{key}'; it takes {', '.join((*extra, *known))}.",
                    key,
                    (*extra, *known),
                )
            for i, item in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(item, Mapping) and "type" in item:
                    inner = f"{where}.{key}" + (f"[{i}]" if isinstance(value, list) else "")
                    self._check_call(item, inner, ())
            if key in ("train", "detach") and key in extra:  # in YAML 1.2, `no` is a word
                problem = "" if isinstance(value, bool) else f"should be true or false, got {value!r}"
            elif key == "of" and base is Model:  # names, checked above; what is passed are the models
                problem = ""
            else:
                takes = DataSet.train_source if base is DataSet and key in extra else target
                problem = wrong_value(takes, key, value)
            if problem:
                self.problems.append(f"{where}.{key}: it {problem}.")
        for name, parameter in parameters.items():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            wanted = named and parameter.default is parameter.empty
            if wanted and name not in node:
                self.problems.append(f"{where}.{name}: this key is required by {target.__name__}.")

    def _check_name(self, name: str, where: str, taken: Collection[str] = ()) -> None:
        """Names become modules of torch, folders and words of a log."""
        if not name or set(name) & set("./\\") or hasattr(torch.nn.ModuleDict, name) or name in taken:
            self.problems.append(
                f"{where}: the name '{name}' is taken, or holds a dot or a slash; choose another."
            )

    def _check_ref(self, ref: Any, recipe: Recipe, where: str, whole: bool = False) -> None:
        name, _, attribute = str(ref).partition(".")
        if name not in recipe.models:
            self._say(where, f"there is no model '{name}' to refer to.", name, recipe.models)
            return
        if whole and attribute:
            self.problems.append(f"{where}: a model is a whole one; write `ref: {name}`.")
        if whole:
            return
        try:
            target = self._locate(recipe.models[name].get("type"), where)
        except RecipeError:
            return  # said at that model
        shares: frozenset[str] = getattr(target, "shares", frozenset())
        if attribute not in shares:
            self._say(
                where,
                f"'{name}' does not share '{attribute}'; it shares {', '.join(sorted(shares)) or 'nothing'}.",
                attribute,
                shares,
            )

    def _locate(self, type_name: Any, where: str) -> Any:
        """The class of that name; of a package the user trusts, anything that can be called."""
        module, _, name = str(type_name).rpartition(".")
        root = str(type_name).partition(".")[0]
        if root not in OURS and root not in self.trusted:
            raise RecipeError(
                f"{where}.type: '{type_name}' is outside of {', '.join(sorted(OURS))}. "
                f"A type is code that runs: if you trust the package, pass --trust {root}."
                f"{nearest(root, OURS)}"
            )
        if not module:
            raise RecipeError(f"{where}.type: '{type_name}' is a package; name a class in it.")
        try:
            holder = importlib.import_module(module)
        except ImportError as error:
            raise RecipeError(f"{where}.type: cannot import '{module}' of '{type_name}': {error}.") from error
        if not hasattr(holder, name):
            known = getattr(holder, "__all__", [])
            raise RecipeError(
                f"{where}.type: {module} has no '{name}'; it has {', '.join(known)}.{nearest(name, known)}"
            )
        target = getattr(holder, name)
        ours = inspect.isclass(target) and target.__module__.partition(".")[0] in OURS
        if (root in OURS and not ours) or not callable(target):  # a stranger's recipe calls no function
            raise RecipeError(f"{where}.type: '{type_name}' is not a class that a recipe can make.")
        return target

    def _say(self, where: str, what: str, word: Any, known: Collection[str]) -> None:
        self.problems.append(f"{where}: {what}{nearest(str(word), [str(k) for k in known])}")


def reached(
    recipe: Recipe, losses: Mapping[str, Mapping[str, Any]], others: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """The models that some losses name, and ``others``, and those that these are built from."""
    wanted: set[str] = set()

    def want(name: str) -> None:
        if name in wanted or name not in recipe.models:
            return
        wanted.add(name)
        spec = recipe.models[name]
        for below in _names(spec.get("of")):
            want(below)
        for value in [spec, *spec.values()]:
            if isinstance(value, Mapping) and "ref" in value:
                want(str(value["ref"]).partition(".")[0])

    for arrow in losses.values():
        for name in (arrow.get("to"), arrow.get("from")):
            if name is not None:
                want(name)
    for name in (recipe.keep, *others):
        want(name)
    return {name: spec for name, spec in recipe.models.items() if name in wanted}


def _below(folder: str | None, value: Any) -> Any:
    """A data set's argument with the names of files that lie in ``folder`` made whole."""
    if folder is None or value is None:
        return value
    if isinstance(value, Mapping):
        return {key: item if key == "columns" else _below(folder, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_below(folder, item) for item in value]
    if isinstance(value, str) and (Path(folder).expanduser() / value).exists():
        return str(Path(folder).expanduser() / value)
    return value


def _names(value: Any) -> list[str]:
    return [] if value is None else [str(item) for item in (value if isinstance(value, list) else [value])]


def _example(base: type | None) -> str:
    examples: dict[type | None, str] = {
        Model: "students.BiEncoder",
        Objective: "distill.objectives.ScoreKL",
        Topics: "distill.data.Topics",
    }
    return examples.get(base, "distill.data.Retrieval")
