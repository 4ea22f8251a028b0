"""What holds for every objective, so that a new one is covered the day it is exported."""

import dataclasses
import doctest
import importlib
import re

import pytest
import torch

from distill import objectives
from distill.batch import Batch, Ragged
from distill.errors import DataError
from distill.outputs import AXES, OF_TOKENS, Outputs
from distill.tokens import Tokens

EXPORTED = [getattr(objectives, name) for name in objectives.__all__]
VARIANTS = [
    objectives.BinaryCrossEntropy(),
    objectives.CrossEntropy(temperature=2.0),
    objectives.BPR(temperature=0.5, in_batch=True),
    objectives.Hinge(margin=2.0, hardest=2, in_batch=True, warp=50),
    objectives.Hinge(margin=3.0, in_batch=True),
    objectives.AttentionKL(layers="all", heads="mean", first=3),
    objectives.AttentionKL(student="tokens", temperature=0.5),
    objectives.AttentionMSE(layers=[[0, 1]], official=True),
    objectives.EmbeddingMatch(fields=["candidates"], distance="mse", projection=True),
    objectives.EmbeddingMatch(fields=["queries", "pair_vectors"], distance="mse"),
    objectives.EmbeddingMatch(fields=["pair_vectors"], projection=True),
    objectives.EmbeddingMatch(fields=["query_tokens", "candidate_tokens"]),
    objectives.EmbeddingMatch(fields=["candidate_tokens"], distance="mse", projection=True),
    objectives.GeometryAlignment(kernel="softmax", temperature=0.1, teacher_temperature=0.5),
    objectives.GeometryAlignment(terms=["Q|Q"]),
    objectives.GuidedSoftmax(temperature=1.0, in_batch=False, relative_margin=0.4),
    objectives.LambdaMRR(groups=[1, 2], temperature=0.5),
    objectives.LayerScoreKL(layers=1, temperature=0.5, teacher_temperature=2.0),
    objectives.MarginMSE(pairs="all", scale=2.0),
    objectives.MarginMSE(in_batch=True),
    objectives.MarginMSE(pairs="all", in_batch=True),
    objectives.PointwiseScore(loss="bce"),
    objectives.RankNet(temperature=0.5),
    objectives.RankNet(form="probability"),
    objectives.SampledSoftmax(temperature=1.0, in_batch=False),
    objectives.SampledSoftmax(temperature=1.0, log_q="all"),
    objectives.SampledSoftmax(temperature=1.0, log_q="negatives", in_batch=False),
    objectives.SampledSoftmax(temperature=1.0, log_q="refined"),
    objectives.ScoreKL(temperature=0.1, teacher_temperature=2.0),
    objectives.ScoreKL(in_batch=True),
]
for heard in VARIANTS[:2]:
    heard.hear()  # a teacher, instead of the labels
SIZES = dict.fromkeys(["queries", "candidates", "pair_vectors", "query_tokens", "candidate_tokens"], 4)
SIZES |= {"layer_scores": 3, "layers": 2, "heads": 2}
OBJECTIVES = [cls() for cls in EXPORTED] + VARIANTS
for objective in OBJECTIVES:
    objective.bind(SIZES, SIZES)
B, N, P, D, C = 3, 4, 6, 4, 3
# what these hear of a teacher, its order or who is above a limit, has no slope
ORDER_ALONE = (
    objectives.GuidedSoftmax,
    objectives.LambdaMRR,
    objectives.RankNet,
    objectives.RelativeOrder,
)

every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)


def a_batch() -> Batch:
    """Three queries of 4, 3 and 2 candidates out of six, the first of each its positive."""
    return Batch(
        index=torch.tensor([[0, 1, 2, 3], [1, 4, 5, 0], [2, 3, 0, 0]]),
        mask=torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 2 + [False] * 2]),
        query_ids=torch.tensor([10, 11, 12]),
        candidate_ids=torch.tensor([50, 20, 40, 10, 30, 60]),
        labels=torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [1.0, 0, 0, 0]]),
        draws=torch.tensor([1, 2, 2, 2, 1, 1]),
        log_q=torch.tensor([0.1, 0.2, 0.2, 0.3, 0.05, 0.15]).log(),
        known_positives=Ragged.of([[50, 70], [20, 60], [40]]),
        source="here",
    )


