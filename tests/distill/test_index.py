import subprocess
import sys

import numpy as np
import pytest
import torch

from distill import index as index_module
from distill.errors import DataError, RecipeError, UserError
from distill.index import Index, nearest


def unit(n: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def names(n: int) -> list[str]:
    return [f"d{i}" for i in range(n)]


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([len(set(f) & set(e)) / len(e) for f, e in zip(found, exact, strict=True)]))


def test_flat_gives_what_numpy_gives():
    corpus, queries = unit(50), unit(7, seed=1)
    scores, rows = Index.build(corpus, names(50)).search_arrays(queries, k=5)
    exact = queries @ corpus.T
    np.testing.assert_array_equal(rows, np.argsort(-exact, axis=1)[:, :5])
    np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :5], atol=1e-6)


def test_hits_carry_id_text_score_and_rank():
    index = Index.build(torch.eye(3), ["a", "b", "c"], texts=["A", "B", "C"])
    (hits,) = index.search(torch.tensor([[0.0, 0.5, 2.0]]), k=2)
    assert [(h.rank, h.id, h.score, h.text) for h in hits] == [(1, "c", 2.0, "C"), (2, "b", 0.5, "B")]


def test_cosine_ignores_length_and_dot_does_not():
    corpus = np.array([[10.0, 10.0], [0.0, 1.0]])
    query = np.array([[0.0, 3.0]])
    assert Index.build(corpus, ["long", "near"]).search(query, 1)[0][0].id == "long"
    cosine = Index.build(corpus, ["long", "near"], metric="cosine").search(query, 1)[0][0]
    assert (cosine.id, cosine.score) == ("near", pytest.approx(1.0))


@pytest.mark.parametrize("factory, search", [("Flat", {}), ("IVF2,Flat", {"nprobe": 2})])
def test_equal_scores_come_in_the_order_of_rows(factory, search):
    """Without it a list of duplicates differs from run to run, and so do the metrics."""
    corpus = np.tile(unit(1), (100, 1))
    corpus[50] = 2 * corpus[0]
    index = Index.build(corpus, names(100), factory=factory, search=search)
    for k in (1, 4, 99):
        _, rows = index.search_arrays(np.concatenate([unit(1), unit(1)]), k)
        assert rows.tolist() == [[50, *[i for i in range(100) if i != 50]][:k]] * 2


def test_a_graph_orders_the_equal_scores_that_it_saw():
    index = Index.build(np.tile(unit(1), (100, 1)), names(100), factory="HNSW16")
    (rows,) = index.search_arrays(unit(1), 20)[1].tolist()
    assert rows == sorted(rows) and len(set(rows)) == 20


def test_more_than_there_are_is_filled_up_in_arrays_and_left_out_of_hits():
    index = Index.build(torch.eye(3), ["a", "b", "c"])
    scores, rows = index.search_arrays(torch.eye(3)[:1], k=5)
    assert rows[0].tolist() == [0, 1, 2, -1, -1] and np.isneginf(scores[0, 3:]).all()
    assert [hit.id for hit in index.search(torch.eye(3)[:1], k=5)[0]] == ["a", "b", "c"]
    assert index.search(np.empty((0, 3)), k=2) == []


@pytest.mark.filterwarnings("ignore")
def test_approximate_indexes_find_nearly_all_and_more_effort_finds_more():
    corpus, queries = unit(2000, 32), unit(50, 32, seed=1)
    _, exact = Index.build(corpus, names(2000)).search_arrays(queries, 10)
    hnsw = Index.build(corpus, names(2000), factory="HNSW16", search={"efSearch": 200})
    assert recall(hnsw.search_arrays(queries, 10)[1], exact) > 0.95
    ivf = Index.build(corpus, names(2000), factory="IVF16,Flat", search={"nprobe": 1})
    few = recall(ivf.search_arrays(queries, 10)[1], exact)
    ivf.set_search(nprobe=16)
    assert few < 0.9 and recall(ivf.search_arrays(queries, 10)[1], exact) == 1.0


