"""What frozen teachers said is recalled as if they were asked again, and only where it is theirs to say."""

import numpy as np
import pytest
import torch

from distill.batch import Ragged
from distill.data import Judged, RandomNegatives, TextSource, TextTable
from distill.data.mixture import Mixture
from distill.errors import RecipeError, RunError
from distill.graph import Arrow, DistillationGraph
from distill.objectives import EmbeddingMatch, SampledSoftmax, ScoreKL
from distill.outputs import Needs, Outputs
from distill.plan import check_scores
from distill.store import RecalledBatches, TeacherMemory, judged_sources
from students import BiEncoder
from teachers import CrossEncoder, Recorded

QUERIES = ["what is a wing", "heart", "ship river", "a wing is a surface"]
PASSAGES = [
    "the flow of air",
    "blood",
    "city",
    "old film and music",
    "the sea",
    "blood",
    "tree",
    "fire and heat",
]


def judged(lists=((0, 1, 2), (5, 3), (), (4, 0, 6, 7)), scores=None):
    listed = Ragged.of([list(rows) for rows in lists])
    return Judged(
        task="rerank",
        queries=TextTable([str(i) for i in range(4)], QUERIES),
        candidates=TextTable([str(i) for i in range(8)], PASSAGES),
        listed=listed,
        labels=torch.tensor([float(i == 0) for rows in lists for i in range(len(rows))]),
        scores=scores or {},
    )