def outputs(needs, batch: Batch, seed: int = 0) -> Outputs:
    """Random values for the needed fields."""
    queries, listed, candidates = batch.sizes
    shapes = {
        "scores": (queries, listed),
        "classes": (queries, listed, C),
        "in_batch": (queries, candidates),
        "queries": (queries, D),
        "candidates": (candidates, D),
        "pair_vectors": (queries, listed, D),
        "layer_scores": (queries, listed, SIZES["layer_scores"]),
        "joint_queries": (queries, listed, D),
        "joint_candidates": (queries, listed, D),
    }
    random = torch.Generator().manual_seed(seed)

    def said(name):
        if name not in OF_TOKENS:
            return torch.randn(shapes[name], generator=random)
        rows = {"query": queries, "candidate": candidates, "pair": queries * listed}[AXES[name]]
        texts = 2 if AXES[name] == "pair" else 1  # each of three ids
        places = torch.full((texts, 3, texts), -1)
        for text in range(texts):
            places[text, :, text] = torch.arange(3)
        kind = (len(needs.layers), 2, 2, D) if "attention" in name else (D,)
        return Tokens(
            torch.randn(rows * texts * 3, *kind, generator=random),
            torch.arange(rows + 1) * texts * 3,
            places.reshape(-1, texts).repeat(rows, 1),
            tuple(sorted(needs.layers)) if "attention" in name else (),
        )

    return Outputs(**{name: said(name) for name in sorted(needs.fields)})


def changed(said: Outputs, change) -> Outputs:
    """The same with every tensor of values changed."""
    return Outputs(
        **{
            name: dataclasses.replace(value, values=change(value.values))
            if isinstance(value, Tokens)
            else change(value)
            for name, value in said.given()
        }
    )


def values_of(said: Outputs):
    """Each field's name and tensor of values."""
    return [(name, v.values if isinstance(v, Tokens) else v) for name, v in said.given()]


def both(objective, batch: Batch) -> tuple[Outputs, Outputs]:
    """What a student says, with gradient, and what its frozen teacher says."""
    student = outputs(objective.student_needs, batch, seed=1)
    return changed(student, torch.Tensor.requires_grad_), outputs(objective.teacher_needs, batch, seed=2)


def test_there_are_objectives_to_test():
    assert len(EXPORTED) == 19
    assert all(issubclass(cls, objectives.Objective) for cls in EXPORTED)
    assert {type(variant) for variant in VARIANTS} <= set(EXPORTED)


@every_objective
def test_loss_and_count_are_finite_float32_rows_of_one_length(objective):
    batch = a_batch()
    loss, count = objective(*both(objective, batch), batch)
    assert loss.dtype == count.dtype == torch.float32
    assert loss.ndim == 1 and loss.shape == count.shape
    assert loss.isfinite().all() and (loss[count > 0] > 0).any()


@every_objective
def test_every_needed_field_of_the_student_gets_a_gradient_and_a_frozen_teacher_none(objective):
    batch = a_batch()
    student, teacher = both(objective, batch)
    objective(student, teacher, batch).loss.sum().backward()
    assert objective.student_needs
    for name, value in values_of(student):
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.any(), name
    assert all(value.grad is None for _, value in values_of(teacher))


@every_objective
def test_gradients_reach_a_teacher_that_is_not_frozen(objective):
    """An arrow may leave its tail attached (a symmetric loss): cutting it is the graph's business."""
    batch = a_batch()
    student, teacher = both(objective, batch)
    attached = changed(teacher, torch.Tensor.requires_grad_)
    objective(student, attached, batch).loss.sum().backward()
    if not isinstance(objective, ORDER_ALONE):
        assert all(value.grad is not None and value.grad.any() for _, value in values_of(attached))


