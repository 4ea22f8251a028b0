"""Distillation in the space of vectors: the student's embedding of a text against the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.batch import Batch
from distill.objectives.base import Objective
from distill.objectives.checks import check_choice, check_fields, check_shapes, said, unpadded
from distill.outputs import AXES, Needs, Outputs
from distill.tokens import Tokens

Field = Literal["queries", "candidates", "pair_vectors", "query_tokens", "candidate_tokens"]
FIELDS = get_args(Field)


def embedding_distance(student: Tensor, teacher: Tensor, distance: str = "cosine") -> Tensor:
    """How far each student vector is from the teacher's: two [..., D] to [...]."""
    check_shapes(student=student, teacher=teacher)
    student, teacher = student.float(), teacher.float()
    if distance == "mse":
        return (student - teacher).square().sum(dim=-1)
    return 1.0 - F.cosine_similarity(student, teacher, dim=-1)


class EmbeddingMatch(Objective):
    r"""Teach the student to put every text where the teacher puts it. No labels, no negatives.

    .. math:: L_r = 1 - \cos(W e^S_r, e^T_r) \quad\text{or}\quad L_r = \lVert W e^S_r - e^T_r \rVert^2

    with the vectors :math:`e^S_r` of the student and :math:`e^T_r` of the teacher for text r: the batch's
    queries, then its distinct candidates, each a row of the loss with count 1 (R = B + P), or for each
    listed pair, summed over the pairs of a query (R = B). Of tokens (ColBERT's vectors) it is the mean over
    those of a text that both have, matched by their place in the cached ids; special ones are left out. W
    is a learned linear map, one for all fields, or the identity. A student matched with the identity
    can search an index its teacher built. W lives in the objective and is gone after training; where
    the student should serve in the teacher's size, give the student a projection instead.

    Needs ``queries`` [B, D] and ``candidates`` [P, D], or those named in ``fields``, from student and
    teacher.

    Args:
        fields: Which vectors to match: "queries", "candidates", "pair_vectors", "query_tokens",
            "candidate_tokens".
        distance: "cosine": one minus the cosine, blind to length. "mse": the squared Euclidean
            distance, summed over the D dimensions (not their mean, which would shrink with D).
        projection: True: learn W. False: compare as they are, and refuse vectors of two sizes.
            None: learn W only if the sizes differ.

    References:
        Kim et al., 2023. EmbedDistill: A Geometric Knowledge Distillation for Information Retrieval.
        arXiv:2301.12005

        Vujanic and Rueckstiess, 2025. LEAF (L2 between projected student and teacher, here squared).
        arXiv:2509.12539

    Example:
        >>> batch = Batch.of_scores(1, 1)
        >>> student = Outputs(queries=torch.tensor([[2.0, 0.0]]), candidates=torch.tensor([[0.0, 1.0]]))
        >>> teacher = Outputs(queries=torch.tensor([[1.0, 0.0]]), candidates=torch.tensor([[1.0, 0.0]]))
        >>> EmbeddingMatch()(student, teacher, batch).loss  # the query fits, the candidate does not
        tensor([0., 1.])
    """

    def __init__(
        self,
        fields: Sequence[Field] = ("queries", "candidates"),
        distance: Literal["cosine", "mse"] = "cosine",
        projection: bool | None = None,
    ):
        names = check_fields(fields, FIELDS)
        check_choice("distance", distance, ("cosine", "mse"))
        super().__init__(student_needs=Needs(*names), teacher_needs=Needs(*names))
        self.fields = names
        self.distance = distance
        self.projection = projection
        self.linear: nn.Linear | None = None

    def bind(self, student_sizes: dict[str, int], teacher_sizes: dict[str, int]) -> None:
        """Make W, shared by the fields, where it is asked for or needed; orthogonal at the start."""
        sizes = {(student_sizes[name], teacher_sizes[name]) for name in self.fields}
        if len(sizes) > 1:
            raise ValueError(
                f"EmbeddingMatch has one projection, but {' and '.join(self.fields)} differ in size: student "
                f"{student_sizes}, teacher {teacher_sizes}. Match them with several losses, one field each."
            )
        ((student, teacher),) = sizes
        if self.projection is False and student != teacher:
            raise ValueError(
                f"EmbeddingMatch cannot compare student vectors of size {student} with teacher vectors of "
                f"size {teacher} without a projection. Leave out `projection: false`, or give the student "
                f"a projection to {teacher}."
            )
        if self.projection or student != teacher:
            self.linear = nn.Linear(student, teacher, bias=False)
            nn.init.orthogonal_(self.linear.weight)

    def count(self, batch: Batch) -> Tensor:
        queries, _, candidates = batch.sizes
        counts = {
            "query": batch.mask.new_ones(queries),
            "candidate": batch.mask.new_ones(candidates),
            "pair": batch.mask.sum(dim=-1),
        }
        return torch.cat([counts[AXES[name]] for name in self.fields]).float()

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return torch.cat(
            [self._distances(name, said(student, name), said(teacher, name), batch) for name in self.fields]
        )

    def _distances(self, name: str, student: Any, teacher: Any, batch: Batch) -> Tensor:
        """The loss of each row of a field: [B] or [P]."""
        if isinstance(student, Tokens):
            return self._of_tokens(student, teacher)
        if name != "pair_vectors":
            return embedding_distance(self.projected(student), teacher, self.distance)
        check_shapes(student=student[..., 0], teacher=teacher[..., 0], mask=batch.mask)
        student, teacher = (unpadded(vectors, batch.mask[..., None]) for vectors in (student, teacher))
        distances = embedding_distance(self.projected(student), teacher, self.distance)
        return distances.masked_fill(~batch.mask, 0.0).sum(dim=-1)

    def _of_tokens(self, student: Tokens, teacher: Tokens) -> Tensor:
        """The mean distance of the tokens that both have, of each row: [n]."""
        if len(student) != len(teacher):
            raise ValueError(f"Shapes must match: tokens of {len(student)} and {len(teacher)} texts.")
        length = min(student.longest(), teacher.longest())
        (own, there), (told, heard) = student.placed(length), teacher.placed(length)
        both = there & heard
        distances = embedding_distance(self.projected(own[both]), told[both], self.distance)
        sums = distances.new_zeros(len(both)).index_add(0, both.nonzero()[:, 0], distances)
        return sums / both.sum(dim=1).clamp(min=1)

    def projected(self, vectors: Tensor) -> Tensor:
        """W times each student vector, or the vectors as they are: [..., D of the teacher]."""
        if self.linear is None:
            assert not self.projection, "bind() comes before the first loss"
            return vectors
        with torch.autocast(vectors.device.type, enabled=False):  # W in float32, as all of the loss
            return self.linear(vectors.float())
