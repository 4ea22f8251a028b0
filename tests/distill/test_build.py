"""The builder: names and arguments are checked before anything is made; equal seeds make equal students."""

import re
import sys
from types import ModuleType

import pytest
import torch

from distill.build import Builder, reached
from distill.data import TextData
from distill.errors import RecipeError
from distill.recipe import check_recipe, load_recipe, recipe_names
from students import BiEncoder

LABELS = {"type": "distill.objectives.SampledSoftmax", "to": "student"}
EMBEDDINGS = {"type": "distill.objectives.EmbeddingMatch", "from": "teacher", "to": "student"}

KL = "distill.objectives.ScoreKL"


@pytest.fixture
def recipe(tiny_bert, tmp_path):
    """A recipe of two tiny models on three rows; keyword arguments replace its sections."""
    path = tmp_path / "rows.jsonl"
    rows = [
        '{"query": "a wing", "candidate": "air", "label": 1}',
        '{"query": "a wing", "candidate": "sea", "label": 0}',
    ]
    path.write_text("\n".join(rows))

    def make(**changes):
        model = {"type": "students.BiEncoder", "checkpoint": str(tiny_bert())}
        document = {
            "name": "mine",
            "data": {"type": "distill.data.Groups", "train": str(path)},
            "models": {"student": model, "teacher": {**model, "layers": 1}},
            "losses": {"labels": LABELS, "embeddings": EMBEDDINGS},
            **changes,
        }
        return check_recipe(document, "")

    return make


def student(tiny_bert, **arguments):
    return {"type": "students.BiEncoder", "checkpoint": str(tiny_bert()), **arguments}


def mistakes(recipe, **builder) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Builder(**builder).check(recipe)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_ours_passes_the_first_look(name):
    Builder().check(load_recipe(name))


def test_there_are_recipes_of_ours():
    assert len(recipe_names()) >= 3


def test_a_node_is_built_of_another_by_its_name(recipe, tiny_bert):
    """What the recipe names is a node; what the class gets is the model, the very one that learns."""
    models = {
        "student": student(tiny_bert),
        "bridge": {"type": "teachers.ColBERT", "of": "student", "train": True, "dim": 8},
    }
    losses = {"labels": {**LABELS, "to": "bridge"}, "down": {**EMBEDDINGS, "type": KL, "from": "bridge"}}
    given = recipe(models=models, losses=losses)
    Builder().check(given)
    graph = Builder().graph(given)
    graph.check({"data": True})
    assert graph.nodes["bridge"].below == (graph.nodes["student"],) and graph.order() == ["student", "bridge"]
    wrong = {**models, "bridge": {**models["bridge"], "of": "studnet"}}
    assert mistakes(recipe(models=wrong, losses=losses)) == [
        "models.bridge.of: there is no model 'studnet'. Did you mean 'student'?"
    ]


def test_a_recipe_becomes_a_graph(recipe):
    builder, given = Builder(), recipe(train={"batch_size": 7, "seed": 3})
    builder.check(given)
    graph = builder.graph(given)
    graph.check({"data": True})
    assert list(graph.nodes) == ["student", "teacher"] and graph.trained == {"student"}
    assert [(a.name, a.head, a.tail, a.weight, a.detach) for a in graph.arrows] == [
        ("labels", "student", None, 1.0, True),
        ("embeddings", "student", "teacher", 1.0, True),
    ]
    data = builder.data(given)
    assert isinstance(data["data"], TextData)
    source = builder.source(given, data, ["data"])
    assert (source.batch_size, source.seed, source.name) == (7, 3, "data")


def test_arrows_take_weight_detach_and_data(recipe):
    loss = {**EMBEDDINGS, "weight": [[0, 0], [1, 0.5]], "detach": False, "data": "data", "distance": "mse"}
    (arrow,) = Builder().graph(recipe(losses={"embeddings": loss})).arrows
    assert (arrow.weight, arrow.detach, arrow.data) == ([[0, 0], [1, 0.5]], False, ("data",))
    assert arrow.objective.distance == "mse"


