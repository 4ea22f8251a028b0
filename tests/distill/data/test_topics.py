"""Batches of one topic: who is alike learns together, every query once an epoch, and again after a stop."""

import pytest
import torch

from distill.batch import Columns, Ragged
from distill.build import Builder
from distill.data import Judged, TextSource, TextTable, Topics
from distill.errors import DataError, RecipeError
from distill.graph import DistillationGraph
from distill.model import Encoder
from distill.plan import check_samplers
from distill.settings import Recipe

TOPICS, EACH = 4, 8


class Place(Encoder):
    """A text is where its first number says, with a little of the second."""

    dim = 1
    provides = frozenset({"queries", "candidates", "scores", "in_batch"})
    reads = Columns()

    def __init__(self):
        super().__init__()
        self.size = torch.nn.Parameter(torch.ones(1))
        self.encoded = 0

    def encode_queries(self, queries, progress=False):
        self.encoded += len(queries)
        return torch.tensor([[float(a) + 0.01 * float(b)] for a, b in (text.split() for text in queries)])

    encode_candidates = represent = save_pretrained = encode_queries


def judged(queries=TOPICS * EACH) -> Judged:
    texts = [f"{i % TOPICS} {i // TOPICS % EACH}" for i in range(queries)]
    return Judged(
        task="rerank",
        queries=TextTable([str(i) for i in range(queries)], texts),
        candidates=TextTable(["a"], ["text"]),
        listed=Ragged.of([[0]] * queries),
        labels=torch.ones(queries),
    )


def graph_of(trained=("student",)) -> DistillationGraph:
    return DistillationGraph({"student": Place(), "bi": Place()}, [], trained)


def source_of(graph, folder, batch_size=EACH, clusters=TOPICS, data=None):
    source = TextSource(data or judged(), batch_size, seed=3)
    source.topics = Topics("bi", clusters)
    source.refresh(graph, 0, folder)
    return source


def topics_in(source, epoch):
    """The topics of the queries of each batch, as they were made."""
    return [set((source.batch(epoch, s).query_ids % TOPICS).tolist()) for s in range(source.steps(epoch))]


def test_a_batch_is_of_one_topic_and_an_epoch_has_every_query(tmp_path):
    source = source_of(graph_of(), tmp_path)
    epochs = [topics_in(source, epoch) for epoch in range(6)]
    assert all(len(found) == 1 for epoch in epochs for found in epoch)
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) > 1  # in another order each epoch
    asked = torch.cat([source.batch(2, step).query_ids for step in range(source.steps(2))])
    assert sorted(asked.tolist()) == list(range(TOPICS * EACH))
    plain = TextSource(judged(), EACH, seed=3)
    assert max(map(len, topics_in(plain, 0))) > 1


def test_where_a_topic_ends_the_next_goes_on(tmp_path):
    source = source_of(graph_of(), tmp_path, batch_size=5)
    assert source.steps(0) == TextSource(judged(), 5).steps(0) == 7
    assert sum(len(found) == 1 for found in topics_in(source, 0)) >= 3
    assert sum(len(source.batch(0, step).query_ids) for step in range(7)) == TOPICS * EACH


def test_queries_are_clustered_once_and_again_read(tmp_path):
    graph = graph_of()
    source = source_of(graph, tmp_path)
    source.refresh(graph, 1, tmp_path)
    assert graph.nodes["bi"].encoded == TOPICS * EACH
    again = source_of(graph, tmp_path)
    assert graph.nodes["bi"].encoded == TOPICS * EACH
    for epoch, step in ((0, 0), (4, 3)):
        assert torch.equal(source.batch(epoch, step).query_ids, again.batch(epoch, step).query_ids)
    (tmp_path / "topics.npy").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"topics.npy is damaged"):
        source_of(graph, tmp_path)


def test_equal_queries_are_one(tmp_path):
    graph = graph_of()
    source = source_of(graph, tmp_path, data=judged(2 * TOPICS * EACH))
    assert graph.nodes["bi"].encoded == TOPICS * EACH
    assert source.topics.topic[: TOPICS * EACH].equal(source.topics.topic[TOPICS * EACH :])


def test_what_cannot_be_clustered_is_said(tmp_path):
    with pytest.raises(ValueError, match="clusters must be at least 2"):
        Topics("bi", 1)
    with pytest.raises(DataError, match=r"data.topics: there are 32 distinct queries, fewer than 40"):
        source_of(graph_of(), tmp_path, clusters=40)
    source = TextSource(judged(), 4)
    source.topics = Topics("bi", 2)
    with pytest.raises(RuntimeError, match="refresh comes before its batches"):
        source.batch(0, 0)
    for by, said in (("teacher", "there is no model 'teacher'"), ("student", "'student' learns")):
        source.topics = Topics(by, 2)
        with pytest.raises(RecipeError, match=rf"data.topics.by: {said}"):
            check_samplers(source, graph_of())


def test_a_recipe_names_them(tiny_bert, tmp_path):
    rows = "\n".join(f'{{"query": "{text}", "candidate": "x"}}' for text in judged().queries.texts)
    (tmp_path / "train.jsonl").write_text(rows)
    model = {"type": "students.BiEncoder", "checkpoint": str(tiny_bert(layers=1))}

    def recipe(topics):
        data = {
            "type": "distill.data.Groups",
            "train": str(tmp_path / "train.jsonl"),
            "columns": {"label": None},
        }
        return Recipe(
            name="x",
            data={**data, "topics": topics},
            models={"student": model, "bi": model},
            losses={"labels": {"type": "distill.objectives.SampledSoftmax", "to": "student"}},
        )

    given = recipe({"type": "distill.data.Topics", "by": "bi", "clusters": 4})
    builder = Builder()
    builder.check(given)
    source = builder.source(given, builder.data(given), ["data"])
    assert source.topics.by == "bi" and source.topics.clusters == 4
    assert "bi" in builder.graph(given, {}).nodes  # the baseline has the same batches
    for topics, said in (
        (
            {"type": "distill.data.Topics", "by": "be", "clusters": 4},
            r"data.topics.by: there is no model 'be'",
        ),
        ({"type": "distill.data.RandomNegatives", "count": 1}, r"RandomNegatives is no Topics"),
        ("bi", r"data.topics.type: this key is required"),
    ):
        with pytest.raises(RecipeError, match=said):
            Builder().check(recipe(topics))
