"""What frozen teachers said is recalled as if they were asked again, and only where it is theirs to say."""

import pytest
import torch

from distill.batch import Ragged
from distill.data import Judged, RandomNegatives, TextSource, TextTable
from distill.data.mixture import Mixture
from distill.graph import Arrow, DistillationGraph
from distill.objectives import EmbeddingMatch, SampledSoftmax, ScoreKL
from distill.outputs import Needs
from distill.store import TeacherMemory, text_sources
from students import BiEncoder
from teachers import CrossEncoder

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


def said_live(graph, batch, name, needs):
    with torch.no_grad():
        graph.nodes[name].eval()
        view = batch.view(*([c.key for c in columns] for columns in graph.nodes[name].reads))
        return graph.nodes[name].represent(view, needs)


@pytest.mark.parametrize("blocks", [4096, 3])
def test_what_is_recalled_is_what_the_teachers_would_say(blocks, models, monkeypatch):
    """In whatever blocks they were asked, and whatever mode the graph was left in."""
    monkeypatch.setattr("distill.store.TEXTS_AT_ONCE", blocks)
    monkeypatch.setattr("distill.store.PAIRS_AT_ONCE", blocks)
    graph = graph_of(models)
    source = source_of(graph)
    graph.train()
    memory = TeacherMemory(graph, {"data": source})
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
    memory = TeacherMemory(graph, {"data": source})
    for name in ("encoder", "cross"):
        graph.nodes[name].calls = 0
    graph.nodes["student"].calls = 0
    recalled = {name: loss.loss.detach() for name, loss in graph(memory.recall(batch)).items()}
    for name, loss in live.items():
        torch.testing.assert_close(recalled[name], loss, atol=1e-5, rtol=1e-4)
    assert [graph.nodes[n].calls for n in ("student", "encoder", "cross")] == [1, 0, 0]


def test_a_pair_that_is_not_listed_is_asked_live(models):
    graph = graph_of(models)
    source = source_of(graph, negatives=[RandomNegatives(3)], candidates=7)
    memory = TeacherMemory(graph, {"data": source})
    batch = memory.recall(source.batch(0, 0))
    assert batch.stored.keys() == {"encoder"}  # texts are all known, pairs of sampled negatives are not
    graph.nodes["cross"].calls = 0
    live = graph(source.batch(0, 0))["pairs"].loss
    torch.testing.assert_close(graph(batch)["pairs"].loss, live)
    assert graph.nodes["cross"].calls == 2


def test_a_trained_teacher_is_never_remembered(models):
    """What it said before the first step is not what it would say now."""
    graph = graph_of(models, trained=("student", "encoder"))
    source = source_of(graph)
    graph.nodes["encoder"].calls = 0
    batch = TeacherMemory(graph, {"data": source}).recall(source.batch(0, 0))
    assert batch.stored.keys() == {"cross"} and graph.nodes["encoder"].calls == 0


def test_a_teacher_is_asked_only_on_the_data_its_arrows_hear(models):
    arrows = [
        Arrow("vectors", EmbeddingMatch(), "student", "encoder", data=("one",)),
        Arrow("labels", SampledSoftmax(), "student"),
    ]
    graph = graph_of(models, arrows=arrows)
    one, two = source_of(graph, name="one"), source_of(graph, name="two")
    memory = TeacherMemory(graph, text_sources(Mixture({"one": one, "two": two})))
    assert memory.recall(one.batch(0, 0)).stored.keys() == {"encoder"}
    assert memory.recall(two.batch(0, 0)).stored.keys() == set()
    assert graph.nodes["cross"].calls == 0


def test_scores_that_come_with_the_data_are_kept(models):
    part = judged(scores={"cross": torch.arange(9.0)})
    graph = graph_of(models)
    source = source_of(graph, part)
    graph.nodes["cross"].calls = 0
    memory = TeacherMemory(graph, {"data": source})
    batch = memory.recall(source.batch(0, 0))
    assert graph.nodes["cross"].calls == 0
    torch.testing.assert_close(batch.stored["cross"].scores, source.batch(0, 0).stored["cross"].scores)


def test_two_memories_are_equal_bit_for_bit(models, monkeypatch):
    """A run that is resumed must hear what it heard before."""
    monkeypatch.setattr("distill.store.TEXTS_AT_ONCE", 3)
    graph = graph_of(models)
    source = source_of(graph)
    one, two = (TeacherMemory(graph, {"data": source}) for _ in range(2))
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
    memory = TeacherMemory(graph, {"data": source})
    batch = memory.recall(source.batch(0, 1))
    live = said_live(graph, batch, "encoder", Needs("candidates")).candidates
    torch.testing.assert_close(batch.stored["encoder"].candidates, live, atol=1e-5, rtol=1e-5)
    graph.nodes["encoder"].calls = 0
    assert graph(batch)["vectors"].loss.shape == (3,) and graph.nodes["encoder"].calls == 0


def test_sources_are_found_inside_a_mixture(models):
    graph = graph_of(models)
    one, two = source_of(graph, name="one"), source_of(graph, name="two")
    assert text_sources(one) == {"one": one}
    assert text_sources(Mixture({"a": one, "b": two})) == {"a": one, "b": two}


def test_queries_that_are_left_out_are_not_asked_about(models):
    """Nor the candidates that they alone list."""
    graph = graph_of(models)
    part = judged(lists=((0, 1), (5, 3)))
    labels = torch.tensor([1.0, 0.0, 0.0, 0.0])
    part = Judged("rerank", part.queries, part.candidates, Ragged.of([[0, 1], [5, 3], [], []]), labels)
    source = source_of(graph, part, with_positive=True)
    assert source.query_rows.tolist() == [0] and source.candidate_rows.tolist() == [0, 1]
    assert source.steps(0) == 1 and source.batch(0, 0).query_ids.tolist() == [0]
    known = TeacherMemory(graph, {"data": source})._known["data"]
    assert known["encoder"].keys["candidate"].tolist() == [0, 1]
    assert known["cross"].keys["pair"].tolist() == [0, 1]
    assert TeacherMemory(graph, {"data": source}).recall(source.batch(0, 0)).stored.keys() == {
        "encoder",
        "cross",
    }
