"""The plain metrics as modules of the library `evaluate`: nothing is downloaded."""

from distill.evaluation.modules.pairs import Pairs
from distill.evaluation.modules.ranking import Ranking

__all__ = ["Pairs", "Ranking"]
