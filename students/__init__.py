"""Models that are kept: fast to serve, and taught."""

from students.bi_encoder import BiEncoder
from students.two_tower import TwoTower

__all__ = ["BiEncoder", "TwoTower"]
