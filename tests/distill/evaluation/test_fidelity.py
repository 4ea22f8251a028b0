import math

import pytest
import torch

from distill.batch import Ragged
from distill.evaluation import fidelity


def test_agreement_is_a_mean_over_lists_worked_by_hand():
    listed = Ragged.of([[0, 1, 2], [3], [4, 5, 6, 7]])
    teacher = torch.tensor([3.0, 2.0, 1.0, 9.0, 4.0, 3.0, 2.0, 1.0])
    student = torch.tensor([2.0, 3.0, 1.0, 9.0, 1.0, 2.0, 3.0, 4.0])
    # First list: one of three pairs is swapped, by one rank each; last list: all are; one candidate: no list.
    assert fidelity(student, teacher, listed, k=2) == pytest.approx(
        {"Kendall": (1 / 3 - 1) / 2, "Spearman": (0.5 - 1) / 2, "Overlap@2": (1 + 0) / 2, "queries": 2}
    )


def test_a_list_of_k_candidates_has_no_overlap_to_lose():
    listed, scores = Ragged.of([[0, 1], [2, 3, 4]]), torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0])
    assert fidelity(-scores, scores, listed, k=2)["Overlap@2"] == 0.5


def test_only_the_order_counts():
    listed, teacher = Ragged.of([[0, 1, 2]]), torch.tensor([0.1, 0.3, 0.2])
    assert fidelity(100 * teacher.exp(), teacher, listed, k=1) == pytest.approx(
        {"Kendall": 1.0, "Spearman": 1.0, "Overlap@1": 1.0, "queries": 1}
    )


def test_a_list_that_is_all_ties_says_nothing():
    said = fidelity(torch.zeros(2), torch.tensor([1.0, 2.0]), Ragged.of([[0, 1]]))
    assert said["queries"] == 0
    assert math.isnan(said["Kendall"]) and math.isnan(said["Overlap@10"])


def test_scores_of_other_lists_are_refused():
    with pytest.raises(ValueError, match=r"student scores \[3\].*must be \[2\]"):
        fidelity(torch.zeros(3), torch.zeros(2), Ragged.of([[0, 1]]))
    with pytest.raises(ValueError, match="k must be at least 1"):
        fidelity(torch.zeros(2), torch.zeros(2), Ragged.of([[0, 1]]), k=0)
