import json
import os
import sys

import pytest
import torch
from huggingface_hub import ModelCard, RepoUrl
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file

from distill.errors import DataError, RecipeError, UserError
from distill.hub import (
    atomic_folder,
    atomic_write_text,
    card,
    model_card,
    push_to_hub,
    read_cross_encoder,
    read_encoder,
    resolve_checkpoint,
)


def write(folder, **files):
    """JSON files by path; ``__`` stands for a folder, a name without ending gets .json."""
    for name, content in files.items():
        path = folder / (name.replace("__", "/") + ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def saved(tmp_path):
    """A folder that looks like an encoder of sentence-transformers; there are no weights in its file."""
    folder = tmp_path / "saved"
    write(folder, config={"model_type": "bert", "max_position_embeddings": 512})
    save_file({}, folder / "model.safetensors")
    kinds = ["Transformer", "Pooling", "Normalize"]
    write(folder, modules=[entry(i, kind) for i, kind in enumerate(kinds)])
    return write(folder, **{"1_Pooling__config": {"pooling_mode": "cls"}, "sentence_bert_config": {}})


def entry(place, kind, package="sentence_transformers.models"):
    path = "" if kind == "Transformer" else f"{place}_{kind}"
    return {"idx": place, "name": str(place), "path": path, "type": f"{package}.{kind}"}


def modules(*kinds):
    return [entry(place, kind) for place, kind in enumerate(kinds)]


# files


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "run" / "student"
    for content in ("first", "second"):
        with atomic_folder(target) as new:
            (new / content).write_text(content)
            assert not (target / content).exists()
        assert [p.name for p in target.iterdir()] == [content]
    assert [p.name for p in target.parent.iterdir()] == ["student"]


def test_a_failed_write_leaves_the_old_folder_and_no_litter(tmp_path):
    target = write(tmp_path / "student", config={"old": True})
    with pytest.raises(RuntimeError, match="disk full"), atomic_folder(target) as new:
        (new / "config.json").write_text("half")
        raise RuntimeError("disk full")
    assert json.loads((target / "config.json").read_text()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["student"]


def test_if_the_last_rename_fails_the_old_folder_comes_back(tmp_path, monkeypatch):
    target = write(tmp_path / "student", config={"old": True})
    rename = type(target).rename

    def fail(self, to):
        if self.name.endswith(".tmp"):
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(type(target), "rename", fail)
    with pytest.raises(OSError, match="no"), atomic_folder(target):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    assert (target / "config.json").exists()


def test_a_folder_cannot_replace_a_file(tmp_path):
    (tmp_path / "student").write_text("notes")
    with pytest.raises(DataError, match="is a file"), atomic_folder(tmp_path / "student"):
        pass
    assert (tmp_path / "student").read_text() == "notes"


def test_text_is_replaced_whole_with_ordinary_permissions(tmp_path):
    path, plain = tmp_path / "deep" / "README.md", tmp_path / "plain"
    plain.write_text("")
    atomic_write_text(path, "old")
    atomic_write_text(path, "neu ä")
    assert path.read_text(encoding="utf-8") == "neu ä"
    assert path.stat().st_mode == plain.stat().st_mode
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "neu ä" and len(os.listdir(path.parent)) == 1


# where a checkpoint is


def test_a_folder_and_a_package_folder_resolve_to_themselves(saved, tmp_path, monkeypatch):
    assert resolve_checkpoint(saved) == str(saved)
    package = tmp_path / "a_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('a package is found, not imported')")
    saved.rename(package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_checkpoint("package:a_package/model") == str(package / "model")
    assert "a_package" not in sys.modules
    with pytest.raises(RecipeError, match="'a_package' has no folder 'modle'"):
        resolve_checkpoint("package:a_package/modle")


def test_a_hub_name_is_left_to_transformers(monkeypatch):
    monkeypatch.setattr("distill.hub.checkpoint.is_offline_mode", lambda: False)
    assert resolve_checkpoint("owner/name") == "owner/name"


def test_offline_a_hub_name_is_its_folder_in_the_cache(saved, monkeypatch):
    monkeypatch.setattr("distill.hub.checkpoint.is_offline_mode", lambda: True)
    monkeypatch.setattr("distill.hub.checkpoint.snapshot_download", lambda name, **_: str(saved))
    assert resolve_checkpoint("owner/name") == str(saved)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("package:no_such_package/model", "'no_such_package' is not installed.*pip install no_such_package"),
        ("package:../model", "is not installed"),
        ("runs/a/student", "neither an existing folder nor a name on the Hub"),
        ("/no/where", "neither an existing folder nor a name on the Hub"),
    ],
)
def test_a_checkpoint_that_is_nowhere_is_refused(spec, message):
    with pytest.raises(RecipeError, match=message):
        resolve_checkpoint(spec)


