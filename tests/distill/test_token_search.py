"""A retriever with a vector per token: exact search, an index on disk, the command, the teacher store."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill.batch import Ragged
from distill.data import Judged, RandomNegatives, TextSource, TextTable
from distill.errors import DataError
from distill.evaluation import evaluate_model
from distill.evaluation.search import search_maxsim
from distill.graph import Arrow, DistillationGraph
from distill.index import Index
from distill.maxsim import maxsim_all
from distill.objectives import AttentionKL, ScoreKL
from distill.outputs import Needs
from distill.store import TeacherMemory
from students import BiEncoder
from teachers import ColBERT, CrossEncoder
from tests.distill.workplace import distill, jsonl


def random_rows(n: int, seed: int = 0) -> Ragged:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (n,), generator=random)
    return Ragged.of_lengths(
        F.normalize(torch.randn(int(lengths.sum()), 8, generator=random), dim=1), lengths
    )


def names(n: int) -> list[str]:
    return [f"d{i}" for i in range(n)]


def test_exact_search_is_maxsim_with_every_candidate():
    queries, candidates = random_rows(70, seed=1), random_rows(1500)
    expected = maxsim_all(queries, candidates)
    scores, rows = search_maxsim(queries, candidates, 5)
    best = expected.topk(5)
    torch.testing.assert_close(scores, best.values)
    assert (rows == best.indices).float().mean() > 0.99  # but for ties


@pytest.mark.parametrize("factory", ["Flat", "HNSW16"])
def test_an_index_of_tokens_finds_and_scores_exactly_and_survives_the_disk(factory, tmp_path):
    queries, candidates = random_rows(9, seed=1), random_rows(400)
    index = Index.build(candidates, names(400), [f"text {i}" for i in range(400)], factory, model="m")
    expected = search_maxsim(queries, candidates, 10)
    scores, rows = index.search_arrays(queries, 10)
    np.testing.assert_array_equal(rows, expected[1].numpy())
    np.testing.assert_allclose(scores, expected[0].numpy(), atol=1e-5)
    index.save(tmp_path / "index")
    again = Index.load(tmp_path / "index")
    assert again.search(queries, 3) == index.search(queries, 3) and len(again) == 400
    few = Index.build(random_rows(2), names(2)).search_arrays(queries, 3)
    assert few[1][0].tolist()[2] == -1 and few[0][0][2] == -np.inf


def test_many_hits_are_found_where_all_tokens_of_a_text_are_alike():
    random = torch.Generator().manual_seed(0)
    texts = torch.randn(400, 1, 16, generator=random) + 0.2 * torch.randn(400, 30, 16, generator=random)
    lengths = torch.full((400,), 30)
    candidates = Ragged.of_lengths(F.normalize(texts.flatten(0, 1), dim=1), lengths)
    asked = F.normalize(torch.randn(6, 16, generator=random), dim=1)
    queries = Ragged.of_lengths(asked, torch.tensor([2, 2, 2]))
    rows = Index.build(candidates, names(400)).search_arrays(queries, 100)[1]
    best = search_maxsim(queries, candidates, 100)[1].numpy()
    shares = [len({*one[:50]} & {*two[:50]}) / 50 for one, two in zip(rows, best, strict=True)]
    assert min(shares) >= 0.96 and (rows >= 0).all()


def test_vectors_of_another_kind_and_parts_that_do_not_fit_are_refused(tmp_path):
    tokens, texts = Index.build(random_rows(5), names(5)), Index.build(torch.eye(8), names(8))
    with pytest.raises(DataError, match="a vector per token, the queries have one per text"):
        tokens.search_arrays(torch.eye(8), 1)
    with pytest.raises(DataError, match="a vector per text, the queries have one per token"):
        texts.search_arrays(random_rows(1), 1)
    tokens.save(tmp_path / "index")
    np.save(tmp_path / "index/tokens.npy", np.zeros((3, 8), np.float32))
    with pytest.raises(DataError, match="parts do not belong together"):
        Index.load(tmp_path / "index")
    (tmp_path / "index/tokens.npy").write_bytes(b"cut short")
    with pytest.raises(DataError, match="cannot be read"):
        Index.load(tmp_path / "index")


QUERIES = ["what is a wing", "heart", "ship river", "a wing is a surface"]
PASSAGES = ["flow of air", "blood", "city", "old film and music", "the sea", "blood", "tree", "fire and heat"]


def judged(task: str) -> Judged:
    lists = [[0, 1, 2], [5, 3], [2, 6], [4, 0, 6, 7]]
    return Judged(
        task=task,
        queries=TextTable([str(i) for i in range(4)], QUERIES),
        candidates=TextTable([str(i) for i in range(8)], PASSAGES),
        listed=Ragged.of(lists),
        labels=torch.tensor([float(i == 0) for rows in lists for i in range(len(rows))]),
    )


@pytest.fixture
def colbert(tiny_bert) -> ColBERT:
    return ColBERT(tiny_bert(), dim=8, query_max_length=10, precision="no")


def test_it_is_measured_by_search_and_by_order(colbert):
    """What its search finds is what scoring each pair finds."""
    found = evaluate_model(colbert, judged("retrieval"), ["MRR@10"])
    assert found.method == "exact search over all candidates"
    pairs = [(q, c) for q in QUERIES for c in PASSAGES]
    scores = colbert.score_pairs(*zip(*pairs, strict=True)).view(4, 8)
    positives = [0, 5, 2, 4]
    ranks = [
        1 + sum((s > row[p]) or (s == row[p] and i < p) for i, s in enumerate(row.tolist()))
        for row, p in zip(scores, positives, strict=True)
    ]
    assert found.means["MRR@10"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert evaluate_model(colbert, judged("rerank"), ["MAP"]).method == "listed candidates in order of score"


def test_the_command_builds_its_index_and_asks_it(colbert, tmp_path):
    colbert.save_pretrained(tmp_path / "model")
    corpus = jsonl(tmp_path / "corpus.jsonl", [{"_id": f"d{i}", "text": t} for i, t in enumerate(PASSAGES)])
    made = distill("index", tmp_path / "model", corpus, "--output", tmp_path / "index")
    assert made.code == 0 and "8 candidates of" in made.out and "tokens, 8 dimensions, Flat" in made.out
    one = distill("search", tmp_path / "index", "old film and music", "-k", "2")
    assert one.code == 0 and one.out.splitlines()[1].split(None, 3)[2:] == ["d3", "old film and music"]


@pytest.fixture
def graph(colbert, tiny_bert, tmp_path, monkeypatch) -> DistillationGraph:
    monkeypatch.setenv("DISTILL_STORE", str(tmp_path / "store"))
    cross = CrossEncoder(tiny_bert(num_labels=1))
    arrows = [
        Arrow("scores", ScoreKL(), "student", "colbert"),
        Arrow("cross", ScoreKL(), "student", "cross"),
        Arrow("words", AttentionKL(first=2), "student", "cross"),
    ]
    nodes = {"student": BiEncoder(tiny_bert(seed=1)), "colbert": colbert, "cross": cross}
    return DistillationGraph(nodes, arrows, ["student"])


def asked_of(model) -> list[Needs]:
    """What a model is asked from now on."""
    asked, represent = [], model.represent

    def counted(batch, needs):
        asked.append(needs)
        return represent(batch, needs)

    model.represent = counted
    return asked


def test_scores_of_a_frozen_one_are_stored_and_what_is_too_large_runs_live(graph):
    """Tokens are not kept; the scores that follow are, and attention is asked of the first pairs only."""
    source = TextSource(judged("rerank"), 2, candidates=4, negatives=[RandomNegatives(count=1)], seed=1)
    source.prepare(*graph.columns())
    memory = TeacherMemory(graph, {"data": source})
    memory.fill()
    graph.eval()
    batch = source.batch(0, 0)
    recalled = memory.recall(batch)
    assert [*dict(recalled.stored["colbert"].given())] == ["scores"]
    live = {name: loss.loss.detach() for name, loss in graph(batch).items()}
    colbert, cross = (asked_of(graph.nodes[name]) for name in ("colbert", "cross"))
    stored = {name: loss.loss.detach() for name, loss in graph(recalled).items()}
    for name, expected in live.items():
        torch.testing.assert_close(stored[name], expected, atol=1e-5, rtol=1e-4)
    assert colbert == [] and [(sorted(n.fields), n.first) for n in cross] == [(["joint_attention"], 2)]