def count_calls(model):
    model.calls = 0
    represent = model.represent

    def counted(batch, needs):
        model.calls += 1
        return represent(batch, needs)

    model.represent = counted
    return model


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """A store of its own for each test."""
    monkeypatch.setenv("DISTILL_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def models(tiny_bert):
    torch.manual_seed(0)
    return {
        "student": count_calls(BiEncoder(tiny_bert(seed=1))),
        "encoder": count_calls(BiEncoder(tiny_bert(seed=2), query_prompt="query ", dropout=0.5)),
        "cross": count_calls(CrossEncoder(tiny_bert(num_labels=1), dropout=0.5)),
    }


def graph_of(models, trained=("student",), arrows=None, heads="student"):
    arrows = arrows or [
        Arrow("vectors", EmbeddingMatch(), heads, "encoder"),
        Arrow("batch", ScoreKL(in_batch=True), heads, "encoder"),
        Arrow("pairs", ScoreKL(), heads, "cross"),
    ]
    return DistillationGraph(models, arrows, trained)


def source_of(graph, part=None, **arguments):
    source = TextSource(part or judged(), **{"batch_size": 2, "candidates": 4, "seed": 1, **arguments})
    source.prepare(*graph.columns())
    return source


def memory_of(graph, sources, **arguments):
    """A memory that has asked what can be asked before the first batch."""
    memory = TeacherMemory(graph, sources, **arguments)
    memory.fill()
    return memory


def calls(graph, *names):
    return [graph.nodes[name].calls for name in names]


def said_live(graph, batch, name, needs):
    with torch.no_grad():
        graph.nodes[name].eval()
        view = batch.view(*graph.nodes[name].reads.keys)
        return graph.nodes[name].represent(view, needs)


@pytest.mark.parametrize("blocks", [4096, 3])
def test_what_is_recalled_is_what_the_teachers_would_say(blocks, models, monkeypatch):
    """In whatever blocks they were asked, and whatever mode the graph was left in."""
    monkeypatch.setattr("distill.store.TEXTS_AT_ONCE", blocks)
    monkeypatch.setattr("distill.store.PAIRS_AT_ONCE", blocks)
    graph = graph_of(models)
    source = source_of(graph)
    graph.train()
    memory = memory_of(graph, {"data": source})
    seen = 0
    for epoch in range(3):
        for step in range(source.steps(epoch)):
            batch = memory.recall(source.batch(epoch, step))
            assert batch.stored.keys() == {"encoder", "cross"}
            live = said_live(graph, batch, "encoder", Needs("queries", "candidates"))
            for name, value in live.given():
                torch.testing.assert_close(
                    getattr(batch.stored["encoder"], name), value, atol=1e-5, rtol=1e-5
                )
            live = said_live(graph, batch, "cross", Needs("scores")).scores
            torch.testing.assert_close(batch.stored["cross"].scores, live, atol=1e-5, rtol=1e-5)
            seen += int(batch.mask.sum())
    assert seen > 20


def test_losses_are_the_same_and_no_frozen_teacher_is_asked_again(models):
    graph = graph_of(models)
    source = source_of(graph)
    batch = source.batch(0, 0)
    graph.eval()  # the student too
    live = {name: loss.loss.detach() for name, loss in graph(batch).items()}
    memory = memory_of(graph, {"data": source})
    for name in ("encoder", "cross"):
        graph.nodes[name].calls = 0
    graph.nodes["student"].calls = 0
    recalled = {name: loss.loss.detach() for name, loss in graph(memory.recall(batch)).items()}
    for name, loss in live.items():
        torch.testing.assert_close(recalled[name], loss, atol=1e-5, rtol=1e-4)
    assert [graph.nodes[n].calls for n in ("student", "encoder", "cross")] == [1, 0, 0]


@pytest.mark.parametrize("blocks", [4096, 8])
def test_a_pair_that_a_sampler_brings_is_asked_once_and_kept(blocks, models, monkeypatch):
    """By whichever run drew it first; with small blocks each batch is asked alone."""
    monkeypatch.setattr("distill.store.PAIRS_AT_ONCE", blocks)
    graph = graph_of(models)
    source = source_of(graph, negatives=[RandomNegatives(3)], candidates=7)
    memory = memory_of(graph, {"data": source})
    assert memory.at_once == max(1, blocks // 14)  # two queries with up to seven candidates a batch
    places = [(epoch, step) for epoch in range(3) for step in range(2)]
    batches = RecalledBatches(memory, source)
    heard = [batches.batch(*place) for place in places]
    for batch in heard:
        live = said_live(graph, batch, "cross", Needs("scores")).scores
        torch.testing.assert_close(batch.stored["cross"].scores, live, atol=1e-5, rtol=1e-5)
    graph.nodes["cross"].calls = graph.nodes["encoder"].calls = 0
    again = memory_of(graph, {"data": source})
    for place, batch in zip(places, heard, strict=True):
        for recalled in (batches.batch(*place), again.recall(source.batch(*place))):
            assert torch.equal(recalled.stored["cross"].scores, batch.stored["cross"].scores)
            graph(recalled)
    assert calls(graph, "cross", "encoder") == [0, 0]


def test_batches_are_asked_ahead_in_the_same_blocks_wherever_one_begins(models, store, monkeypatch):
    """Else a run that is resumed would ask in other blocks than one that was never stopped."""
    monkeypatch.setattr("distill.store.PAIRS_AT_ONCE", 21)
    graph = graph_of(models, arrows=[Arrow("pairs", ScoreKL(), "student", "cross")])
    found = []
    for name, steps in (("whole", [0, 1, 2, 3]), ("resumed", [2, 3]), ("late", [3])):
        monkeypatch.setenv("DISTILL_STORE", str(store / name))
        source = source_of(graph, negatives=[RandomNegatives(3)], candidates=7, batch_size=1)
        memory = memory_of(graph, {"data": source})
        assert memory.at_once == 3  # steps 0 to 2, then 3
        batches = RecalledBatches(memory, source)
        for step in steps:
            batches.batch(1, step)
        found.append(places(store / name))
    assert found[0] == found[1] and len(found[0]) == 3 and set(found[2]) < set(found[0])


def test_without_asking_beforehand_the_batch_is_asked(models):
    graph = graph_of(models)
    source = source_of(graph)
    batch = TeacherMemory(graph, {"data": source}).recall(source.batch(0, 0))
    live = said_live(graph, batch, "cross", Needs("scores")).scores
    torch.testing.assert_close(batch.stored["cross"].scores, live, atol=1e-5, rtol=1e-5)
    assert batch.stored["encoder"].candidates.shape == (len(batch.candidate_ids), 32)


def test_a_trained_teacher_is_never_remembered(models):
    """What it said before the first step is not what it would say now."""
    graph = graph_of(models, trained=("student", "encoder"))
    source = source_of(graph)
    graph.nodes["encoder"].calls = 0
    batch = memory_of(graph, {"data": source}).recall(source.batch(0, 0))
    assert batch.stored.keys() == {"cross"} and graph.nodes["encoder"].calls == 0


def test_a_teacher_is_asked_only_on_the_data_its_arrows_hear(models):
    arrows = [
        Arrow("vectors", EmbeddingMatch(), "student", "encoder", data=("one",)),
        Arrow("labels", SampledSoftmax(), "student"),
    ]
    graph = graph_of(models, arrows=arrows)
    one, two = source_of(graph, name="one"), source_of(graph, name="two")
    memory = memory_of(graph, judged_sources(Mixture({"one": one, "two": two})))
    assert memory.recall(one.batch(0, 0)).stored.keys() == {"encoder"}
    assert memory.recall(two.batch(0, 0)).stored.keys() == set()
    assert graph.nodes["cross"].calls == 0


def given(part):
    """Scores of the listed pairs that no model would give."""
    return {"cross": torch.arange(len(part.listed.values)) + 100.0}


def test_scores_that_come_with_the_data_are_heard_and_nobody_is_asked(models):
    part = judged(scores=given(judged()))
    graph = graph_of(models)
    source = source_of(graph, part)
    graph.nodes["cross"].calls = 0
    memory = memory_of(graph, {"data": source})
    batch = memory.recall(source.batch(0, 0))
    graph(batch)
    assert graph.nodes["cross"].calls == 0
    torch.testing.assert_close(batch.stored["cross"].scores, source.batch(0, 0).stored["cross"].scores)


def test_pairs_that_samplers_bring_are_asked_beside_scores_of_the_data(models):
    part = judged(scores=given(judged()))
    graph = graph_of(models)
    source = source_of(graph, part, negatives=[RandomNegatives(3)], candidates=7)
    memory = memory_of(graph, {"data": source})
    assert memory.asked["cross"] == 0  # all that is listed has its score
    seen = 0
    for step in range(2):
        bare = source.batch(0, step)
        batch, known = memory.recall(bare), bare.stored["cross"].known
        live = said_live(graph, batch, "cross", Needs("scores")).scores
        expected = torch.where(known, bare.stored["cross"].scores, live)
        torch.testing.assert_close(batch.stored["cross"].scores, expected, atol=1e-5, rtol=1e-5)
        assert (batch.stored["cross"].scores[known] >= 100).all()
        graph.nodes["cross"].calls = 0
        graph(batch)
        assert graph.nodes["cross"].calls == 0
        seen += int((batch.mask & ~known).sum())
    assert seen > 3 and memory.asked["cross"] == seen


@pytest.mark.parametrize("negatives", [(), (RandomNegatives(3),)], ids=["listed", "sampled"])
def test_given_scores_are_heard_of_a_teacher_that_is_asked_for_vectors_too(negatives, models):
    part = judged(scores={"encoder": given(judged())["cross"]})
    arrows = [
        Arrow("vectors", EmbeddingMatch(), "student", "encoder"),
        Arrow("batch", ScoreKL(in_batch=True), "student", "encoder"),
        Arrow("pairs", ScoreKL(), "student", "encoder"),
    ]
    graph = graph_of(models, arrows=arrows)
    source = source_of(graph, part, negatives=negatives, candidates=7)
    memory = memory_of(graph, {"data": source})
    bare = source.batch(0, 0)
    batch, own = memory.recall(bare), bare.stored["encoder"]
    known = batch.mask if own.known is None else own.known
    said = batch.stored["encoder"]
    cosines = (said.candidates[batch.index] * said.queries[:, None]).sum(-1)
    expected = torch.where(known, own.scores, cosines)
    torch.testing.assert_close(said.scores[batch.mask], expected[batch.mask])
    assert (said.scores[known] >= 100).all() and torch.equal(known, batch.mask) != bool(negatives)
    graph.nodes["encoder"].calls = 0
    graph.eval()
    heard = graph(batch)
    assert graph.nodes["encoder"].calls == 0
    listed = Arrow("pairs", ScoreKL(), "student", "encoder").objective
    student = graph.nodes["student"]
    own_scores = student.compare(student.represent(batch, Needs("scores")), batch, Needs("scores"))
    torch.testing.assert_close(heard["pairs"].loss, listed(own_scores, said, batch).loss)


def test_a_recorded_teacher_teaches_by_its_scores_and_is_never_asked(models):
    models["cross"] = Recorded()
    graph = graph_of(models)
    source = source_of(graph, judged(scores=given(judged())))
    check_scores(graph, source)
    batch = memory_of(graph, {"data": source}).recall(source.batch(0, 0))
    loss = graph(batch)["pairs"].loss
    assert loss.isfinite().all() and loss.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "models.cross: the data set 'data' has no scores of it, and a recorded teacher cannot be asked"),
        (
            {"scored": True, "negatives": [RandomNegatives(1)]},
            "samplers add negatives to the data set 'data'",
        ),
        (
            {"scored": True, "trained": ("student", "cross")},
            "models.cross: it is trained, so its scores in the",
        ),
    ],
)
def test_scores_that_are_not_there_or_would_not_be_heard_are_refused(arguments, message, models):
    models["cross"] = Recorded()
    arguments = {"scored": False, "trained": ("student",), **arguments}
    graph = graph_of(models, trained=arguments.pop("trained"))
    part = judged(scores=given(judged()) if arguments.pop("scored") else None)
    with pytest.raises(RecipeError, match=message):
        check_scores(graph, source_of(graph, part, **arguments))


