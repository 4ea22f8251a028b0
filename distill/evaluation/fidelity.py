"""How much of the teacher's ranking the student kept, whatever the labels say."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import scipy
from torch import Tensor

from distill.batch import Ragged


def fidelity(student: Tensor, teacher: Tensor, listed: Ragged, k: int = 10) -> dict[str, float]:
    """Agreement of two models on the same candidate lists, as means over queries.

    Kendall's tau-b and Spearman's rho are over lists on which both models tell candidates apart; the
    overlap is the share of the teacher's first k that are among the student's first k, over lists with
    more than k candidates. Nothing to average: nan.

    Args:
        student: Scores [T], aligned to ``listed.values``.
        teacher: Scores [T] of the same.
        listed: Who lists whom; only its offsets are read.
        k: How many candidates of each list the overlap compares.

    Returns:
        ``Kendall``, ``Spearman``, ``Overlap@k``, and ``queries``, how many lists the first two are over.

    Example:
        >>> import torch
        >>> scores = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 6.0, 9.0])
        >>> fidelity(*scores, Ragged.of([[0, 1, 2]]), k=1)
        {'Kendall': 1.0, 'Spearman': 1.0, 'Overlap@1': 1.0, 'queries': 1}
    """
    total = int(listed.offsets[-1])
    if student.shape != (total,) or teacher.shape != (total,):
        raise ValueError(
            f"student scores {[*student.shape]} and teacher scores {[*teacher.shape]} must be [{total}]: "
            f"one per listed candidate."
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    kendall, spearman, overlap = [], [], []
    for start, stop in pairwise(listed.offsets.tolist()):
        said, taught = student[start:stop].float().numpy(), teacher[start:stop].float().numpy()
        if len(said) and np.ptp(said) > 0 and np.ptp(taught) > 0:
            kendall.append(scipy.stats.kendalltau(said, taught).statistic)
            spearman.append(scipy.stats.spearmanr(said, taught).statistic)
        if len(said) > k:
            first = [set(np.argsort(-scores, kind="stable")[:k].tolist()) for scores in (said, taught)]
            overlap.append(len(first[0] & first[1]) / k)
    means = {"Kendall": _mean(kendall), "Spearman": _mean(spearman), f"Overlap@{k}": _mean(overlap)}
    return means | {"queries": len(kendall)}


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
