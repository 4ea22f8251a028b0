"""The graph: who is asked for what, in which mode, with which gradient, and which graphs are refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from distill.batch import Batch, Columns
from distill.errors import RecipeError
from distill.graph import Arrow, DistillationGraph
from distill.model import Encoder, Model
from distill.objectives import EmbeddingMatch, PointwiseScore, SampledSoftmax, ScoreKL
from distill.outputs import Needs, Outputs


class Table(Encoder):
    """A vector per text row; remembers each call: its needs, its mode and whether gradients were on."""

    shares = frozenset({"vectors"})
    reads = Columns()
    dim = 4
    provides = frozenset({"queries", "candidates", "scores", "in_batch"})

    def __init__(self, vectors: nn.Embedding | None = None, dim: int = 4):
        super().__init__()
        self.dim = dim
        self.vectors = vectors or nn.Embedding(100, dim)
        self.calls = []

    def represent(self, batch, needs):
        self.calls.append((set(needs.fields), self.training, torch.is_grad_enabled()))
        return Outputs(
            queries=self.vectors(batch.query_ids + 50), candidates=self.vectors(batch.candidate_ids)
        )

    def compare(self, outputs, batch, needs):
        listed = outputs.candidates[batch.index]
        scores = (listed * outputs.queries[:, None]).sum(-1)
        return outputs.with_(scores=scores, in_batch=outputs.queries @ outputs.candidates.T)

    def encode_queries(self, queries, progress=False):
        raise NotImplementedError

    encode_candidates = encode_queries

    def save_pretrained(self, folder):
        raise NotImplementedError


class Scorer(Model):
    """Says scores alone, as a cross-encoder does."""

    provides = frozenset({"scores"})
    reads = Columns()

    def __init__(self):
        super().__init__()
        self.scores = nn.Parameter(torch.randn(10, 100))

    def represent(self, batch, needs):
        return Outputs(scores=self.scores[batch.query_ids[:, None], batch.candidate_ids[batch.index]])

    def save_pretrained(self, folder):
        raise NotImplementedError


class Scaled(Model):
    """Built from another node: its scores times one learned number."""

    provides = frozenset({"scores"})
    reads = Columns()

    def __init__(self, *of):
        super().__init__()
        self.of = of
        self.scale = nn.Parameter(torch.tensor(2.0))

    def of_needs(self, needs):
        return Needs("queries", "candidates")

    def represent(self, batch, needs):
        raise AssertionError("a node with `of` hears the others")

    def represent_of(self, heard, batch, needs):
        below = heard[self.of[0]]
        return Outputs(scores=self.scale * (below.candidates[batch.index] * below.queries[:, None]).sum(-1))

    def save_pretrained(self, folder):
        raise NotImplementedError


def graph_of(arrows, trained=("student",), **nodes) -> DistillationGraph:
    return DistillationGraph({"student": Table(), **nodes}, arrows, trained)


def total(losses) -> torch.Tensor:
    return sum(loss.loss.sum() for loss in losses.values())


def grads(model) -> float:
    return sum(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None)


def three_arrows():
    return [
        Arrow("labels", SampledSoftmax(), "student"),
        Arrow("scores", ScoreKL(), "student", "teacher"),
        Arrow("vectors", EmbeddingMatch(), "student", "teacher"),
    ]


def test_each_model_is_asked_once_for_the_union_of_what_its_arrows_need():
    graph = graph_of(three_arrows(), teacher=Table())
    losses = graph(Batch.of_scores(3, 4))
    assert list(losses) == ["labels", "scores", "vectors"]
    assert [needs for needs, *_ in graph.nodes["student"].calls] == [
        {"in_batch", "scores", "queries", "candidates"}
    ]
    assert [needs for needs, *_ in graph.nodes["teacher"].calls] == [{"scores", "queries", "candidates"}]


def test_losses_are_those_of_the_objectives_on_what_the_nodes_say():
    graph = graph_of([Arrow("scores", ScoreKL(), "student", "teacher", weight=0.3)], teacher=Table())
    batch = Batch.of_scores(3, 4)
    said = {}
    for name, node in graph.nodes.items():
        said[name] = node.compare(node.represent(batch, Needs("scores")), batch, Needs("scores"))
    expected = ScoreKL()(said["student"], said["teacher"], batch)
    torch.testing.assert_close(graph(batch)["scores"].loss, expected.loss)  # without the weight
    torch.testing.assert_close(graph(batch)["scores"].count, expected.count)


def test_frozen_models_answer_in_eval_and_without_gradient_at_every_step():
    graph = graph_of(three_arrows(), teacher=Table())
    for _ in range(3):
        graph.train()
        total(graph(Batch.of_scores(2, 3))).backward()
    assert {call[1:] for call in graph.nodes["teacher"].calls} == {(False, False)}
    assert {call[1:] for call in graph.nodes["student"].calls} == {(True, True)}
    assert grads(graph.nodes["teacher"]) == 0 < grads(graph.nodes["student"])
    assert not any(p.requires_grad for p in graph.nodes["teacher"].parameters())


def test_what_a_frozen_node_is_asked_live_is_counted_and_what_the_batch_knows_is_not():
    """All of it is cost; a node that learns is not asked, it is trained."""
    arrows = [
        Arrow("scores", ScoreKL(), "student", "teacher"),
        Arrow("vectors", EmbeddingMatch(), "student", "known"),
        Arrow("labels", SampledSoftmax(), "student"),
    ]
    graph = DistillationGraph(
        {"student": Table(), "teacher": Scorer(), "known": Table()}, arrows, ["student"]
    )
    batch = Batch.of_scores(3, 4)
    batch.mask[0, 3] = False
    known = graph.nodes["known"].represent(batch, Needs("queries", "candidates"))
    stored = replace(batch, stored={"known": known})
    graph(stored)
    assert graph.live == {"teacher": 11}
    graph(batch)
    assert graph.live == {"teacher": 22, "known": 3 + 12}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_second_pass_of_a_node_by_another_name_has_dropout_of_its_own(dropout):
    """Dual regularisation: each pass learns from the other, and without dropout they say the same."""

    class Dropping(Table):
        def represent(self, batch, needs):
            said = super().represent(batch, needs)
            return said.with_(queries=nn.functional.dropout(said.queries, dropout, self.training))

    node = Dropping()
    arrows = [
        Arrow("dual", ScoreKL(), "student", "again", detach=False),
        Arrow("back", ScoreKL(), "again", "student", detach=False),
    ]
    graph = DistillationGraph({"student": node, "again": node}, arrows, ["student", "again"]).train()
    losses = graph(Batch.of_scores(4, 5))
    assert len(node.calls) == 2
    assert all((loss.loss.sum() > 1e-3) == (dropout > 0) for loss in losses.values())
    losses["dual"].loss.sum().backward()
    assert (node.vectors.weight.grad.abs().sum() > 1e-6) == (dropout > 0)


@pytest.mark.parametrize("detach", [True, False])
def test_the_tail_learns_from_an_arrow_only_if_it_is_not_detached(detach):
    arrows = [
        Arrow("labels", SampledSoftmax(), "teacher", weight=[[0, 0], [1, 1]]),  # closed at 0
        Arrow("scores", ScoreKL(), "student", "teacher", detach=detach),
    ]
    graph = graph_of(arrows, trained=("student", "teacher"), teacher=Table())
    total(graph(Batch.of_scores(2, 3))).backward()
    assert grads(graph.nodes["student"]) > 0
    assert (grads(graph.nodes["teacher"]) > 0) is not detach


def test_the_weight_runs_in_straight_lines_between_its_points():
    rising = Arrow("a", None, "student", weight=[[0.0, 0.1], [0.5, 0.3], [1.0, 0.0]])
    assert [rising.weight_at(at) for at in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([0.1, 0.2, 0.3, 0.15, 0])
    step = Arrow("a", None, "student", weight=[[0, 0], [0.2, 0], [0.2, 0.5]])
    assert [step.weight_at(at) for at in (0, 0.19, 0.2, 0.9, 1)] == [0, 0, 0.5, 0.5, 0.5]
    late = Arrow("a", None, "student", weight=[[0.5, 2], [0.8, 4]])
    assert [late.weight_at(at) for at in (0, 0.5, 0.65, 1)] == pytest.approx([2, 2, 3, 4])
    assert Arrow("a", None, "student", weight=3).weight_at(0.4) == 3.0


def test_a_node_that_no_open_arrow_hears_is_not_run():
    arrows = [
        Arrow("labels", SampledSoftmax(), "student"),
        Arrow("scores", ScoreKL(), "student", "teacher", weight=[[0, 0], [0.2, 0], [0.2, 1]]),
    ]
    graph = graph_of(arrows, teacher=Table())
    assert list(graph(Batch.of_scores(2, 3), progress=0.1)) == ["labels"]
    assert graph.nodes["teacher"].calls == []
    assert list(graph(Batch.of_scores(2, 3), progress=0.2)) == ["labels", "scores"]
    assert list(graph.counts(Batch.of_scores(2, 3), 0.1)) == ["labels"]


def test_an_arrow_may_be_limited_to_data_sets():
    arrows = [
        Arrow("labels", SampledSoftmax(), "student", data=("judged",)),
        Arrow("vectors", EmbeddingMatch(), "student", "teacher"),
    ]
    graph = graph_of(arrows, teacher=Table())
    batch = Batch.of_scores(2, 3)
    assert list(graph(replace(batch, source="texts"))) == ["vectors"]
    assert list(graph(replace(batch, source="judged"))) == ["labels", "vectors"]


def test_counts_are_those_the_losses_have():
    graph = graph_of(three_arrows(), teacher=Table())
    batch = Batch.of_scores(3, 4)
    assert {n: int(c) for n, c in graph.counts(batch, 0.0).items()} == {
        "labels": 3,
        "scores": 3,
        "vectors": 15,
    }
    assert {n: int(loss.count.sum()) for n, loss in graph(batch).items()} == {
        n: int(c) for n, c in graph.counts(batch, 0.0).items()
    }


def test_a_node_built_from_another_hears_it_and_passes_gradients_down():
    graph = graph_of(
        [Arrow("labels", SampledSoftmax(in_batch=False), "head")], ("student", "head"), head=Scaled("student")
    )
    assert list(graph.asked(graph.arrows)) == ["student", "head"]
    total(graph(Batch.of_scores(3, 4))).backward()
    assert [needs for needs, *_ in graph.nodes["student"].calls] == [{"queries", "candidates"}]
    assert graph.nodes["head"].scale.grad is not None
    assert grads(graph.nodes["student"]) > 0
    graph.check()  # the student learns through the node above it


def test_a_node_and_one_built_from_it_share_one_forward():
    arrows = [
        Arrow("labels", SampledSoftmax(), "student"),
        Arrow("head", SampledSoftmax(in_batch=False), "head"),
        Arrow("back", ScoreKL(), "student", "head"),
    ]
    graph = graph_of(arrows, ("student", "head"), head=Scaled("student"))
    graph(Batch.of_scores(3, 4))
    assert [needs for needs, *_ in graph.nodes["student"].calls] == [
        {"in_batch", "scores", "queries", "candidates"}
    ]


def test_arrows_may_form_a_cycle():
    arrows = [Arrow("there", ScoreKL(), "student", "peer"), Arrow("back", ScoreKL(), "peer", "student")]
    graph = graph_of(arrows, ("student", "peer"), peer=Table())
    graph.check()
    total(graph(Batch.of_scores(2, 3))).backward()
    assert grads(graph.nodes["student"]) > 0 and grads(graph.nodes["peer"]) > 0


def test_nodes_built_from_each_other_are_refused():
    graph = graph_of([Arrow("x", SampledSoftmax(), "student")], a=Scaled("b"), b=Scaled("a"))
    with pytest.raises(RecipeError, match=r"a -> b -> a are built from each other \(`of`\)"):
        graph.order()


def test_what_is_stored_is_used_instead_of_asking():
    batch = Batch.of_scores(2, 3)
    graph = graph_of([Arrow("scores", ScoreKL(), "student", "teacher")], teacher=Table())
    teacher = graph.nodes["teacher"]
    live = graph(batch)["scores"].loss
    vectors = teacher.represent(batch, Needs("queries", "candidates"))
    scores = teacher.compare(vectors, batch, Needs("scores")).scores.detach()
    teacher.calls.clear()
    for stored in (vectors.detach(), Outputs(scores=scores)):  # what represent says, or what is needed
        torch.testing.assert_close(graph(replace(batch, stored={"teacher": stored}))["scores"].loss, live)
    assert teacher.calls == []
    graph(replace(batch, stored={"teacher": Outputs(queries=vectors.queries)}))  # not enough to answer
    assert len(teacher.calls) == 1


def test_a_trained_node_is_asked_whatever_is_stored():
    batch = Batch.of_scores(2, 3)
    graph = graph_of([Arrow("labels", SampledSoftmax(in_batch=False), "student")])
    graph(replace(batch, stored={"student": Outputs(scores=torch.zeros(2, 3))}))[
        "labels"
    ].loss.sum().backward()
    assert len(graph.nodes["student"].calls) == 1


def test_a_shared_parameter_is_counted_once():
    student = Table()
    peer = Table(vectors=student.vectors)
    graph = DistillationGraph(
        {"student": student, "peer": peer}, [Arrow("x", SampledSoftmax(), "student")], ("student", "peer")
    )
    assert len(graph.trainable()) == 1


def test_objectives_with_parameters_are_bound_and_trained():
    graph = graph_of([Arrow("vectors", EmbeddingMatch(), "student", "teacher")], teacher=Table(dim=6))
    assert [*graph.trainable()] == ["node_modules.student.vectors.weight", "objectives.vectors.linear.weight"]
    assert graph.objectives["vectors"].linear.weight.shape == (6, 4)
    total(graph(Batch.of_scores(2, 3))).backward()
    assert grads(graph.objectives["vectors"]) > 0


def test_labels_can_stand_for_a_teachers_scores():
    """``from: labels``: the loss is what a teacher would cause whose scores are the labels."""
    batch = Batch.of_scores(2, 3, labels=torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.0]]))
    graph = graph_of([Arrow("graded", PointwiseScore(), "student", labels=True)])
    graph.check({"judged": True})
    told = graph(batch)["graded"]
    student = graph.nodes["student"].represent(batch, Needs("scores"))
    student = graph.nodes["student"].compare(student, batch, Needs("scores"))
    expected = (student.scores - batch.labels).square().sum(dim=-1)
    torch.testing.assert_close(told.loss, expected)
    with pytest.raises(RecipeError, match=r"losses.graded: PointwiseScore reads labels, and .* 'texts'"):
        graph.check({"texts": False})


def test_sizes_that_do_not_fit_are_a_mistake_of_the_recipe():
    match = r"losses.vectors: EmbeddingMatch cannot compare .* size 4 .* size 6"
    with pytest.raises(RecipeError, match=match):
        graph_of([Arrow("vectors", EmbeddingMatch(projection=False), "student", "t")], t=Table(dim=6))


MISTAKES = {
    "losses.a.to: there is no model 'nobody'; there are student, teacher, cross.": dict(
        arrow=Arrow("a", SampledSoftmax(), "nobody", data=("judged",))
    ),
    "losses.a.from: there is no model 'nobody'": dict(arrow=Arrow("a", ScoreKL(), "student", "nobody")),
    "losses.a.to: 'teacher' is frozen and cannot learn; set `train: true`": dict(
        arrow=Arrow("a", ScoreKL(), "teacher", "cross")
    ),
    "losses.a: ScoreKL compares with a teacher's scores; say which node with `from:`": dict(
        arrow=Arrow("a", ScoreKL(), "student")
    ),
    "losses.a: EmbeddingMatch compares with a teacher's candidates, queries": dict(
        arrow=Arrow("a", EmbeddingMatch(), "student")
    ),
    "losses.a: EmbeddingMatch needs candidates, queries from the teacher, but 'cross' (Scorer) provides "
    "only scores. Choose a teacher": dict(arrow=Arrow("a", EmbeddingMatch(), "student", "cross")),
    "losses.a: SampledSoftmax needs in_batch from the student, but 'cross'": dict(
        arrow=Arrow("a", SampledSoftmax(), "cross", data=("judged",)), trained=("student", "cross")
    ),
    "losses.a.from: SampledSoftmax hears no teacher, only labels; remove `from`": dict(
        arrow=Arrow("a", SampledSoftmax(), "student", "cross", data=("judged",))
    ),
    "losses.a.data: there is no data set 'nowhere'; there are judged, texts": dict(
        arrow=Arrow("a", ScoreKL(), "student", "cross", data=("nowhere",))
    ),
    "losses.a: SampledSoftmax reads labels, and data set 'texts' has none; limit the arrow": dict(
        arrow=Arrow("a", SampledSoftmax(), "student")
    ),
    "losses.a.weight: [[0, 1], [1]] is neither a number nor a list of": dict(weight=[[0, 1], [1]]),
    "losses.a.weight: [0.1, 0.5] is neither": dict(weight=[0.1, 0.5]),
    "losses.a.weight: [[0, 'high']] is neither": dict(weight=[[0, "high"]]),
    "losses.a.weight: high is neither": dict(weight="high"),
    "losses.a.weight: None is neither": dict(weight=None),
    "losses.a.weight: nan holds a number that is not finite": dict(weight=float("nan")),
    "losses.a.weight: the progress of the points [[0.5, 1], [0.2, 0]] must rise": dict(
        weight=[[0.5, 1], [0.2, 0]]
    ),
    "losses.a.weight: the progress of the points [[-1, 1], [1, 0]] must rise": dict(weight=[[-1, 1], [1, 0]]),
    "losses.a.weight: the progress of the points [[0, 1], [2, 0]] must rise": dict(weight=[[0, 1], [2, 0]]),
    "losses.a.weight: it is 0 all the time": dict(weight=[[0, 0], [1, 0]]),
    "models: there is no node 'gone' to keep; name one `student`": dict(keep="gone"),
    "models.teacher: the node to keep must be trained; remove `train: false`": dict(keep="teacher"),
    "models.teacher: it is trained, but no arrow leads to it": dict(trained=("student", "teacher")),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_each_mistake_is_named_and_told_with_its_remedy(said):
    given = dict(MISTAKES[said])
    weight = given.pop("weight", 1.0)
    arrow = given.pop("arrow", None) or Arrow("a", ScoreKL(), "student", "cross", weight=weight)
    nodes = {"student": Table(), "teacher": Table(), "cross": Scorer()}
    arrows = [arrow, Arrow("good", ScoreKL(), "student", "cross")]
    graph = DistillationGraph(nodes, arrows, given.pop("trained", ("student",)), **given)
    with pytest.raises(RecipeError) as caught:
        graph.check({"judged": True, "texts": False})
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1  # and nothing beside it


def test_all_mistakes_come_in_one_message():
    arrows = [
        Arrow("one", SampledSoftmax(), "nobody"),
        Arrow("two", ScoreKL(), "student"),
        Arrow("three", ScoreKL(), "student", "cross", weight=0.0),
    ]
    with pytest.raises(RecipeError) as caught:
        graph_of(arrows, cross=Scorer()).check()
    starts = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert starts == ["losses.one.to", "losses.two", "losses.three.weight"]


def test_a_frozen_node_may_not_share_parameters_with_a_trained_one():
    """It would change under the eyes of those who think it constant."""
    student = Table()
    nodes = {"student": student, "teacher": Table(vectors=student.vectors)}
    graph = DistillationGraph(nodes, [Arrow("x", ScoreKL(), "student", "teacher")], ("student",))
    with pytest.raises(RecipeError, match=r"models.teacher: it is frozen but shares .* trained 'student'"):
        graph.check()


def test_a_good_graph_passes():
    graph_of(three_arrows(), teacher=Table()).check({"judged": True})