def test_two_memories_are_equal_bit_for_bit(models, monkeypatch):
    """A run that is resumed must hear what it heard before."""
    monkeypatch.setattr("distill.store.TEXTS_AT_ONCE", 3)
    graph = graph_of(models)
    source = source_of(graph)
    one, two = (memory_of(graph, {"data": source}) for _ in range(2))
    batch = source.batch(1, 0)
    for name in ("encoder", "cross"):
        for field, value in one.recall(batch).stored[name].given():
            assert torch.equal(value, getattr(two.recall(batch).stored[name], field))


def test_texts_alone_have_their_vectors(models):
    none = TextTable([], [])
    texts = Judged(
        "texts", none, TextTable([str(i) for i in range(8)], PASSAGES), Ragged.of([]), name="texts"
    )
    arrows = [Arrow("vectors", EmbeddingMatch(), "student", "encoder")]
    graph = graph_of(models, arrows=arrows)
    source = source_of(graph, texts, batch_size=3)
    memory = memory_of(graph, {"data": source})
    batch = memory.recall(source.batch(0, 1))
    live = said_live(graph, batch, "encoder", Needs("candidates")).candidates
    torch.testing.assert_close(batch.stored["encoder"].candidates, live, atol=1e-5, rtol=1e-5)
    graph.nodes["encoder"].calls = 0
    assert graph(batch)["vectors"].loss.shape == (3,) and graph.nodes["encoder"].calls == 0


