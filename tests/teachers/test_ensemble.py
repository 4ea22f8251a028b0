"""Several teachers as one: the rules by their numbers, and one teacher as if it stood alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from distill.batch import Batch, Columns, Ragged
from distill.build import Builder
from distill.data import BM25Negatives, Judged, TextSource, TextTable
from distill.errors import DataError, RecipeError
from distill.evaluation import evaluate_model
from distill.evaluation.cost import size_in_mb
from distill.evaluation.scoring import score_listed
from distill.graph import Arrow, DistillationGraph
from distill.measure import can_be_measured
from distill.model import Encoder, Model
from distill.objectives import EmbeddingMatch, MarginMSE, SampledSoftmax, ScoreKL
from distill.open import class_of, open_model
from distill.outputs import Needs, Outputs
from distill.run import Runs
from distill.store import TeacherMemory
from students import BiEncoder
from teachers import Concatenation, CrossEncoder, Ensemble, Recorded
from teachers.ensemble import combined, confidence, standardized
from tests.shop import fitted

B, N = 3, 4


class Scores(Model):
    """Says what it was given: scores [B, N]."""

    provides = frozenset({"scores"})
    reads = Columns()

    def __init__(self, scores):
        super().__init__()
        self.said = torch.nn.Parameter(torch.as_tensor(scores))

    def represent(self, batch, needs):
        return Outputs(scores=self.said)

    def save_pretrained(self, folder):
        raise NotImplementedError


class Vectors(Encoder):
    """A vector for each row; scores follow only in ``compare``."""

    dim = 4
    reads = Columns()
    provides = frozenset({"queries", "candidates", "scores", "in_batch"})

    def __init__(self, dim=4, seed=0):
        super().__init__()
        self.dim = dim
        random = torch.Generator().manual_seed(seed)
        self.vectors = torch.nn.Parameter(torch.randn(40, dim, generator=random))

    def represent(self, batch, needs):
        return Outputs(
            queries=self.vectors[batch.query_ids + 20], candidates=self.vectors[batch.candidate_ids]
        )

    def compare(self, outputs, batch, needs):
        scores = (outputs.candidates[batch.index] * outputs.queries[:, None]).sum(dim=-1)
        return outputs.with_(scores=scores, in_batch=outputs.queries @ outputs.candidates.T)

    def encode_queries(self, queries, progress=False):
        raise NotImplementedError

    encode_candidates = encode_queries
    save_pretrained = encode_queries


def a_batch() -> Batch:
    batch = Batch.of_scores(B, N)
    batch.mask[1, 3] = False
    return replace(batch, source="here")


def graph_of(parts, tail="all", objective=None, **settings) -> DistillationGraph:
    """A student, some teachers, and all of them as one."""
    nodes = {"student": Vectors(seed=9), **parts, "all": Ensemble(parts, **settings)}
    return DistillationGraph(nodes, [Arrow("order", objective or ScoreKL(), "student", tail)], ["student"])


def rows(*lists):
    scores = [torch.tensor([values]) for values in lists]
    return scores, torch.ones_like(scores[0], dtype=torch.bool), torch.full((len(lists), 1), 1 / len(lists))


# the rules


@pytest.mark.parametrize(
    ("combine", "expected"),
    [("scores", [0.468311, 0.468311, 0.063379]), ("probabilities", [0.478995, 0.478995, 0.042010])],
)
def test_two_teachers_by_the_worked_numbers(combine, expected):
    said = combined(*rows([4.0, 2.0, 1.0], [1.0, 3.0, 0.0]), combine)
    assert said.softmax(dim=-1)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_confidence_by_the_worked_numbers():
    """Losses of 0.169846 and 2.169846 on the first candidate, its positive."""
    scores, mask, _ = rows([3.0, 1.0, 0.0], [1.0, 3.0, 0.0])
    weights = confidence(scores, mask, torch.tensor([[True, False, False]]), kappa=1.0)
    assert weights[:, 0].tolist() == pytest.approx([0.880797, 0.119203], abs=1e-6)
    none = confidence(scores, mask, torch.zeros(1, 3, dtype=torch.bool), kappa=1.0)
    assert none[:, 0].tolist() == [0.5, 0.5]  # no positive: nobody is more confident
    sharp = confidence(scores, mask, torch.tensor([[True, False, False]]), kappa=0.1)
    assert sharp[0, 0] > 0.999


def test_standardised_lists_equal_numpy_and_ignore_padding():
    scores = np.array([[900.0, 1.0, 4.0, 77.0], [1.0, 2.0, 3.0, -5.0]], dtype=np.float32)
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=bool)
    found = standardized(torch.from_numpy(scores), torch.from_numpy(mask)).numpy()
    for row, real, z in zip(scores, mask, found, strict=True):
        np.testing.assert_allclose(z[real], (row[real] - row[real].mean()) / row[real].std(), rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1000.1, -3e7])
def test_a_list_of_equals_has_no_deviation_to_divide_by(value):
    scores = torch.full((1, 7), value, requires_grad=True)
    found = standardized(scores, torch.ones(1, 7, dtype=torch.bool))
    found.sum().backward()
    assert found.tolist() == [[0.0] * 7] and scores.grad.isfinite().all()


def test_rules_with_weights_and_temperatures_equal_numpy():
    given = np.random.default_rng(0).normal(size=(2, B, N)).astype(np.float32)
    parts = {"a": Scores(given[0]), "b": Scores(given[1])}
    weights, taus = np.array([0.75, 0.25]), np.array([1.0, 0.5])
    cooled = given / taus[:, None, None]
    z = (cooled - cooled.mean(-1, keepdims=True)) / cooled.std(-1, keepdims=True)
    expected = {
        "scores": np.tensordot(weights, cooled, 1),
        "probabilities": np.log(np.tensordot(weights, softmax(cooled, axis=-1), 1)),
        "standardized": np.tensordot(weights, z, 1),
    }
    batch = Batch.of_scores(B, N)
    for combine, values in expected.items():
        temperatures = None if combine == "standardized" else {"b": 0.5}
        node = Ensemble(parts, combine, {"a": 3, "b": 1}, temperatures)
        heard = {name: part.represent(batch, Needs("scores")) for name, part in parts.items()}
        said = node.represent_of(heard, batch, Needs("scores")).scores
        np.testing.assert_allclose(said.detach().numpy(), values, rtol=1e-4, atol=1e-6)


def test_probabilities_reach_the_objective_as_they_are():
    """A ScoreKL at teacher temperature 1 hears just the mean of the softmaxes."""
    scores, mask, weights = rows([4.0, 2.0, -200.0], [1.0, 3.0, -200.0])
    said = combined(scores, mask, weights, "probabilities")
    assert said.isfinite().all()
    torch.testing.assert_close(said.softmax(-1), sum(s.softmax(-1) for s in scores) / 2)


# in a graph

PLAIN = [
    dict(combine="scores"),
    dict(combine="scores", weights={"one": 7}),
    dict(combine="scores", weights="learned"),
    dict(combine="scores", weights="confidence"),
    dict(combine="scores", routes={"here": ["one"]}),
]


@pytest.mark.parametrize("settings", PLAIN, ids=str)
@pytest.mark.parametrize("part", [lambda: Scores(torch.randn(B, N)), lambda: Vectors(seed=5)])
@pytest.mark.parametrize("objective", [ScoreKL, MarginMSE])
def test_one_teacher_by_a_rule_that_does_not_rescale_is_the_plain_arrow(settings, part, objective):
    torch.manual_seed(3)
    one, batch = part(), a_batch()
    losses = []
    for tail in ("all", "one"):
        graph = graph_of({"one": one}, tail, objective(), **settings)
        loss = graph(batch)["order"]
        loss.loss.sum().backward()
        losses.append((*loss, graph.nodes["student"].vectors.grad))
    for together, alone in zip(*losses, strict=True):
        assert torch.equal(together, alone)
    assert losses[0][0].any()


def test_one_encoder_concatenated_is_the_plain_arrow():
    batch, one = a_batch(), Vectors(seed=5)
    for objective in (EmbeddingMatch, ScoreKL, lambda: ScoreKL(in_batch=True)):
        losses = []
        for tail in ("joined", "one"):
            nodes = {"student": Vectors(seed=9), "one": one, "joined": Concatenation({"one": one})}
            graph = DistillationGraph(nodes, [Arrow("a", objective(), "student", tail)], ["student"])
            losses.append(graph(batch)["a"].loss)
        assert torch.equal(*losses) and losses[0].any()


def test_two_encoders_end_to_end():
    a, b, batch = Vectors(4, seed=1), Vectors(6, seed=2), a_batch()
    node = Concatenation({"a": a, "b": b})
    assert node.dim == 10 and node.sizes == {"queries": 10, "candidates": 10}
    needs = Needs("queries", "scores", "in_batch")
    said = {name: part.represent(batch, needs) for name, part in node.parts.items()}
    joined = node.compare(node.represent_of(said, batch, needs), batch, needs)
    assert torch.equal(joined.queries, torch.cat([said["a"].queries, said["b"].queries], dim=1))
    answers = [part.compare(said[name], batch, needs) for name, part in node.parts.items()]
    torch.testing.assert_close(joined.scores, answers[0].scores + answers[1].scores)
    torch.testing.assert_close(joined.in_batch, answers[0].in_batch + answers[1].in_batch)
    unit = Concatenation({"a": a, "b": b}, normalize=True).represent_of(said, batch, needs)
    torch.testing.assert_close(unit.candidates[:, 4:].norm(dim=1), torch.ones(len(batch.candidate_ids)))


def test_who_is_heard_depends_on_the_data_set():
    parts = {"a": Scores(torch.randn(B, N)), "b": Scores(torch.randn(B, N))}
    graph = graph_of(parts, combine="scores", routes={"here": ["b"], "nowhere": []})
    batch = a_batch()
    alone = DistillationGraph(
        {"student": graph.nodes["student"], "b": parts["b"]},
        [Arrow("order", ScoreKL(), "student", "b")],
        ["student"],
    )
    assert torch.equal(graph(batch)["order"].loss, alone(batch)["order"].loss)
    elsewhere = graph(replace(batch, source="third"))["order"].loss
    assert not torch.equal(elsewhere, graph(batch)["order"].loss)  # both are heard
    silent = replace(batch, source="nowhere")
    loss, count = graph(silent)["order"]
    assert not loss.any() and not count.any() and graph.counts(silent, 0.0)["order"] == 0
    with pytest.raises(RecipeError, match=r"models.all: there is no data set 'nowhere'; .* here, third"):
        graph.check({"here": True, "third": True})


def test_who_is_heard_depends_on_a_column():
    parts = {"a": Scores(torch.randn(B, N)), "b": Scores(torch.randn(B, N))}
    features = fitted()  # of the shop, whose users are from de, fr and jp
    settings = dict(combine="scores", column="country", features=features)
    node = Ensemble(parts, routes={"de": ["a"], "fr": []}, **settings)
    assert [column.key for column in node.reads.queries] == ["country"]
    users = features.encode([{"country": c} for c in ("de", "fr", "it")], ["country"])  # none is from it
    batch = replace(a_batch(), queries={"country": users.columns["country"]})
    heard = {name: part.represent(batch, Needs("scores")) for name, part in parts.items()}
    said = node.represent_of(heard, batch, Needs("scores"))
    a, b = parts["a"].said, parts["b"].said
    torch.testing.assert_close(said.scores[0], a[0])
    torch.testing.assert_close(said.scores[2], (a[2] + b[2]) / 2)
    assert said.known.any(dim=1).tolist() == [True, False, True]
    assert node.provides == {"scores"} and not node.measurable
    graph = DistillationGraph(
        {"student": Vectors(), **parts, "all": node},
        [Arrow("order", ScoreKL(), "student", "all")],
        ["student"],
    )
    assert graph(batch)["order"].count.tolist() == [1, 0, 1]
    for column in ("price", "age", "nowhere"):
        with pytest.raises(ValueError, match=f"'{column}' is no categorical feature of users, .* country"):
            Ensemble(parts, routes={"de": ["a"]}, column=column, features=features)
    with pytest.raises(ValueError, match=r"routes\.dee: no user of train has this value of 'country'"):
        Ensemble(parts, routes={"dee": ["a"]}, column="country", features=features)
    with pytest.raises(DataError, match="routes"):
        Ensemble(parts, routes={7: ["a"]}, column="country", features=features)
    with pytest.raises(ValueError, match="two values of 'user_id' have one id"):
        settings = dict(column="user_id", features=fitted(user_buckets=1))
        Ensemble(parts, routes={"u0": ["a"], "u1": ["b"]}, **settings)


def test_what_was_saved_with_routes_is_opened_with_routes(tmp_path):
    parts = {"a": Scores(torch.randn(B, N)), "b": Scores(torch.randn(B, N))}
    Ensemble(parts, routes={"here": ["a"]}).save_pretrained(tmp_path / "routed")
    with pytest.raises(ValueError, match="saved from a recipe with routes: use it in a recipe, with these"):
        Ensemble(parts, checkpoint=tmp_path / "routed")
    again = Ensemble(parts, routes={"here": ["a"]}, checkpoint=tmp_path / "routed")
    assert again.combine == "standardized" and not again.measurable


def test_joined_vectors_score_as_their_parts_do_added_up():
    """Also where a part multiplies its products by a scale, as a two-tower does by 1 / temperature."""
    parts = {"a": Vectors(seed=1), "b": Vectors(seed=2)}
    parts["a"].scale, parts["b"].scale = lambda: torch.tensor(5.0), lambda: 0.5
    node, batch, needs = Concatenation(parts), a_batch(), Needs("scores", "in_batch")
    heard = {name: part.represent(batch, Needs("queries", "candidates")) for name, part in parts.items()}
    said = node.compare(node.represent_of(heard, batch, needs), batch, needs)
    products = {name: heard[name].queries @ heard[name].candidates.T for name in parts}
    together = 5 * products["a"] + products["b"] / 2
    torch.testing.assert_close(said.in_batch, together)
    torch.testing.assert_close(said.scores, together.gather(1, batch.index))
    alone = Concatenation({"a": parts["a"]})
    one = alone.compare(alone.represent_of({"a": heard["a"]}, batch, needs), batch, needs)
    assert torch.equal(one.in_batch, products["a"] * 5)  # bit for bit, as the plain arrow
    unit = Concatenation(parts, normalize=True)
    assert unit.scale() == 1.0


def test_weights_are_learnt_from_labels_and_the_better_teacher_wins():
    batch = Batch.of_scores(20, 4)
    good, bad = torch.randn(20, 4), torch.randn(20, 4)
    good[:, 0] += 2
    parts = {"bad": Scores(bad), "good": Scores(good)}
    node = Ensemble(parts, weights="learned")
    graph = DistillationGraph(
        {**parts, "all": node},
        [Arrow("labels", SampledSoftmax(temperature=1.0, in_batch=False), "all")],
        ["all"],
        keep="all",
    )
    graph.check({"data": True})
    assert list(graph.trainable()) == ["node_modules.all.logits"]
    optimizer = torch.optim.Adam(graph.trainable().values(), lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        graph(batch)["labels"].loss.sum().backward()
        optimizer.step()
    assert node.logits.softmax(0)[1] > 0.9
    assert parts["good"].said.grad is None


def test_a_trained_part_learns_through_an_ensemble_and_a_frozen_ensemble_gives_no_gradient():
    parts = {"a": Vectors(seed=1), "b": Vectors(seed=2)}
    nodes = {**parts, "all": Ensemble(parts)}
    labels = Arrow("labels", SampledSoftmax(in_batch=False), "all")
    graph = DistillationGraph(nodes, [labels], ["a", "all"], keep="a")
    graph.check({"data": True})
    graph(a_batch())["labels"].loss.sum().backward()
    assert parts["a"].vectors.grad.any() and parts["b"].vectors.grad is None
    graph = DistillationGraph(nodes, [Arrow("order", ScoreKL(), "a", "all")], ["a"], keep="a")
    parts["a"].vectors.grad = None
    graph(a_batch())["order"].loss.sum().backward()
    assert not nodes["all"].training and parts["a"].vectors.grad.any()
    with pytest.raises(RecipeError, match="all: it is to be trained, but has no parameter that could"):
        DistillationGraph({**parts, "all": nodes["all"]}, [labels], ["all"], keep="all").check({"data": True})


def test_an_ensemble_to_be_trained_that_has_nothing_to_learn_is_refused():
    """Its loss would be logged, and teach nobody."""
    parts = {"a": Vectors(seed=1), "b": Vectors(seed=2)}
    nodes = {"student": Vectors(seed=3), **parts, "all": Ensemble(parts)}
    arrows = [Arrow(f"to_{head}", SampledSoftmax(in_batch=False), head) for head in ("student", "all")]
    with pytest.raises(RecipeError, match="all: it is to be trained, but has no parameter that could learn"):
        DistillationGraph(nodes, arrows, ["student", "all"], keep="student").check({"data": True})


def test_the_more_confident_teacher_is_heard_more():
    """Weights are of each query, by what each teacher makes of its labels at its own temperature."""
    torch.manual_seed(0)
    parts = {"a": Scores(torch.randn(B, N)), "b": Scores(torch.randn(B, N))}
    node = Ensemble(parts, "scores", "confidence", {"b": 0.5}, kappa=0.7)
    batch, needs = Batch.of_scores(B, N), Needs("scores")
    heard = {name: part.represent(batch, needs) for name, part in parts.items()}
    said = node.represent_of(heard, batch, needs).scores.detach().numpy()
    cooled = [parts["a"].said.detach().numpy(), parts["b"].said.detach().numpy() / 0.5]
    losses = [-np.log(softmax(scores, axis=-1)[:, 0]) for scores in cooled]  # the first is the positive
    weights = softmax(-np.stack(losses) / 0.7, axis=0)
    np.testing.assert_allclose(
        said, weights[0][:, None] * cooled[0] + weights[1][:, None] * cooled[1], rtol=1e-4
    )


def test_labels_that_are_not_there_are_said_before_the_first_step():
    parts = {"a": Vectors(seed=1), "b": Vectors(seed=2)}
    graph = graph_of(parts, weights="confidence")
    with pytest.raises(RecipeError, match=r"losses.order: 'all' reads labels, and .*'texts' has none"):
        graph.check({"here": True, "texts": False})
    assert not can_be_measured(graph.nodes["all"])  # it would read the labels it is measured by


PARTS = {"a": Vectors(seed=1), "b": Scores(torch.zeros(B, N))}
WRONG = {
    "of: name one node at least": dict(of={}),
    r"of: 'c' \(CrossEncoder\) provides no scores": dict(of={"c": None}),
    "combine must be one of scores, standardized, probabilities": dict(combine="mean"),
    "weights must be one of equal, learned, confidence": dict(weights="learnt"),
    "weights: 'c' is not in `of`, which names a, b": dict(weights={"a": 1, "b": 1, "c": 1}),
    "weights: give one to each of a, b": dict(weights={"a": 1}),
    "weights.a must be positive and finite": dict(weights={"a": 0, "b": 1}),
    "temperatures.a must be positive": dict(temperatures={"a": -1}, combine="scores"),
    "temperatures do nothing to standardised lists": dict(temperatures={"a": 2}),
    "kappa does nothing without": dict(kappa=2.0),
    "kappa must be positive": dict(kappa=0.0, weights="confidence"),
    "routes.here: 'c' is not in `of`": dict(routes={"here": ["c"]}),
    "a column needs `features": dict(column="country", routes={"de": ["a"]}),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_rule_is_refused(said, tiny_bert):
    settings = {"of": PARTS, **WRONG[said]}
    if settings["of"] == {"c": None}:
        settings["of"] = {"c": CrossEncoder(tiny_bert(layers=1, num_labels=3))}
    with pytest.raises(ValueError, match=said):
        Ensemble(**settings)


def test_what_a_concatenation_cannot_join_is_refused():
    with pytest.raises(ValueError, match=r"of: 'b' \(Scores\) provides no candidates"):
        Concatenation(PARTS)
    silent = Ensemble(PARTS, routes={"here": []})
    with pytest.raises(ValueError, match="'all' is an ensemble that says nothing somewhere"):
        Ensemble({"all": silent})


# real models: the recipe, the store, measures, the disk

QUERIES = ["what is a wing", "heart", "ship river"]
PASSAGES = ["the flow of air", "blood", "city", "old film and music", "the sea"]
LISTED = [[0, 1, 2], [1, 3], [4, 0, 2, 3]]


def judged() -> Judged:
    return Judged(
        task="rerank",
        queries=TextTable([str(i) for i in range(3)], QUERIES),
        candidates=TextTable([str(i) for i in range(5)], PASSAGES),
        listed=Ragged.of(LISTED),
        labels=torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0, 0]),
    )


@pytest.fixture(scope="module")
def models(tiny_bert):
    torch.manual_seed(0)
    return {
        "cross": CrossEncoder(tiny_bert(num_labels=1), precision="no"),
        "bi": BiEncoder(tiny_bert(seed=2), precision="no"),
    }


def test_a_recipe_names_its_parts(tiny_bert):
    from distill.settings import Recipe

    student = {"type": "students.BiEncoder", "checkpoint": str(tiny_bert())}
    cross = {"type": "teachers.CrossEncoder", "checkpoint": str(tiny_bert(num_labels=1))}
    both = {
        "type": "teachers.Ensemble",
        "of": ["bi", "cross"],
        "combine": "scores",
        "weights": {"bi": 2, "cross": 1},
    }
    recipe = Recipe(
        name="x",
        data={"type": "distill.data.Groups", "train": "x"},
        models={"student": student, "bi": student, "cross": cross, "all": both},
        losses={"order": {"type": "distill.objectives.ScoreKL", "from": "all", "to": "student"}},
    )
    Builder().check(recipe)
    graph = Builder().graph(recipe)
    assert graph.nodes["all"].of == ("bi", "cross") and graph.nodes["all"].parts["bi"] is graph.nodes["bi"]
    assert list(graph.asked(graph.arrows)) == ["student", "bi", "cross", "all"]
    assert len([name for name, _ in graph.named_parameters() if ".all." in name]) == 0


def test_the_store_asks_the_teachers_below(models, monkeypatch, tmp_path):
    monkeypatch.setenv("DISTILL_STORE", str(tmp_path))
    torch.manual_seed(1)
    nodes = {"student": BiEncoder(models["bi"].checkpoint), **models, "all": Ensemble(models)}
    graph = DistillationGraph(nodes, [Arrow("order", ScoreKL(), "student", "all")], ["student"])
    source = TextSource(judged(), batch_size=3, candidates=4, seed=1)
    source.prepare(*graph.columns())
    batch = source.batch(0, 0)
    graph.eval()
    live = graph(batch)["order"].loss
    memory = TeacherMemory(graph, {"data": source})
    assert sorted(listener.name for listener in memory.listeners) == ["bi", "cross"]
    memory.fill()
    known = memory.recall(batch)
    for part in models.values():
        monkeypatch.setattr(part, "represent", None)  # nobody is asked again
    torch.testing.assert_close(graph(known)["order"].loss, live, atol=1e-5, rtol=1e-4)


def test_it_is_measured_as_its_parts_are_and_by_whole_lists(models):
    node = Ensemble(models, combine="standardized")
    assert can_be_measured(node)
    listed = score_listed(node, judged())
    parts = {name: score_listed(part, judged()) for name, part in models.items()}
    start = 0
    for rows_ in LISTED:
        at = slice(start, start + len(rows_))
        z = [(said[at] - said[at].mean()) / said[at].std(correction=0) for said in parts.values()]
        torch.testing.assert_close(listed[at], (z[0] + z[1]) / 2, atol=1e-5, rtol=1e-4)
        start += len(rows_)
    texts = [QUERIES[q] for q, found in enumerate(LISTED) for _ in found]
    pairs = [PASSAGES[c] for found in LISTED for c in found]
    torch.testing.assert_close(node.score_pairs(texts, pairs), listed, atol=1e-5, rtol=1e-5)
    order = [5, 0, 8, 3, 1, 7, 4, 2, 6]  # in any order
    mixed = node.score_pairs([texts[i] for i in order], [pairs[i] for i in order])
    torch.testing.assert_close(mixed, listed[order], atol=1e-5, rtol=1e-5)
    assert 0 < evaluate_model(node, judged(), ["MAP"]).means["MAP"] <= 1
    assert size_in_mb(node) == pytest.approx(sum(size_in_mb(part) for part in models.values()))
    assert not can_be_measured(Ensemble({**models, "said": Recorded()}))


def test_a_concatenation_is_searched(models, tiny_bert):
    node = Concatenation({"bi": models["bi"], "other": BiEncoder(tiny_bert(seed=3), precision="no")})
    vectors = node.encode_candidates(PASSAGES)
    assert vectors.shape == (5, 64) and can_be_measured(node)
    expected = sum(score_listed(part, judged()) for part in node.parts.values())
    torch.testing.assert_close(score_listed(node, judged()), expected, atol=1e-5, rtol=1e-5)


def test_a_saved_one_opens_with_its_parts_and_in_a_recipe(models, tmp_path):
    node = Ensemble(models, "probabilities", "learned", {"bi": 0.5})
    with torch.no_grad():
        node.logits.copy_(torch.tensor([0.3, -0.7]))
    node.save_pretrained(tmp_path / "saved")
    assert class_of(tmp_path / "saved") == "teachers.Ensemble"
    opened = open_model(tmp_path / "saved")
    for part in opened.parts.values():
        part.precision = "no"
    found, expected = (score_listed(model, judged()) for model in (opened, node))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    again = Ensemble(models, checkpoint=tmp_path / "saved")
    assert torch.equal(again.logits, node.logits) and again.combine == "probabilities"
    assert torch.equal(again.temperatures, node.temperatures)
    with pytest.raises(RecipeError, match="was made of cross, bi, not of bi, cross"):
        Ensemble(dict(reversed(models.items())), checkpoint=tmp_path / "saved")
    with pytest.raises(ValueError, match="leave out combine"):
        Ensemble(models, combine="scores", checkpoint=tmp_path / "saved")
    joined = Concatenation({"bi": models["bi"]}, normalize=True)
    joined.save_pretrained(tmp_path / "joined")
    assert open_model(tmp_path / "joined").normalize
    with pytest.raises(RecipeError, match="holds no Ensemble"):
        Ensemble(models, checkpoint=tmp_path / "joined")


def test_a_part_that_is_no_longer_the_same_is_refused(models, tiny_bert, tmp_path):
    changed = BiEncoder(tiny_bert(seed=2), precision="no")
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    Ensemble({"bi": changed}).save_pretrained(tmp_path / "saved")
    with pytest.raises(DataError, match="its part 'bi' has other weights"):
        open_model(tmp_path / "saved")
    Ensemble({"a": Vectors()}).save_pretrained(tmp_path / "nowhere")
    with pytest.raises(DataError, match="'a' came from no checkpoint"):
        open_model(tmp_path / "nowhere")


def test_weights_learnt_in_one_run_teach_in_the_next(tiny_bert, tmp_path, monkeypatch):
    """Trained, measured, saved, and asked for by ``{run: ...}``; both tables show what it reaches."""
    monkeypatch.setenv("DISTILL_STORE", str(tmp_path / "store"))
    lines = [
        json.dumps({"query": query, "candidate": f"{other} of the sea", "label": int(query == other)})
        for query in QUERIES
        for other in QUERIES
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows_ = str(tmp_path / "rows.jsonl")
    parts = {
        "cross": {"type": "teachers.CrossEncoder", "checkpoint": str(tiny_bert(num_labels=1))},
        "bi": {"type": "students.BiEncoder", "checkpoint": str(tiny_bert(seed=2))},
    }
    both = {"type": "teachers.Ensemble", "of": ["cross", "bi"]}
    listed = {"type": "distill.objectives.SampledSoftmax", "temperature": 1.0, "in_batch": False}
    shared = {
        "data": {"type": "distill.data.Groups", "train": rows_, "test": rows_},
        "train": {"steps": 4, "batch_size": 3, "learning_rate": 0.05, "mixed_precision": "no"},
        "evaluate": {"metrics": ["MAP"]},
    }
    first = {
        **shared,
        "name": "weights",
        "models": {**parts, "all": {**both, "weights": "learned", "train": True}},
        "losses": {"labels": {**listed, "to": "all"}},
        "keep": "all",
    }
    second = {
        **shared,
        "name": "taught",
        "models": {
            "student": parts["bi"] | {"layers": 1},
            **parts,
            "all": {**both, "checkpoint": {"run": str(tmp_path / "weights.yaml")}},
        },
        "losses": {"order": {"type": "distill.objectives.ScoreKL", "from": "all", "to": "student"}},
    }
    for recipe in (first, second):
        (tmp_path / f"{recipe['name']}.yaml").write_text(json.dumps(recipe))
    runs = Runs(tmp_path / "runs")
    assert runs.check(runs.load(tmp_path / "taught.yaml")).costs()  # before the other recipe was run
    folder = runs.run(runs.load(tmp_path / "taught.yaml"))
    measured = json.loads((folder / "metrics.json").read_text())["models"]
    assert measured.keys() == {"student", "cross", "bi", "all"} and "MAP" in measured["all"]["metrics"]
    learnt = open_model("weights", tmp_path / "runs")
    assert learnt.logits.abs().min() > 0 and learnt.logits.sum().abs() < 1e-6
    assert "open_model" in (tmp_path / "runs" / "weights" / "README.md").read_text()
    assert isinstance(open_model("taught", tmp_path / "runs"), BiEncoder)


def test_negatives_are_checked_by_an_ensemble_and_mined_anew_when_a_part_changes(models, tiny_bert):
    parts = {"bi": BiEncoder(tiny_bert(seed=2)), "cross": models["cross"]}
    nodes = {
        "student": Vectors(),
        **parts,
        "all": Ensemble(parts),
        "here": Ensemble(parts, routes={"x": ["bi"]}),
    }
    graph = DistillationGraph(nodes, [], ["student"])
    sampler = BM25Negatives(1, top=2, checked_by="all", strata=2)
    assert not list(sampler.problems(graph, judged()))
    before = sampler._state(graph)
    with torch.no_grad():
        next(parts["bi"].parameters()).add_(1)
    assert sampler._state(graph) != before
    routed = BM25Negatives(1, top=2, checked_by="here", strata=2)
    assert [*routed.problems(graph, judged())] == [
        "checked_by: 'here' (Ensemble) needs more than a pair of texts to score it."
    ]
    trained = DistillationGraph(nodes, [], ["student", "bi"])
    assert sampler._learns(trained) and not sampler._learns(graph)
