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


def test_the_store_is_in_the_cache_unless_it_is_said_where(monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", "/data/cache")
    monkeypatch.delenv("DISTILL_STORE", raising=False)
    assert paths.store_folder() == Path("/data/cache/store")
    monkeypatch.setenv("DISTILL_STORE", "~/store")
    assert paths.store_folder() == Path.home() / "store"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file"
    with paths.replacing(path) as new:
        new.write_text("old")
        assert not path.exists()
    with pytest.raises(ValueError, match="no"), paths.replacing(path) as new:
        new.write_text("half")
        raise ValueError("no")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("replacing", [paths.replacing, paths.replacing_folder])
def test_what_a_killed_process_left_is_swept_away_but_not_what_is_being_written(replacing, tmp_path):
    left, another = tmp_path / ".it.0123abcd.tmp", tmp_path / ".other.0123abcd.tmp"
    for path in (left, another):
        path.mkdir() if replacing is paths.replacing_folder else path.write_text("half")
    with replacing(tmp_path / "it") as one:
        assert not left.exists()
        with replacing(tmp_path / "it") as two:
            assert one.exists() and two.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [another.name, "it"]
