"""How splits are given: as tables of their own, or as a share of the train split to hold out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.data.cache import unit_hash

SPLITS = ("train", "dev", "test")


def given_splits(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """The splits that are tables, and the shares of train that others hold out."""
    tables = {name: spec for name, spec in given.items() if spec is not None and not _is_share(spec)}
    shares = {name: float(spec) for name, spec in given.items() if _is_share(spec)}
    for name, share in shares.items():
        if name == "train" or not 0 < share < 1:
            raise ValueError(
                f"{name} must be a table, or for dev and test a share between 0 and 1; got {share}."
            )
    if shares and "train" not in tables:
        raise ValueError(f"{' and '.join(shares)} cannot be cut from train: there is no train table.")
    if sum(shares.values()) >= 1:
        raise ValueError(f"the shares held out ({sum(shares.values())}) leave nothing to train on.")
    if not tables:
        raise ValueError("no split is given; give at least one of train, dev and test.")
    return tables, shares


def _is_share(spec: Any) -> bool:
    return isinstance(spec, int | float) and not isinstance(spec, bool)


def choose(texts: Sequence[str], name: str, shares: Mapping[str, float], seed: int) -> list[bool]:
    """Which texts belong to a split: by their hash, so equal texts are never in two splits.

    >>> shares = {"dev": 0.25, "test": 0.25}
    >>> sum(sum(choose(["a", "b", "c"], name, shares, seed=0)) for name in ("train", "dev", "test"))
    3
    """
    low, spans = 0.0, {}
    for split, share in shares.items():
        spans[split] = (low, low + share)
        low += share
    spans["train"] = (low, 1.0)
    low, high = spans[name]
    return [low <= unit_hash(text, seed) < high for text in texts]
