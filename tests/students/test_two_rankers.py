"""Two rankers over texts encoded apart: their arithmetic, what may be kept, and who teaches whom."""

import pytest
import torch

from distill.batch import Batch, Ragged
from distill.data.judged import Judged, TextTable
from distill.errors import RecipeError
from distill.evaluation import evaluate_model
from distill.graph import Arrow, DistillationGraph
from distill.objectives import EmbeddingMatch, RankNet
from distill.open import open_model
from distill.outputs import Needs, Outputs
from students import BiEncoder, TwoRankers
from teachers import ColBERT, CrossEncoder, Ensemble

QUERIES = ["what is a wing", "heart", "how does a ship flow in the river"]
PASSAGES = ["a wing is a surface in the flow of air", "the heart moves blood", "city", "old film " * 9]
FIELDS = ("scores", "in_batch", "pair_vectors")
JUDGED = Judged(
    task="rerank",
    queries=TextTable(["a", "b"], QUERIES[:2]),
    candidates=TextTable(["0", "1", "2", "3"], PASSAGES),
    listed=Ragged.of([[0, 1, 2], [1, 3, 0]]),
    labels=torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0]),
)


@pytest.fixture
def ranker(tiny_bert):
    def make(heads: bool = True, **arguments) -> TwoRankers:
        model = TwoRankers(tiny_bert(), precision="no", **arguments)
        if heads:
            for parameter in model.heads.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


def batch_of(model) -> Batch:
    batch = model.texts.batch_of(QUERIES, PASSAGES) if isinstance(model, TwoRankers) else None
    assert batch is not None
    index = torch.tensor([[0, 2], [1, 3], [3, 0]])
    labels = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    return Batch(
        index, torch.ones_like(index).bool(), batch.query_ids, batch.candidate_ids, labels,
        queries=batch.queries, candidates=batch.candidates,
    )  # fmt: skip


def test_the_merged_cls_and_both_scores_are_those_worked_out_by_hand(ranker):
    model = ranker(heads=False)
    queries, candidates = torch.tensor([0.4, -0.5, 1.0]), torch.tensor([0.2, -0.8, 1.5])
    model.heads["merge"] = torch.nn.Linear(3, 3)
    torch.nn.init.zeros_(model.heads["merge"].weight), torch.nn.init.zeros_(model.heads["merge"].bias)
    merged = model.merged(queries, candidates)
    torch.testing.assert_close(merged, torch.tensor([0.4, -0.5, 1.5]))
    assert (merged - torch.tensor([0.5, -1.0, 2.0])).square().mean().item() == pytest.approx(0.17)
    model.heads["first"] = torch.nn.Linear(3, 1)
    with torch.no_grad():
        model.heads["merge"].weight[0, 2] = 2.0
        model.heads["first"].weight.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        model.heads["first"].bias.fill_(0.5)
    merged = model.merged(queries, candidates)
    torch.testing.assert_close(merged, torch.tensor([3.4, -0.5, 1.5]))  # a residual: m + W m
    score = model.ranked(merged, queries, candidates)
    assert score.item() == pytest.approx(3.4 - 1.0 + 4.5 + 0.5 + (0.08 + 0.4 + 1.5))


def test_the_three_losses_are_those_of_the_worked_example():
    batch = Batch.of_scores(1, 2)
    student = Outputs(
        scores=torch.tensor([[1.2, 0.7]]),
        pair_vectors=torch.tensor([[[0.4, -0.5, 1.5], [0.0, 0.0, 0.0]]]),
        queries=torch.tensor([[0.0, 0.2, 0.6]]),
    )
    teacher = Outputs(
        pair_vectors=torch.tensor([[[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]]]),
        queries=torch.tensor([[0.1, 0.2, 0.3]]),
    )
    rank = RankNet(form="probability")(student, Outputs(scores=torch.tensor([[1.0, 0.0]])), batch).loss
    cls, rep = (EmbeddingMatch(fields=[field], distance="mse") for field in ("pair_vectors", "queries"))
    said = [rank.item()]
    for one in (cls, rep):  # squared Euclidean, where the paper takes means over dimensions
        one.bind({"pair_vectors": 3, "queries": 3}, {"pair_vectors": 3, "queries": 3})
        said.append(one(student, teacher, batch).loss.sum().item() / 3)
    assert said == pytest.approx([0.377541, 0.17, 0.033333], abs=1e-6)
    assert sum(said) == pytest.approx(0.580874, abs=2e-6)


