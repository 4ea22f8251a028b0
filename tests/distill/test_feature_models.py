"""Folders of models over features: opened by what they say they are, indexed and searched by the command."""

import json

import polars as pl
import pytest
import torch

from distill.errors import UserError
from distill.hub import model_card, push_to_hub
from distill.index import Index
from distill.open import open_model
from students import TwoTower
from teachers import PrivilegedRanker
from tests.distill.workplace import distill
from tests.shop import fitted, items, public, users


@pytest.fixture(scope="module")
def features():
    return fitted()


@pytest.fixture(scope="module")
def saved(features, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "student"
    torch.manual_seed(3)
    TwoTower(features, dim=8).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """Items with a column that the model must not read and one that it does not know."""
    path = tmp_path_factory.mktemp("data") / "items.parquet"
    pl.DataFrame([{**item, "title": f"Item {i}"} for i, item in enumerate(items())]).write_parquet(path)
    return path


def test_opens_as_what_it_was(features, saved, tmp_path):
    model = open_model(saved)
    assert isinstance(model, TwoTower) and model.dim == 8
    PrivilegedRanker(features).save_pretrained(tmp_path / "ranker")
    assert isinstance(open_model(tmp_path / "ranker"), PrivilegedRanker)
    about = json.loads((tmp_path / "ranker" / "config.json").read_text())
    (tmp_path / "ranker" / "config.json").write_text(json.dumps({**about, "type": "os.system"}))
    with pytest.raises(UserError, match=r"holds a os\.system"):
        open_model(tmp_path / "ranker")


def test_items_are_indexed_and_a_user_is_answered(saved, catalogue):
    done = distill("index", saved, catalogue, "--id-column", "item_id", "--title-column", "title",
                   "--output", saved.parent / "index")  # fmt: skip
    assert done.code == 0 and "15 candidates, 8 dimensions" in done.out, done.err
    user = public(users())[4]
    model = open_model(saved)
    best = (model.encode_items(public(items())) @ model.encode_users(user)[0]).argsort(descending=True)
    for named in (saved.parent / "index", saved):  # an index, or the model beside it
        done = distill("search", named, "--user", json.dumps(user), "-k", 3)
        assert done.code == 0, done.err
        first, *hits = done.out.splitlines()
        assert json.loads(first) == user
        assert [hit.split()[2] for hit in hits] == [f"i{i}" for i in best[:3].tolist()]
        assert hits[0].endswith(f"Item {best[0]}")
    assert len(Index.load(saved.parent / "index")) == 15
    wrong = {
        json.dumps(user)[:-3]: "--user: this is no JSON",
        "[1]": "a user is a JSON object",
        json.dumps({**user, "loyalty": "l1"}): "the column 'loyalty': it is privileged",
        json.dumps({"user_id": "u1"}): "there is no 'country'",
    }
    for given, message in wrong.items():
        done = distill("search", saved, "--user", given)
        assert done.code == 2 and message in done.err
    done = distill("search", saved, "a text")
    assert done.code == 2 and "asked with --user JSON" in done.err


def test_a_catalogue_without_a_column_is_refused(saved, tmp_path):
    pl.DataFrame(items()).drop("price").write_parquet(tmp_path / "items.parquet")
    done = distill(
        "index", saved, tmp_path / "items.parquet", "--id-column", "item_id", "--output", tmp_path / "i"
    )
    assert done.code == 2 and "there is no column 'price'" in done.err and not (tmp_path / "i").exists()


def test_its_card_says_how_it_is_used(features, saved):
    recipe = {"models": {"student": {"type": "students.TwoTower"}}, "losses": {}}
    card = model_card("me/shop", "recommender", recipe, "student", {"student": {"HitRate@10": 0.5}})
    assert 'model = TwoTower.from_pretrained("me/shop")' in card
    assert "users = model.encode_users(rows)" in card and "library_name: distill" in card


def test_goes_to_the_hub_whole(saved, monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token=None): ...

        def create_repo(self, repo_id, **others):
            return type("Address", (str,), {"repo_id": repo_id})(f"https://hub/{repo_id}")

        def upload_folder(self, folder_path, **others):
            sent["files"] = {
                p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*") if p.is_file()
            }

    monkeypatch.setattr("distill.hub.card.HfApi", Api)
    assert push_to_hub(saved, "me/shop") == "https://hub/me/shop"
    assert {"config.json", "model.safetensors", "features/features.json"} < sent["files"]
    assert "features/vocabulary/item_id.arrow" in sent["files"]
    whole = sent.pop("files")
    assert TwoTower.from_pretrained(saved).push_to_hub("me/shop") == "https://hub/me/shop"
    assert sent["files"] == whole - {"README.md"}