@every_objective
@pytest.mark.parametrize("extreme", [1e30, -1e30, float("inf"), float("nan")])
def test_a_padded_candidate_changes_nothing(objective, extreme):
    """Neither its scores nor its label count, and its place in the index points at a stranger."""
    batch = a_batch()
    student, teacher = both(objective, batch)
    expected = objective(student, teacher, batch)

    def widen(value: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.cat([value, torch.full_like(value[:, :1], fill)], dim=1).detach()

    padded = dataclasses.replace(
        batch,
        index=widen(batch.index, 4),
        mask=widen(batch.mask, False),
        labels=widen(batch.labels, extreme),
    )
    pairs = {name for name, axis in AXES.items() if axis == "pair"}

    def wider(value):
        if isinstance(value, Tokens):
            places = torch.arange(padded.mask.numel()).view(padded.mask.shape)[:, :-1].flatten()
            return value.among(places, padded.mask.numel())
        return widen(value, extreme)

    def with_padding(said: Outputs) -> Outputs:
        return said.with_(**{name: wider(value) for name, value in said.given() if name in pairs})

    student = changed(with_padding(student), lambda value: value.detach().requires_grad_())
    loss, count = objective(student, with_padding(teacher), padded)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(count, expected.count)
    loss.sum().backward()
    for name, value in values_of(student):
        assert value.grad.isfinite().all(), name
        if name in pairs:
            assert not value.grad[:, -1].any(), name


@every_objective
def test_rows_that_count_nothing_lose_exactly_nothing(objective):
    """Queries that list nobody, whatever the scores: no loss, no gradient, no NaN."""
    batch = dataclasses.replace(a_batch(), mask=torch.zeros(B, N, dtype=torch.bool))
    student, teacher = both(objective, batch)
    loss, count = objective(student, teacher, batch)
    loss.sum().backward()
    assert (loss[count == 0] == 0).all()
    assert all(value.grad.isfinite().all() for _, value in values_of(student))
    asked = objective.student_needs.fields
    of_texts = {"queries", "candidates", "in_batch", "query_tokens", "candidate_tokens"} & asked
    attention = isinstance(objective, objectives.AttentionKL)  # of pairs, by their tokens
    if not of_texts or attention or objective.labelled:
        assert (count == 0).all()
        assert not any(value.grad.any() for _, value in values_of(student))


@every_objective
def test_a_single_candidate_alone_makes_no_list(objective):
    batch = dataclasses.replace(Batch.of_scores(2, 1), log_q=torch.tensor([-1.0, -2.0]))
    loss, count = objective(*both(objective, batch), batch)
    assert (loss[count == 0] == 0).all()


@every_objective
@pytest.mark.parametrize("sizes", [(0, 0, 0), (0, 3, 2), (2, 0, 0), (2, 0, 3)])
def test_a_batch_may_be_empty(objective, sizes):
    queries, listed, candidates = sizes
    batch = Batch(
        index=torch.zeros(queries, listed, dtype=torch.int64),
        mask=torch.zeros(queries, listed, dtype=torch.bool),
        query_ids=torch.arange(queries),
        candidate_ids=torch.arange(candidates),
        labels=torch.zeros(queries, listed),
        log_q=-torch.ones(candidates),
        known_positives=Ragged.of([[0]] * queries),
    )
    student, teacher = both(objective, batch)
    loss, count = objective(student, teacher, batch)
    loss.sum().backward()
    assert loss.shape == count.shape and loss.isfinite().all()
    assert all(value.grad.isfinite().all() for _, value in values_of(student))


@every_objective
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(objective, dtype):
    batch = a_batch()
    student, teacher = both(objective, batch)

    def cast(said: Outputs, dtype: torch.dtype) -> Outputs:
        return changed(said, lambda value: value.detach().to(dtype))

    halves = cast(student, dtype), cast(teacher, dtype)
    expected = objective(*(cast(half, torch.float32) for half in halves), batch).loss
    with torch.autocast("cpu", dtype=dtype):
        loss = objective(*halves, batch).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@every_objective
def test_a_teacher_of_another_shape_is_refused(objective):
    """A [B, 1] teacher would broadcast, and train the student to find all candidates equal."""
    batch = a_batch()
    student, teacher = both(objective, batch)
    for name, value in teacher.given():
        fewer = value.rows(slice(0, 2)) if isinstance(value, Tokens) else value[:, :1]
        with pytest.raises(ValueError, match=r"[Ss]hapes must match"):
            objective(student, teacher.with_(**{name: fewer}), batch)
    for name, value in student.given():
        if name in ("scores", "in_batch"):
            with pytest.raises(ValueError, match=r"[Ss]hapes must match"):
                objective(student.with_(**{name: value[:, :1].detach()}), teacher, batch)


@every_objective
def test_a_missing_field_or_missing_labels_are_named(objective):
    batch = a_batch()
    student, teacher = both(objective, batch)
    for name, _ in student.given():
        with pytest.raises(ValueError, match=f"needs '{name}'"):
            objective(student.with_(**{name: None}), teacher, batch)
    if objective.teacher_needs:
        with pytest.raises(ValueError, match="was given nothing"):
            objective(student, None, batch)
    unlabelled = dataclasses.replace(batch, labels=None)
    if objective.labelled:
        with pytest.raises(DataError, match="'here' has no labels"):
            objective(student, teacher, unlabelled)
    else:
        objective(student, teacher, unlabelled)


@pytest.mark.parametrize("cls", EXPORTED, ids=lambda cls: cls.__name__)
def test_the_docstring_has_a_formula_a_source_and_an_example_that_runs(cls):
    text = cls.__doc__
    assert ".. math::" in text
    assert "Needs ``" in text
    assert re.search(r"References:\n.*(arXiv:\d{4}\.\d{5}|\b(19|20)\d\d\b)", text, re.DOTALL)
    names = vars(importlib.import_module(cls.__module__))
    (example,) = [
        test for test in doctest.DocTestFinder(recurse=False).find(cls, globs=dict(names)) if test.examples
    ]
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
