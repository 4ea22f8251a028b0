"""What a batch holds: every promise of TextSource, on lists small enough to read."""

from zlib import crc32

import pytest
import torch

from distill.batch import Ragged
from distill.data import Judged, Mixture, Negatives, RandomNegatives, TextSource, TextTable


class Words:
    key = "words"
    fingerprint = "words"

    def encode(self, texts):
        return Ragged.of([[crc32(w.encode()) % 1000 for w in t.split()] for t in texts], dtype=torch.int32)


class Fixed(Negatives):
    """Proposes what it is told to, to every query."""

    def __init__(self, rows):
        super().__init__(len(rows))
        self.rows = torch.tensor(rows)

    def prepare(self, judged):
        pass

    def draw(self, query_rows, generator):
        return self.rows.expand(len(query_rows), -1)


def judged(lists, labels, queries=None, candidates=None, scores=None, n=12):
    queries = queries or [f"q{i}" for i in range(len(lists))]
    candidates = candidates or [f"c{i}" for i in range(n)]

    def flat(rows):
        return torch.tensor([float(x) for row in rows for x in row])

    return Judged(
        task="rerank",
        queries=TextTable([str(i) for i in range(len(queries))], queries),
        candidates=TextTable([str(i) for i in range(len(candidates))], candidates),
        listed=Ragged.of(lists),
        labels=None if labels is None else flat(labels),
        scores={name: flat(rows) for name, rows in (scores or {}).items()},
    )


def listed(batch):
    """{query row: [(candidate row, label), ...]} of what is real."""
    rows = batch.candidate_ids[batch.index]
    labels = batch.labels if batch.labels is not None else torch.zeros(rows.shape)
    return {
        int(q): [(int(c), float(y)) for c, y, real in zip(*row, strict=True) if real]
        for q, *row in zip(batch.query_ids, rows, labels, batch.mask, strict=True)
    }


LISTS = [[3, 1, 2], [4, 5], [0]]
LABELS = [[0, 1, 0], [0, 0], [2]]


def test_positives_come_first_then_the_others_then_padding():
    batch = TextSource(judged(LISTS, LABELS), batch_size=3).batch(0, 0)
    assert batch.sizes == (3, 3, 6) and batch.source == "data"
    rows = listed(batch)
    assert rows[0][0] == (1, 1.0) and sorted(rows[0][1:]) == [(2, 0.0), (3, 0.0)]
    assert sorted(rows[1]) == [(4, 0.0), (5, 0.0)] and rows[2] == [(0, 2.0)]
    order = batch.query_ids.argsort()
    assert batch.mask[order].tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    assert batch.labels[~batch.mask].eq(0).all() and batch.draws.tolist() == [1] * 6


def test_every_query_comes_once_an_epoch_in_an_order_of_its_own():
    source = TextSource(judged([[0]] * 10, [[1]] * 10), batch_size=4, seed=5)
    epochs = [
        torch.cat([source.batch(e, s).query_ids for s in range(source.steps(e))]).tolist() for e in (0, 1)
    ]
    assert source.steps(0) == 3 and len(source.batch(0, 2).query_ids) == 2
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]


def test_a_batch_depends_on_seed_epoch_and_step_alone():
    """A run that is resumed in the middle must go on as if it had never stopped."""

    def source(seed=0):
        lists = [[(i + j) % 12 for j in range(9)] for i in range(40)]
        negatives = [RandomNegatives(3)]
        return TextSource(judged(lists, [[1] + [0] * 8] * 40), 8, 5, negatives, seed)

    def rows(batch):
        return batch.query_ids.tolist(), batch.candidate_ids[batch.index].tolist()

    walked = source()
    there = [rows(walked.batch(e, s)) for e in range(2) for s in range(5)]
    assert rows(source().batch(1, 2)) == there[7]
    assert rows(source(seed=1).batch(1, 2)) != there[7]
    assert len({str(x) for x in there}) == 10


def test_several_positives_take_turns():
    source = TextSource(judged([[0, 1, 2, 3]], [[1, 1, 1, 0]]), batch_size=1)
    lists = [listed(source.batch(epoch, 0))[0] for epoch in range(3)]
    assert {row[0][0] for row in lists} == {0, 1, 2}
    assert all(row[1:] == [(3, 0.0)] for row in lists)


def test_more_others_than_fit_are_drawn_without_replacement():
    source = TextSource(judged([list(range(10))], [[1] + [0] * 9]), batch_size=1, candidates=4)
    drawn = [tuple(c for c, _ in listed(source.batch(epoch, 0))[0][1:]) for epoch in range(60)]
    assert all(len(set(row)) == 3 and 0 not in row for row in drawn)
    counts = torch.tensor([c for row in drawn for c in row]).bincount(minlength=10)[1:]
    assert counts.min() > 5 and counts.sum() == 180  # 20 expected of each


