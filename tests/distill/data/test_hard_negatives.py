"""Hard negatives: what is found is near, what is kept is no positive, and mining twice is not needed."""

import logging
import math
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch

from distill.batch import Columns, Ragged
from distill.data import (
    BM25Negatives,
    Judged,
    Mixture,
    NearestNegatives,
    TextSource,
    TextTable,
    hard_negatives,
    neighbours,
)
from distill.errors import DataError, RecipeError
from distill.graph import DistillationGraph
from distill.model import Encoder, Model
from students import TwoTower
from tests.shop import fitted
from tests.shop import judged as shop_judged

ANGLES = [0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 1.5]  # of candidates c0 to c7, in radians


class Circle(Encoder):
    """Texts are angles: a query at 0 is nearest to the smallest."""

    provides = frozenset({"queries", "candidates", "scores"})
    reads = Columns()
    dim = 2

    def __init__(self, turn=0.0):
        super().__init__()
        self.turn = torch.nn.Parameter(torch.tensor(turn))
        self.encoded = []

    def _vectors(self, texts):
        self.encoded.append(len(texts))
        assert not torch.is_grad_enabled() and not self.training
        angles = torch.tensor([float(text.split("@")[1]) for text in texts]) * torch.cos(self.turn)
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    def encode_queries(self, queries, progress=False):
        return self._vectors(queries)

    def encode_candidates(self, candidates, progress=False):
        return self._vectors(candidates)

    def represent(self, batch, needs):
        raise NotImplementedError

    def save_pretrained(self, folder):
        raise NotImplementedError


class Reader(Model):
    """Scores pairs by a table; 0 where it says nothing."""

    provides = frozenset({"scores"})
    reads = Columns()

    def __init__(self, scores):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1))
        self.table, self.asked = scores, []

    def score_pairs(self, queries, candidates):
        self.asked += list(zip(queries, candidates, strict=True))
        return (
            torch.tensor([float(self.table.get(c.split("@")[0], 0.0)) for c in candidates])
            + self.bias.detach()
        )

    def represent(self, batch, needs):
        raise NotImplementedError

    def save_pretrained(self, folder):
        raise NotImplementedError


def judged(lists=((0,),), labels=None, queries=None, extra=()):
    texts = [f"c{i}@{angle}" for i, angle in enumerate(ANGLES)] + list(extra)
    queries = queries or [f"q{i}@0.0" for i in range(len(lists))]
    n = sum(map(len, lists))
    return Judged(
        task="retrieval",
        queries=TextTable([str(i) for i in range(len(queries))], list(queries)),
        candidates=TextTable([str(i) for i in range(len(texts))], texts),
        listed=Ragged.of([list(rows) for rows in lists]),
        labels=torch.ones(n) if labels is None else labels,
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def graph(trained=(), **nodes):
    return DistillationGraph({"teacher": Circle(), **nodes}, [], trained)


def refreshed(sampler, folder, data=None, made=None, epoch=0, begun=False):
    data = data or judged()
    if sampler._judged is None:
        sampler.prepare(data)
    figures = sampler.refresh(made or graph(), epoch, folder, torch.arange(len(data.queries)), begun)
    return figures


def lists(sampler):
    return sampler.mined.rows.tolist()


# what is found


def test_the_nearest_come_first_without_positives_repeats_and_the_query_itself(tmp_path):
    sampler = NearestNegatives("teacher", 1)
    extra = ["c1@0.1", "q0@0.0"]  # a text again, and the query's own
    refreshed(sampler, tmp_path, judged(((0, 2), (1,)), extra=extra))
    assert lists(sampler) == [[1, 3, 4, 5, 6, 7], [0, 9, 2, 3, 4, 5, 6, 7]]
    assert sampler.mined.ranks.tolist() == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 7, 8]


def test_ranks_window(tmp_path):
    sampler = NearestNegatives("teacher", 1, top=2, skip=3)
    figures = refreshed(sampler, tmp_path)
    assert lists(sampler) == [[4, 5]] and figures["rank"] == 4.5