def test_the_twin_reads_the_larger_of_each_element(ranker):
    model = ranker(ranker="twin")
    rep, cls = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    merged = model.merged(*cls)
    x = torch.maximum(*rep)
    feature = x @ model.heads["twin"].weight.T + model.heads["twin"].bias + x
    second = feature @ model.heads["second"].weight[0] + model.heads["second"].bias
    first = merged @ model.heads["first"].weight[0] + model.heads["first"].bias
    torch.testing.assert_close(model.ranked(merged, *rep), first + second, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dot", "twin"])
def test_what_is_encoded_apart_scores_as_the_batch_does(kind, ranker):
    """Documents can be encoded beforehand: nothing of theirs depends on a query."""
    model = ranker(ranker=kind).train()
    queries, candidates = model.encode_queries(QUERIES), model.encode_candidates(PASSAGES)
    assert model.training and queries.shape == (3, model.dim) and model.dim == 64
    alone = torch.cat([model.encode_candidates([passage]) for passage in PASSAGES])
    torch.testing.assert_close(alone, candidates, atol=1e-5, rtol=1e-5)
    batch = batch_of(model)
    model.eval()
    said = model.compare(model.represent(batch, Needs(*FIELDS)), batch, Needs(*FIELDS))
    for row in range(3):
        found = model.score_encoded(queries[row].expand(4, -1), candidates)
        torch.testing.assert_close(said.in_batch[row].detach(), found, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(said.scores[row].detach(), found[batch.index[row]], atol=1e-5, rtol=1e-5)
    assert said.pair_vectors.shape == (3, 2, 32) and said.scores.std() > 0.1
    assert dict(model.represent(batch, Needs("queries")).given()).keys() == {"queries"}
    assert set(said.queries.shape) == {3, 32}


def test_a_new_one_ranks_as_the_bi_encoder_it_was_made_from(ranker, tiny_bert):
    model, plain = ranker(heads=False), BiEncoder(tiny_bert(), precision="no")
    batch = batch_of(model)
    said = model.compare(model.represent(batch, Needs("scores")), batch, Needs("scores"))
    expected = plain.compare(plain.represent(batch, Needs("scores")), batch, Needs("scores"))
    torch.testing.assert_close(said.scores, expected.scores)


@pytest.mark.parametrize("kind", ["dot", "twin"])
def test_a_saved_one_opens_with_equal_scores_and_as_an_encoder_of_rep(kind, ranker, tmp_path):
    model = ranker(ranker=kind, query_max_length=5, max_length=20, normalize=False, layers=1)
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")  # over the one that is there
    again = open_model(tmp_path / "saved")
    assert isinstance(again, TwoRankers) and again.ranker == kind
    again.precision = again.texts.precision = "no"
    for encode in ("encode_queries", "encode_candidates"):
        texts = getattr(again, encode)(PASSAGES), getattr(model, encode)(PASSAGES)
        torch.testing.assert_close(*texts, atol=0, rtol=0)
    vectors = model.encode_queries(PASSAGES)
    torch.testing.assert_close(
        again.score_encoded(vectors, vectors), model.score_encoded(vectors, vectors), atol=0, rtol=0
    )
    rep = BiEncoder(tmp_path / "saved", precision="no")
    torch.testing.assert_close(rep.encode_queries(PASSAGES), vectors[:, :32], atol=1e-6, rtol=0)
    other = "twin" if kind == "dot" else "dot"
    with pytest.raises(ValueError, match=f"ranker: {other}, but the checkpoint was trained with {kind}"):
        TwoRankers(tmp_path / "saved", ranker=other)
    (tmp_path / "saved" / "distill.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"distill.safetensors does not hold the weights"):
        TwoRankers(tmp_path / "saved")


def test_maxsim_is_over_projected_tokens_of_length_one_and_adds_to_the_first_ranker(ranker):
    model = ranker(ranker="maxsim", size=16)
    batch = batch_of(model)
    said = model.compare(model.represent(batch, Needs(*FIELDS)), batch, Needs(*FIELDS))
    plain = model.texts.represent(batch, Needs("query_tokens", "candidate_tokens"))
    weight = model.heads["tokens"].weight

    def tokens(side: str, row: int) -> torch.Tensor:
        of = getattr(plain, f"{side}_tokens")
        vectors = of.values[of.offsets[row] : of.offsets[row + 1]] @ weight.T
        return vectors / vectors.norm(dim=-1, keepdim=True)

    for row in range(3):
        for place, candidate in enumerate(batch.index[row].tolist()):
            second = (tokens("query", row) @ tokens("candidate", candidate).T).amax(dim=1).sum()
            first = said.pair_vectors[row, place] @ model.heads["first"].weight[0]
            expected = first + model.heads["first"].bias[0] + second
            torch.testing.assert_close(said.scores[row, place], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(said.in_batch[row, candidate], expected, atol=1e-5, rtol=1e-5)


def test_a_maxsim_ranker_encodes_documents_beforehand_and_opens_again(ranker, tmp_path):
    model = ranker(ranker="maxsim", size=16, layers=1).train()
    queries, candidates = model.encode_queries(QUERIES), model.encode_candidates(PASSAGES)
    assert model.training and model.dim == 16 and queries.values.shape[1] == 16
    model.eval()
    batch = batch_of(model)
    said = model.compare(model.represent(batch, Needs("in_batch")), batch, Needs("in_batch"))
    everyone = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    found = model.score_encoded(queries.select(everyone[:, 0]), candidates.select(everyone[:, 1]))
    torch.testing.assert_close(said.in_batch.detach().flatten(), found, atol=1e-5, rtol=1e-5)
    alone = model.encode_candidates(PASSAGES[3:])
    torch.testing.assert_close(alone.values, candidates[3], atol=1e-5, rtol=1e-5)
    scores = [found.view(3, 4)[0, [0, 1, 2]], found.view(3, 4)[1, [1, 3, 0]]]
    expected = [1 / (1 + int((one > one[0]).sum())) for one in scores]
    assert evaluate_model(model, JUDGED, ["MAP"]).means["MAP"] == pytest.approx(sum(expected) / 2)
    model.save_pretrained(tmp_path / "saved")
    again = open_model(tmp_path / "saved")
    assert isinstance(again, TwoRankers) and (again.ranker, again.dim) == ("maxsim", 16)
    again.precision = again.texts.precision = "no"
    torch.testing.assert_close(again.encode_queries(QUERIES).values, queries.values, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        again.score_encoded(queries, queries), model.score_encoded(queries, queries), atol=0, rtol=0
    )


def test_a_colbert_teaches_the_tokens_of_a_maxsim_ranker(ranker, tiny_bert):
    student = ranker(ranker="maxsim", size=16, dropout=0.0)
    graph = DistillationGraph(
        {"student": student, "colbert": ColBERT(tiny_bert(seed=1), dim=16)},
        [
            Arrow("rank", RankNet(form="probability"), "student", labels=True),
            Arrow("rep", EmbeddingMatch(["query_tokens", "candidate_tokens"], "mse"), "student", "colbert"),
        ],
        {"student"},
    )
    graph.check({"data": True})
    batch = batch_of(student)
    query, candidate = graph.columns()[:2]
    assert len(query) == len(candidate) == 1  # one tokenizer, no prompts: the same ids
    before = graph(batch)["rep"].loss.sum()
    assert before > 0
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        graph(batch)["rep"].loss.sum().backward()
        optimizer.step()
    assert graph(batch)["rep"].loss.sum() < 0.5 * before


def test_both_teachers_stay_frozen_and_in_eval_at_every_step(ranker, tiny_bert):
    """Their dropout, once on again, would teach noise: a pitfall of the authors' code."""
    student = ranker(dropout=0.0)
    cross, bi = CrossEncoder(tiny_bert(num_labels=1), dropout=0.5), BiEncoder(tiny_bert(seed=1), dropout=0.5)
    graph = DistillationGraph(
        {"student": student, "cross": cross, "bi": bi},
        [
            Arrow("rank", RankNet(form="probability"), "student", labels=True),
            Arrow("cls", EmbeddingMatch(["pair_vectors"], "mse"), "student", "cross"),
            Arrow("rep", EmbeddingMatch(distance="mse"), "student", "bi"),
        ],
        {"student"},
    )
    graph.check({"data": True})
    batch, losses = batch_of(student), []
    for _ in range(2):
        graph.train()
        said = graph(batch)
        losses.append({name: loss.loss.detach() for name, loss in said.items()})
        torch.stack([loss.loss.sum() for loss in said.values()]).sum().backward()
        assert student.training and not cross.training and not bi.training
        assert not any(module.training for teacher in (cross, bi) for module in teacher.modules())
    for name in ("rank", "cls", "rep"):
        torch.testing.assert_close(losses[0][name], losses[1][name])
    assert all(p.grad is None for teacher in (cross, bi) for p in teacher.parameters())
    learnt = dict(student.heads.named_parameters())
    assert learnt.pop("first.bias").grad.abs() < 1e-6  # it raises both of a pair
    assert all(p.grad is not None and p.grad.any() for p in learnt.values())


def test_evaluation_encodes_each_text_once_and_never_a_pair(ranker):
    model, read = ranker(), []
    encode = model._encode
    model._encode = lambda texts, side, bar: read.append((side, len(texts))) or encode(texts, side, bar)
    found = evaluate_model(model, JUDGED, ["MAP"])
    assert sorted(read) == [("candidate", 4), ("query", 2)]
    queries, candidates = model.encode_queries(QUERIES[:2]), model.encode_candidates(PASSAGES)
    first = model.score_encoded(queries[0].expand(3, -1), candidates[:3])
    second = model.score_encoded(queries[1].expand(3, -1), candidates[[1, 3, 0]])
    expected = [1 / (1 + int((scores > scores[0]).sum())) for scores in (first, second)]
    assert found.means["MAP"] == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize("kind", ["dot", "maxsim"])
def test_raw_pairs_are_scored_alone_and_as_part_of_an_ensemble(kind, ranker):
    model = ranker(ranker=kind, **({"size": 16} if kind == "maxsim" else {}))
    pairs = [*QUERIES[:2], QUERIES[0]], PASSAGES[:3]
    expected = model.score_encoded(model.encode_queries(pairs[0]), model.encode_candidates(pairs[1]))
    torch.testing.assert_close(model.score_pairs(*pairs), expected)
    torch.testing.assert_close(Ensemble({"one": model}, "scores").score_pairs(*pairs), expected)
    assert model.score_pairs([], []).shape == (0,)


def test_a_ranker_it_does_not_have_is_refused(tiny_bert):
    with pytest.raises(ValueError, match="ranker must be one of dot, twin, maxsim; got 'cosine'"):
        TwoRankers(tiny_bert(), ranker="cosine")
    with pytest.raises(ValueError, match="size is that of a token's vector"):
        TwoRankers(tiny_bert(), size=16)
    with pytest.raises(ValueError, match="size: 24 does not divide the encoder's own, 32"):
        TwoRankers(tiny_bert(), ranker="maxsim", size=24)