def test_a_hub_name_that_cannot_be_had_is_refused(monkeypatch):
    def refuse(name, **_):
        raise OSError("no network\nand a long story")

    monkeypatch.setattr("distill.hub.checkpoint.snapshot_download", refuse)
    with pytest.raises(RecipeError, match=r"'owner/name' is neither .*OSError: no network\)"):
        read_encoder("owner/name")


def test_a_folder_without_configuration_or_weights_is_refused(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"saved has no weights"):
        resolve_checkpoint(saved)
    (saved / "pytorch_model.bin").touch()
    with pytest.raises(RecipeError, match=r"only in pytorch_model.bin.*save_pretrained"):
        resolve_checkpoint(saved)
    (saved / "config.json").unlink()
    with pytest.raises(RecipeError, match=r"saved has no config.json"):
        resolve_checkpoint(saved)


def test_weights_in_several_files_count(saved):
    (saved / "model.safetensors").rename(saved / "model-1.safetensors")
    write(saved, **{"model.safetensors.index": {"weight_map": {"a": "model-1.safetensors"}}})
    assert resolve_checkpoint(saved) == str(saved)
    (saved / "model-1.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"model-1.safetensors cannot be read"):
        resolve_checkpoint(saved)


def test_weights_that_are_cut_short_are_refused_before_they_are_loaded(saved):
    """Else the first to say so is the loading of a model, in the middle of a run."""
    file = saved / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    assert resolve_checkpoint(saved) == str(saved)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(RecipeError, match=r"saved: model.safetensors cannot be read .*downloaded whole"):
        resolve_checkpoint(saved)


# what a folder says


def test_lengths_come_from_the_settings_the_tokenizer_and_the_positions(saved):
    assert read_encoder(saved).max_length == 512
    write(saved, tokenizer_config={"model_max_length": 300})
    assert read_encoder(saved).max_length == 300
    write(saved, sentence_bert_config={"max_seq_length": 64, "query_length": 16})
    layout = read_encoder(saved)
    assert (layout.max_length, layout.query_length, layout.candidate_length) == (64, 16, None)
    write(saved, sentence_bert_config={"max_seq_length": 4096})
    assert read_encoder(saved).max_length == 512
    write(saved, sentence_bert_config={}, tokenizer_config={"model_max_length": int(1e30)})
    assert read_encoder(saved).max_length == 512
    write(saved, config={"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1})
    assert read_encoder(saved).max_length == 512
    write(saved, config={"model_type": "xlnet", "max_position_embeddings": -1})
    assert read_encoder(saved).max_length is None


def test_old_flags_and_new_names_say_the_same_pooling(saved):
    flags = {
        f"pooling_mode_{name}": False for name in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    }
    for flag, name in (("cls_token", "cls"), ("mean_tokens", "mean"), ("lasttoken", "lasttoken")):
        write(saved, **{"1_Pooling__config": {**flags, f"pooling_mode_{flag}": True}})
        assert read_encoder(saved).pooling == name
        write(saved, **{"1_Pooling__config": {"pooling_mode": name}})
        assert read_encoder(saved).pooling == name


@pytest.mark.parametrize(
    "files, message",
    [
        ({"modules": modules("WordEmbeddings", "Pooling")}, "module 'WordEmbeddings' does not open here"),
        ({"modules": modules("Transformer", "Pooling", "LSTM")}, r"module 'LSTM' \(number 2\)"),
        ({"modules": modules("Transformer", "Pooling", "Normalize", "Dense")}, "'Dense'.*in this order"),
        ({"modules": modules("Transformer")}, "lists no Pooling"),
        ({"modules": []}, "lists no modules"),
        ({"modules": [entry(0, "Model", package="my.code")]}, "'my.code.Model' is code of its own"),
        ({"modules": [{**entry(0, "Transformer"), "path": "../other"}]}, "points outside its folder"),
        ({"1_Pooling__config": {"pooling_mode": "max"}}, "pooling by max"),
        (
            {"1_Pooling__config": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}},
            "mean and cls",
        ),
        ({"sentence_bert_config": {"transformer_task": "fill-mask"}}, "transformer_task 'fill-mask'"),
        ({"sentence_bert_config": {"processing_kwargs": {"text": {}}}}, "processing_kwargs is set"),
        ({"sentence_bert_config": {"do_lower_case": True}}, "do_lower_case is set, but the tokenizer keeps"),
        ({"config_sentence_transformers": {"similarity_fn_name": "euclidean"}}, "compared by 'euclidean'"),
        ({"config_sentence_transformers": {"model_type": "SparseEncoder"}}, "holds a SparseEncoder"),
        ({"config_sentence_transformers": {"truncate_dim": 64}}, "truncate_dim"),
        (
            {"2_Normalize__config": {"module_input_name": "token_embeddings"}},
            "'token_embeddings' does not open",
        ),
    ],
)
def test_an_encoder_that_would_give_other_vectors_here_is_refused(saved, files, message):
    """To open it anyway would train and serve vectors that its makers never meant."""
    write(saved, **files)
    with pytest.raises(RecipeError, match=message):
        read_encoder(saved)


def test_lower_casing_that_the_tokenizer_does_is_no_obstacle(saved):
    write(saved, sentence_bert_config={"do_lower_case": True})
    for normalizer in (
        {"type": "Lowercase"},
        {"type": "BertNormalizer", "lowercase": True},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
    ):
        write(saved, tokenizer={"normalizer": normalizer})
        read_encoder(saved)
    write(saved, tokenizer={"normalizer": {"type": "BertNormalizer", "lowercase": False}})
    with pytest.raises(RecipeError, match="do_lower_case"):
        read_encoder(saved)


def test_broken_json_is_named(saved):
    (saved / "modules.json").write_text('[{"idx": 0,')
    with pytest.raises(DataError, match=r"modules.json is not valid JSON"):
        read_encoder(saved)


@pytest.mark.parametrize(
    "config, settings, labels, activation",
    [
        ({"id2label": {"0": "x"}}, {}, 1, "Sigmoid"),
        ({"id2label": {"0": "x", "1": "y", "2": "z"}}, {}, 3, "Identity"),
        ({}, {}, 2, "Identity"),
        ({"architectures": ["BertModel"], "id2label": {"0": "x", "1": "y"}}, {}, 1, "Sigmoid"),
        ({"id2label": {"0": "x"}, "sbert_ce_default_activation_function": "a.Identity"}, {}, 1, "Identity"),
        ({"id2label": {"0": "x"}, "sentence_transformers": {"activation_fn": "a.Tanh"}}, {}, 1, "Tanh"),
        (
            {"id2label": {"0": "x"}, "sentence_transformers": {"activation_fn": "a.Tanh"}},
            {"model_type": "CrossEncoder", "activation_fn": "a.Identity"},
            1,
            "Identity",
        ),
    ],
)
def test_a_cross_encoder_tells_labels_and_activation_in_every_layout(
    tmp_path, config, settings, labels, activation
):
    config = {"architectures": ["BertForSequenceClassification"], "max_position_embeddings": 99, **config}
    write(tmp_path, config=config, config_sentence_transformers=settings)
    (tmp_path / "model.safetensors").touch()
    layout = read_cross_encoder(tmp_path)
    assert (layout.num_labels, layout.activation.rsplit(".")[-1]) == (labels, activation)
    assert layout.max_length == 99


# the model card


RECIPE = {
    "models": {
        "student": {"type": "students.BiEncoder", "checkpoint": "a/small", "layers": 3},
        "cross": {"type": "teachers.CrossEncoder", "checkpoint": "c/large"},
    },
    "losses": {
        "ranking": {
            "type": "distill.objectives.ScoreKL",
            "from": "cross",
            "to": "student",
            "temperature": 2.0,
        },
        "labels": {"type": "distill.objectives.SampledSoftmax", "to": "student"},
    },
}
METRICS = {
    "student": {"nDCG@10": 0.65124},
    "baseline": {"nDCG@10": 0.6},
    "cross": {"nDCG@10": 0.7, "MRR@10": 0.5},
}


def test_a_card_is_valid_and_tells_all():
    text = model_card(
        "me/small-student",
        "encoder",
        RECIPE,
        "student",
        METRICS,
        command="distill run r.yaml",
        dataset="SciFact",
        base_model="a/small",
        datasets=["BeIR/scifact:corpus", "BeIR/scifact:queries", "/data/own.parquet"],
        language="en",
        license="apache-2.0",
    )
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert (data.base_model, data.datasets, data.license) == ("a/small", ["BeIR/scifact"], "apache-2.0")
    (result,) = data.eval_results
    assert (result.metric_name, result.metric_type, result.metric_value) == ("nDCG@10", "ndcg_10", 0.6512)
    for line in (
        "| model | nDCG@10 | MRR@10 |",
        "| student | 0.6512 | - |",
        "| cross | 0.7000 | 0.5000 |",
        "- **cross**: CrossEncoder (checkpoint: `c/large`)",
        "- **ranking**: ScoreKL, from cross to student (temperature: `2.0`)",
        "- **labels**: SampledSoftmax, from labels to student",
        'model = SentenceTransformer("me/small-student")',
        "from students import BiEncoder",
        "distill run r.yaml",
    ):
        assert line in text.splitlines(), line


@pytest.mark.parametrize("kind", ["encoder", "cross_encoder", "recommender", "combined"])
def test_the_code_in_a_card_is_python(kind):
    text = model_card("me/model", kind, RECIPE, "student", {})
    blocks = text.split("```python\n")[1:]
    assert blocks
    for block in blocks:
        compile(block.split("```")[0], "README.md", "exec")


def test_a_card_names_no_local_path_as_base_model(tmp_path):
    for base in (str(tmp_path), "package:x/model"):
        assert (
            ModelCard(model_card("m", "encoder", RECIPE, "student", {}, base_model=base)).data.base_model
            is None
        )


# the way to the Hub


class FakeApi:
    def __init__(self, token=None):
        self.calls = [token]
        FakeApi.last = self

    def create_repo(self, repo_id, **options):
        self.calls.append((repo_id, options))
        return RepoUrl(f"https://huggingface.co/me/{repo_id.split('/')[-1]}")

    def upload_folder(self, **options):
        self.calls.append(options)


def test_push_makes_the_repository_and_uploads_the_folder(saved, monkeypatch):
    monkeypatch.setattr(card, "HfApi", FakeApi)
    assert push_to_hub(saved, "student", private=True, token="t") == "https://huggingface.co/me/student"
    token, created, uploaded = FakeApi.last.calls
    assert (token, created) == ("t", ("student", {"private": True, "exist_ok": True}))
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/student", saved)


def test_what_cannot_be_pushed_is_told(saved, tmp_path, monkeypatch):
    class Refuses(FakeApi):
        def create_repo(self, repo_id, **options):
            raise OSError("401 unauthorized")

    with pytest.raises(UserError, match="not a folder with a saved model"):
        push_to_hub(tmp_path / "nothing", "me/student")
    with pytest.raises(UserError, match="'a/b/c' is not a name"):
        push_to_hub(saved, "a/b/c", token="t")
    monkeypatch.setattr(card, "HfApi", Refuses)
    with pytest.raises(UserError, match=r"could not be pushed to me/student: 401.*hf auth login"):
        push_to_hub(saved, "me/student")
    assert issubclass(HfHubHTTPError, OSError)  # so that every refusal of the Hub is told so
