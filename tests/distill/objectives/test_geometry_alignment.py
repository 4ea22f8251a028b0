"""The worked numbers of ENDX's geometry, and what is left out of a neighbourhood."""

import dataclasses

import numpy as np
import pytest
import torch

from distill.batch import Batch, Columns
from distill.graph import Arrow, DistillationGraph
from distill.model import Model
from distill.objectives import GeometryAlignment
from distill.objectives.base import Loss
from distill.objectives.geometry_alignment import log_kernel
from distill.objectives.score_kl import listwise_kl
from distill.outputs import Outputs

JOINT_Q, JOINT_C = [[1, 0], [0.6, 0.8], [0, 1]], [[0.8, 0.6], [0, 1], [-0.6, 0.8]]
Q, C = [[1, 0], [0.8, 0.6], [-0.6, 0.8]], [[0.6, 0.8], [1, 0], [0, 1]]


def teacher(queries=JOINT_Q, candidates=JOINT_C) -> Outputs:
    queries, candidates = (torch.tensor(v, dtype=torch.float32) for v in (queries, candidates))
    return Outputs(joint_queries=queries[:, None], joint_candidates=candidates[:, None])


def student(queries=Q, candidates=C) -> Outputs:
    queries, candidates = (torch.tensor(v, dtype=torch.float32) for v in (queries, candidates))
    return Outputs(queries=queries.requires_grad_(), candidates=candidates.requires_grad_())


def align(batch=None, said=None, taught=None, **settings) -> Loss:
    batch = batch or Batch.of_scores(3, 1)
    return GeometryAlignment(**settings)(said or student(), taught or teacher(), batch)


def means(loss: Loss) -> dict[str, float]:
    return {name: (part.sum() / loss.count.sum()).item() for name, part in loss.parts.items()}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"C|Q": 0.108579, "Q|C": 0.147984, "Q|Q": 0.062148, "C|C": 0.084349}),
        (
            {"kernel": "softmax", "temperature": 0.5},
            {"C|Q": 0.477993, "Q|C": 0.557017, "Q|Q": 0.215520, "C|C": 0.550000},
        ),
    ],
)
def test_three_pairs_have_the_numbers_worked_out_by_hand(settings, expected):
    loss = align(**settings)
    assert means(loss) == pytest.approx(expected, abs=1e-6)
    assert (loss.loss.sum() / loss.count.sum()).item() == pytest.approx(sum(expected.values()), abs=1e-5)
    torch.testing.assert_close(loss.loss, torch.stack([*loss.parts.values()]).sum(0))


def test_equals_the_formula_written_out_in_numpy():
    """Vectors of any length, one negative listed per query, two temperatures."""
    rng = np.random.default_rng(0)
    q, c, jq, jc = (rng.normal(size=(5, 4)) for _ in range(4))
    order = np.array([3, 0, 4, 1, 2])  # the candidate of query i stands in row order[i]

    def chances(a, t, tau, own):
        a, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, t))
        k = ((1 + a @ t.T) / 2) ** (1 / tau)
        k = k * (1 - np.eye(5)) if own else k
        return k / k.sum(1, keepdims=True)

    def kl(p, r):
        return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(r > 0, r, 1)), 0).sum(1)

    matched = c[order]
    sides = {"Q": (q, jq), "C": (matched, jc)}
    batch = dataclasses.replace(
        Batch.of_scores(5, 2),
        index=torch.tensor(np.stack([order, np.roll(order, 1)], axis=1)),
        candidate_ids=torch.arange(5),
    )
    joint = [torch.tensor(np.stack([x, rng.normal(size=(5, 4))], axis=1)).float() for x in (jq, jc)]
    loss = align(
        batch, student(q, c), Outputs(joint_queries=joint[0], joint_candidates=joint[1]),
        temperature=0.5, teacher_temperature=2.0,
    )  # fmt: skip
    for term, part in loss.parts.items():
        target, anchor = term.split("|")
        own = target == anchor
        p = chances(sides[anchor][1], sides[target][1], 2.0, own)
        r = chances(sides[anchor][0], sides[target][0], 0.5, own)
        assert part.detach().numpy() == pytest.approx(kl(p, r), abs=1e-5), term


def test_the_chosen_terms_alone_are_compared():
    every = align()
    some = align(terms=["C|C", "Q|Q"])
    assert [*some.parts] == ["Q|Q", "C|C"]
    torch.testing.assert_close(some.loss, every.parts["Q|Q"] + every.parts["C|C"])
    one = GeometryAlignment(terms=["Q|Q"])
    assert one.student_needs.fields == {"queries"} and one.teacher_needs.fields == {"joint_queries"}


def test_duplicates_are_left_out_of_each_others_neighbourhoods():
    """Queries 0 and 2 have one candidate, which can neither be told from itself nor be its own neighbour."""
    batch = dataclasses.replace(Batch.of_scores(3, 1), index=torch.tensor([[0], [1], [0]]))
    said, taught = student(candidates=[[0.6, 0.8], [1, 0], [9, 9]]), teacher()
    parts = align(batch, said, taught).parts
    assert (parts["C|C"] > 0).tolist() == [False, True, False]  # one neighbour is left: nothing to choose
    assert parts["Q|Q"].min() > 0
    changed = torch.tensor(JOINT_C)[:, None].clone()
    changed[2] = torch.tensor([5.0, -5.0])  # another reading of that candidate, with query 2
    again = align(batch, said, taught.with_(joint_candidates=changed)).parts
    assert again["C|Q"][0] == parts["C|Q"][0] and again["C|Q"][1] != parts["C|Q"][1]

    asked_twice = dataclasses.replace(Batch.of_scores(3, 1), query_ids=torch.tensor([7, 8, 7]))
    assert (align(asked_twice).parts["Q|Q"] > 0).tolist() == [False, True, False]
    assert align(asked_twice).parts["C|C"].min() > 0


