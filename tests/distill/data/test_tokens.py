"""Each text is encoded once per tokenizer and prompt, and a damaged file never passes for a good one."""

import logging
from zlib import crc32

import pytest
import torch

from distill.batch import Ragged
from distill.data.tokens import tokenized
from distill.errors import DataError


class Words:
    """A white-space tokenizer; counts the texts that it was asked for."""

    def __init__(self, prompt="", fingerprint="words"):
        self.prompt, self.fingerprint, self.key = prompt, fingerprint, f"{fingerprint}+{prompt}"
        self.asked = 0

    def encode(self, texts):
        self.asked += len(texts)
        rows = [[crc32(w.encode()) % 1000 for w in f"{self.prompt}{t}".split()] for t in texts]
        return Ragged.of(rows, dtype=torch.int32)


TEXTS = ["a b c", "", "d"]


def test_ids_come_back_as_they_were_and_the_second_time_from_disk(tmp_path):
    first, again = Words(), Words()
    ids = tokenized(TEXTS, first, tmp_path)
    assert ids.tolist() == first.encode(TEXTS).tolist() and ids.values.dtype == torch.int32
    assert tokenized(TEXTS, again, tmp_path).tolist() == ids.tolist()
    assert again.asked == 0 and len(list(tmp_path.iterdir())) == 1
    assert ids.select(torch.tensor([2, 0])).tolist() == [ids.tolist()[2], ids.tolist()[0]]


@pytest.mark.parametrize("other", [Words("query: "), Words(fingerprint="other")])
def test_another_prompt_or_tokenizer_has_a_file_of_its_own(tmp_path, other):
    tokenized(TEXTS, Words(), tmp_path)
    assert tokenized(TEXTS, other, tmp_path).tolist() == other.encode(TEXTS).tolist()
    assert len(list(tmp_path.iterdir())) == 2


def test_texts_that_only_join_to_the_same_string_differ(tmp_path):
    one, two = tokenized(["a b", "c"], Words(), tmp_path), tokenized(["a", " bc"], Words(), tmp_path)
    assert one.lengths.tolist() == [2, 1] and two.lengths.tolist() == [1, 1]


def test_no_texts(tmp_path):
    assert len(tokenized([], Words(), tmp_path)) == 0
    assert tokenized([""], Words(), tmp_path).tolist() == [[]]


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "other"])
def test_a_damaged_file_is_made_again(tmp_path, caplog, damage):
    texts = [f"{i} word {i * 7}" for i in range(300)]
    right = tokenized(texts, Words(), tmp_path).tolist()
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    at = data.index(torch.tensor(right[150], dtype=torch.int32).numpy().tobytes())
    data[at] ^= 1
    path.unlink()  # the old file stays mapped by what was read from it
    path.write_bytes(
        {"cut": data[: len(data) // 2], "flipped": data, "emptied": b"", "other": b"x" * 5000}[damage]
    )
    column = Words()
    with caplog.at_level(logging.WARNING):
        assert tokenized(texts, column, tmp_path).tolist() == right
    assert column.asked == 300 and "damaged" in caplog.text
    assert tokenized(texts, Words(), tmp_path).tolist() == right


def test_a_run_killed_while_writing_leaves_no_file(tmp_path):
    class Dies(Words):
        def encode(self, texts):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenized(TEXTS, Dies(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write the cache.*set DISTILL_CACHE"):
        tokenized(TEXTS, Words(), tmp_path / "file" / "folder")