def test_a_query_without_positive_uses_all_places():
    source = TextSource(judged([list(range(10))], [[0] * 10]), batch_size=1, candidates=4)
    assert len(listed(source.batch(0, 0))[0]) == 4


def test_candidates_with_one_text_are_one_with_the_highest_label():
    data = judged([[0, 1, 2], [2]], [[0, 1, 0], [1]], candidates=["same", "same", "other"])
    batch = TextSource(data, batch_size=2).batch(0, 0)
    assert batch.candidate_ids.tolist() == [0, 2] and batch.draws.tolist() == [1, 2]
    assert listed(batch) == {0: [(0, 1.0), (2, 0.0)], 1: [(2, 1.0)]}


def test_known_positives_are_those_of_every_query_with_the_text():
    data = judged([[0], [1, 2], [3]], [[1], [1, 0], [1]], queries=["same", "same", "other"])
    batch = TextSource(data, batch_size=3).batch(0, 0)
    known = dict(zip(batch.query_ids.tolist(), batch.known_positives.tolist(), strict=True))
    assert known == {0: [0, 1], 1: [0, 1], 2: [3]}


def test_samplers_fill_up_and_never_bring_a_known_positive_or_a_candidate_twice():
    """A positive that is taught as a negative undoes what the labels say."""
    data = judged([[0, 1], [2]], [[1, 0], [1]], queries=["same", "same"], candidates=[*"abcdef", "a"])
    source = TextSource(
        data, batch_size=2, candidates=4, negatives=[Fixed([6, 2, 1, -1, 3, 3]), Fixed([4, 5])]
    )
    batch = source.batch(0, 0)  # 6 has the text of 0, the positive; 2 is that of the same query elsewhere
    assert listed(batch) == {
        0: [(0, 1.0), (1, 0.0), (3, 0.0), (4, 0.0)],
        1: [(2, 1.0), (1, 0.0), (3, 0.0), (4, 0.0)],
    }
    assert batch.candidate_ids.tolist() == [0, 1, 2, 3, 4] and batch.draws.tolist() == [1, 2, 1, 2, 2]


def test_listed_negatives_leave_the_other_places_to_samplers():
    """Samplers fill what a list leaves free, which of a list of many judged negatives is nothing."""
    data = judged([[0, 1, 2, 3], [4, 5]], [[1, 0, 0, 0], [1, 0]])
    new = {
        most: TextSource(data, 2, 4, [Fixed([8, 9, 10])], listed_negatives=most) for most in (None, 0, 1, 2)
    }
    assert [source.lists.others().tolist() for source in new.values()] == [[3, 1], [0, 0], [1, 1], [2, 1]]
    assert new[0].lists.rows.values.tolist() == [0, 4]  # teachers are asked about no more
    there = {most: listed(source.batch(0, 0)) for most, source in new.items()}
    drawn = {most: [sum(row >= 8 for row, _ in there[most][q]) for q in (0, 1)] for most in there}
    assert drawn == {None: [0, 2], 0: [3, 3], 1: [2, 2], 2: [1, 2]}
    assert all(len(lists[q]) == 4 and lists[q][0][1] == 1.0 for lists in there.values() for q in (0, 1))
    seen = {row for e in range(40) for row, _ in listed(new[1].batch(e, 0))[0] if row < 8}
    assert seen == {0, 1, 2, 3}  # which of the listed ones is drawn anew
    assert TextSource(data, 2, 4, listed_negatives=0).width == 1
    with pytest.raises(ValueError, match="listed_negatives must be 0 or more, got -1"):
        TextSource(data, 2, listed_negatives=-1)
    with pytest.raises(ValueError, match="without labels nothing listed is a negative"):
        TextSource(judged([[0, 1]], None), 1, listed_negatives=0)


def test_too_few_negatives_leave_padding():
    batch = TextSource(judged([[0]], [[1]]), 1, 5, [Fixed([0, -1, 7])]).batch(0, 0)
    assert batch.sizes == (1, 4, 2) and batch.mask.tolist() == [[True, True, False, False]]


def test_random_negatives_reach_every_other_candidate():
    source = TextSource(judged([[0]], [[1]]), 1, 5, [RandomNegatives(4)])
    seen = {c for epoch in range(80) for c, _ in listed(source.batch(epoch, 0))[0][1:]}
    assert seen == set(range(1, 12))


def test_teacher_scores_of_the_data_lie_where_their_pairs_lie():
    scores = {"cross": [[30, 10, 20], [40, 50], [7]]}
    source = TextSource(judged(LISTS, LABELS, scores=scores), batch_size=3)
    batch = source.batch(0, 0)
    expected = torch.tensor([7.0, 10, 20, 30, 40, 50])[batch.candidate_ids[batch.index]]
    torch.testing.assert_close(batch.stored["cross"].scores, expected * batch.mask)
    assert source.scored == ("cross",)


