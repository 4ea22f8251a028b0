"""Ragged against plain lists, and what a Batch shows of itself."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.batch import Batch, ChosenRows, Ragged
from distill.outputs import Outputs

ROWS = st.lists(st.lists(st.integers(-9, 9), max_size=5), max_size=6)
fast = settings(max_examples=60, deadline=None)


@fast
@given(ROWS)
def test_rows_come_back_as_they_were(rows):
    ragged = Ragged.of(rows)
    assert ragged.tolist() == rows
    assert len(ragged) == len(rows)
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    assert ragged.offsets.dtype == torch.int64


@fast
@given(ROWS.filter(len), st.data())
def test_select_is_a_list_of_rows(rows, data):
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    selected = Ragged.of(rows).select(torch.tensor(chosen, dtype=torch.int64))
    assert selected.tolist() == [rows[row] for row in chosen]


@fast
@given(st.integers(0, 5), st.data())
def test_join_puts_the_pieces_of_each_row_one_after_the_other(n, data):
    rows = st.lists(st.lists(st.integers(-9, 9), max_size=4), min_size=n, max_size=n)
    first, second = data.draw(rows), data.draw(rows)
    same = data.draw(st.lists(st.integers(-9, 9), max_size=3))
    constant = torch.tensor(same, dtype=torch.int64)
    joined = Ragged.join([constant, Ragged.of(first), constant, Ragged.of(second)])
    assert joined.tolist() == [same + a + same + b for a, b in zip(first, second, strict=True)]


def test_the_parts_of_a_ragged_stay_on_its_device():
    """Constants and ranges made on another device would stop a training on a GPU at its first batch."""
    one, texts = torch.tensor([9]), Ragged.of([[1, 2], [3]])
    with torch.device("meta"):  # whatever is made without asking for a device lands there, and cannot mix
        joined = Ragged.join([one, texts, one])
        cut = joined.truncate(2).select(torch.tensor([1, 0], device="cpu"))
        mask = cut.padded(0)[1]
    assert joined.tolist() == [[9, 1, 2, 9], [9, 3, 9]]
    assert cut.tolist() == [[9, 3], [9, 1]]
    assert mask.all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_constant_of_the_cpu_joins_texts_on_a_gpu():
    joined = Ragged.join([torch.tensor([9]), Ragged.of([[1, 2], [3]]).to("cuda")])
    assert joined.values.device.type == joined.offsets.device.type == "cuda"
    assert joined.tolist() == [[9, 1, 2], [9, 3]]


@fast
@given(ROWS, st.data())
def test_truncate_takes_one_limit_or_one_per_row(rows, data):
    ragged = Ragged.of(rows)
    limit = data.draw(st.integers(0, 6))
    assert ragged.truncate(limit).tolist() == [row[:limit] for row in rows]
    limits = data.draw(st.lists(st.integers(0, 6), min_size=len(rows), max_size=len(rows)))
    cut = ragged.truncate(torch.tensor(limits, dtype=torch.int64))
    assert cut.tolist() == [row[:most] for row, most in zip(rows, limits, strict=True)]


@fast
@given(ROWS)
def test_padded_fills_on_the_right_and_says_what_is_real(rows):
    longest = max(map(len, rows), default=0)
    values, mask = Ragged.of(rows).padded(77)
    assert values.tolist() == [row + [77] * (longest - len(row)) for row in rows]
    assert mask.tolist() == [[True] * len(row) + [False] * (longest - len(row)) for row in rows]
    assert values.shape == mask.shape == (len(rows), longest)


@fast
@given(st.lists(ROWS, min_size=1, max_size=3))
def test_stack_appends_rows(parts):
    assert Ragged.stack([Ragged.of(part) for part in parts]).tolist() == [
        row for part in parts for row in part
    ]


def test_dtype_is_kept_through_every_operation():
    ragged = Ragged.of([[1, 2], [3]], dtype=torch.int32)
    made = [ragged.select(torch.tensor([1])), ragged.truncate(1), Ragged.join([ragged, ragged])]
    assert {part.values.dtype for part in [*made, Ragged.stack([ragged, ragged])]} == {torch.int32}
    assert ragged.padded(0)[0].dtype == torch.int32


def a_batch() -> Batch:
    ids = Ragged.of([[1], [2, 3]])
    batch = Batch.of_scores(2, 1)
    columns = {"text": ids, "secret": ids}
    return Batch(
        batch.index,
        batch.mask,
        batch.query_ids,
        batch.candidate_ids,
        queries=columns,
        candidates=columns,
        stored={"cross": Outputs(scores=torch.zeros(2, 1))},
        source="here",
    )


def test_a_view_shows_only_the_columns_that_were_asked_for():
    """A privileged column, or what a teacher said, must not reach a student by accident."""
    view = a_batch().view(["text"], [])
    assert (list(view.queries), list(view.candidates), dict(view.stored)) == (["text"], [], {})
    assert view.source == "here"
    with pytest.raises(KeyError, match="absent"):
        a_batch().view(["absent"], [])


def test_sizes_and_of_scores():
    batch = Batch.of_scores(2, 3)
    assert batch.sizes == (2, 3, 6)
    assert batch.index.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert batch.labels.tolist() == [[1, 0, 0], [1, 0, 0]]


def test_to_moves_everything_inside():
    moved = a_batch().to("meta")
    inside = [moved.index, moved.queries["text"].values, moved.candidates["secret"].offsets]
    assert {tensor.device.type for tensor in [*inside, moved.stored["cross"].scores]} == {"meta"}
    assert moved.labels is None and moved.source == "here"


def test_a_part_has_the_chosen_rows_and_masks_what_it_lists_of_others():
    batch = Batch(
        index=torch.tensor([[0, 2, 0], [1, 0, 0], [2, 1, 0]]),
        mask=torch.tensor([[True, True, False], [True, False, False], [True, True, True]]),
        query_ids=torch.tensor([5, 6, 7]),
        candidate_ids=torch.tensor([10, 11, 12]),
        labels=torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [3.0, 4.0, 0.0]]),
        draws=torch.tensor([1, 2, 3]),
        known_positives=Ragged.of([[10], [], [12, 11]]),
        queries={"text": Ragged.of([[1], [2, 2], [3]])},
        candidates={"text": Ragged.of([[4], [], [6]]), "length": torch.tensor([1, 0, 1])},
        source="here",
        stored={"cross": Outputs(scores=torch.zeros(3, 3))},
    )
    part = batch.select(torch.tensor([2, 0]), torch.tensor([2, 0]))
    assert part.query_ids.tolist() == [7, 5] and part.candidate_ids.tolist() == [12, 10]
    assert part.mask.tolist() == [[True, False, True], [True, True, False]]  # candidate 11 is not there
    assert part.candidate_ids[part.index][part.mask].tolist() == [12, 10, 10, 12]
    assert part.labels.tolist() == [[3, 4, 0], [1, 0, 0]] and part.draws.tolist() == [3, 1]
    assert part.known_positives.tolist() == [[12, 11], [10]]
    assert part.queries["text"].tolist() == [[3], [1]] and part.candidates["text"].tolist() == [[6], [4]]
    assert part.candidates["length"].tolist() == [1, 1]
    assert part.source == "here" and not part.stored
    none = torch.tensor([], dtype=torch.int64)
    assert batch.select(none, torch.tensor([1])).sizes == (0, 3, 1)
    assert not batch.select(torch.tensor([0, 1]), none).mask.any()
    assert part.select(none, none).select(none, none).sizes == (0, 3, 0)


def test_every_field_with_rows_says_which():
    """One that does not would be left out of a part without a word."""
    silent = {f.name for f in fields(Batch) if "axis" not in f.metadata}
    assert silent == {"index", "mask", "source", "stored"}


def test_chosen_rows_are_gathered_when_somebody_looks():
    whole = Ragged.of([[1, 2], [], [3], [4, 5, 6]])
    rows = ChosenRows(whole, torch.tensor([3, 0, 1]))
    assert "_made" not in vars(rows) and len(rows) == 3
    again = rows.select(torch.tensor([1, 0])).to("cpu")
    assert "_made" not in vars(again)
    assert (rows.tolist(), again.tolist()) == ([[4, 5, 6], [1, 2], []], [[1, 2], [4, 5, 6]])
    assert again.lengths.tolist() == [2, 3] and "_made" in vars(again)
