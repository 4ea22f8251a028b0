"""Crosses of features, of growing degree: the cross network of DCN-v2."""

from __future__ import annotations

from torch import Tensor, nn

from distill.nn.mlp import in_round_numbers


class CrossNetwork(nn.Module):
    r"""Layers that multiply a row with what the layer before made of it.

    .. math:: x_{l+1} = x_0 \odot (W_l x_l + b_l) + x_l

    so layer l holds crosses of up to l + 1 features.

    Args:
        inputs: The size of a row.
        layers: How many.
        rank: W is a product of two matrices of this rank; None: it is a full one.

    References:
        Wang et al., 2021. DCN V2: Improved Deep & Cross Network. arXiv:2008.13535
    """

    def __init__(self, inputs: int, layers: int = 2, rank: int | None = None):
        super().__init__()
        if layers < 1 or (rank is not None and rank < 1):
            raise ValueError(f"a cross network needs a layer and a rank, got {layers} and {rank}.")

        def product() -> nn.Module:
            if rank is None:
                return nn.Linear(inputs, inputs)
            return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, inputs))

        self.layers = nn.ModuleList(product() for _ in range(layers))

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [n, W] to rows [n, W]."""
        return in_round_numbers(self._crossed, rows)

    def _crossed(self, rows: Tensor) -> Tensor:
        crossed = rows
        for layer in self.layers:
            crossed = rows * layer(crossed) + crossed
        return crossed