def test_queries_with_one_text_share_their_positives(tmp_path):
    sampler = NearestNegatives("teacher", 2, top=2)
    refreshed(sampler, tmp_path, judged(((0,), (1,)), queries=["q@0.0", "q@0.0"]))
    assert lists(sampler) == [[2, 3]]
    drawn = sampler.draw(torch.tensor([1, 0]), torch.Generator())
    assert drawn.sort().values.tolist() == [[2, 3], [2, 3]]


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"margin": 0.1}, [4, 5, 6, 7]),  # cosines 1, .995, .980, .955, .878, .697, .362, .071: at most .895
        ({"margin": 0.0}, [2, 3, 4, 5, 6, 7]),
        ({"relative_margin": 0.03}, [3, 4, 5, 6, 7]),  # at most .965
        ({"relative_margin": 0.05}, [4, 5, 6, 7]),  # at most .945
        ({"keep_below": 0.5}, [6, 7]),
        ({"margin": 0.1, "keep_below": 0.5}, [6, 7]),
        ({"margin": 0.2, "keep_below": 0.9}, [5, 6, 7]),
        ({"margin": 0.2, "relative_margin": 0.5}, [6, 7]),
    ],
)
def test_what_is_too_close_to_the_positive_is_removed(limits, kept, tmp_path):
    scores = np.cos(np.array(ANGLES))
    sampler = NearestNegatives("teacher", 1, **limits)
    figures = refreshed(sampler, tmp_path, judged(((1,),)))
    assert lists(sampler) == [kept] and figures["too close"] == 7 - len(kept)
    assert sampler.mined.scores.numpy() == pytest.approx(scores[kept], abs=1e-6)
    assert figures["positive score"] == pytest.approx(scores[1], abs=1e-6)


def test_limits_are_in_units_of_the_served_score(tmp_path):
    """A model that divides its products by 0.05 is 20 times as far from each negative."""
    kept = {}
    for scale, margin in ((1.0, 0.1), (20.0, 2.0)):
        model = Circle()
        model.scale = lambda scale=scale: scale
        sampler = NearestNegatives("teacher", 1, margin=margin)
        refreshed(sampler, tmp_path / str(scale), judged(((1,),)), graph(teacher=model))
        kept[scale] = (lists(sampler), sampler.mined.scores / scale, sampler.mined.positive / scale)
    assert kept[1.0][0] == kept[20.0][0] == [[4, 5, 6, 7]]
    for one, other in zip(kept[1.0][1:], kept[20.0][1:], strict=True):
        torch.testing.assert_close(one, other)


def test_a_two_tower_finds_the_items_it_would_serve_but_for_those_taken(tmp_path):
    features = fitted()
    data = shop_judged(features)
    torch.manual_seed(0)
    student = TwoTower(features, dim=8, temperature=0.1)
    sampler = NearestNegatives("student", 1, top=5)
    refreshed(sampler, tmp_path, data, DistillationGraph({"student": student}, [], ["student"]))
    vectors = student.encode_queries(data.queries), student.encode_candidates(data.candidates)
    scores = (vectors[0] @ vectors[1].T) / 0.1
    for user, taken in enumerate(data.positives.tolist()):
        scores[user, taken] = -math.inf
    best = scores.topk(5)
    assert lists(sampler) == best.indices.tolist()
    torch.testing.assert_close(sampler.mined.scores.view(-1, 5), best.values, rtol=1e-4, atol=1e-4)


