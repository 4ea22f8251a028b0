"""The optimisers of a training, and their learning rates from step to step. Next: ``trainer.py``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distill.nn.feature_embedding import PADDING, Table
from distill.recipe import nearest
from distill.settings import TrainSettings

if TYPE_CHECKING:
    from distill.graph import DistillationGraph


def rate_problems(settings: TrainSettings, graph: DistillationGraph) -> Iterator[str]:
    """Learning rates of nodes that have no parameters of their own to train, in words."""
    trained = sorted(graph.trained)
    for name in settings.learning_rates:
        if name not in graph.trained:
            yield (
                f"train.learning_rates: '{name}' is not a trained model; these are: "
                f"{', '.join(trained)}.{nearest(name, trained)}"
            )
        elif not any(key.startswith(f"node_modules.{name}.") for key in graph.trainable()):
            yield f"train.learning_rates: all parameters of '{name}' are another node's; set the rate there."


def optimizers(graph: DistillationGraph, settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """AdamW for the graph's parameters, and RowAdagrad for its embedding tables where it has any."""
    tables = table_names(graph)
    parameters = graph.trainable()
    made = [adamw({name: p for name, p in parameters.items() if name not in tables}, settings)]
    if tables:
        made.append(RowAdagrad([parameters[name] for name in sorted(tables)], settings.table_learning_rate))
    return made


def table_names(graph: DistillationGraph) -> set[str]:
    """The names of the trained parameters that are embedding tables."""
    tables = {id(module.weight) for module in graph.modules() if isinstance(module, Table)}
    return {name for name, parameter in graph.trainable().items() if id(parameter) in tables}


class RowAdagrad(torch.optim.Optimizer):
    r"""Adagrad with one sum per row, for embedding tables.

    .. math:: s_r \leftarrow s_r + \frac{1}{D} \sum_d g_{rd}^2, \quad
              w_r \leftarrow w_r - \frac{\eta}{\sqrt{s_r} + \epsilon} \, g_r

    A row without a gradient stays where it is, so that with sparse gradients a step costs what its batch
    reads, however long the table; a dense gradient gives the same numbers. Row 0, the padding, never moves.

    References:
        Duchi, Hazan and Singer, 2011. Adaptive Subgradient Methods for Online Learning. Row-wise as in
        Gupta, Bengio and Weston, 2014. Training Highly Multiclass Classifiers.
    """

    def __init__(self, tables: Iterable[nn.Parameter], lr: float = 0.05, eps: float = 1e-10):
        super().__init__([{"params": list(tables), "lr": lr, "base_lr": lr}], {"eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._move(table, table.grad, group["lr"], group["eps"])

    def _move(self, table: Tensor, gradient: Tensor, rate: float, eps: float) -> None:
        state = self.state[table]
        if not state:
            state["sum"] = torch.zeros(len(table), device=table.device)
        if not gradient.is_sparse:
            gradient[PADDING] = 0.0
            state["sum"] += gradient.square().mean(dim=1)
            table.addcdiv_(gradient, (state["sum"].sqrt() + eps)[:, None], value=-rate)
            return
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        values = values * (rows != PADDING)[:, None]
        sums = state["sum"].index_select(0, rows) + values.square().mean(dim=1)
        state["sum"].index_copy_(0, rows, sums)
        table.index_add_(0, rows, values / (sums.sqrt() + eps)[:, None], alpha=-rate)


def adamw(parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW; vectors (biases, norms) do not decay.

    Args:
        parameters: Of the graph, by name.
        settings: Of the training; its ``learning_rates`` name nodes.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in parameters.items():
        rate = next(
            (r for node, r in settings.learning_rates.items() if name.startswith(f"node_modules.{node}.")),
            settings.learning_rate,
        )
        decay = settings.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ],
        fused=True,
    )


def rate_at(step: int, steps: int, settings: TrainSettings) -> float:
    """The learning rate's factor at a step: up over the warm-up, then by the schedule."""
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    rest = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1.0 - rest, "cosine": 0.5 * (1.0 + math.cos(math.pi * rest))}[
        settings.schedule
    ]
