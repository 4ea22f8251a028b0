"""Layers and towers: what they are made of, and that a batch's size changes no row."""

import pytest
import torch
from torch import nn

from distill.nn import MLPTower
from distill.nn.cross_network import CrossNetwork
from distill.nn.mlp import MLP, ROUND


def test_layers_are_normalised_and_activated_but_for_the_last():
    mlp = MLP(4, [6, 3, 2], dropout=0.5, activation="prelu")
    kinds = ["Linear", "LayerNorm", "PReLU", "Dropout"]
    assert [type(layer).__name__ for layer in mlp] == [*kinds, *kinds, "Linear"]
    assert mlp.eval()(torch.randn(50, 4)).min() < 0
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in mlp.modules())


def test_a_tower_gets_its_parameters_when_it_is_known_what_it_reads():
    tower = MLPTower([5, 2])
    assert tower.dim == 2 and not list(tower.parameters())
    tower.bind([4, 1, 4])
    assert tower(torch.randn(7, 9)).shape == (7, 2)
    assert MLPTower(**tower.arguments).arguments == tower.arguments


@pytest.mark.parametrize("layers", [MLP(8, [6, 2]), CrossNetwork(8)])
def test_in_half_precision_rows_are_rounded_up_and_say_the_same(layers):
    rows = torch.randn(ROUND + 3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, few = layers(rows), layers(rows[:ROUND])
    assert len(found) == ROUND + 3
    torch.testing.assert_close(found[:ROUND], few)
    found.float().sum().backward()
    assert rows.grad.abs().amin(dim=0).max() > 0
    torch.testing.assert_close(found.float(), layers(rows), atol=0.1, rtol=0.1)