def test_of_several_positives_the_lowest_decides_and_without_one_nothing_is_too_close(tmp_path):
    """Positives take turns: a negative of any turn must be below that turn's positive."""
    sampler = NearestNegatives("teacher", 1, margin=0.0)
    data = judged(((0, 5), (1,)), labels=torch.tensor([1.0, 1.0, 0.0]))
    refreshed(sampler, tmp_path, data)
    assert lists(sampler) == [[6, 7], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert sampler.mined.positive.isnan().tolist() == [False, True]


# who checks


def test_another_node_may_check_what_was_found(tmp_path):
    reader = Reader({"c0": 2.0, "c1": 3.0, "c2": 1.0, "c4": -1.0})
    sampler = NearestNegatives("teacher", 1, top=4, checked_by="reader", margin=1.0)
    figures = refreshed(sampler, tmp_path, made=graph(reader=reader))
    assert lists(sampler) == [[2, 3, 4]] and sampler.mined.scores.tolist() == [1.0, 0.0, -1.0]
    assert (figures["too close"], figures["positive score"]) == (1.0, 2.0)
    assert sorted(c for _, c in reader.asked) == [f"c{i}@{ANGLES[i]}" for i in range(5)]  # each pair once


def test_an_encoder_may_check_too_and_encodes_each_text_once(tmp_path, monkeypatch):
    monkeypatch.setattr(hard_negatives, "QUERIES_AT_ONCE", 1)
    checker = Circle()
    made = graph(checker=checker, teacher=Circle(math.pi / 2))  # the finder finds nothing: all are alike
    sampler = NearestNegatives("teacher", 1, checked_by="checker", margin=0.1)
    refreshed(sampler, tmp_path, judged(((1,), (1,))), made)
    assert lists(sampler) == [[4, 5, 6, 7]] * 2
    assert checker.encoded == [1, 8, 1]  # a query, all candidates, the other query


def test_bm25_finds_and_a_reader_checks(tmp_path):
    reader = Reader({"c1": 3.0, "c0": 2.0, "c3": 2.5})
    data = judged(queries=["c0 c1 c2 c3"])
    sampler = BM25Negatives(1, checked_by="reader", relative_margin=0.5)
    refreshed(sampler, tmp_path, data, graph(reader=reader))
    assert lists(sampler) == [[2]] and sampler.mined.positive.tolist() == [2.0]


def test_logits_are_compared_by_their_sigmoid_if_asked(tmp_path):
    """95% of the logit 3 is 2.85, but 95% of its probability .953 is .905, of the logit 2.25."""
    reader = Reader({"c0": 3.0, "c1": 2.9, "c2": 2.5, "c3": -1.0})
    kept = {}
    for sigmoid in (True, False):
        sampler = NearestNegatives(
            "teacher", 1, top=3, checked_by="reader", relative_margin=0.05, sigmoid=sigmoid
        )
        refreshed(sampler, tmp_path / str(sigmoid), made=graph(reader=reader))
        kept[sigmoid] = (lists(sampler)[0], sampler.mined.scores.tolist())
    assert kept == {True: ([3], [pytest.approx(1 / (1 + math.e))]), False: ([2, 3], [2.5, -1.0])}


def test_a_score_that_is_not_finite_is_refused(tmp_path):
    reader = Reader({"c2": math.nan})
    sampler = NearestNegatives("teacher", 1, checked_by="reader", margin=0.1)
    with pytest.raises(DataError, match=r"'reader' gives a pair a score that is not finite"):
        refreshed(sampler, tmp_path, made=graph(reader=reader))


# what is drawn


def test_draws_are_distinct_real_and_of_the_asked_shape(tmp_path):
    sampler = NearestNegatives("teacher", 5, top=5, skip=3)
    refreshed(sampler, tmp_path, judged(((0,), (1,))))
    rows = sampler.draw(torch.tensor([1, 0, 1]), torch.Generator().manual_seed(0))
    assert rows.shape == (3, 5) and rows.dtype == torch.int64
    assert [sorted(row) for row in rows.tolist()] == [[-1, 4, 5, 6, 7]] * 3


def test_strata_spread_the_draws_over_the_range_of_scores(tmp_path):
    plain, spread = NearestNegatives("teacher", 2), NearestNegatives("teacher", 2, strata=2)
    data = judged(((0,),), extra=[f"d{i}@{1.4 + i / 100}" for i in range(30)])  # many easy ones
    picked = {}
    for name, sampler in (("plain", plain), ("spread", spread)):
        refreshed(sampler, tmp_path / name, data)
        rows = sampler.draw(torch.zeros(200, dtype=torch.int64), torch.Generator().manual_seed(0))
        scores = torch.tensor([math.cos(float(t.split("@")[1])) for t in data.candidates.texts])
        picked[name] = (scores[rows] > 0.5).sum(dim=1)
    assert picked["spread"].eq(1).all()  # one of each half of the range
    assert picked["plain"].double().mean() < 0.5


def test_a_source_lists_them_and_never_a_positive(tmp_path):
    data = judged(((0, 2), (1,), (3,)))
    source = TextSource(data, 3, candidates=8, negatives=[NearestNegatives("teacher", 4, top=4)])
    source.refresh(graph(), 0, tmp_path)
    batch = source.batch(0, 0)
    for query, *row in zip(batch.query_ids.tolist(), batch.index, batch.mask, strict=True):
        rows = batch.candidate_ids[row[0]][row[1]].tolist()
        assert len(rows) == 5 and len(set(rows)) == 5
        assert not set(rows[1:]) & set(data.positives[query].tolist())


def test_batches_before_the_first_refresh_are_refused():
    source = TextSource(judged(), 1, negatives=[NearestNegatives("teacher", 1)])
    with pytest.raises(RuntimeError, match="refresh comes before its batches"):
        source.batch(0, 0)


# when


def test_lists_follow_the_student_as_often_as_asked(tmp_path, caplog):
    student = Circle()
    made = graph(("student",), student=student)
    source = TextSource(judged(), 1, negatives=[NearestNegatives("student", 1, top=3, every=2)])
    (sampler,) = source.negatives
    seen = []
    with caplog.at_level(logging.INFO, "distill"):
        for epoch in range(4):
            figures = source.refresh(made, epoch, tmp_path)
            assert bool(figures) == (epoch % 2 == 0)
            seen.append(lists(sampler))
            with torch.no_grad():
                student.turn += math.pi / 2  # all texts alike, then as before but mirrored, ...
    assert seen[0] == seen[1] == [[1, 2, 3]] and seen[2] == seen[3]
    assert sorted(path.name for path in (tmp_path / "negatives-0").iterdir()) == [
        "epoch-0000.arrow",
        "epoch-0002.arrow",
    ]
    assert "data.negatives[0], epoch 0: per query 3, rank 2, score 0.9" in caplog.text
    assert student.encoded == [1, 8, 1, 8]


def test_lists_of_a_student_change_as_it_learns(tmp_path):
    student = Circle()
    sampler = NearestNegatives("student", 1, top=3, every=1)
    made = graph(("student",), student=student)
    data = judged(((0,),), queries=["q@0.75"])
    refreshed(sampler, tmp_path, data, made, epoch=0)
    first = lists(sampler)
    with torch.no_grad():
        student.turn += math.pi / 2
    refreshed(sampler, tmp_path, data, made, epoch=1)
    assert first == [[5, 4, 3]] and lists(sampler) == [[1, 2, 3]]  # the second: ties, by row


def test_lists_of_an_epoch_that_began_are_read_and_never_mined_again(tmp_path):
    """The student has learnt since: what it would find now, it did not learn from then."""
    made = graph(("student",), student=Circle())

    def sampler():
        return NearestNegatives("student", 1, top=3, every=1)

    refreshed(first := sampler(), tmp_path, made=made, epoch=1)
    with torch.no_grad():
        made.nodes["student"].turn += math.pi / 2
    again = sampler()
    assert refreshed(again, tmp_path, made=made, epoch=1, begun=True) == {}
    assert lists(again) == lists(first) and made.nodes["student"].encoded == [1, 8]
    at_start = sampler()  # killed after mining, before the first step; it came here with other weights
    assert refreshed(at_start, tmp_path, made=made, epoch=1)
    assert made.nodes["student"].encoded == [1, 8, 1, 8]
    path = tmp_path / "epoch-0001.arrow"
    other = NearestNegatives("student", 1, top=2, every=1)
    with pytest.raises(DataError, match=r"epoch-0001.arrow is missing, or of other settings"):
        refreshed(other, tmp_path, made=made, epoch=1, begun=True)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"epoch-0001.arrow is damaged .* Put the file back"):
        refreshed(sampler(), tmp_path, made=made, epoch=1, begun=True)
    path.unlink()
    with pytest.raises(DataError, match=r"epoch-0001.arrow is missing.* cannot be mined again"):
        refreshed(sampler(), tmp_path, made=made, epoch=1, begun=True)


