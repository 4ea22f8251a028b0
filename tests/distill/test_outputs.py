"""Outputs carries what was said; Needs names what is asked."""

import pytest
import torch

from distill.outputs import AXES, Needs, Outputs


def test_given_names_the_filled_fields_only():
    outputs = Outputs(scores=torch.zeros(1, 2)).with_(queries=torch.ones(1, 3))
    assert [name for name, _ in outputs.given()] == ["scores", "queries"]
    assert dict(outputs.with_(scores=None).given()).keys() == {"queries"}


def test_every_field_declares_its_axis():
    assert AXES["scores"] == AXES["classes"] == "pair"
    assert (AXES["queries"], AXES["candidates"]) == ("query", "candidate")
    assert set(AXES.values()) == {"pair", "query", "candidate"}


def test_detach_cuts_the_gradient_of_every_field():
    scores = torch.zeros(1, 2, requires_grad=True)
    assert not Outputs(scores=scores * 2).detach().scores.requires_grad


def test_needs_are_a_set_with_a_union():
    needs = Needs("scores") | Needs("queries", "scores")
    assert needs.fields == {"scores", "queries"}
    assert "queries" in needs and "classes" not in needs
    assert needs and not Needs()


def test_a_need_that_no_field_answers_is_refused():
    """Else the objective would find out in the middle of a run."""
    with pytest.raises(ValueError, match=r"no field \['score'\]; it has scores, classes"):
        Needs("score")
