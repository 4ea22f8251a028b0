"""Frames built from cached ids equal what the tokenizer itself would have said."""

import pytest
from transformers import AutoTokenizer

from distill.batch import Ragged
from distill.errors import RecipeError
from distill.nn.tokenizer import TextTokenizer

FAMILIES = ["bert", "roberta", "distilbert"]
FIRST = ["a cat", "query", "the small student learns from a teacher", ""]
SECOND = ["the mat", "a large model teaches the cat", "on", "a passage"]


@pytest.fixture(params=[*FAMILIES, "wordpiece"])
def folder(request, family, tiny_bert):
    return tiny_bert() if request.param == "wordpiece" else family(request.param)


@pytest.mark.parametrize("max_length", [3, 5, 32])
def test_a_framed_text_is_what_the_tokenizer_says(folder, max_length, texts):
    ours = TextTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(folder)(texts, truncation=True, max_length=max_length)
    assert ours.frame(ours.ids(texts), max_length).tolist() == theirs["input_ids"]


def test_a_framed_pair_is_what_the_tokenizer_says_with_its_segments(folder):
    ours = TextTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(folder)(FIRST, SECOND)
    ids, types = ours.frame_pairs(ours.ids(FIRST), ours.ids(SECOND), max_length=128, max_first=64)
    assert ids.tolist() == theirs["input_ids"]
    if "token_type_ids" in theirs:
        assert types.tolist() == theirs["token_type_ids"]
        assert {kind for row in types.tolist() for kind in row} == {0, 1}
    else:
        assert types is None


@pytest.mark.parametrize("max_length", [8, 12])
def test_only_the_candidate_pays_for_the_length(folder, max_length):
    ours = TextTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    short = FIRST[:2]
    ids, _ = ours.frame_pairs(ours.ids(short), ours.ids(SECOND[:2]), max_length, max_first=64)
    expected = theirs(short, SECOND[:2], truncation="only_second", max_length=max_length)
    assert ids.tolist() == expected["input_ids"]
    assert max(map(len, ids.tolist())) <= max_length


def test_the_query_is_capped_at_its_own_length(folder):
    ours = TextTokenizer.from_pretrained(folder)
    capped, _ = ours.frame_pairs(ours.ids(FIRST), ours.ids(SECOND), max_length=32, max_first=2)
    cut = ours.ids(FIRST).truncate(2)
    assert capped.tolist() == ours.frame_pairs(cut, ours.ids(SECOND), 32, 64)[0].tolist()
    tight, _ = ours.frame_pairs(ours.ids(FIRST), ours.ids(SECOND), max_length=6, max_first=64)
    assert max(map(len, tight.tolist())) == 6  # a query longer than the pair leaves no candidate, no crash


def test_roberta_puts_two_separators_between_texts(family):
    tokenizer = TextTokenizer.from_pretrained(family("roberta"))
    (ids,) = tokenizer.frame_pairs(tokenizer.ids(["cat"]), tokenizer.ids(["mat"]), 32, 8)[0].tolist()
    assert [ids[0], *ids[2:4], ids[-1]] == [0, 2, 2, 2]
    assert tokenizer.specials == 2


def test_ids_have_no_special_tokens_and_no_end(family):
    tokenizer = TextTokenizer.from_pretrained(family("bert"))
    (ids,) = tokenizer.ids(["cat " * 50]).tolist()
    assert len(ids) == 50 and len(set(ids)) == 1  # longer than the model may read: cut when framed
    assert tokenizer.ids([]).tolist() == []


def test_the_key_of_a_column_depends_on_tokenizer_and_prompt_alone(family):
    first, same = (TextTokenizer.from_pretrained(family("bert")) for _ in range(2))
    other = TextTokenizer.from_pretrained(family("roberta"))
    same.tokenizer(["cat", "a cat"], padding=True, truncation=True, max_length=3)  # state inside the library
    assert first.column().key == same.column().key
    keys = {first.column().key, first.column("query ").key, first.column("passage ").key, other.column().key}
    assert len(keys) == 4


def test_the_prompt_is_cut_into_ids_with_the_text(family):
    tokenizer = TextTokenizer.from_pretrained(family("bert"))
    assert tokenizer.column("query ").encode(["cat"]).tolist() == tokenizer.ids(["query cat"]).tolist()
    assert tokenizer.column().encode(["cat"]).tolist() == tokenizer.ids(["cat"]).tolist()


def test_framing_asks_for_ids_of_the_same_dtype_as_the_cache(family):
    tokenizer = TextTokenizer.from_pretrained(family("bert"))
    ids = tokenizer.ids(["a cat"])
    assert tokenizer.frame(ids, 8).values.dtype == ids.values.dtype
    assert isinstance(tokenizer.frame(ids, 8), Ragged)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(RecipeError, match="Slow is not a fast tokenizer"):
        TextTokenizer(Slow())