@pytest.mark.parametrize(
    "factory, search", [("Flat", {}), ("HNSW8", {"efSearch": 50}), ("IVF8,SQ8", {"nprobe": 3})]
)
@pytest.mark.parametrize("texts", [None, [f"text {i} ä" for i in range(400)]])
def test_a_saved_index_answers_as_before(tmp_path, factory, search, texts):
    index = Index.build(unit(400), names(400), texts, factory, "cosine", search, model="me/encoder")
    index.save(tmp_path / "index")
    loaded = Index.load(tmp_path / "index")
    assert loaded.about == index.about and loaded.about["model"] == "me/encoder" and len(loaded) == 400
    assert loaded.search(unit(9, seed=2), 6) == index.search(unit(9, seed=2), 6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index"]


def test_two_builds_give_the_same_answers():
    first, second = (Index.build(unit(600), names(600), factory="IVF8,Flat") for _ in range(2))
    assert first.search(unit(5, seed=3), 7) == second.search(unit(5, seed=3), 7)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"factory": "Banana"}, RecipeError, "cannot build 'Banana'.*could not parse index string Banana"),
        ({"factory": "PQ7"}, RecipeError, "cannot build 'PQ7' over 16 dimensions.*multiple"),
        ({"factory": "IVF256,Flat"}, UserError, "20 vectors are too few to train 'IVF256,Flat'"),
        ({"search": {"nprobe": 4}}, RecipeError, "'nprobe' = 4 cannot be set on the factory 'Flat'"),
        ({"factory": "HNSW8", "search": {"efSearch": "x"}}, RecipeError, "'efSearch' = x cannot be set"),
        ({"metric": "l2"}, RecipeError, "dot or cosine, got 'l2'"),
        ({"ids": names(19)}, DataError, "20 vectors came with 19 ids"),
        ({"texts": ["one"]}, DataError, "20 ids and 1 texts"),
        ({"ids": ["d3", *names(19)]}, DataError, "the id 'd3' comes more than once"),
        ({"vectors": np.full((20, 16), np.nan)}, DataError, "not finite in row 0"),
        ({"vectors": np.zeros(20)}, DataError, r"must be \[n, D\], got the shape \[20\]"),
        ({"vectors": np.zeros((0, 16)), "ids": []}, DataError, "there are no vectors"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_message(change, error, message):
    with pytest.raises(error, match=message) as caught:
        Index.build(**{"vectors": unit(20), "ids": names(20), **change})
    assert "\n" not in str(caught.value) and "/project/" not in str(caught.value)


def test_queries_of_another_model_are_refused():
    """A query of another size is surely from another model; its scores would mean nothing."""
    index = Index.build(unit(5), names(5), model="me/encoder")
    with pytest.raises(
        DataError, match=r"queries have 8 dimensions, the index has 16 \(made with me/encoder\)"
    ):
        index.search(unit(1, dim=8))
    with pytest.raises(RecipeError, match="k must be at least 1"):
        index.search(unit(1), k=0)


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    folder = tmp_path / "index"
    Index.build(unit(5), names(5)).save(folder)
    Index.build(unit(6), names(6)).save(tmp_path / "other")
    kept = (folder / "vectors.faiss").read_bytes()
    (folder / "vectors.faiss").write_bytes(kept[:40])
    with pytest.raises(DataError, match="cannot be read"):
        Index.load(folder)
    (folder / "vectors.faiss").write_bytes((tmp_path / "other" / "vectors.faiss").read_bytes())
    with pytest.raises(
        DataError, match=r"do not belong together \(candidates: index.json 5, vectors.faiss 6"
    ):
        Index.load(folder)
    (folder / "candidates.parquet").unlink()
    with pytest.raises(DataError, match=r"candidates.parquet missing"):
        Index.load(folder)


def test_importing_does_not_load_faiss():
    code = "import sys, distill, distill.index, distill.hub; sys.exit(any(m in sys.modules for m in NAMES))"
    code = code.replace("NAMES", "('faiss', 'transformers', 'sentence_transformers')")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_tie_is_followed_to_its_end_in_bounded_memory(monkeypatch):
    """A model that gives every text one vector must not make a search hold all scores of all queries."""
    monkeypatch.setattr(index_module, "TIED", 200)
    vectors, queries = np.ones((90, 4), np.float32), np.ones((30, 4), np.float32)
    vectors[70:80] *= 2
    held = []

    def find(asked, k):
        held.append(len(asked) * k)
        scores = asked @ vectors.T
        places = np.broadcast_to(-np.arange(90), scores.shape)
        rows = np.lexsort((places, -scores), axis=1)[:, :k]  # of equal ones the last, as Faiss may
        return np.take_along_axis(scores, rows, axis=1), rows

    scores, rows = nearest(find, queries, 12, 90)
    assert (
        (rows == [*range(70, 80), 0, 1]).all() and (scores[:, :10] == 8).all() and (scores[:, 10:] == 4).all()
    )
    assert max(held[1:]) <= 200
