"""MaxSim by the worked example, by the formula in a loop, and in bounded memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from distill.batch import Ragged
from distill.maxsim import maxsim_all, maxsim_pairs


def rows(*texts) -> Ragged:
    """Unit vectors along those given, text by text."""
    vectors = [F.normalize(torch.tensor(text, dtype=torch.float32), dim=1) for text in texts]
    return Ragged.of_lengths(torch.cat(vectors), torch.tensor([len(text) for text in texts]))


def random_rows(lengths, size=8, seed=0) -> Ragged:
    values = torch.randn(sum(lengths), size, generator=torch.Generator().manual_seed(seed))
    return Ragged.of_lengths(F.normalize(values, dim=1), torch.tensor(lengths))


def in_a_loop(queries, candidates):
    return torch.stack(
        [
            torch.stack(
                [(queries[b] @ candidates[p].T).max(dim=1).values.sum() for p in range(len(candidates))]
            )
            for b in range(len(queries))
        ]
    )


def test_the_worked_example():
    queries, candidates = rows([[1, 0], [0, 1], [1, 1]]), rows([[3, 4], [1, -1]], [[1, 0]])
    products = queries[0] @ candidates[0].T
    expected = [[0.6, 0.707107], [0.8, -0.707107], [0.989949, 0.0]]
    torch.testing.assert_close(products, torch.tensor(expected), atol=1e-6, rtol=0)
    first = torch.tensor([0])
    assert maxsim_pairs(queries, candidates, first, first).item() == pytest.approx(2.497056, abs=1e-6)
    assert maxsim_all(queries, candidates)[0, 0].item() == pytest.approx(2.497056, abs=1e-6)


def test_what_pads_never_wins():
    """All true products are negative; a padded zero would be the best of them."""
    queries, candidates = rows([[1, 0]], [[1, 0], [1, 0]]), rows([[-1, -0.1]], [[-1, 0], [-1, -1], [-1, 0]])
    for found in (
        maxsim_all(queries, candidates)[0, 0],
        maxsim_pairs(queries, candidates, torch.tensor([0, 1]), torch.tensor([0, 1]))[0],
    ):
        assert found.item() == pytest.approx(-0.995037, abs=1e-6)


@pytest.mark.parametrize("budget", [1, 500, 2**24])
def test_chunks_change_neither_scores_nor_gradients(budget):
    lengths = ([3, 1, 5], [4, 9, 1, 6, 2])
    expected = None
    for function in (in_a_loop, maxsim_all, maxsim_pairs):
        queries, candidates = (random_rows(lengths[i], seed=i) for i in (0, 1))
        queries.values.requires_grad_(), candidates.values.requires_grad_()
        if function is maxsim_pairs:
            b, p = (
                axis.flatten() for axis in torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij")
            )
            scores = maxsim_pairs(queries, candidates, b, p, budget).view(3, 5)
        else:
            scores = function(queries, candidates, *([budget] if function is maxsim_all else []))
        (scores * torch.linspace(-1, 1, 15).view(3, 5)).sum().backward()
        found = (scores.detach(), queries.values.grad, candidates.values.grad)
        for mine, theirs in zip(found, expected or found, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        expected = expected or found


def test_half_precision_is_scored_in_float32():
    queries, candidates = random_rows([4], seed=1), random_rows([6, 7])
    halves = [Ragged(one.values.bfloat16(), one.offsets) for one in (queries, candidates)]
    wide = [Ragged(one.values.float(), one.offsets) for one in halves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = maxsim_all(*halves)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, maxsim_all(*wide), rtol=0, atol=0)


def test_a_thousand_candidates_of_a_query_fit_into_a_gigabyte():
    """Forward and backward, 180 tokens each: the vectors take 92 MB, their gradient as much."""
    script = (
        "import resource, torch\n"
        "from distill.batch import Ragged\n"
        "from distill.maxsim import maxsim_pairs\n"
        "from distill.progress import peak_memory\n"
        "def rows(n, length):\n"
        "    values = torch.randn(n * length, 128).requires_grad_()\n"
        "    return Ragged.of_lengths(values, torch.full((n,), length))\n"
        "queries, candidates = rows(1, 32), rows(1000, 180)\n"
        "before = peak_memory()\n"
        "maxsim_pairs(queries, candidates, torch.zeros(1000, dtype=torch.int64), torch.arange(1000))"
        ".sum().backward()\n"
        "print(peak_memory() - before)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 100 < float(said.stdout) < 600  # MB; the vectors alone are 92
