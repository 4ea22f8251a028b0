"""The graph: nodes are models, arrows are losses. The one place where distillation happens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from distill.batch import Batch, Columns, Readable
from distill.errors import RecipeError
from distill.gradient_cache import cached
from distill.model import Model
from distill.objectives.base import Loss, Objective
from distill.outputs import AXES, JOINT, OF_TOKENS, ROWWISE, Needs, Outputs
from distill.pieces import in_pieces
from distill.processes import world

Weight = float | Sequence[Sequence[float]]


@dataclass(frozen=True)
class Arrow:
    """A loss: what ``tail`` (a node, None for the labels) says teaches ``head``.

    Args:
        name: In the log, the report and in errors.
        head: The node that learns.
        tail: The node that teaches.
        weight: A number, or [progress, weight] points with straight lines between them; progress runs
            from 0 to 1 over the training, two points at one progress make a step. At 0 the arrow is closed.
        detach: Whether the teacher's words are constants here.
        data: Names of the sources it is limited to; None: all.
        labels: Without a tail: whether the data's labels stand for a teacher's scores.
    """

    name: str
    objective: Objective
    head: str
    tail: str | None = None
    weight: Weight = 1.0
    detach: bool = True
    data: tuple[str, ...] | None = None
    labels: bool = False

    def __post_init__(self) -> None:
        if self.tail is not None:
            self.objective.hear()

    def weight_at(self, progress: float) -> float:
        """The weight at a progress in [0, 1].

        >>> Arrow("a", None, "student", weight=[[0, 0], [0.2, 0], [0.2, 0.5]]).weight_at(0.1)
        0.0
        """
        if isinstance(self.weight, int | float):
            return float(self.weight)
        points = [(float(at), float(value)) for at, value in self.weight]
        if progress < points[0][0]:
            return points[0][1]
        for (left, low), (right, high) in pairwise(points):
            if left <= progress < right:
                return low + (high - low) * (progress - left) / (right - left)
        return points[-1][1]

    @property
    def labelled(self) -> bool:
        """Whether it reads the labels, in its objective or for a teacher's scores."""
        return self.objective.labelled or self.labels

    def is_open(self, progress: float, source: str) -> bool:
        return (self.data is None or source in self.data) and self.weight_at(progress) != 0.0


