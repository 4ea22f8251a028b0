"""The bi-encoder against sentence-transformers, and each of its arguments against what it promises."""

import pytest
import torch
from torch import nn

from distill.batch import Batch, Ragged
from distill.nn import text_encoder
from distill.nn.text_encoder import TextEncoder
from distill.outputs import Needs
from students import BiEncoder

st = pytest.importorskip("sentence_transformers")

QUERIES = ["what is a wing", "heart", "how does a ship flow in the river"]
PASSAGES = [
    "a wing is a surface in the flow of air",
    "the heart moves blood",
    "city",
    "old film and music " * 9,
]


def batch_of(model: BiEncoder, queries=QUERIES, candidates=PASSAGES, index=((0, 2), (1, 3), (3, 0))) -> Batch:
    (query_column,), (candidate_column,), _ = model.reads
    index = torch.tensor(index, dtype=torch.int64).view(len(queries), 2 if queries else 0)
    return Batch(
        index=index,
        mask=torch.ones_like(index, dtype=torch.bool),
        query_ids=torch.arange(len(queries)),
        candidate_ids=torch.arange(len(candidates)),
        queries={query_column.key: query_column.encode(list(queries))},
        candidates={candidate_column.key: candidate_column.encode(list(candidates))},
    )


def theirs(folder, **kwargs):
    return st.SentenceTransformer(str(folder), device="cpu", **kwargs)


def assert_opens_there_with_equal_vectors(model: BiEncoder, folder) -> None:
    model.save_pretrained(folder)
    other = theirs(folder)
    for ours, encode in (
        (model.encode_queries(QUERIES), other.encode_query),
        (model.encode_candidates(PASSAGES), other.encode_document),
    ):
        torch.testing.assert_close(ours, encode(convert_to_tensor=True, inputs=list(
            QUERIES if len(ours) == len(QUERIES) else PASSAGES)), atol=1e-5, rtol=0)  # fmt: skip
        assert ours.std(dim=0).mean() > 1e-3


@pytest.fixture
def tiny(tiny_bert):
    def make(**arguments) -> BiEncoder:
        torch.manual_seed(0)
        return BiEncoder(tiny_bert(), precision="no", **arguments)

    return make


