"""The contract of an objective: what an arrow computes. Next: any file beside this one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

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


class Objective(nn.Module, ABC):
    """Compares what the student says with what its teacher, or the labels, say.

    ``student`` is the head of the arrow, the one who learns; ``teacher`` its tail, None when the arrow
    starts at the labels. An objective holds no model, encodes nothing and gathers nothing.
    """

    across = False  # True: compares queries with each other
    labelled = False  # True: reads batch.labels

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
    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """Each row's summed loss: [R] float32, exactly 0 where ``count`` is 0."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Loss:
        return Loss(self.loss(student, teacher, batch), self.count(batch))