def test_a_frozen_teacher_mines_once_for_all_runs(tmp_path, own_cache, caplog):
    def run(folder, teacher, **arguments):
        sampler = NearestNegatives("teacher", 1, top=3, **arguments)
        refreshed(sampler, tmp_path / folder, made=graph(teacher=teacher))
        return lists(sampler), len(teacher.encoded)

    assert run("a", Circle()) == ([[1, 2, 3]], 2)
    assert run("b", Circle()) == ([[1, 2, 3]], 0)  # from the cache
    assert (
        run("c", Circle(0.1))[1] == 2 and run("d", Circle(), skip=1)[1] == 2
    )  # another teacher, other lists
    assert not any((own_cache / "mining").iterdir())  # no vectors are left behind
    for path in (own_cache / "mined").iterdir():
        path.write_bytes(path.read_bytes()[:-50])
    assert run("e", Circle()) == ([[1, 2, 3]], 2) and "is damaged" in caplog.text  # mined again
    (tmp_path / "a" / "epoch-0000.arrow").write_bytes(b"")
    assert run("a", Circle()) == ([[1, 2, 3]], 0)


def test_a_mixture_refreshes_each_of_its_sources(tmp_path):
    made = graph()
    sources = {
        name: TextSource(judged(((row,),)), 1, negatives=[NearestNegatives("teacher", 1, top=2)], name="x")
        for name, row in (("a/b", 0), ("c", 1))
    }
    figures = Mixture(sources).refresh(made, 0, tmp_path)
    assert figures["a/b.negatives[0]/rank"] == figures["c.negatives[0]/rank"] == 1.5
    assert [lists(s.negatives[0]) for s in sources.values()] == [[[1, 2]], [[0, 2]]]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["a%2Fb", "c"]