def test_it_is_told_which_scores_are_given_where_samplers_bring_more():
    source = TextSource(judged(LISTS, LABELS, scores={"cross": LABELS}), 3, negatives=[Fixed([9])])
    batch = source.batch(0, 0)
    given = batch.stored["cross"]
    assert torch.equal(given.known, batch.mask & (batch.candidate_ids[batch.index] != 9))
    assert (batch.mask & ~given.known).sum() == 3 and not given.scores[~given.known].any()


def test_unlabelled_lists():
    source = TextSource(judged([[0, 1], [2]], None), 2, 4, [Fixed([0, 1, 2, 5])])
    batch = source.batch(0, 0)
    assert not source.labelled and batch.labels is None
    assert {q: sorted(c for c, _ in row) for q, row in listed(batch).items()} == {
        0: [0, 1, 2, 5],
        1: [0, 1, 2, 5],
    }


def test_texts_alone():
    none, some = TextTable([], []), TextTable(["0", "1", "2"], ["a", "b", "a"])
    source = TextSource(Judged("texts", none, some, Ragged.of([])), batch_size=2)
    source.prepare([], [Words()])
    batch = source.batch(0, 0)
    assert batch.sizes == (0, 0, 2) and batch.candidate_ids.tolist() == [0, 1] and source.steps(0) == 1
    assert len(batch.candidates["words"]) == 2 and batch.queries == {}
    source = TextSource(Judged("texts", some, none, Ragged.of([[], [], []])), batch_size=2)
    source.prepare([Words()], [Words()])
    batch = source.batch(0, 0)
    assert batch.sizes == (2, 0, 0) and batch.labels is None and len(batch.queries["words"]) == 2
    assert len(batch.candidates["words"]) == 0


def test_token_columns_hold_the_texts_of_their_rows():
    source = TextSource(judged(LISTS, LABELS, queries=["one two", "three", "one two"]), batch_size=2)
    source.prepare([Words()], [Words()])
    for step in range(2):
        batch = source.batch(0, step)
        for ids, table, rows in (
            (batch.queries["words"], source.queries, batch.query_ids),
            (batch.candidates["words"], source.candidates, batch.candidate_ids),
        ):
            assert ids.tolist() == Words().encode([table.texts[row] for row in rows]).tolist()


def test_a_step_beyond_the_epoch_is_refused():
    source = TextSource(judged(LISTS, LABELS), batch_size=2, name="wiki")
    with pytest.raises(IndexError, match="wiki: epoch 3 has 2 steps, there is no step 2"):
        source.batch(3, 2)
    with pytest.raises(ValueError, match="must be at least 1"):
        TextSource(judged(LISTS, LABELS), batch_size=0)
    with pytest.raises(ValueError, match="no candidates that negatives"):
        empty = Judged("texts", TextTable(["0"], ["a"]), TextTable([], []), Ragged.of([[]]))
        TextSource(empty, 1, negatives=[RandomNegatives(1)])


def test_a_mixture_deals_every_batch_of_every_source_once():
    parts = {"a": TextSource(judged([[0]] * 6, [[1]] * 6), 2), "b": TextSource(judged([[1]] * 5, None), 1)}
    mixture = Mixture(parts, seed=3)
    mixture.prepare([Words()], [Words()])
    assert mixture.steps(0) == 8 and not mixture.labelled and Mixture({"a": parts["a"]}).labelled
    orders = []
    for epoch in (0, 1):
        batches = [mixture.batch(epoch, step) for step in range(8)]
        orders.append([batch.source for batch in batches])
        seen = {name: [b.query_ids for b in batches if b.source == name] for name in parts}
        assert {name: sorted(torch.cat(rows).tolist()) for name, rows in seen.items()} == {
            "a": list(range(6)),
            "b": list(range(5)),
        }
    assert orders[0] != orders[1] and len(batches[0].queries["words"]) > 0
    again = Mixture(parts, seed=3).batch(1, 5)
    assert again.source == orders[1][5] and again.query_ids.tolist() == batches[5].query_ids.tolist()
    with pytest.raises(ValueError, match="at least one source"):
        Mixture({})


def test_a_mixture_takes_a_small_source_again_in_another_order():
    parts = {"a": TextSource(judged([[0]] * 9, [[1]] * 9), 3), "b": TextSource(judged([[1]] * 5, None), 1)}
    mixture = Mixture(parts, repeat={"a": 2})
    assert mixture.steps(0) == 2 * 3 + 5
    passes = []
    for epoch in (0, 1):
        batches = [mixture.batch(epoch, step) for step in range(11)]
        rows = torch.cat([batch.query_ids for batch in batches if batch.source == "a"]).tolist()
        passes += [rows[:9], rows[9:]]
    assert all(sorted(rows) == list(range(9)) for rows in passes)
    assert len(set(map(tuple, passes))) == 4
    for wrong in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match=r"a\.repeat must be a whole number of at least 1"):
            Mixture(parts, repeat={"a": wrong})