def test_sources_are_found_inside_a_mixture(models):
    graph = graph_of(models)
    one, two = source_of(graph, name="one"), source_of(graph, name="two")
    assert judged_sources(one) == {"one": one}
    assert judged_sources(Mixture({"a": one, "b": two})) == {"a": one, "b": two}


def test_queries_that_are_left_out_are_not_asked_about(models):
    """Nor the candidates that they alone list."""
    graph = graph_of(models)
    part = judged(lists=((0, 1), (5, 3)))
    labels = torch.tensor([1.0, 0.0, 0.0, 0.0])
    part = Judged("rerank", part.queries, part.candidates, Ragged.of([[0, 1], [5, 3], [], []]), labels)
    source = source_of(graph, part, with_positive=True)
    assert source.query_rows.tolist() == [0] and source.candidate_rows.tolist() == [0, 1]
    assert source.steps(0) == 1 and source.batch(0, 0).query_ids.tolist() == [0]
    memory = TeacherMemory(graph, {"data": source})
    asked = {
        (listener.name, axis): [(q.queries.tolist(), q.candidates.tolist()) for q in found]
        for listener in memory.listeners
        for axis in listener.signals
        if (found := memory.unknown(listener, axis))
    }
    assert asked == {
        ("encoder", "query"): [([0], [])],
        ("encoder", "candidate"): [([], [0, 1])],
        ("cross", "pair"): [([0, 0], [0, 1])],
    }


# what is kept, and for whom


def places(store):
    return sorted(str(path.relative_to(store)) for path in store.rglob("*.arrow"))


def test_another_run_asks_only_what_is_new(models):
    """Keys are texts: rows may be others, lists longer, the data set another one."""
    graph = graph_of(models)
    memory_of(graph, {"data": source_of(graph)})
    part = judged()
    texts = ["fire", *PASSAGES]
    lists = [[row + 1 for row in rows] for rows in ((0, 1, 2), (5, 3), (), (4, 0, 6, 7))]
    longer = Judged(
        "rerank",
        TextTable(["x"] * 4, part.queries.texts[::-1]),
        TextTable([str(i) for i in range(9)], texts),
        Ragged.of([[*rows, 0] for rows in lists[::-1]]),
        torch.zeros(13),
    )
    other = graph_of(models)
    for name in ("encoder", "cross"):
        other.nodes[name].calls = 0
    memory = TeacherMemory(other, {"other": source_of(other, longer, name="other")})
    counts = {(one.name, axis): memory.count(one, axis) for one in memory.listeners for axis in one.signals}
    assert counts == {
        ("encoder", "query"): (4, 4),
        ("encoder", "candidate"): (8, 7),
        ("cross", "pair"): (13, 9),
    }
    memory.fill()
    assert memory.asked == {"encoder": 1, "cross": 4} and calls(other, "encoder", "cross") == [1, 1]


