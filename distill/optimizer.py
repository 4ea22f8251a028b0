"""The optimiser of a training, and its learning rate from step to step. Next: ``trainer.py``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

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
