"""Vectors of a query and a candidate that have read each other, against the plain transformer."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from distill.batch import Batch
from distill.errors import DataError, RecipeError
from distill.graph import Arrow, DistillationGraph
from distill.objectives import GeometryAlignment, SampledSoftmax
from distill.open import open_model
from distill.outputs import Needs
from students import BiEncoder
from teachers import CrossEmbedding

QUERIES = ["what is a wing", "heart", "how does a ship flow in the river"]
PASSAGES = ["a wing is a surface in the flow of air", "the heart moves blood", "city", "old film " * 9]
FIELDS = ("joint_queries", "joint_candidates", "scores")


def batch_of(model, queries=QUERIES, mask=((1, 1, 0), (1, 1, 1), (1, 0, 0))) -> Batch:
    column = model.reads.queries[0]
    mask = torch.tensor(mask, dtype=torch.bool)
    return Batch(
        index=torch.tensor([[0, 2, 0], [1, 3, 0], [3, 0, 0]]),
        mask=mask,
        query_ids=torch.arange(3),
        candidate_ids=torch.arange(4),
        labels=mask * torch.tensor([1.0, 0.0, 0.0]),
        queries={column.key: column.encode(queries)},
        candidates={column.key: column.encode(PASSAGES)},
        source="here",
    )


def expected(folder, query, passage, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of both spans, of this pair by itself."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    given = tokenizer(query, passage, return_tensors="pt", return_special_tokens_mask=True, **settings)
    special = given.pop("special_tokens_mask")[0].bool()
    with torch.no_grad():
        hidden = model(**given).last_hidden_state[0]
    second = given["token_type_ids"][0].bool()
    return hidden[~second & ~special].mean(0), hidden[second & ~special].mean(0)


@pytest.fixture
def model(tiny_bert) -> CrossEmbedding:
    return CrossEmbedding(tiny_bert(), precision="no", chunk_tokens=60)


def test_each_span_is_the_mean_over_its_tokens_in_the_joint_text(model, tiny_bert):
    batch = batch_of(model)
    said = model.represent(batch, Needs(*FIELDS))
    for row, place in batch.mask.nonzero().tolist():
        query, passage = expected(tiny_bert(), QUERIES[row], PASSAGES[batch.index[row, place]])
        torch.testing.assert_close(said.joint_queries[row, place], query, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(said.joint_candidates[row, place], passage, atol=1e-5, rtol=1e-5)
        score = cosine_similarity(query, passage, dim=0).item()
        assert said.scores[row, place].item() == pytest.approx(score, abs=1e-5)
    for _, value in said.given():
        assert not value[~batch.mask].any()
    assert dict(model.represent(batch, Needs("scores")).given()).keys() == {"scores"}
    assert (said.joint_queries[0, 0] - said.joint_queries[0, 1]).abs().max() > 1e-2  # it has read the other


def test_only_the_candidate_is_cut_and_the_query_at_its_own_length(tiny_bert):
    model = CrossEmbedding(tiny_bert(), max_length=14, query_max_length=9, precision="no")
    said = model.represent(batch_of(model), Needs(*FIELDS))
    cut = expected(tiny_bert(), QUERIES[1], PASSAGES[3], truncation="only_second", max_length=14)
    torch.testing.assert_close(said.joint_candidates[1, 1], cut[1], atol=1e-5, rtol=1e-5)


def test_it_scores_raw_pairs_as_it_scores_a_batch(model):
    batch = batch_of(model)
    rows, places = batch.mask.nonzero(as_tuple=True)
    passages = [PASSAGES[i] for i in batch.index[rows, places]]
    found = model.train().score_pairs([QUERIES[row] for row in rows], passages)
    assert model.training and not found.requires_grad
    said = model.eval().represent(batch, Needs("scores"))
    torch.testing.assert_close(found, said.scores[batch.mask].detach(), atol=1e-5, rtol=1e-5)
    assert model.score_pairs([], []).shape == (0,)
    nobody = model.represent(batch_of(model, mask=((0, 0, 0),) * 3), Needs(*FIELDS))
    assert nobody.joint_queries.shape == (3, 3, 32) and not nobody.scores.any()


def test_a_saved_one_opens_here_with_equal_answers(tiny_bert, tmp_path):
    model = CrossEmbedding(tiny_bert(), max_length=40, query_max_length=7, layers=1, precision="no")
    model.save_pretrained(tmp_path / "saved")
    again = open_model(tmp_path / "saved")
    assert isinstance(again, CrossEmbedding) and (again.max_length, again.query_max_length) == (40, 7)
    again.precision = "no"
    pairs = QUERIES, PASSAGES[:3]
    torch.testing.assert_close(again.score_pairs(*pairs), model.score_pairs(*pairs), atol=0, rtol=0)


def test_it_starts_from_a_bi_encoder_and_from_a_cross_encoder(tiny_bert, tmp_path):
    BiEncoder(tiny_bert()).save_pretrained(tmp_path / "bi")
    plain = CrossEmbedding(tiny_bert(), precision="no").score_pairs(QUERIES, PASSAGES[:3])
    from_bi = CrossEmbedding(tmp_path / "bi", precision="no")
    torch.testing.assert_close(from_bi.score_pairs(QUERIES, PASSAGES[:3]), plain)
    assert CrossEmbedding(tiny_bert(num_labels=1)).provides == {*FIELDS}


def graph_of(tiny_bert) -> DistillationGraph:
    student = BiEncoder(tiny_bert(seed=1), precision="no", dropout=0.0)
    cross = CrossEmbedding(tiny_bert(), precision="no", dropout=0.0)
    arrows = [
        Arrow("geometry", GeometryAlignment(), "student", "cross"),
        Arrow("negatives", SampledSoftmax(in_batch=False), "cross"),
    ]
    return DistillationGraph({"student": student, "cross": cross}, arrows, {"student", "cross"})


def test_a_cached_gradient_is_that_of_the_whole_batch_and_the_geometry_teaches_the_student_alone(tiny_bert):
    found = []
    for rows in (None, 2):
        graph = graph_of(tiny_bert)
        graph.gradient_cache = rows
        losses = graph.train()(batch_of(graph.nodes["cross"]))
        losses["geometry"].loss.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in graph.nodes["cross"].parameters())
        losses["negatives"].loss.sum().backward()
        found.append({name: p.grad for name, p in graph.trainable().items() if p.grad is not None})
    assert any(name.startswith("node_modules.student") for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_a_text_without_a_token_is_refused(model):
    """Its mean would be 0 / 0, and its neighbourhood anything."""
    with pytest.raises(DataError, match=r"data set 'here': query row 1 \(from 0\) has no token"):
        model.represent(batch_of(model, ["wing", "", "ship"]), Needs("scores"))


@pytest.mark.parametrize("given", [{"query_max_length": 125}, {"max_length": 20, "query_max_length": 17}])
def test_lengths_that_leave_no_room_for_a_candidate_are_refused(given, tiny_bert):
    with pytest.raises(ValueError, match=r"query_max_length must be between 1 and .* room for the candidate"):
        CrossEmbedding(tiny_bert(), **given)


def test_a_folder_that_names_a_strangers_class_is_refused(model, tmp_path):
    """Whoever wrote it would choose what is imported."""
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "distill.json").write_text('{"opens": "os.system"}')
    with pytest.raises(RecipeError, match=r"distill.json: 'os.system' is no model of ours"):
        open_model(tmp_path / "saved")
