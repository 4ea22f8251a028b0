"""What decides where the words of a teacher are kept, and what is done about blocks that are damaged."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from distill.data.judged import text_keys
from distill.errors import DataError
from distill.store_files import ABOUT, Signal, Teacher, outdated, pair_keys, remove, size_of
from students import BiEncoder
from teachers import CrossEncoder


@pytest.fixture
def signal(tiny_bert, tmp_path):
    """Seven vectors in three blocks, and their keys."""
    made = Signal(teacher_of(BiEncoder(tiny_bert()), tmp_path), ["queries"], "float32")
    keys, values = text_keys([f"text {i}" for i in range(7)]), torch.randn(7, 5)
    for part in ([0, 1, 2], [3, 4, 5], [6]):
        made.append(keys[part], {"queries": values[part]})
    return made, keys, values


def teacher_of(node, root, precision="float32") -> Teacher:
    teacher = Teacher.of(node, precision, root)
    assert teacher is not None
    return teacher


def again(signal: Signal, **arguments) -> Signal:
    return Signal(signal.teacher, signal.fields, signal.precision, **arguments)


def test_what_was_written_is_read_by_the_next(signal):
    made, keys, values = signal
    for one in (made, again(made)):
        order = np.array([6, 0, 3, 3, 2])
        assert torch.equal(one.read(one.find(keys[order]))["queries"], values[order])
        assert one.find(text_keys(["text 0", "another"]))[1] == -1 and len(one) == 7


def test_a_key_is_of_texts_and_of_their_sides():
    one, two = text_keys(["a", "b"])[:, None]
    assert not np.array_equal(pair_keys(one, two), pair_keys(two, one))
    texts = text_keys([str(i) for i in range(200)])
    pairs = pair_keys(texts.repeat(200, axis=0), np.tile(texts, (200, 1)))
    assert len(np.unique(pairs[:, 0])) == len(np.unique(pairs[:, 1])) == 40_000
    assert len(text_keys(["", "\ud800", "ä"])) == 3 and text_keys([]).shape == (0, 2)


def test_blocks_depend_on_what_they_hold_alone(signal, tmp_path, tiny_bert):
    made, keys, values = signal
    other = Signal(teacher_of(BiEncoder(tiny_bert()), tmp_path / "other"), ["queries"], "float32")
    for part in ([6], [0, 1, 2], [3, 4, 5]):
        other.append(keys[part], {"queries": values[part]})
    folders = [{path.name: path.read_bytes() for path in one.folder.iterdir()} for one in (made, other)]
    assert folders[0] == folders[1] and len(folders[0]) == 3


CHANGES = {
    "another revision": lambda folder, tiny: CrossEncoder(tiny(num_labels=1, seed=1)),
    "another maximum length": lambda folder, tiny: CrossEncoder(folder, max_length=60),
    "another length of the query": lambda folder, tiny: CrossEncoder(folder, query_max_length=8),
    "fewer layers": lambda folder, tiny: CrossEncoder(folder, layers=1),
    "another setting of the architecture": lambda folder, tiny: changed(CrossEncoder(folder)),
}


def changed(node):
    node.encoder.backbone.config.layer_norm_eps = 1e-3
    return node


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_answers_changes_the_address(change, tiny_bert, tmp_path):
    folder = tiny_bert(num_labels=1)
    one = teacher_of(CrossEncoder(folder), tmp_path)
    assert teacher_of(CHANGES[change](folder, tiny_bert), tmp_path).address != one.address


def test_another_prompt_pooling_or_precision_is_another_teacher_and_another_path_is_not(tiny_bert, tmp_path):
    folder = tiny_bert()
    copy = shutil.copytree(folder, tmp_path / "copy")
    one = teacher_of(BiEncoder(folder, dropout=0.3), tmp_path)
    assert teacher_of(BiEncoder(copy), tmp_path).address == one.address
    others = [
        BiEncoder(folder, query_prompt="query: "),
        BiEncoder(folder, candidate_prompt="passage: "),
        BiEncoder(folder, pooling="cls"),
        BiEncoder(folder, normalize=False),
    ]
    addresses = {teacher_of(other, tmp_path).address for other in others}
    addresses |= {teacher_of(BiEncoder(folder), tmp_path, "bfloat16").address, one.address}
    assert len(addresses) == 6


def test_a_tokenizer_of_its_own_is_another_teacher(tiny_bert, tmp_path):
    folder = tiny_bert()
    copy = shutil.copytree(folder, tmp_path / "copy")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "do_lower_case": False}))
    one, other = (teacher_of(BiEncoder(path), tmp_path) for path in (folder, copy))
    assert one.address != other.address


@pytest.mark.parametrize("place", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_any_flipped_bit_is_found_and_only_its_block_is_lost(place, signal, caplog):
    made, keys, _ = signal
    path = sorted(made.folder.iterdir())[0]
    data = bytearray(path.read_bytes())
    data[round(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    looked = again(made, mend=False)
    assert len(looked) < 7 and str(path) in caplog.text and path.exists()
    assert (looked.find(keys) < 0).sum() == 7 - len(looked)
    again(made)
    assert not path.exists()


@pytest.mark.parametrize("left", [0, 100])
def test_a_block_that_is_cut_short_is_found(left, signal, caplog):
    made, _, _ = signal
    path = sorted(made.folder.iterdir())[0]
    path.write_bytes(path.read_bytes()[:left])
    assert len(again(made)) < 7 and "is damaged" in caplog.text


def test_a_store_of_another_teacher_under_this_name_is_refused_and_says_what_differs(
    signal, tiny_bert, tmp_path
):
    made, _, _ = signal
    other = teacher_of(BiEncoder(tiny_bert(seed=1), max_length=50), tmp_path)
    shutil.copytree(made.teacher.folder, other.folder)
    with pytest.raises(DataError, match="written by another teacher") as error:
        Signal(other, ["queries"], "float32")
    assert "max_length is 128 there, 50 here" in str(error.value) and "weights is" in str(error.value)
    (other.folder / ABOUT).write_text("{")  # its word is lost; its blocks still say whose they are
    with pytest.raises(DataError, match="a block in it was written by another teacher"):
        Signal(other, ["queries"], "float32")


def test_who_it_is_can_be_read_and_is_written_again_when_it_is_lost(signal):
    made, _, values = signal
    path = made.teacher.folder / ABOUT
    about = json.loads(path.read_text())
    assert about["type"] == "students.bi_encoder.BiEncoder" and about["max_length"] == 128
    path.unlink()
    one = again(made)
    one.append(text_keys(["new"]), {"queries": values[:1]})
    assert json.loads(path.read_text()) == about


def test_outdated_is_what_the_same_checkpoint_said_with_other_settings(tiny_bert, tmp_path):
    folder, root = tiny_bert(), tmp_path / "store"
    key, value = text_keys(["a"]), {"queries": torch.ones(1, 3)}

    def kept(node, precision="float32", kept_as="float32"):
        made = Signal(teacher_of(node, root, precision), ["queries"], kept_as)
        made.append(key, value)
        return made

    ours, half = kept(BiEncoder(folder)), kept(BiEncoder(folder), kept_as="float16")
    old = [kept(BiEncoder(folder, query_prompt="q")), kept(BiEncoder(folder), "bfloat16")]
    other = kept(BiEncoder(tiny_bert(seed=1)))
    found = list(outdated(ours.teacher, [ours.folder]))
    assert sorted(found) == sorted([*(one.teacher.folder for one in old), half.folder])
    assert all(size_of(path) > 500 for path in found)
    for path in found:
        remove(path)
    assert list(outdated(ours.teacher, [ours.folder])) == []
    assert len(again(ours)) == len(again(other)) == 1 and len(again(half)) == 0


def test_a_disk_that_fills_leaves_nothing_half_written(signal, monkeypatch):
    made, _, values = signal
    before = sorted(path.name for path in made.folder.iterdir())

    def full(path, data):
        with path.open("wb") as file:
            file.write(memoryview(data)[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(DataError, match=r"cannot write the teacher store .*No space left.*DISTILL_STORE"):
        made.append(text_keys(["new"]), {"queries": values[:1]})
    assert sorted(os.listdir(made.folder)) == before and len(made) == len(again(made)) == 7
    monkeypatch.undo()
    made.append(text_keys(["new"]), {"queries": values[:1]})
    assert len(made) == len(again(made)) == 8
