"""A history as a candidate sees it: DIN's weighted sum of what a user did before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.nn.mlp import MLP


class TargetAttention(nn.Module):
    r"""The sum of a history's vectors, each weighted by how it meets the candidate.

    .. math:: \sum_j a(e_j, v) e_j, \quad a(e, v) = \mathrm{MLP}([e; v; e - v; e \odot v])

    over the items j of a user's history, with vectors e, and the candidate's vector v. The weights are no
    softmax: how much a user cares shall show in the length of the sum (section 4.3 of the paper).

    Args:
        dim: The size of a vector.
        widths: Of the hidden layers of the weight's MLP.

    References:
        Zhou et al., 2018. Deep Interest Network for Click-Through Rate Prediction. arXiv:1706.06978
    """

    def __init__(self, dim: int, widths: Sequence[int] = (36,)):
        super().__init__()
        self.weight = MLP(4 * dim, [*widths, 1], activation="prelu")

    def forward(self, history: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Sums [n, dim] float32; 0 of an empty history.

        Args:
            history: Vectors [T, dim], the items of n histories laid end to end.
            lengths: Of the histories: [n].
            target: The candidates' vectors [n, dim].
        """
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        met = target.index_select(0, owner)
        weights = self.weight(torch.cat([history, met, history - met, history * met], dim=1)).float()
        return torch.zeros_like(target).index_add(0, owner, history * weights)