VARIANTS = {
    "as it is": {},
    "cls": {"pooling": "cls"},
    "lasttoken": {"pooling": "lasttoken"},
    "dot": {"normalize": False},
    "projected": {"dim": 8},
    "prompts": {"query_prompt": "query ", "candidate_prompt": "passage "},
    "short queries": {"query_max_length": 4, "max_length": 12},
    "separate": {"encoders": "separate"},
    "one layer": {"layers": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_one_opens_in_sentence_transformers_and_here(variant, tiny, tmp_path):
    model = tiny(**VARIANTS[variant])
    if model.query_tower is not model.candidate_tower:
        with torch.no_grad():
            for parameter in model.candidate_tower.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    assert_opens_there_with_equal_vectors(model, tmp_path / "saved")
    again = BiEncoder(tmp_path / "saved", precision="no")
    torch.testing.assert_close(again.encode_queries(QUERIES), model.encode_queries(QUERIES), atol=0, rtol=0)
    torch.testing.assert_close(
        again.encode_candidates(PASSAGES), model.encode_candidates(PASSAGES), atol=0, rtol=0
    )
    settings = ("max_length", "query_max_length", "query_prompt", "candidate_prompt", "dim")
    assert [getattr(again, name) for name in settings] == [getattr(model, name) for name in settings]


def test_one_of_theirs_opens_here_with_equal_vectors(tiny_bert, tmp_path):
    from sentence_transformers.sentence_transformer import modules

    word = modules.Transformer(str(tiny_bert()), max_seq_length=16)
    size = word.get_embedding_dimension()
    made = st.SentenceTransformer(
        modules=[word, modules.Pooling(size, "mean"), modules.Dense(size, 12), modules.Normalize()],
        prompts={"query": "query ", "document": "passage "},
        device="cpu",
    )
    made.save(str(tmp_path / "theirs"))
    ours = BiEncoder(tmp_path / "theirs", precision="no")
    assert (ours.dim, ours.max_length, ours.query_prompt) == (12, 16, "query ")
    for mine, other in (
        (ours.encode_queries(QUERIES), made.encode_query(QUERIES, convert_to_tensor=True)),
        (ours.encode_candidates(PASSAGES), made.encode_document(PASSAGES, convert_to_tensor=True)),
    ):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


def test_a_real_encoder_has_the_vectors_of_sentence_transformers(minilm, tmp_path):
    model = BiEncoder(minilm, precision="no")
    other = theirs(minilm)
    expected = other.encode(PASSAGES, convert_to_tensor=True)
    torch.testing.assert_close(model.encode_candidates(PASSAGES), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_queries(PASSAGES), expected, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        theirs(tmp_path / "saved").encode(PASSAGES, convert_to_tensor=True), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_pooling_and_normalisation_are_those_of_the_plain_transformer(pooling, tiny_bert):
    from transformers import AutoModel, AutoTokenizer

    model = BiEncoder(tiny_bert(), pooling=pooling, normalize=False, precision="no")
    backbone = AutoModel.from_pretrained(tiny_bert()).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert())
    expected = []
    for text in PASSAGES:
        with torch.no_grad():
            tokens = backbone(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected.append({"mean": tokens.mean(0), "cls": tokens[0], "lasttoken": tokens[-1]}[pooling])
    expected = torch.stack(expected)
    torch.testing.assert_close(model.encode_candidates(PASSAGES), expected, atol=1e-5, rtol=1e-5)
    unit = BiEncoder(tiny_bert(), pooling=pooling, normalize=True, precision="no").encode_candidates(PASSAGES)
    torch.testing.assert_close(unit, nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=1e-5)


def test_compare_scores_the_listed_candidates_and_the_whole_batch(tiny):
    model = tiny()
    batch = batch_of(model)
    needs = Needs("scores", "in_batch")
    said = model.compare(model.represent(batch, needs), batch, needs)
    queries, candidates = model.encode_queries(QUERIES), model.encode_candidates(PASSAGES)
    for row, places in enumerate(batch.index.tolist()):
        for column, place in enumerate(places):
            expected = float(queries[row] @ candidates[place])
            assert said.scores[row, column].item() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(said.in_batch, queries @ candidates.T, atol=1e-5, rtol=1e-5)
    assert said.scores.dtype == torch.float32


@pytest.mark.parametrize("encoders", ["shared", "separate"])
@pytest.mark.parametrize("fields", [("queries",), ("candidates",), ("scores",)])
def test_only_the_side_that_is_needed_is_asked(fields, encoders, tiny):
    model = tiny(encoders=encoders, chunk_tokens=1)  # a chunk per text
    runs = []
    for module in model.modules():
        if isinstance(module, TextEncoder):
            module.backbone.register_forward_hook(lambda *_: runs.append(1))
    said = model.represent(batch_of(model), Needs(*fields))
    both = fields == ("scores",)
    assert len(runs) == len(QUERIES) * (both or fields == ("queries",)) + len(PASSAGES) * (
        both or fields == ("candidates",)
    )
    assert dict(said.given()).keys() == ({"queries", "candidates"} if both else set(fields))


@pytest.mark.parametrize("encoders", ["shared", "separate"])
def test_represent_says_what_encode_says_and_takes_empty_sides(encoders, tiny):
    model = tiny(encoders=encoders, query_prompt="query ", query_max_length=5)
    said = model.represent(batch_of(model), Needs("queries", "candidates"))
    torch.testing.assert_close(said.queries, model.encode_queries(QUERIES), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(said.candidates, model.encode_candidates(PASSAGES), atol=1e-5, rtol=1e-5)
    texts = model.represent(batch_of(model, queries=[], index=()), Needs("queries", "candidates"))
    assert texts.queries.shape == (0, 32) and texts.candidates.shape == (4, 32)


def test_layers_are_scored_like_the_last_which_says_the_score(tiny, tiny_bert):
    model = tiny()
    batch = batch_of(model)
    needs = Needs("layer_scores", "scores")
    said = model.compare(model.represent(batch, needs), batch, needs)
    depth = model.encoder.backbone.config.num_hidden_layers
    assert said.layer_scores.shape == (*batch.index.shape, depth) and model.sizes["layer_scores"] == depth > 1
    torch.testing.assert_close(said.layer_scores[..., -1], said.scores)
    shallower = BiEncoder(tiny_bert(), precision="no", layers=1)  # ends where the first layer does
    alone = shallower.compare(shallower.represent(batch, Needs("scores")), batch, Needs("scores")).scores
    torch.testing.assert_close(said.layer_scores[..., 0], alone)
    model.train()
    said.layer_scores[..., 0].sum().backward()
    layers = model.encoder.backbone.encoder.layer
    assert layers[0].output.dense.weight.grad.any() and not layers[-1].output.dense.weight.grad.any()


def test_separate_encoders_start_equal_and_learn_apart(tiny):
    model = tiny(encoders="separate")
    assert sum(p.numel() for p in model.parameters()) == 2 * sum(p.numel() for p in tiny().parameters())
    torch.testing.assert_close(model.encode_queries(PASSAGES), model.encode_candidates(PASSAGES))
    model.represent(batch_of(model), Needs("queries")).queries[:, 0].sum().backward()
    assert all(p.grad is None for p in model.candidate_tower.parameters())
    assert any(p.grad is not None for p in model.query_tower.parameters())


def test_the_encoder_of_another_node_is_the_same_object(tiny, tiny_bert):
    first = tiny()
    second = BiEncoder(tiny_bert(), encoder=first.encoder, pooling="cls")
    assert second.encoder is first.encoder
    assert {id(p) for p in second.parameters()} == {id(p) for p in first.parameters()}
    for own in ({"layers": 1}, {"encoders": "separate"}, {"dropout": 0.1}, {"chunk_tokens": 8}):
        with pytest.raises(ValueError, match="a shared `encoder` is taken as it is: leave out `layers`"):
            BiEncoder(tiny_bert(), encoder=first.encoder, **own)


def test_query_max_length_cuts_queries_alone(tiny):
    model = tiny(query_max_length=4)
    texts = ["a wing is", "a wing is a surface"]
    short = model.encode_queries(texts)
    torch.testing.assert_close(short[0], model.encode_queries(["a wing"])[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(short[0], short[1], atol=1e-6, rtol=0)  # two words are left of each
    long = model.encode_candidates(texts)
    assert (long[0] - long[1]).abs().max() > 1e-3
    torch.testing.assert_close(long, tiny().encode_candidates(texts))
    assert tiny(max_length=9).query_max_length == 9


@pytest.mark.parametrize("given", [{"max_length": 129}, {"query_max_length": 500}, {"max_length": 2}])
def test_lengths_beyond_the_positions_are_refused(given, tiny):
    """The position table would be read past its end, in the first long text of hour three."""
    ((name, length),) = given.items()
    with pytest.raises(ValueError, match=f"{name} must be between 3 and 128 ids .* got {length}"):
        tiny(**given)
    model = tiny(max_length=128)
    assert model.encode_candidates(["wing " * 500]).isfinite().all()


def test_an_unknown_pooling_is_refused(tiny):
    with pytest.raises(ValueError, match="pooling must be mean, cls or lasttoken, got 'max'"):
        tiny(pooling="max")


@pytest.mark.parametrize("learning", [True, False])
def test_encoding_restores_the_mode_and_needs_no_gradient(learning, tiny):
    model = tiny(dropout=0.5).train(learning)
    first = model.encode_queries(QUERIES)
    assert model.training is learning
    assert all(module.training is learning for module in model.modules())
    torch.testing.assert_close(first, model.encode_queries(QUERIES))  # no dropout, whatever the mode
    assert not first.requires_grad and first.device.type == "cpu" and first.dtype == torch.float32
    assert model.encode_queries([]).shape == (0, 32)


def test_dropout_acts_while_it_learns(tiny):
    model = tiny(dropout=0.5).train()
    one, two = (model.represent(batch_of(model), Needs("queries")).queries for _ in range(2))
    assert (one - two).abs().max() > 1e-3
    still = tiny(dropout=0.0).train()
    one, two = (still.represent(batch_of(still), Needs("queries")).queries for _ in range(2))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activation_checkpointing_gives_equal_gradients(dropout, tiny, monkeypatch):
    """With dropout both are padded here: end to end, as only one of them learns, other masks are drawn."""
    if dropout:
        monkeypatch.setattr(text_encoder, "takes_packed", lambda backbone: False)
    gradients = []
    for checkpointing in (False, True):
        model = tiny(dropout=dropout, activation_checkpointing=checkpointing).train()
        runs = []
        model.encoder.backbone.encoder.layer[0].intermediate.register_forward_hook(
            lambda *_, r=runs: r.append(1)
        )
        torch.manual_seed(3)
        said = model.represent(batch_of(model), Needs("queries", "candidates"))
        (said.queries[:, 0].sum() + said.candidates.square()[:, 1].sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert len(runs) == 1 + checkpointing  # once more in the backward
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_texts_come_back_in_their_order(tiny):
    model = tiny(chunk_tokens=12)
    texts = ["wing " * n for n in (9, 1, 5, 2, 7, 1, 3)]
    together = model.encode_candidates(texts)
    apart = torch.cat([model.encode_candidates([text]) for text in texts])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_both_sides_share_one_pass(tiny):
    model = tiny()
    runs = []
    model.encoder.backbone.register_forward_hook(lambda *_: runs.append(1))
    model.represent(batch_of(model), Needs("scores"))
    assert len(runs) == 1


def test_reads_name_a_column_per_prompt(tiny):
    (queries,), (candidates,), _ = tiny().reads
    assert queries.key == candidates.key
    (queries,), (candidates,), _ = tiny(query_prompt="query ").reads
    assert queries.key != candidates.key
    assert isinstance(queries.encode(["wing"]), Ragged)
