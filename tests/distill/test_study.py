"""A study's recipes: what a variant drops and sets, what all share, and every mistake in one go."""

import json
import re

import pytest

from distill.equal_runs import OF_ITS_OWN
from distill.errors import RecipeError
from distill.recipe import load_recipe, study_names
from distill.run import Runs
from distill.study import cells_of, compared_with, is_study, load_study, recipes_of

KL = {"type": "distill.objectives.ScoreKL", "from": "cross", "to": "student"}
RECIPE = {
    "name": "mine",
    "data": {"type": "distill.data.Groups", "train": "train.jsonl"},
    "models": {
        "student": {"type": "students.BiEncoder", "checkpoint": "small"},
        "cross": {"type": "teachers.CrossEncoder", "checkpoint": "large"},
    },
    "losses": {
        "labels": {"type": "distill.objectives.SampledSoftmax", "to": "student"},
        "order": {**KL, "temperature": 0.05},
    },
    "train": {"epochs": 2},
    "evaluate": {"metrics": ["MAP", "nDCG@10"]},
    "baseline": True,
    "search": ["a wing"],
}


@pytest.fixture
def write(tmp_path):
    """Writes the recipe and a study of it, and returns the study's path."""

    def write(**changes):
        (tmp_path / "mine.yaml").write_text(json.dumps(RECIPE))
        study = {
            "recipe": str(tmp_path / "mine.yaml"),
            "baseline": "alone",
            "seeds": [1, 2],
            "variants": {"alone": {"drop": ["losses.order", "models.cross"]}, "taught": {}},
        } | changes
        path = tmp_path / "study.yaml"
        path.write_text(json.dumps({key: value for key, value in study.items() if value is not None}))
        return path

    return write


def load(path, *overrides):
    return Runs().load_study(path, overrides)


def mistakes(path, *overrides):
    with pytest.raises(RecipeError) as error:
        load(path, *overrides)
    return str(error.value)


def test_a_variant_drops_and_sets_and_leaves_the_others_as_they_are(write):
    variants = {
        "alone": {"drop": ["losses.order", "models.cross"]},
        "taught": {},
        "hot": {"set": {"losses.order.temperature": 2, "train.learning_rate": 1}},
        "other": {"set": {"losses.order": KL}},
    }
    recipes = recipes_of(load(write(variants=variants))).variants
    assert recipes["", "alone"].losses.keys() == {"labels"} and "cross" not in recipes["", "alone"].models
    assert recipes["", "taught"].losses == RECIPE["losses"]
    assert recipes["", "hot"].losses["order"] == {**KL, "temperature": 2}
    assert (recipes["", "hot"].train.learning_rate, recipes["", "taught"].train.learning_rate) == (1, 2e-5)
    assert recipes["", "other"].losses["order"] == KL  # a value is set whole: what it had before is gone


def test_the_cells_are_alike_but_for_variant_and_seed(write):
    study = load(write())
    cells = cells_of(study, recipes_of(study), {("", "alone"): 7, ("", "taught"): 7})
    assert [(cell.variant, cell.seed) for cell in cells] == [
        ("alone", 1), ("taught", 1), ("alone", 2), ("taught", 2),
    ]  # fmt: skip
    assert [cell.recipe.name for cell in cells][:2] == ["study/alone/seed1", "study/taught/seed1"]
    for cell in cells:
        assert (cell.recipe.train.seed, cell.recipe.train.steps) == (cell.seed, 7)
        assert cell.recipe.baseline is False and cell.recipe.search == []
    assert [cell.recipe.evaluate.teachers for cell in cells] == [True, True, False, False]


def test_data_sets_are_other_recipes_or_changes_of_one(write, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps({**RECIPE, "train": {"epochs": 9}}))
    study = load(write(data={"one": {"set": {"train.batch_size": 5}}, "two": {"recipe": str(other)}}))
    recipes = recipes_of(study)
    assert recipes.plain["one"].train.batch_size == 5 and recipes.plain["two"].train.batch_size == 32
    assert (recipes.plain["one"].train.epochs, recipes.variants["two", "alone"].train.epochs) == (2, 9)
    cells = cells_of(study, recipes, dict.fromkeys(recipes.variants, 3))
    assert len(cells) == 8 and cells[0].recipe.name == "study/one/alone/seed1"


