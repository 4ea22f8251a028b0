"""What both teachers and students build on."""

from distill.nn.mlp import MLPTower, Tower

__all__ = ["MLPTower", "Tower"]