# in bounded memory


def random_judged(queries, candidates, seed=0):
    chance = np.random.default_rng(seed)
    asked, texts = (
        [f"{kind}{i}@{angle}" for i, angle in enumerate(np.round(chance.uniform(0, 3, n), 2))]
        for kind, n in (("q", queries), ("c", candidates))
    )
    return Judged(
        task="retrieval",
        queries=TextTable(list(asked), asked),
        candidates=TextTable(list(texts), texts),
        listed=Ragged.of([[i % candidates] for i in range(queries)]),
        labels=torch.ones(queries),
    )


def test_pieces_hold_no_more_than_the_bound_and_change_nothing(tmp_path, monkeypatch):
    data, found = random_judged(25, 90), {}
    for name, numbers, queries in (("whole", 2**25, 4096), ("pieces", 2 * 16, 7)):
        seen = []

        def watched(asked, vectors, k, metric, seen=seen, knn=faiss.knn):
            seen.append((len(asked), len(vectors)))
            return knn(asked, vectors, k, metric=metric)

        with monkeypatch.context() as patch:
            patch.setattr(neighbours, "NUMBERS_AT_ONCE", numbers)
            patch.setattr(hard_negatives, "QUERIES_AT_ONCE", queries)
            patch.setattr(faiss, "knn", watched)
            teacher = Circle()
            sampler = NearestNegatives("teacher", 1, top=20, margin=0.01)
            refreshed(sampler, tmp_path / name, data, graph(teacher=teacher), epoch=0)
        found[name] = sampler.mined
        if name == "pieces":
            assert max(asked for asked, _ in seen) == 7 and max(size for _, size in seen) == 16
            assert max(teacher.encoded) == 16 and sum(teacher.encoded) == 25 + 90  # each text once
        (tmp_path / "cache" / "mined").rename(tmp_path / f"mined-{name}")
    assert found["whole"].rows.tolist() == found["pieces"].rows.tolist()
    torch.testing.assert_close(found["whole"].scores, found["pieces"].scores)
    brute = teacher_scores(data)
    for query, rows in zip(found["whole"].queries.tolist(), found["whole"].rows.tolist(), strict=True):
        order = [row for row in np.lexsort((np.arange(90), -brute[query])) if row != query % 90][:20]
        expected = [row for row in order if brute[query, row] <= brute[query, query % 90] - 0.01]
        assert sorted(brute[query, rows]) == pytest.approx(sorted(brute[query, expected]), abs=1e-6)