def test_a_variant_may_have_a_baseline_of_its_own(write):
    six = {"set": {"models.student.layers": 6}}
    study = load(write(variants={"alone": {}, "six": six, "six_taught": {**six, "against": "six"}}))
    assert [compared_with(study, name) for name in study.variants] == [None, "alone", "six"]


def test_overrides_are_of_the_study_and_below_set_of_the_recipe(write):
    study = load(
        write(),
        "seeds=[5]",
        "set.train.epochs=3",
        "variants.taught.set.losses.order.temperature=0.5",
        "name=x/y",
    )
    recipes = recipes_of(study)
    assert (study.name, study.seeds) == ("x/y", [5])
    assert {recipe.train.epochs for recipe in recipes.variants.values()} == {3}
    assert recipes.variants["", "taught"].losses["order"]["temperature"] == 0.5
    said = mistakes(write(), "train.epochs=3")
    assert "'train' is a key of the recipe; for all variants it is set by set.train.epochs=" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"recipe": "text/wikiqa_studnt"},
            "recipe: there is no recipe .* Did you mean 'text/wikiqa_student'?",
        ),
        ({"recipe": "studies/text_methods"}, "is a study itself; name a recipe"),
        (
            {"baseline": "alon"},
            "baseline: there is no variant 'alon'; there are alone, taught. Did you mean 'alone'?",
        ),
        (
            {"metrics": ["MAPP"]},
            "'MAPP' of the study is not measured; evaluate.metrics are MAP, .*mean 'MAP'?",
        ),
        ({"seeds": [1, 1]}, "a seed stands twice"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"variants": {"alone": {}}}, "variants: Dictionary should have at least 2 items"),
        ({"variants": {"alone": {}, "a/b": {}}}, "the name 'a/b' becomes a folder"),
        ({"variants": {"alone": {}, "Alone": {}}}, "alone and Alone are one name to some file systems"),
        ({"name": "../up"}, "the name becomes a folder below the runs"),
        ({"set": {"losses.order.temprature": 1}}, "losses.order: ScoreKL has no argument 'temprature'"),
        ({"set": {"train.minutes": 3}}, "train.minutes cuts the steps by the speed of each run"),
        ({"set": {"train.patience": 2}}, "train.patience ends a training .* set train.patience to null"),
        ({"set": {"evaluate.metrics": []}}, "evaluate.metrics: none are named"),
    ],
)
def test_each_mistake_says_what_would_be_right(changes, said, write):
    assert re.search(said, mistakes(write(**changes)))


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ({"dorp": []}, ".dorp: there is no such key; known are drop, set, against. Did you mean 'drop'?"),
        (
            {"drop": ["losses.ordr"]},
            ".drop: there is no 'losses.ordr' in the recipe; there are losses.labels, losses",
        ),
        ({"drop": ["losses.ordr"]}, "losses.order. Did you mean 'losses.order'?"),
        ({"drop": ["loses.order"]}, ".drop: there is no 'loses.order' in the recipe; there are name, data"),
        ({"drop": ["models.cross"]}, ": losses.order.from: there is no model 'cross'"),
        ({"set": {"train.epoks": 1}}, ": train.epoks: there is no such key; known are epochs"),
        ({"set": {"name.x": 1}}, ".set: 'name.x': 'name' is not a mapping"),
        ({"against": "x"}, ".against: a variant cannot be compared with itself"),
        ({"against": "y"}, ".against: there is no variant 'y'; there are alone, x."),
    ],
)
def test_each_mistake_of_a_variant_names_it(variant, said, write):
    assert said in mistakes(write(variants={"alone": {}, "x": variant}))
    assert "variants.x" in mistakes(write(variants={"alone": {}, "x": variant}))


