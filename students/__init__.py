"""Models that are kept: fast to serve, and taught."""

from students.bi_encoder import BiEncoder

__all__ = ["BiEncoder"]