def test_half_precision_is_kept_on_request_and_apart(models, store):
    graph = graph_of(models)
    source = source_of(graph)
    whole = memory_of(graph, {"data": source}).recall(source.batch(0, 0)).stored
    memory = memory_of(graph, {"data": source}, precision="float16")
    half = memory.recall(source.batch(0, 0)).stored
    assert memory.asked["cross"] == 9  # float32 is not what was asked for
    assert half["cross"].scores.dtype == torch.float32
    assert torch.equal(half["cross"].scores, whole["cross"].scores.half().float())
    sizes = {path.parent.name: path.stat().st_size for path in store.rglob("*.arrow")}
    assert set(sizes) == {
        f"{signal}.{precision}"
        for signal in ("queries", "candidates", "scores")
        for precision in ("float16", "float32")
    }
    assert sizes["candidates.float16"] < 0.8 * sizes["candidates.float32"]


@pytest.mark.parametrize(
    ("answer", "precision", "message"),
    [
        (float("nan"), "float32", "models.cross: the teacher answered scores that are not finite numbers"),
        (1e6, "float16", "models.cross: .* beyond the range of float16; set train.store: float32"),
    ],
)
def test_an_answer_that_cannot_be_kept_is_refused(answer, precision, message, models, store):
    graph = graph_of(models)
    graph.nodes["cross"].represent = lambda batch, needs: Outputs(scores=torch.full(batch.mask.shape, answer))
    with pytest.raises(RunError, match=message):
        memory_of(graph, {"data": source_of(graph)}, precision=precision)
    assert not [name for name in places(store) if "scores" in name]


def test_a_teacher_without_an_identity_is_heard_but_leaves_nothing(models, store, monkeypatch):
    monkeypatch.setattr(CrossEncoder, "identity", None)
    graph = graph_of(models)
    source = source_of(graph)
    for _ in range(2):
        graph.nodes["cross"].calls = 0
        memory = memory_of(graph, {"data": source})
        batch = memory.recall(source.batch(0, 0))
        assert graph.nodes["cross"].calls == 1 and batch.stored["cross"].scores.any()
    assert places(store) and not [name for name in places(store) if "scores" in name]


def test_a_teacher_that_is_stopped_while_it_is_asked_keeps_its_answers(models, monkeypatch):
    monkeypatch.setattr("distill.store.PAIRS_AT_ONCE", 2)
    graph = graph_of(models, arrows=[Arrow("pairs", ScoreKL(), "student", "cross")])
    source = source_of(graph)
    memory = TeacherMemory(graph, {"data": source})
    with pytest.raises(KeyboardInterrupt, match="answers of the teachers so far are kept"):
        memory.fill(lambda: memory.asked["cross"] >= 4)
    assert memory.asked["cross"] == 4
    assert memory_of(graph, {"data": source}).asked["cross"] == 5


def test_a_damaged_block_is_asked_again_and_said(models, store, monkeypatch, caplog):
    """One flipped bit, anywhere: the store ends as it was."""
    monkeypatch.setattr("distill.store.PAIRS_AT_ONCE", 4)
    graph = graph_of(models, arrows=[Arrow("pairs", ScoreKL(), "student", "cross")])
    source = source_of(graph)
    memory_of(graph, {"data": source})
    before = {path: path.read_bytes() for path in store.rglob("*.arrow")}
    path = sorted(before)[1]
    flipped = bytearray(before[path])
    flipped[len(flipped) // 2] ^= 4
    path.write_bytes(flipped)
    memory = TeacherMemory(graph, {"data": source}, mend=False)  # who only looks removes nothing
    assert path.exists() and memory.count(memory.listeners[0], "pair")[1] < 9
    caplog.clear()
    memory = memory_of(graph, {"data": source})
    assert f"{path}: this block of the teacher store is damaged" in caplog.text
    assert 1 <= memory.asked["cross"] <= 4
    assert {path: path.read_bytes() for path in store.rglob("*.arrow")} == before


def test_keys_and_rows_may_be_many(models):
    """What is found is the key's own row, through many blocks."""
    from distill.data.judged import text_keys
    from distill.store_files import Signal, pair_keys

    signal = Signal(None, ["scores"], "float32")
    queries, candidates = text_keys([f"q{i}" for i in range(30)]), text_keys([f"c{i}" for i in range(40)])
    rows = np.random.default_rng(0).permutation(1200)
    keys = pair_keys(queries[rows // 40], candidates[rows % 40])
    assert len(np.unique(keys, axis=0)) == 1200
    for part in np.array_split(np.arange(1000), 37):
        signal.append(keys[part], {"scores": torch.from_numpy(rows[part]).float()})
    found = signal.find(keys)
    assert (found[:1000] >= 0).all() and (found[1000:] == -1).all() and len(signal) == 1000
    torch.testing.assert_close(signal.read(found[:1000])["scores"], torch.from_numpy(rows[:1000]).float())