def test_train_says_who_learns(recipe, tiny_bert):
    models = {"student": student(tiny_bert), "teacher": student(tiny_bert, train=True)}
    assert Builder().models(recipe(models=models))[1] == {"student", "teacher"}
    models = {"student": student(tiny_bert, train=False), "teacher": student(tiny_bert)}
    assert Builder().models(recipe(models=models, keep="teacher"))[1] == {"teacher"}


# what the first look refuses

MISTAKES = {
    "data without a type": (
        {"data": {"train": {"train": "x"}}},
        "data(.train)?.type: this key is required; it names a class, such as distill.data.Retrieval",
    ),
    "unknown class": (
        {"losses": {"labels": {**LABELS, "type": "distill.objectives.SampledSoftmaxx"}}},
        "losses.labels.type: distill.objectives has no 'SampledSoftmaxx'; it has .* mean 'SampledSoftmax'?",
    ),
    "unknown module": (
        {"losses": {"labels": {**LABELS, "type": "distill.objective.ScoreKL"}}},
        "losses.labels.type: cannot import 'distill.objective' of 'distill.objective.ScoreKL'",
    ),
    "a package": (
        {"losses": {"labels": {**LABELS, "type": "distill"}}},
        "losses.labels.type: 'distill' is a package; name a class in it",
    ),
    "a stranger's code": (
        {"losses": {"labels": {**LABELS, "type": "os.system"}}},
        "losses.labels.type: 'os.system' is outside of distill, students, teachers.* pass --trust os",
    ),
    "a function of ours": (
        {"losses": {"labels": {**LABELS, "type": "distill.hub.push_to_hub"}}},
        "losses.labels.type: 'distill.hub.push_to_hub' is not a class that a recipe can make",
    ),
    "a class of others within ours": (
        {"losses": {"labels": {**LABELS, "type": "distill.build.Path"}}},
        "losses.labels.type: 'distill.build.Path' is not a class",
    ),
    "a model for a loss": (
        {"losses": {"labels": {**LABELS, "type": "students.BiEncoder"}}},
        "losses.labels.type: students.BiEncoder is no Objective, such as distill.objectives.ScoreKL",
    ),
    "a loss for data": (
        {"data": {"type": "distill.objectives.ScoreKL"}},
        "data.type: distill.objectives.ScoreKL is no DataSet",
    ),
    "misspelt argument": (
        {"losses": {"labels": {**LABELS, "temprature": 1}}},
        "losses.labels: SampledSoftmax has no argument 'temprature'; it takes .* Did you mean 'temperature'?",
    ),
    "no head": (
        {"losses": {"labels": {"type": "distill.objectives.SampledSoftmax"}}},
        "losses.labels.to: this key is required; it names the node that learns",
    ),
    "head misspelt": (
        {"losses": {"labels": {**LABELS, "to": "studnet"}}},
        "losses.labels.to: there is no model 'studnet'. Did you mean 'student'?",
    ),
    "tail misspelt": (
        {"losses": {"labels": LABELS, "e": {**EMBEDDINGS, "from": "teachers"}}},
        "losses.e.from: there is no model 'teachers'. Did you mean 'teacher'?",
    ),
    "nothing to keep": ({"keep": "pupil"}, "keep: there is no model 'pupil' to keep"),
    "in the baseline": (
        {"baseline": {"labels": {**LABELS, "too": 1}}},
        "baseline.labels: SampledSoftmax has no argument 'too'",
    ),
    "a name with a dot": (
        {"losses": {"my.labels": LABELS}},
        "losses.my.labels: the name 'my.labels' is taken, or holds a dot or a slash",
    ),
    "a name of torch": ({"losses": {"to": LABELS}}, "losses.to: the name 'to' is taken"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_the_first_look_names_the_mistake(case, recipe):
    changes, said = MISTAKES[case]
    (line,) = mistakes(recipe(**changes))
    assert re.search(said, line), line


def test_models_are_looked_at_too(recipe, tiny_bert):
    models = {
        "student": {"type": "students.BiEncoder", "poolling": "cls"},
        "a/b": student(tiny_bert),
        "checkpoints": student(tiny_bert),
        "copy": {"ref": "studnet"},
        "part": {"ref": "student.encoder"},
        "encoded": student(tiny_bert, encoder={"ref": "student.encodre"}),
        "whole": student(tiny_bert, encoder={"ref": "student"}),
        "below": student(tiny_bert, of="nobody"),
    }
    lines = mistakes(recipe(models=models, losses={"labels": LABELS}))
    expected = [
        "models.student: BiEncoder has no argument 'poolling'",
        "models.student.checkpoint: this key is required by BiEncoder",
        "models.a/b: the name 'a/b' is taken, or holds a dot or a slash",
        "models.checkpoints: the name 'checkpoints' is taken",
        "models.copy.ref: there is no model 'studnet' to refer to. Did you mean 'student'?",
        "models.part.ref: a model is a whole one; write `ref: student`",
        "models.encoded.encoder: 'student' does not share 'encodre'; it shares encoder. Did you",
        "models.whole.encoder: 'student' does not share ''; it shares encoder",
        "models.below: BiEncoder has no argument 'of'",
        "models.below.of: there is no model 'nobody'",
    ]
    for said in expected:
        assert any(line.startswith(said) for line in lines), (said, lines)
    assert len(lines) == len(expected)  # all at once, nothing else


def test_typed_arguments_are_looked_at_inside(recipe):
    data = {
        "type": "distill.data.Groups",
        "train": "x",
        "negatives": [
            {"type": "distill.data.RandomNegatives", "cout": 3},
            {"type": "distill.hub.atomic_write_text", "path": "x", "text": "y"},
        ],
    }
    first, second, *_ = mistakes(recipe(data=data))
    assert first.startswith("data.negatives[0]: RandomNegatives has no argument 'cout'")
    assert any("atomic_write_text' is not a class" in line for line in mistakes(recipe(data=data))), second


# what building refuses and does


def test_what_a_constructor_refuses_is_told_with_its_place(recipe):
    given = recipe(losses={"labels": {**LABELS, "temperature": 0}})
    with pytest.raises(RecipeError, match=r"losses.labels: temperature must be positive and finite, got 0"):
        Builder().graph(given)


def test_a_ref_is_the_same_object(recipe, tiny_bert):
    models = {
        "student": student(tiny_bert),
        "teacher": student(tiny_bert, encoder={"ref": "student.encoder"}, train=True),
        "again": {"ref": "student"},
    }
    built, trained = Builder().models(recipe(models=models))
    assert built["teacher"].encoder is built["student"].encoder
    assert built["again"] is built["student"] and trained == {"student", "teacher", "again"}


def test_models_that_refer_to_each_other_are_refused(recipe, tiny_bert):
    models = {
        "student": student(tiny_bert, encoder={"ref": "teacher.encoder"}),
        "teacher": student(tiny_bert, encoder={"ref": "student.encoder"}),
    }
    with pytest.raises(RecipeError, match="models: student -> teacher -> student refer to each other"):
        Builder().models(recipe(models=models))


def test_a_student_starts_alike_whatever_stands_beside_it(recipe, tiny_bert):
    """Else a student with a teacher and its baseline would differ before the first step."""

    def first_weights(losses=None, **changes):
        model = student(tiny_bert, dim=8)  # a random projection
        models = {"student": model, "teacher": student(tiny_bert), **changes.pop("models", {})}
        if changes.pop("last", False):
            models = dict(reversed(models.items()))
        graph = Builder().graph(recipe(models=models, train=changes), losses)
        return graph.nodes["student"].query_tower.dense[0][0].weight

    weights = first_weights(seed=1)
    others = [
        first_weights(seed=1, models={"third": student(tiny_bert, dim=4)}),
        first_weights(seed=1, last=True),
        first_weights({"labels": LABELS}, seed=1),
    ]
    assert all(torch.equal(weights, other) for other in others)
    assert not torch.equal(weights, first_weights(seed=2))


def test_other_losses_build_only_the_models_they_reach(recipe, tiny_bert):
    models = {
        "student": student(tiny_bert, encoder={"ref": "teacher.encoder"}),
        "teacher": student(tiny_bert, train=True),
        "far": student(tiny_bert),
    }
    given = recipe(models=models)
    assert list(reached(given, {"labels": LABELS})) == ["student", "teacher"]
    assert list(Builder().graph(given, {"labels": LABELS}).nodes) == ["student", "teacher"]


def test_a_run_stands_for_the_folder_it_leaves(recipe, tiny_bert):
    asked = []

    def folder_of(name):
        asked.append(name)
        return tiny_bert()

    models = {"student": {"type": "students.BiEncoder", "checkpoint": {"run": "text/mine"}}}
    given = recipe(models=models, losses={"labels": LABELS})
    Builder().check(given)
    built, _ = Builder(run_folder=folder_of).models(given)
    assert isinstance(built["student"], BiEncoder) and asked == ["text/mine"]
    with pytest.raises(RecipeError, match=r"models.student.checkpoint.run: 'text/mine' names a run"):
        Builder().models(given)


def test_a_package_is_imported_only_if_it_is_trusted(recipe, tiny_bert, monkeypatch):
    theirs = ModuleType("their_package")

    class Theirs(BiEncoder):
        def __init__(self, *, checkpoint):
            super().__init__(checkpoint)

    theirs.Theirs = Theirs
    monkeypatch.setitem(sys.modules, "their_package", theirs)
    models = {"student": {"type": "their_package.Theirs", "checkpoint": str(tiny_bert())}}
    given = recipe(models=models, losses={"labels": LABELS})
    assert "outside of" in mistakes(given)[0] and "--trust their_package" in mistakes(given)[0]
    Builder(trusted=["their_package"]).check(given)
    assert isinstance(Builder(trusted=["their_package"]).models(given)[0]["student"], Theirs)
    bare = recipe(models={"student": {"type": "their_package.Theirs"}}, losses={"labels": LABELS})
    (line,) = mistakes(bare, trusted=["their_package"])
    assert line == "models.student.checkpoint: this key is required by Theirs."


def test_several_data_sets_are_mixed_by_name(recipe, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "air"}\n{"text": "sea"}')
    judged = recipe().data
    texts = {"type": "distill.data.Texts", "path": str(tmp_path), "train": "texts.jsonl", "batch_size": 1}
    given = recipe(data={"judged": judged, "texts": texts})
    builder = Builder()
    builder.check(given)
    source = builder.source(given, builder.data(given), ["judged", "texts"])
    assert {source.batch(0, step).source for step in range(source.steps(0))} == {"judged", "texts"}
    assert source.steps(0) == 3  # one of the judged query, two of a text each
    given = recipe(data={"judged": {**judged, "repeat": 4}, "texts": texts})
    builder.check(given)
    assert builder.source(given, builder.data(given), ["judged", "texts"]).steps(0) == 4 + 2
    assert builder.source(given, builder.data(given), ["judged"]).steps(0) == 4  # of a baseline, say
    given = recipe(data={"judged": {**judged, "repeat": 0}, "texts": texts})
    with pytest.raises(RecipeError, match=r"data: judged\.repeat must be a whole number .* got 0"):
        builder.source(given, builder.data(given), ["judged", "texts"])


def test_a_recipe_without_a_train_split_is_refused(recipe):
    given = recipe()
    with pytest.raises(RecipeError, match="no arrow hears a data set with a train split"):
        Builder().source(given, Builder().data(given), [])
