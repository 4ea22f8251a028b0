from pathlib import Path

import pytest

from distill import paths
from distill.errors import DataError


def test_recipes_are_found_in_a_checkout_and_in_an_installed_package(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "distill" / "paths.py"))
    (tmp_path / "recipes").mkdir()
    assert paths.recipes_folder() == tmp_path / "recipes"
    (tmp_path / "distill" / "recipes").mkdir(parents=True)  # an installed package's own come first
    assert paths.recipes_folder() == tmp_path / "distill" / "recipes"


def test_missing_recipes_are_one_clear_message(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "distill" / "paths.py"))
    with pytest.raises(DataError, match="recipes that come with Distill are missing"):
        paths.recipes_folder()


def test_the_recipes_of_this_checkout_are_found():
    assert paths.recipes_folder().is_dir()


@pytest.mark.parametrize(
    ("value", "folder"),
    [("/data/cache", Path("/data/cache")), ("~/kept", Path.home() / "kept")],
)
def test_the_cache_is_where_the_environment_says(value, folder, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", value)
    assert paths.cache_folder() == folder


@pytest.mark.parametrize("value", [None, ""])
def test_the_cache_is_in_the_home_folder_otherwise(value, monkeypatch):
    monkeypatch.delenv("DISTILL_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("DISTILL_CACHE", value)
    assert paths.cache_folder() == Path.home() / ".cache" / "distill"