def test_all_mistakes_come_together_and_each_once(write):
    bad = {"drop": ["losses.nothing"], "set": {"losses.order.temprature": 1}}
    said = mistakes(write(variants={"alone": bad, "x": bad}, baseline="y", metrics=["AP"])).splitlines()
    assert len(said) == len(set(said))
    for words in (
        "baseline: there is no",
        "alone.drop",
        "x.drop",
        "alone: losses.order",
        "x: losses.order",
        "'AP'",
    ):
        assert sum(words in line for line in said) == 1, words


def test_what_is_wrong_in_the_recipe_is_said_of_it_and_not_of_its_variants(write, monkeypatch):
    monkeypatch.setitem(RECIPE["train"], "epochs", -1)
    (line,) = mistakes(write()).splitlines()
    assert "mine.yaml: train.epochs: Input should be greater than 0" in line and "variants" not in line


def test_two_variants_with_one_name_are_refused(write):
    path = write()
    path.write_text("recipe: quickstart\nbaseline: a\nvariants:\n  a: {}\n  b: {}\n  a: {}\n")
    assert "duplicate key" in mistakes(path) and "line 6" in mistakes(path)


def test_a_recipe_and_a_study_are_told_apart(write, tmp_path):
    assert is_study(write()) and not is_study(tmp_path / "mine.yaml")
    assert "is a recipe, not a study" in mistakes(tmp_path / "mine.yaml")
    assert "is a recipe, not a study" in mistakes("quickstart")
    assert "there is no study 'studies/text_method'. Did you mean 'studies/text_methods'?" in mistakes(
        "text_method"
    )
    with pytest.raises(RecipeError, match="is a study of several variants; run it by `distill ablate"):
        Runs().load(tmp_path / "study.yaml")


@pytest.mark.parametrize("name", study_names())
def test_our_studies_have_no_mistakes_of_names(name):
    study = load(name)
    assert study.name == name and load(name.removeprefix("studies/")) == study
    assert study_names()


MEASURED_BY = {  # whose figure in recipes/README.md is that of a study's variant
    "text_methods": {
        "text/endx_joint": "endx_joint",
        "text/endx_two_stage": "endx_two_stage",
        "text/ernie_search": "ernie_search",
        "text/trmd": "trmd",
        "text/trmd_colbert": "trmd_colbert",
        "text/wikiqa_cadet": "cadet",
        "text/wikiqa_cl_drd": "cl_drd",
        "text/wikiqa_gist": "gist",
        "text/wikiqa_lead": "lead",
        "text/wikiqa_leaf": "leaf",
        "text/wikiqa_rocketqav2": "rocketqav2",
        "text/wikiqa_stella": "stella",
        "text/wikiqa_stratified": "stratified",
        "text/wikiqa_tas_balanced": "tas_balanced",
    },
    "single_vs_multiple_teachers": {"text/wikiqa_two_teachers": "learned"},
    "pairs_mrpc": {"text/virt_mrpc": "virt", "text/dual_encoder_mrpc": "dual_encoder"},
    "pairs_sick": {"text/virt_sick": "virt"},
}


def test_the_cascade_has_its_seven_arrows():
    """ERNIE-Search: three task losses, three steps of scores, one of words."""
    recipe = load_recipe("text/ernie_search")
    ways = [(one.get("from"), one["to"], one["type"].split(".")[-1]) for one in recipe.losses.values()]
    assert sorted(ways, key=str) == sorted(
        [
            *((None, model, "SampledSoftmax") for model in ("student", "colbert", "cross")),
            ("cross", "colbert", "ScoreKL"),
            ("colbert", "student", "ScoreKL"),
            ("cross", "student", "ScoreKL"),
            ("cross", "colbert", "AttentionKL"),
        ],
        key=str,
    )
    assert [name for name, node in recipe.models.items() if node.get("train", name == recipe.keep)] == [
        "student",
        "cross",
        "colbert",
    ]
    assert recipe.models["colbert"]["of"] == "student"


@pytest.mark.parametrize("study", MEASURED_BY)
def test_a_recipe_that_a_study_measures_is_the_studys_variant(study):
    variants = recipes_of(load_study(study)).variants
    for recipe, variant in MEASURED_BY[study].items():
        assert load_recipe(recipe).model_dump(exclude=OF_ITS_OWN) == variants["", variant].model_dump(
            exclude=OF_ITS_OWN
        )
