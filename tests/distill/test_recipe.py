"""A recipe is read as YAML 1.2, overridden by key, and its mistakes are told together and by name."""

import copy

import pytest

from distill.errors import RecipeError
from distill.recipe import check_recipe, load_recipe, read_yaml, recipe_names

DOCUMENT = {
    "name": "mine",
    "data": {"type": "distill.data.Groups", "train": "rows.parquet"},
    "models": {"student": {"type": "students.BiEncoder", "checkpoint": "small"}},
    "losses": {"labels": {"type": "distill.objectives.SampledSoftmax", "to": "student"}},
}
TEXT = """
data: {type: distill.data.Groups, train: rows.parquet}
models:
  student: {type: students.BiEncoder, checkpoint: small}
losses:
  labels: {type: distill.objectives.SampledSoftmax, to: student}
train: {epochs: 2, learning_rate: 2e-5, accumulate: 2}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


def mistakes(**changes) -> list[str]:
    """What is said of the document with dotted keys changed; None takes a key away."""
    document = copy.deepcopy(DOCUMENT)
    for key, value in changes.items():
        *path, last = key.split("__")
        at = document
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
        if value is None:
            del at[last]
    with pytest.raises(RecipeError) as caught:
        check_recipe(document, "mine.yaml")
    return str(caught.value).splitlines()


def test_a_file_is_named_after_itself_and_has_defaults(file):
    recipe = load_recipe(file)
    assert (recipe.name, recipe.keep, recipe.baseline) == ("mine", "student", False)
    assert (recipe.train.epochs, recipe.train.learning_rate, recipe.train.batch_size) == (2, 2e-5, 32)
    assert list(recipe.data_sets) == ["data"]


def test_several_data_sets_are_kept_by_name():
    several = {"judged": DOCUMENT["data"], "texts": {"type": "distill.data.Texts", "train": "x"}}
    assert list(check_recipe({**DOCUMENT, "data": several}, "").data_sets) == ["judged", "texts"]


# overrides


def test_an_override_sets_a_key_however_deep(file):
    recipe = load_recipe(
        file,
        [
            "train.learning_rate=1e-3",
            "losses.labels.temperature=0.1",
            "evaluate.metrics=[nDCG@10, MAP]",
            "losses.vectors={type: distill.objectives.EmbeddingMatch, from: teacher, to: student}",
            "train.patience=3",
            "name=a=b",
            "models.student.checkpoint=",
        ],
    )
    assert recipe.train.learning_rate == 1e-3 and recipe.train.epochs == 2
    assert recipe.losses["labels"]["temperature"] == 0.1
    assert recipe.evaluate.metrics == ["nDCG@10", "MAP"]
    assert recipe.losses["vectors"]["from"] == "teacher"
    assert (recipe.train.patience, recipe.name) == (3, "a=b")
    assert recipe.models["student"]["checkpoint"] is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epochs", "'train.epochs' is not an override; write key=value"),
        ("=3", "is not an override"),
        ("train.epochs.more=3", "'epochs' is not a mapping in this recipe"),
        ("train.epochs=[1", "is not valid YAML"),
        ("train.epoch=3", "train.epoch: there is no such key; .* Did you mean 'epochs'?"),
        ("train.epochs=many", "train.epochs: .* valid number.*, got 'many'"),
    ],
)
def test_an_override_that_cannot_be_is_refused(file, override, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(file, [override])


# YAML


def test_yaml_is_read_in_the_sense_of_1_2(tmp_path):
    """In YAML 1.1 `on` is true, `2e-5` a string and 12:30 a number: all three cost somebody a run."""
    path = tmp_path / "x.yaml"
    path.write_text("{a: on, b: 2e-5, c: no, d: 12:30, e: 010, f: yes, g: true, h: 1_000, i: null}")
    assert read_yaml(path) == {
        "a": "on", "b": 2e-5, "c": "no", "d": "12:30", "e": 10, "f": "yes", "g": True, "h": 1000, "i": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2", "duplicate key"),
        ("a: [1", "x.yaml"),
        ("- 1\n- 2", "must be a mapping with the keys name, data, models"),
        ("", "must be a mapping"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: *b", "undefined alias"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused(tmp_path, text, said):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said):
        read_yaml(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(RecipeError, match=r"x\.yaml"):
        read_yaml(path)


# the schema


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__learning_rat": 1}, "mine.yaml: train.learning_rat: there is no such key; known are epochs"),
        ({"train__learning_rat": 1}, "Did you mean 'learning_rate'?"),
        ({"loses": {}}, "mine.yaml: loses: there is no such key; known are name, data, models, losses"),
        ({"loses": {}}, "Did you mean 'losses'?"),
        ({"data": None}, "mine.yaml: data: this key is required"),
        ({"data": {}}, "data: a recipe needs at least one"),
        ({"models": {}}, "models: a recipe needs at least one"),
        ({"losses": {}}, "losses: a recipe needs at least one"),
        ({"train__epochs": 0}, "train.epochs: Input should be greater than 0, got 0"),
        ({"train__epochs": float("inf")}, "train.epochs: Input should be a finite number"),
        ({"train__learning_rate": float("nan")}, "train.learning_rate: Input should be a finite number"),
        ({"train__warmup": 1.5}, "train.warmup: Input should be less than or equal to 1, got 1.5"),
        ({"train__schedule": "linnear"}, "train.schedule: Input should be 'linear', 'cosine' or 'constant'"),
        ({"train__mixed_precision": "int8"}, "train.mixed_precision: Input should be 'auto', 'no', 'bf16'"),
        ({"train__learning_rates": {"student": -1}}, "train.learning_rates.student: Input should be greater"),
        ({"models__student": "small"}, "models.student: Input should be a valid dictionary"),
        ({"evaluate__metrics": "MAP"}, "evaluate.metrics: Input should be a valid list"),
        ({"name": "/etc"}, "name: the name becomes a folder below the runs"),
        ({"name": "../elsewhere"}, "name: the name becomes a folder below the runs"),
        ({"name": ""}, "name: the name becomes a folder below the runs"),
    ],
)  # fmt: skip
def test_each_mistake_of_the_schema_names_its_key_and_what_is_allowed(changes, said):
    (line,) = mistakes(**changes)
    assert said in line


def test_all_mistakes_of_the_schema_come_together():
    lines = mistakes(train__epochs=-1, train__sed=3, losses={}, evaluate__rerank="many")
    keys = [line.split(": ")[1] for line in lines]
    assert {"train.epochs", "train.sed", "evaluate.rerank"} <= set(keys)


def test_further_mistakes_are_told_along():
    with pytest.raises(RecipeError, match="odd") as caught:
        check_recipe(DOCUMENT, "mine.yaml", lambda recipe: ["models.student: odd"])
    assert "models.student: odd" in str(caught.value)


def test_a_recipe_that_is_not_there_is_looked_for_nearby(tmp_path):
    with pytest.raises(RecipeError, match=r"there is no recipe 'quickstar'\. Did you mean 'quickstart'\?"):
        load_recipe("quickstar")
    with pytest.raises(RecipeError, match="there is no recipe file"):
        load_recipe(tmp_path / "none.yaml")


def test_our_recipes_are_found_by_name_and_named_after_it():
    names = recipe_names()
    assert "quickstart" in names and len(names) > 2
    for name in names:
        assert load_recipe(name).name == name
