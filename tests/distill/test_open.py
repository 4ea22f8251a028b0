"""A saved model is opened as what its folder says it is."""

from __future__ import annotations

import json
import shutil

import pytest

from distill.errors import RecipeError, UserError
from distill.open import CROSS_ENCODER, ENCODER, class_of, model_folder, open_model


def test_transformers_folders_open_by_their_architecture(tiny_bert):
    assert class_of(tiny_bert(layers=1)) == ENCODER
    assert class_of(tiny_bert(layers=1, num_labels=1)) == CROSS_ENCODER
    assert type(open_model(tiny_bert(layers=1))).__name__ == "BiEncoder"
    assert open_model(tiny_bert(layers=1, num_labels=3)).classes == 3


def test_what_was_saved_here_opens_as_what_it_was(tiny_bert, tmp_path):
    for place in (tiny_bert(layers=1), tiny_bert(layers=1, num_labels=1)):
        model = open_model(place)
        model.save_pretrained(tmp_path / "saved")
        assert type(open_model(tmp_path / "saved")) is type(model)
        shutil.rmtree(tmp_path / "saved")


def test_settings_of_sentence_transformers_say_more_than_the_architecture(tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert(layers=1), tmp_path / "saved")
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "CrossEncoder"}))
    assert class_of(folder) == CROSS_ENCODER


def test_a_run_is_opened_by_name_or_folder_as_the_model_it_kept(tiny_bert, tmp_path):
    run = tmp_path / "runs" / "text" / "mine"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("keep: cross\n")
    with pytest.raises(UserError, match="not finished"):
        model_folder("text/mine", tmp_path / "runs")
    shutil.copytree(tiny_bert(layers=1, num_labels=1), run / "cross")
    for spec in ("text/mine", run, run / "cross"):
        assert model_folder(spec, tmp_path / "runs") == run / "cross"


def test_what_is_nowhere_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="neither an existing folder nor a name on the Hub"):
        open_model(tmp_path / "nothing here")
