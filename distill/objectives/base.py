"""The contract of an objective: what an arrow computes. Next: any file beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from distill.batch import Batch
from distill.outputs import Needs, Outputs


class Loss(NamedTuple):
    """Summed losses of R rows (queries, as a rule), and over how many terms each row sums.

    The graph divides the sum by the count over all rows of an optimiser step, so a row with nothing
    to say has count 0 and changes nothing.
    """

    loss: Tensor  # [R] float32
    count: Tensor  # type: ignore[assignment]  # [R] float32

    @property
    def parts(self) -> Mapping[str, Tensor]:
        """What the loss is the sum of, [R] each by name, which the log tells apart; empty: one thing."""
        return {}


class LossOfParts(Loss):
    """A loss that is the sum of named parts."""

    _parts: Mapping[str, Tensor]

    @classmethod
    def of(cls, parts: Mapping[str, Tensor], count: Tensor) -> LossOfParts:
        made = cls(torch.stack([*parts.values()]).sum(dim=0), count)
        made._parts = parts
        return made

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return self._parts


class Objective(nn.Module, ABC):
    """Compares what the student says with what its teacher, or the labels, say.

    ``student`` is the head of the arrow, the one who learns; ``teacher`` its tail, None when the arrow
    starts at the labels. An objective holds no model, encodes nothing and gathers nothing.
    """

    across = False  # True: compares queries with each other
    least_queries: ClassVar[int] = 0  # a batch of fewer has nothing to compare
    least_listed: int = 0  # a list of fewer has nothing to compare
    labelled = False  # True: reads batch.labels
    corrects = False  # True: takes out how likely a candidate is drawn (Batch.log_q)
    contrasts = False  # True: learns nothing, or nothing but yes, from lists of positives only

    def __init__(self, student_needs: Needs, teacher_needs: Needs | None = None):
        super().__init__()
        self.student_needs = student_needs
        self.teacher_needs = teacher_needs or Needs()

    def hear(self) -> None:
        """An arrow gives it a teacher: who can learn from labels or from a teacher now needs the teacher."""

    def bind(self, student_sizes: dict[str, int], teacher_sizes: dict[str, int]) -> None:
        """Make parameters that depend on sizes (last axis by field), before the optimiser is made."""

    @abstractmethod
    def count(self, batch: Batch) -> Tensor:
        """Over how many terms each row sums: [R]. From the batch alone, so that a step's divisor is
        known before its first backward, however many micro-batches and processes share it."""

    @abstractmethod
    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor | Mapping[str, Tensor]:
        """Each row's summed loss: [R] float32, exactly 0 where ``count`` is 0; or its parts, by name."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Loss:
        said, count = self.loss(student, teacher, batch), self.count(batch)
        return Loss(said, count) if isinstance(said, Tensor) else LossOfParts.of(said, count)
