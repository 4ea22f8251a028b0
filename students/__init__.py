"""Models that are kept: fast to serve, and taught."""

from students.bi_encoder import BiEncoder
from students.two_rankers import TwoRankers
from students.two_tower import TwoTower
from students.virtual_interaction import VirtualInteraction

__all__ = ["BiEncoder", "TwoRankers", "TwoTower", "VirtualInteraction"]