def teacher_scores(data):
    asked, texts = (
        np.array([float(text.split("@")[1]) for text in table.texts])
        for table in (data.queries, data.candidates)
    )
    return np.cos(asked[:, None] - texts[None])


def test_an_interrupted_mining_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "NUMBERS_AT_ONCE", 2 * 30)
    monkeypatch.setattr(hard_negatives, "QUERIES_AT_ONCE", 10)
    data, stop = random_judged(25, 90), SimpleNamespace(after=5)
    knn, calls = faiss.knn, []

    def dies(*arguments, **named):
        calls.append(1)
        if len(calls) == stop.after:
            raise KeyboardInterrupt
        return knn(*arguments, **named)

    monkeypatch.setattr(faiss, "knn", dies)
    first, second = Circle(), Circle()
    with pytest.raises(KeyboardInterrupt):
        refreshed(NearestNegatives("teacher", 1), tmp_path, data, graph(teacher=first))
    assert not (tmp_path / "epoch-0000.arrow").exists()
    refreshed(NearestNegatives("teacher", 1), tmp_path, data, graph(teacher=second))
    assert first.encoded == [10, 30, 30, 30, 10]
    assert second.encoded == [10, 5]  # the queries of the second block and the third
    assert len(calls) == 5 + 2 * 3


def test_two_runs_that_mine_the_same_do_not_share_a_folder(tmp_path):
    folder_for = hard_negatives._folder_of_its_own
    with folder_for(tmp_path / "a") as mine, folder_for(tmp_path / "a") as theirs:
        assert mine == tmp_path / "a" != theirs and theirs.parent == tmp_path
    with folder_for(tmp_path / "a") as again:
        assert again == mine


def test_pairs_that_were_read_are_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(hard_negatives, "CHECKED_AT_ONCE", 10)
    data = random_judged(25, 90)

    class Dies(Reader):
        dies = True

        def score_pairs(self, queries, candidates):
            if self.dies and len(self.asked) > 60:
                raise KeyboardInterrupt
            return super().score_pairs(queries, candidates)

    def mine(reader):
        sampler = NearestNegatives("teacher", 1, top=5, checked_by="reader", keep_below=0.5)
        refreshed(sampler, tmp_path, data, graph(reader=reader))

    first, second = Dies({}), Dies({})
    with pytest.raises(KeyboardInterrupt):
        mine(first)
    Dies.dies = False
    mine(second)
    queries = [{query for query, _ in reader.asked} for reader in (first, second)]
    assert len(queries[0]) == 20 and len(queries[1]) == 5 and not queries[0] & queries[1]


# what is refused


def test_a_margin_that_removes_every_negative_is_one_clear_message(tmp_path):
    data = judged(((7,), (7,)))
    source = TextSource(data, 1, negatives=[NearestNegatives("teacher", 1, top=5, skip=1, margin=0.5)])
    expected = (
        r"^data\.negatives\[0\]: margin 0\.5 removes every negative: all 2 queries, whose positives score "
        r"0\.0707 in the mean, lost all that teacher found, 10 candidates\. Take a smaller margin .* "
        r"top is 5, skip 1\.$"
    )
    with pytest.raises(DataError, match=expected):
        source.refresh(graph(), 0, tmp_path)
    assert not (tmp_path / "negatives-0").exists()


