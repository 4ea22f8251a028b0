"""The optimiser of a training, and its learning rate from step to step. Next: ``trainer.py``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from distill.errors import RecipeError
from distill.recipe import nearest
from distill.settings import TrainSettings


def adamw(
    parameters: Mapping[str, nn.Parameter], settings: TrainSettings, trained: Collection[str]
) -> torch.optim.Optimizer:
    """AdamW; vectors (biases, norms) do not decay.

    Args:
        parameters: Of the graph, by name.
        settings: Of the training; its ``learning_rates`` name nodes.
        trained: The nodes that are trained.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in parameters.items():
        rate = next(
            (r for node, r in settings.learning_rates.items() if name.startswith(f"node_modules.{node}.")),
            settings.learning_rate,
        )
        decay = settings.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    if unknown := sorted(set(settings.learning_rates) - set(trained)):
        raise RecipeError(
            f"train.learning_rates: '{unknown[0]}' is not a trained model; these are: "
            f"{', '.join(sorted(trained))}.{nearest(unknown[0], sorted(trained))}"
        )
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
