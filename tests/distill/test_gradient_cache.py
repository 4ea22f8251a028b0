"""Gradient caching: the same losses and gradients, from few rows at a time."""

import pytest
import torch

from distill import graph as graph_module
from distill.errors import RecipeError
from distill.graph import Arrow, DistillationGraph
from distill.objectives import SampledSoftmax
from distill.outputs import Needs
from distill.pieces import piece_problems
from tests.distill.several import CASES, case, step
from tests.distill.training import Bag, trainer


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys() and any(not key.startswith("loss/") for key in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_whole_batch(name, rows):
    whole = step(name)
    assert sum(value.abs().sum() for key, value in whole.items() if not key.startswith("loss/")) > 1e-3
    assert_same(step(name, rows), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name != "features"])  # which has none
def test_dropout_is_the_same_in_both_passes(name, monkeypatch):
    """Beside pieces whose activations are all kept, from the same random state."""
    cached, without = step(name, 3, dropout=0.4), step(name, 3)
    assert not any(torch.allclose(cached[key], without[key]) for key in cached if key.startswith("loss/"))
    monkeypatch.setattr(graph_module, "cached", lambda ask, device: ask)
    assert_same(cached, step(name, 3, dropout=0.4), atol=1e-6, rtol=1e-6)


def test_a_step_leaves_the_random_state_that_its_forward_left():
    states = []
    for name in ("in_batch", "pairs"):
        for cache in (lambda ask, device: ask), graph_module.cached:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(graph_module, "cached", cache)
                step(name, 3, dropout=0.4)
            states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[2], states[3])


def test_no_more_rows_than_asked_are_represented_at_once_with_gradient(tmp_path):
    graph, given = case("in_batch")
    student, sizes = graph.nodes["student"], []
    represent = student.represent
    student.represent = lambda batch, needs: sizes.append(batch.sizes) or represent(batch, needs)
    it = trainer(tmp_path, graph, given, gradient_cache=5)
    it._batch(0)
    sizes.clear()
    it._step()
    queries, _, candidates = it._batch(0).sizes
    assert max(b + p for b, _, p in sizes) == 5
    assert sum(b for b, _, _ in sizes) == 2 * queries and sum(p for _, _, p in sizes) == 2 * candidates


def test_in_bf16_each_pass_has_its_own_autocast():
    whole, cached = step("vectors", mixed_precision="bf16"), step("vectors", 3, mixed_precision="bf16")
    assert not torch.equal(whole["loss/labels"], step("vectors")["loss/labels"])
    for name, value in whole.items():
        assert torch.cosine_similarity(value.flatten(), cached[name].flatten(), dim=0) > 0.999, name


def test_a_text_encoder_draws_the_same_dropout_again(tiny_bert, monkeypatch):
    """Its attention chooses other kernels without gradient, which would draw other numbers."""
    from distill.data import TextSource
    from students import BiEncoder
    from tests.distill.training import judged

    def gradients():
        student = BiEncoder(tiny_bert(), dropout=0.3)
        made = DistillationGraph({"student": student}, [Arrow("x", SampledSoftmax(), "student")], {"student"})
        given = TextSource(judged(), 8, seed=5)
        given.prepare(*made.columns())
        made.gradient_cache = 3
        made.train()
        torch.manual_seed(3)
        loss = made(given.batch(0, 0))["x"].loss.sum()
        loss.backward()
        return {
            "loss/x": loss.detach(),
            **{n: p.grad for n, p in made.trainable().items() if p.grad is not None},
        }

    found = gradients()
    monkeypatch.setattr(graph_module, "cached", lambda ask, device: ask)
    assert_same(found, gradients(), atol=1e-5, rtol=1e-5)


class Whole(Bag):
    """Represents all pairs of a batch at once, so no row is known by itself."""

    def represents(self, needs):
        return Needs(*needs.fields)


class Normed(Bag):
    def __init__(self, seed=0):
        super().__init__(seed)
        self.norm = torch.nn.BatchNorm1d(6)


@pytest.mark.parametrize(
    ("student", "cached", "several", "said"),
    [
        (
            Whole(),
            True,
            False,
            "losses.x compares in_batch, which 'student' \\(Whole\\) does not",
        ),
        (Whole(), False, True, None),  # each process then represents all rows
        (
            Normed(),
            True,
            False,
            "models.student: its batch normalisation .*gradient_cache cannot allow",
        ),
        (Normed(), True, True, "train.gradient_cache and several processes cannot allow; take a model"),
        (Normed(), False, False, None),
        (Bag(), True, True, None),
    ],
)
def test_what_cannot_be_cut_is_refused(student, cached, several, said, tmp_path):
    made = DistillationGraph(
        {"student": student, "frozen": Normed(1)}, [Arrow("x", SampledSoftmax(), "student")], {"student"}
    )
    problems = "\n".join(piece_problems(made, cached, several))
    assert bool(problems) is (said is not None)
    if said is not None and not several:
        with pytest.raises(RecipeError, match=said):
            trainer(tmp_path, made, gradient_cache=2)
    elif said is not None:
        assert said in problems