def test_a_query_that_lost_all_has_none_and_the_others_keep_theirs(tmp_path):
    sampler = NearestNegatives("teacher", 2, top=6, margin=0.5)
    figures = refreshed(sampler, tmp_path, judged(((7,), (0,))))
    assert figures["queries without"] == 1 and lists(sampler) == [[], [6]]
    rows = sampler.draw(torch.tensor([0, 1]), torch.Generator())
    assert rows.tolist() == [[-1, -1], [6, -1]]


def test_nothing_beside_positives_is_told(tmp_path):
    with pytest.raises(
        DataError, match=r"no query of 1 has a negative: beyond the first 7 \(skip\), teacher"
    ):
        refreshed(NearestNegatives("teacher", 1, skip=7), tmp_path)


def test_vectors_that_are_not_finite_are_told_by_id(tmp_path):
    data = judged(extra=["broken@nan"])
    with pytest.raises(DataError, match=r"the vector of '8' is not finite"):
        refreshed(NearestNegatives("teacher", 1), tmp_path, data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 3, "top": 2}, r"top \(2\) must be at least count \(3\)"),
        ({"count": 1, "skip": -1}, "skip"),
        ({"count": 1, "strata": 1}, "strata must be at least 2"),
        ({"count": 1, "every": 0}, "every must be at least 1 epoch"),
        ({"count": 1, "margin": -1.0}, "margin must be 0 or more"),
        ({"count": 1, "checked_by": "reader"}, "checked_by does nothing without margin"),
        ({"count": 1, "sigmoid": True}, "sigmoid does nothing without margin"),
        ({"count": 1, "checked_by": "student", "margin": 0.1}, "'student' scores what it finds anyway"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NearestNegatives("student", **arguments)


def test_bm25s_own_scores_judge_nothing():
    with pytest.raises(ValueError, match="name a node in checked_by"):
        BM25Negatives(1, margin=0.1)


def test_nodes_that_cannot_do_it_are_refused(tmp_path):
    made = graph(("student",), student=Circle(), reader=Reader({}), mute=Mute())
    unlabelled = judged()
    unlabelled = Judged("retrieval", unlabelled.queries, unlabelled.candidates, unlabelled.listed)

    def problems(sampler, data=None):
        return list(sampler.problems(made, data or judged()))

    said = {
        "by: there is no model 'techer'; there are teacher, student": problems(NearestNegatives("techer", 1)),
        "by: 'reader' (Reader) gives no single vector per text": problems(NearestNegatives("reader", 1)),
        "checked_by: 'mute' (Mute) gives no score to a pair": problems(
            NearestNegatives("teacher", 1, checked_by="mute", margin=0.1)
        ),
        "every: 'teacher' will not learn": problems(NearestNegatives("teacher", 1, every=1)),
        "every: BM25 will not learn": problems(BM25Negatives(1, every=1)),
        "margin: the data has no labels": problems(NearestNegatives("teacher", 1, margin=0.1), unlabelled),
    }
    for start, found in said.items():
        assert len(found) == 1 and found[0].startswith(start), found
    fine = [
        NearestNegatives("student", 1, every=1, checked_by="reader", margin=0.1),
        BM25Negatives(1, checked_by="student", margin=0.1, every=2),
        NearestNegatives("teacher", 1, checked_by="student", strata=2),
    ]
    assert [problems(sampler) for sampler in fine] == [[], [], []]
    with pytest.raises(RecipeError, match=r"data.negatives\[0\]: by: there is no model 'techer'"):
        TextSource(judged(), 1, negatives=[NearestNegatives("techer", 1)]).refresh(made, 0, tmp_path)


class Mute(Model):
    provides = frozenset({"classes"})
    reads = Columns()

    def represent(self, batch, needs):
        raise NotImplementedError

    def save_pretrained(self, folder):
        raise NotImplementedError