class DistillationGraph(nn.Module):
    """Models and the losses between them.

    Each model is asked once per batch, for the union of what its open arrows need; a model that no open
    arrow hears is not run. Frozen models answer in eval mode and without gradient, at every step.

    Args:
        nodes: Models by name.
        arrows: The losses.
        trained: Names of the nodes that learn.
        keep: The node that is kept.
    """

    def __init__(
        self,
        nodes: Mapping[str, Model],
        arrows: Sequence[Arrow],
        trained: Iterable[str],
        keep: str = "student",
    ):
        super().__init__()
        self.nodes: dict[str, Model] = dict(nodes)
        self.node_modules = nn.ModuleDict(self.nodes)  # for parameters(), to() and state_dict()
        self.arrows = tuple(arrows)
        self.objectives = nn.ModuleDict({arrow.name: arrow.objective for arrow in arrows})
        self.trained = frozenset(trained)
        self.keep = keep
        self.autocast: Callable[[], AbstractContextManager] = nullcontext  # of the heavy half
        self.live: Counter[str] = (
            Counter()
        )  # texts and pairs frozen nodes were asked about, which no store keeps
        self.gradient_cache: int | None = None  # rows represented at a time with gradient; None: all at once
        for name, node in self.nodes.items():
            node.requires_grad_(name in self.trained)
        for name in self.trained:  # what a frozen node shares with a trained one learns (check refuses it)
            self.nodes[name].requires_grad_(True)
        for arrow in self.arrows:
            if self._fits(arrow):  # what does not fit is said by check
                try:
                    arrow.objective.bind(
                        self.nodes[arrow.head].sizes, self.nodes[arrow.tail].sizes if arrow.tail else {}
                    )
                except ValueError as error:
                    raise RecipeError(f"losses.{arrow.name}: {error}") from error
        self.train(self.training)

    def _fits(self, arrow: Arrow) -> bool:
        """Whether both ends are there and provide what the objective needs."""
        ends = ((arrow.head, arrow.objective.student_needs), (arrow.tail, arrow.objective.teacher_needs))
        return all(
            needs.fields <= (self.nodes[name].provides if name in self.nodes else _said_without(arrow, name))
            for name, needs in ends
        )

    def train(self, mode: bool = True) -> DistillationGraph:
        super().train(mode)
        for name, node in self.nodes.items():
            if name not in self.trained:
                node.eval()
        return self

    def forward(self, batch: Batch, progress: float = 0.0) -> dict[str, Loss]:
        """Each open arrow's summed loss and count per row, by name, without its weight.

        Args:
            batch: With the columns that every node reads.
            progress: How far the training is, in [0, 1].
        """
        arrows = self.open_arrows(progress, batch.source)
        asked = self.asked(arrows)
        said = self.represent(batch, asked)
        said = {name: self._compare(name, outputs, batch, asked[name]) for name, outputs in said.items()}
        return {
            arrow.name: arrow.objective(
                said[arrow.head], self._heard(arrow, said, batch), self._taught(arrow, batch)
            )
            for arrow in arrows
        }

    def open_arrows(self, progress: float, source: str = "") -> list[Arrow]:
        return [arrow for arrow in self.arrows if arrow.is_open(progress, source)]

    def asked(self, arrows: Iterable[Arrow]) -> dict[str, Needs]:
        """What each heard node must answer, in an order in which nodes built from others come last."""
        needs: dict[str, Needs] = {}
        for arrow in arrows:
            needs[arrow.head] = needs.get(arrow.head, Needs()) | arrow.objective.student_needs
            if arrow.tail is not None:
                needs[arrow.tail] = needs.get(arrow.tail, Needs()) | arrow.objective.teacher_needs
        order = self.order()
        for name in reversed(order):
            if name in needs:
                for below in self.nodes[name].of:
                    needs[below] = needs.get(below, Needs()) | self.nodes[name].of_needs(needs[name])
        return {name: needs[name] for name in order if name in needs}

    def order(self) -> list[str]:
        """Node names, each after the nodes it is built from."""
        order: list[str] = []

        def visit(name: str, path: tuple[str, ...]) -> None:
            if name in path:
                raise RecipeError(f"models: {' -> '.join((*path, name))} are built from each other (`of`).")
            if name not in order:
                for below in self.nodes[name].of:
                    visit(below, (*path, name))
                order.append(name)

        for name in self.nodes:
            visit(name, ())
        return order

    def represent(self, batch: Batch, asked: Mapping[str, Needs]) -> dict[str, Outputs]:
        """The heavy half: what each node says row by row; known answers are taken from the batch.

        Of nodes that others are built from it is the whole answer.
        """
        said: dict[str, Outputs] = {}
        for name, needs in asked.items():
            node, stored = self.nodes[name], batch.stored.get(name)
            known = Outputs()
            if stored is not None and stored.known is None and name not in self.trained:
                known = stored
                needs = _unanswered(node, needs, known)
                if not needs:
                    said[name] = known
                    continue
            view = batch.view(*node.reads.keys)
            for below in node.of:  # it hears answers, not only what they follow from
                said[below] = self._compare(below, said[below], batch, asked[below])
            with torch.set_grad_enabled(torch.is_grad_enabled() and name in self.trained):
                if node.of:
                    with self.autocast():
                        said[name] = node.represent_of({n: said[n] for n in node.of}, view, needs)
                else:
                    if name not in self.trained:
                        self.live[name] += _size(node.represents(needs), batch)
                    said[name] = self._represent(node, view, needs)
            said[name] = said[name].with_(**dict(known.given()))
        return said

    def _represent(self, node: Model, batch: Batch, needs: Needs) -> Outputs:
        """What a node says row by row, of all at once or in pieces."""

        def ask(batch: Batch, needs: Needs) -> Outputs:
            with self.autocast():  # of each pass its own
                return node.represent(batch, needs)

        rows = self.gradient_cache if torch.is_grad_enabled() else None
        fields = node.represents(needs)
        if (rows is None and world() == 1) or not fields.fields <= ROWWISE:
            return ask(batch, needs)
        return in_pieces(ask if rows is None else cached(ask, node.device), batch, fields, rows)

    def _compare(self, name: str, outputs: Outputs, batch: Batch, needs: Needs) -> Outputs:
        missing = needs.fields - dict(outputs.given()).keys()
        if not missing:
            return outputs
        with torch.set_grad_enabled(torch.is_grad_enabled() and name in self.trained):
            return self.nodes[name].compare(outputs, batch, needs.only(missing))

    @staticmethod
    def _heard(arrow: Arrow, said: Mapping[str, Outputs], batch: Batch) -> Outputs | None:
        if arrow.tail is None:
            return Outputs(scores=batch.labels) if arrow.labels else None
        return said[arrow.tail].detach() if arrow.detach else said[arrow.tail]

    def _taught(self, arrow: Arrow, batch: Batch) -> Batch:
        """The batch of an arrow: it lists only the pairs that its tail knows a score of."""
        tail = None if arrow.tail is None else self.nodes[arrow.tail]
        known = None if tail is None else tail.knows(batch.view(*tail.reads.keys))
        return batch if known is None else replace(batch, mask=batch.mask & known)

    def columns(self) -> Columns:
        """The columns that the nodes read, each once."""
        sides: tuple[dict[str, Readable], ...] = ({}, {}, {})
        for name in self.asked(self.arrows):
            for side, columns in zip(sides, self.nodes[name].reads, strict=True):
                side.update({column.key: column for column in columns})
        return Columns(*(tuple(side.values()) for side in sides))

    def counts(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Over how many terms each open arrow sums on this batch, before anything is run."""
        return {
            arrow.name: arrow.objective.count(self._taught(arrow, batch)).sum()
            for arrow in self.open_arrows(progress, batch.source)
        }

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name; one that is shared comes once."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def check(self, sources: Mapping[str, bool] | None = None) -> None:
        """Refuse a graph that cannot be trained; every mistake in one message.

        Args:
            sources: Which data sets there are, and whether each has labels.

        Raises:
            RecipeError: An arrow from or to nowhere, an objective that needs what a node lacks, a trained
                node without an arrow in, a frozen node that shares parameters with a trained one, ...
        """
        problems = [
            problem for arrow in self.arrows for problem in self._arrow_problems(arrow, sources or {})
        ]
        if self.keep not in self.nodes:
            problems.append(
                f"models: there is no node '{self.keep}' to keep; "
                + (
                    "name one `student`, or name the node to keep with `keep: NODE`."
                    if self.nodes
                    else "none at all."
                )
            )
        elif self.keep not in self.trained:
            problems.append(f"models.{self.keep}: the node to keep must be trained; remove `train: false`.")
        heads = {arrow.head for arrow in self.arrows}
        learn_through = {below for name in heads if name in self.nodes for below in self.below(name)}
        for name in sorted(self.trained - heads - learn_through):
            problems.append(
                f"models.{name}: it is trained, but no arrow leads to it; add one or set `train: false`."
            )
        for name, node in self.nodes.items():
            for data in node.by_data:
                if sources and data not in sources:
                    there = ", ".join(sources)
                    problems.append(f"models.{name}: there is no data set '{data}'; there are {there}.")
        for name in sorted(self.trained):
            parts = {name} | (self.below(name) & self.trained)
            if not any(p.requires_grad for part in parts for p in self.nodes[part].parameters()):
                problems.append(
                    f"models.{name}: it is to be trained, but has no parameter that could learn; "
                    f"set `train: false`."
                )
        frozen = {
            id(p): n for n, node in self.nodes.items() if n not in self.trained for p in node.parameters()
        }
        for name in sorted(self.trained):
            shared = {frozen[id(p)] for p in self.nodes[name].parameters() if id(p) in frozen}
            problems += [
                f"models.{other}: it is frozen but shares parameters with the trained '{name}'; "
                f"train both or use `of: {name}`."
                for other in sorted(shared)
            ]
        if problems:
            raise RecipeError("\n".join(problems))

    def below(self, name: str) -> set[str]:
        """The nodes that a node is built from, and those that these are built from."""
        below = set(self.nodes[name].of) & self.nodes.keys()
        return below | {deeper for node in below for deeper in self.below(node)}

    def _arrow_problems(self, arrow: Arrow, sources: Mapping[str, bool]) -> Iterable[str]:
        where, objective = f"losses.{arrow.name}", arrow.objective
        kind = type(objective).__name__
        for key, name in (("to", arrow.head), ("from", arrow.tail)):
            if name is not None and name not in self.nodes:
                there = ", ".join(self.nodes) or "none"
                yield f"{where}.{key}: there is no model '{name}'; there are {there}."
        if arrow.head in self.nodes and arrow.head not in self.trained:
            yield f"{where}.to: '{arrow.head}' is frozen and cannot learn; set `train: true` on it."
        for side, name, needs in (
            ("student", arrow.head, objective.student_needs),
            ("teacher", arrow.tail, objective.teacher_needs),
        ):
            if name is None and (missing := needs.fields - _said_without(arrow, name)):
                yield (
                    f"{where}: {kind} compares with a teacher's {', '.join(sorted(missing))}; "
                    f"say which node with `from:`."
                )
            if name not in self.nodes:
                continue
            provides = self.nodes[name].provides
            if missing := needs.fields - provides:
                yield (
                    f"{where}: {kind} needs {', '.join(sorted(missing))} from the {side}, but '{name}' "
                    f"({type(self.nodes[name]).__name__}) provides only {', '.join(sorted(provides))}. "
                    f"Choose a {side} that provides it, or take this arrow out of the recipe."
                )
        yield from self._token_problems(arrow, where)
        if arrow.tail is not None and not objective.teacher_needs:
            yield f"{where}.from: {kind} hears no teacher, only labels; remove `from`."
        for name in arrow.data or ():
            if sources and name not in sources:
                yield f"{where}.data: there is no data set '{name}'; there are {', '.join(sources)}."
        heard = [name for name in sources if arrow.data is None or name in arrow.data]
        if self._reads_labels(arrow) and (bare := [name for name in heard if not sources[name]]):
            who = kind if arrow.labelled else f"'{arrow.tail}'"
            yield (
                f"{where}: {who} reads labels, and data set '{bare[0]}' has none; "
                f"limit the arrow with `data: [...]` to those that have."
            )
        yield from self._weight_problems(where, arrow.weight)

    def _token_problems(self, arrow: Arrow, where: str) -> Iterable[str]:
        """Tokens are matched by their place in ids, which both ends must have cut alike."""
        needs = (arrow.objective.student_needs, arrow.objective.teacher_needs)
        ends = [self.nodes.get(name or "") for name in (arrow.head, arrow.tail)]
        if ends[0] is None or ends[1] is None or not all(one.fields & OF_TOKENS for one in needs):
            return
        head, tail = (end.reads.keys[:2] for end in ends if end is not None)
        if head != tail:
            yield (
                f"{where}: {type(arrow.objective).__name__} matches tokens of '{arrow.tail}' and "
                f"'{arrow.head}', which cut texts into different ids: their tokenizers or prompts differ. "
                f"Take checkpoints of one tokenizer, and set the prompts of '{arrow.head}' to \"\" (the "
                f"`markers` of a ColBERT to [])."
            )

    def _reads_labels(self, arrow: Arrow) -> bool:
        """Whether the arrow reads the labels, or a teacher does that it hears."""
        tail = arrow.tail if arrow.tail in self.nodes else None
        heard = [] if tail is None else [tail, *self.below(tail)]
        return arrow.labelled or any(self.nodes[name].labelled for name in heard)

    @staticmethod
    def _weight_problems(where: str, weight: Weight) -> Iterable[str]:
        points = [[0.0, weight]] if isinstance(weight, int | float) else weight
        if not (
            isinstance(points, list | tuple)
            and points
            and all(isinstance(point, list | tuple) and len(point) == 2 for point in points)
            and all(isinstance(value, int | float) for point in points for value in point)
        ):
            yield f"{where}.weight: {weight} is neither a number nor a list of [progress, weight] points."
            return
        if any(not math.isfinite(value) for point in points for value in point):
            yield f"{where}.weight: {weight} holds a number that is not finite."
        places = [place for place, _ in points]
        if places != sorted(places) or places[0] < 0 or places[-1] > 1:
            yield f"{where}.weight: the progress of the points {weight} must rise within 0 to 1."
        if all(value == 0 for _, value in points):
            yield f"{where}.weight: it is 0 all the time, so the arrow never opens; remove it."


def _unanswered(node: Model, needs: Needs, known: Outputs) -> Needs:
    """What a node must still be asked to represent when some of it is known."""
    there = dict(known.given()).keys()
    left = needs.only(needs.fields - there)
    return needs.only(node.represents(left).fields - there) if left else left


def _size(needs: Needs, batch: Batch) -> int:
    """About how many texts and pairs of a batch a node is asked."""
    axes = {AXES[name] for name in needs.fields}
    pairs = batch.mask if needs.first is None or needs.fields - JOINT else batch.mask[:, : needs.first]
    sizes = {"query": len(batch.mask), "candidate": len(batch.candidate_ids), "pair": int(pairs.sum())}
    return sum(size for axis, size in sizes.items() if axis in axes)


def _said_without(arrow: Arrow, name: str | None) -> frozenset[str]:
    """What an end of an arrow says that is no node: the labels, where they stand for scores."""
    return frozenset({"scores"} if name is None and arrow.labels else ())
