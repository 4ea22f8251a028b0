"""The cross-encoder against sentence-transformers and against the plain transformer."""

import pytest
import torch

from distill.batch import Batch
from distill.outputs import Needs
from teachers import CrossEncoder

st = pytest.importorskip("sentence_transformers")

QUERIES = ["what is a wing", "heart", "how does a ship flow in the river"]
PASSAGES = [
    "a wing is a surface in the flow of air",
    "the heart moves blood",
    "city",
    "old film and music " * 3,
]
PAIRS = [(query, passage) for query in QUERIES for passage in PASSAGES]


def batch_of(model: CrossEncoder, mask=((1, 1, 0), (1, 1, 1), (1, 0, 0))) -> Batch:
    column = model.column
    mask = torch.tensor(mask, dtype=torch.bool)
    return Batch(
        index=torch.tensor([[0, 2, 0], [1, 3, 0], [3, 0, 0]]),
        mask=mask,
        query_ids=torch.arange(3),
        candidate_ids=torch.arange(4),
        queries={column.key: column.encode(QUERIES)},
        candidates={column.key: column.encode(PASSAGES)},
    )


def plain_logits(folder, pairs, **settings) -> torch.Tensor:
    """The library's own answer to each pair by itself: [n, C]."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat(
            [model(**tokenizer(*pair, return_tensors="pt", **settings)).logits for pair in pairs]
        )


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_logits_are_those_of_the_plain_transformer(classes, tiny_bert):
    folder = tiny_bert(num_labels=classes)
    model = CrossEncoder(folder, precision="no", chunk_tokens=60)
    assert model.classes == classes
    expected = plain_logits(folder, PAIRS)
    found = model.score_pairs(*zip(*PAIRS, strict=True))
    served = {1: lambda x: x[:, 0], 2: lambda x: x.log_softmax(-1)[:, 1], 3: lambda x: x}[classes](expected)
    torch.testing.assert_close(found, served, atol=1e-5, rtol=1e-5)
    assert found.std() > 1e-3


@pytest.mark.parametrize("classes", [1, 3])
def test_a_saved_one_opens_in_sentence_transformers_and_here(classes, tiny_bert, tmp_path):
    """Pairs beyond the length too, as long as the query takes less than half of it."""
    model = CrossEncoder(tiny_bert(num_labels=classes), precision="no", max_length=40, query_max_length=30)
    model.save_pretrained(tmp_path / "saved")
    pairs = [*PAIRS, (QUERIES[0], f"{PASSAGES[0]} " * 12), (QUERIES[1], f"{PASSAGES[1]} " * 12)]
    logits = model.score_pairs(*zip(*pairs, strict=True))
    theirs = st.CrossEncoder(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(theirs.predict(pairs, convert_to_tensor=True), logits, atol=1e-5, rtol=0)
    again = CrossEncoder(tmp_path / "saved", precision="no")
    assert (again.max_length, again.query_max_length, again.classes) == (40, 30, classes)
    torch.testing.assert_close(again.score_pairs(*zip(*pairs, strict=True)), logits, atol=0, rtol=0)


def test_one_of_theirs_opens_here(tiny_bert, tmp_path):
    theirs = st.CrossEncoder(str(tiny_bert(num_labels=1)), device="cpu", max_length=48)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    logits = theirs.predict(PAIRS, convert_to_tensor=True, activation_fn=torch.nn.Identity())
    ours = CrossEncoder(tmp_path / "theirs", precision="no")
    assert ours.max_length == 48
    torch.testing.assert_close(ours.score_pairs(*zip(*PAIRS, strict=True)), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_represent_answers_the_listed_pairs_and_leaves_the_rest_at_zero(classes, tiny_bert):
    model = CrossEncoder(tiny_bert(num_labels=classes), precision="no")
    batch = batch_of(model)
    fields = {1: ("scores",), 2: ("scores", "classes"), 3: ("classes",)}[classes]
    assert model.provides == {*fields, "joint_attention", "pair_vectors"}
    said = dict(model.represent(batch, Needs(*fields)).given())
    assert said.keys() == set(fields)
    rows, places = batch.mask.nonzero(as_tuple=True)
    listed = [(QUERIES[r], PASSAGES[batch.index[r, p]]) for r, p in zip(rows, places, strict=True)]
    for name, value in said.items():
        assert (value[~batch.mask] == 0).all()
        if name == "scores":
            expected = model.score_pairs(*zip(*listed, strict=True))
        else:
            expected = plain_logits(tiny_bert(num_labels=classes), listed)
        torch.testing.assert_close(value[batch.mask], expected, atol=1e-5, rtol=1e-5)


def test_a_batch_that_lists_nothing_is_answered(tiny_bert):
    model = CrossEncoder(tiny_bert(num_labels=1), precision="no")
    said = model.represent(batch_of(model, mask=((0, 0, 0),) * 3), Needs("scores"))
    assert said.scores.tolist() == [[0.0] * 3] * 3
    assert model.score_pairs([], []).shape == (0,)


def test_only_the_candidate_is_cut(tiny_bert):
    folder = tiny_bert(num_labels=1)
    model = CrossEncoder(folder, max_length=14, precision="no")
    expected = plain_logits(folder, PAIRS, truncation="only_second", max_length=14)[:, 0]
    found = model.score_pairs(*zip(*PAIRS, strict=True))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (
        found - CrossEncoder(folder, precision="no").score_pairs(*zip(*PAIRS, strict=True))
    ).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_length": 4}, "max_length must be at least 5, a token of each text"),
        (
            {"max_length": 20, "query_max_length": 17},
            "query_max_length must be between 1 and 16, .* room for the",
        ),
    ],
)
def test_lengths_that_leave_a_text_no_token_are_refused(lengths, message, tiny_bert):
    """All candidates of a query would get one score, and a student learn that they are equal."""
    with pytest.raises(ValueError, match=message):
        CrossEncoder(tiny_bert(num_labels=1), **lengths)


def test_a_long_query_leaves_the_candidate_a_quarter_of_a_short_pair(tiny_bert):
    model = CrossEncoder(tiny_bert(num_labels=1), max_length=12, precision="no")
    assert model.query_max_length == 7  # of the 9 that are no special ones
    scores = model.score_pairs([" ".join(QUERIES) * 3] * 2, ["city", "blood"])
    assert (scores[0] - scores[1]).abs() > 1e-4


def test_the_query_is_capped_at_its_own_length(tiny_bert):
    model = CrossEncoder(tiny_bert(num_labels=1), query_max_length=2, precision="no")
    long, short = model.score_pairs(["heart blood of the cat", "heart blood"], ["city"] * 2)
    assert long.item() == pytest.approx(short.item(), abs=1e-6)


def test_a_checkpoint_without_a_head_gets_one_by_seed(tiny_bert):
    scores = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = CrossEncoder(tiny_bert(), precision="no")
        assert model.classes == 1
        scores.append(model.score_pairs(QUERIES, PASSAGES[:3]))
    torch.testing.assert_close(scores[0], scores[1])
    assert (scores[0] - scores[2]).abs().max() > 1e-4
    assert CrossEncoder(tiny_bert(), classes=3).classes == 3


def test_a_head_of_another_size_is_refused(tiny_bert):
    """A trained head must not be dropped, and its mismatch not end in a traceback."""
    with pytest.raises(ValueError, match="classes: 2, but the checkpoint was trained with 3"):
        CrossEncoder(tiny_bert(num_labels=3), classes=2)


@pytest.mark.parametrize("length", [129, 512, 2])
def test_a_length_beyond_the_positions_is_refused(length, tiny_bert):
    with pytest.raises(ValueError, match=f"max_length must be between .* and 128 ids .* got {length}"):
        CrossEncoder(tiny_bert(num_labels=1), max_length=length)


def test_a_query_without_room_is_refused(tiny_bert):
    with pytest.raises(ValueError, match="query_max_length must be at least 1, got 0"):
        CrossEncoder(tiny_bert(num_labels=1), query_max_length=0)


@pytest.mark.parametrize("learning", [True, False])
def test_scoring_restores_the_mode_and_needs_no_gradient(learning, tiny_bert):
    model = CrossEncoder(tiny_bert(num_labels=1), dropout=0.5).train(learning)
    one, two = (model.score_pairs(QUERIES, PASSAGES[:3]) for _ in range(2))
    torch.testing.assert_close(one, two)
    assert model.training is learning and not one.requires_grad


def test_dropout_and_layers_reach_the_transformer(tiny_bert):
    model = CrossEncoder(tiny_bert(num_labels=1), dropout=0.5, layers=1, precision="no").train()
    assert model.encoder.backbone.config.num_hidden_layers == 1
    one, two = (model.represent(batch_of(model), Needs("scores")).scores for _ in range(2))
    assert (one - two).abs().max() > 1e-4


def test_it_learns_and_activation_checkpointing_gives_equal_gradients(tiny_bert):
    gradients = []
    for checkpointing in (False, True):
        model = CrossEncoder(
            tiny_bert(num_labels=1), dropout=0.1, activation_checkpointing=checkpointing
        ).train()
        torch.manual_seed(3)
        model.represent(batch_of(model), Needs("scores")).scores.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 10 and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_both_sides_read_one_column(tiny_bert):
    (queries,), (candidates,), _ = CrossEncoder(tiny_bert(num_labels=1)).reads
    assert queries.key == candidates.key


def test_its_encoder_with_a_head_is_not_offered_for_sharing():
    """A bi-encoder over it would find no hidden states, at the first batch."""
    assert CrossEncoder.shares == frozenset()


def test_the_vector_of_a_pair_is_the_first_tokens_and_comes_from_the_same_forward(tiny_bert):
    from transformers import AutoModel, AutoTokenizer

    folder = tiny_bert(num_labels=1)
    model = CrossEncoder(folder, precision="no", chunk_tokens=60)
    batch, runs = batch_of(model), []
    model.encoder.backbone.register_forward_hook(lambda *_: runs.append(1))
    alone = model.represent(batch, Needs("scores"))
    once = len(runs)
    for needs in (Needs("scores", "pair_vectors"), Needs("pair_vectors", "joint_attention", layers=[-1])):
        runs.clear()
        said = model.represent(batch, needs)
        assert len(runs) == once
        plain, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        for row, place in batch.mask.nonzero().tolist():
            pair = tokenizer(QUERIES[row], PASSAGES[batch.index[row, place]], return_tensors="pt")
            with torch.no_grad():
                expected = plain(**pair).last_hidden_state[0, 0]
            torch.testing.assert_close(said.pair_vectors[row, place], expected, atol=1e-5, rtol=1e-5)
        assert not said.pair_vectors[~batch.mask].any()
    together = model.represent(batch, Needs("scores", "pair_vectors"))
    torch.testing.assert_close(together.scores, alone.scores, atol=1e-6, rtol=0)
    nobody = batch_of(model, mask=((0, 0, 0),) * 3)
    assert model.represent(nobody, Needs("pair_vectors")).pair_vectors.shape == (3, 3, 32)
    assert model.sizes["pair_vectors"] == 32