def test_queries_whose_first_candidate_is_no_match_are_left_out():
    batch = Batch.of_scores(4, 1, labels=torch.tensor([[1.0], [1.0], [0.0], [1.0]]))
    vectors = [JOINT_Q, JOINT_C, Q, C]
    jq, jc, q, c = ([*rows[:2], [7.0, -7.0], rows[2]] for rows in vectors)
    loss = align(batch, student(q, c), teacher(jq, jc))
    assert loss.count.tolist() == [1, 1, 0, 1] and loss.loss[2] == 0
    torch.testing.assert_close(loss.loss[[0, 1, 3]], align().loss)
    unlabelled = dataclasses.replace(batch, labels=None)
    assert align(unlabelled, student(q, c), teacher(jq, jc)).count.tolist() == [1, 1, 1, 1]


def test_a_last_batch_of_one_match_says_nothing():
    batch = Batch.of_scores(1, 1)
    loss = align(batch, student(Q[:1], C[:1]), teacher(JOINT_Q[:1], JOINT_C[:1]))
    assert loss.count.tolist() == [0] and loss.loss.tolist() == [0]


def test_a_step_against_the_gradient_brings_the_geometries_together():
    said = student()
    align(said=said).loss.sum().backward()
    moved = student(
        (said.queries - 0.5 * said.queries.grad).tolist(),
        (said.candidates - 0.5 * said.candidates.grad).tolist(),
    )
    assert align(said=moved).loss.sum() < 0.9 * align().loss.sum()


def test_opposite_vectors_have_a_finite_gradient():
    """The cosine kernel is 0 there, and its logarithm is not."""
    said = student([[1, 0], [-1, 0]], [[-1, 0], [1, 0]])
    taught = teacher([[1, 0], [0, 1]], [[1, 0], [0, 1]])
    align(Batch.of_scores(2, 1), said, taught).loss.sum().backward()
    assert said.queries.grad.isfinite().all() and said.candidates.grad.isfinite().all()


class Table(Model):
    """Says what it was given, times a parameter for each field."""

    def __init__(self, said: Outputs):
        super().__init__()
        self.fixed = {name: value.detach() for name, value in said.given()}
        self.scale = torch.nn.ParameterDict({n: torch.nn.Parameter(v.clone()) for n, v in self.fixed.items()})

    provides = property(lambda self: frozenset(self.fixed))
    reads = Columns()

    def represent(self, batch, needs):
        return Outputs(**{name: self.scale[name] for name in needs.fields})

    def save_pretrained(self, folder):
        raise NotImplementedError


def test_in_a_graph_that_trains_both_only_the_student_hears_of_it():
    graph = DistillationGraph(
        {"student": Table(student()), "cross": Table(teacher())},
        [Arrow("geometry", GeometryAlignment(), "student", "cross")],
        {"student", "cross"},
    )
    graph(Batch.of_scores(3, 1))["geometry"].loss.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in graph.nodes["student"].parameters())
    assert all(p.grad is None for p in graph.nodes["cross"].parameters())


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf")])
def test_refuses_a_temperature_that_is_none(temperature):
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        GeometryAlignment(temperature=temperature)


@pytest.mark.parametrize("terms", ["Q|Q", [], ["A|Q"]])
def test_refuses_terms_it_does_not_know(terms):
    with pytest.raises(ValueError, match=r"terms must be a list of C\|Q, Q\|C, Q\|Q, C\|C, or some"):
        GeometryAlignment(terms=terms)


def test_refuses_a_kernel_it_does_not_know():
    with pytest.raises(ValueError, match="kernel must be one of cosine, softmax; got 'rbf'"):
        GeometryAlignment(kernel="rbf")


def test_the_worked_rows_of_the_kernel():
    """Who is the first query's neighbour; and as the kernel's authors have it, each text its own too."""
    q, c, joint_q, joint_c = (torch.tensor(v, dtype=torch.float32) for v in (Q, C, JOINT_Q, JOINT_C))
    taught, learnt = (log_kernel(*pair, "cosine").softmax(-1)[0] for pair in ((joint_q, joint_c), (q, c)))
    assert taught.tolist() == pytest.approx([0.5625, 0.3125, 0.125], abs=1e-6)
    assert learnt.tolist() == pytest.approx([0.347826, 0.434783, 0.217391], abs=1e-6)
    own = (
        log_kernel(q, q, "cosine"),
        log_kernel(joint_q, joint_q, "cosine"),
        torch.ones(3, 3, dtype=torch.bool),
    )
    assert listwise_kl(*own).sum().item() / 9 == pytest.approx(
        0.019664, abs=1e-6
    )  # the kernel's first authors
