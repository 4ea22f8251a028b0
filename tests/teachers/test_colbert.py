"""ColBERT against sentence-transformers' MultiVectorEncoder, and its parts against what they promise."""

import json
import string
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from distill.batch import Batch, Ragged
from distill.errors import RecipeError
from distill.graph import Arrow, DistillationGraph
from distill.hub.checkpoint import UNWANTED, WANTED
from distill.hub.files import read_json, write_json
from distill.objectives import AttentionKL, SampledSoftmax, ScoreKL
from distill.open import open_model
from distill.outputs import Needs, Outputs
from distill.tokens import Tokens
from students import BiEncoder, VirtualInteraction
from teachers import ColBERT, CrossEncoder
from tests.conftest import WORDS

st = pytest.importorskip("sentence_transformers", minversion="6")

QUERIES = ["what is a wing", "heart, heart?", "how does a ship flow in the river and the sea"]
PASSAGES = [
    "a wing is a surface; in the flow of air.",
    "the heart moves blood!",
    "city",
    "old film - music " * 5,
]


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    """A random little BERT whose vocabulary has markers, a mask and punctuation."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("marked-bert")
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, "a", *WORDS, *string.punctuation]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=64)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def colbert(folder, **arguments) -> ColBERT:
    torch.manual_seed(0)  # of the projection
    return ColBERT(folder, **({"precision": "no", "dim": 8, "query_max_length": 12} | arguments))


def theirs(folder):
    return st.MultiVectorEncoder(str(folder), device="cpu")


def assert_equal_there(model: ColBERT, other) -> None:
    """Token vectors and scores to 1e-5."""
    queries, candidates = model.encode_queries(QUERIES), model.encode_candidates(PASSAGES)
    their_queries, their_candidates = other.encode_query(QUERIES), other.encode_document(PASSAGES)
    for mine, their in ((queries, their_queries), (candidates, their_candidates)):
        assert mine.lengths.tolist() == [len(rows) for rows in their]
        torch.testing.assert_close(mine.values, torch.cat([*their]), atol=1e-5, rtol=0)
    pairs = [(q, c) for q in QUERIES for c in PASSAGES]
    scores = model.score_pairs(*zip(*pairs, strict=True)).view(len(QUERIES), -1)
    torch.testing.assert_close(scores, other.similarity(their_queries, their_candidates), atol=1e-5, rtol=0)
    assert scores.std() > 0.01


def batch_of(model, index=((0, 2), (1, 3), (3, 0)), mask=((1, 1), (1, 1), (1, 0))) -> Batch:
    queries, candidates, _ = model.reads
    return Batch(
        index=torch.tensor(index),
        mask=torch.tensor(mask, dtype=torch.bool),
        query_ids=torch.arange(3),
        candidate_ids=torch.arange(4),
        labels=torch.tensor([[1.0, 0.0]] * 3),
        queries={queries[0].key: queries[0].encode(QUERIES)},
        candidates={candidates[0].key: candidates[0].encode(PASSAGES)},
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_length": 9, "query_max_length": 8},
        {"augment": False},
        {"punctuation": True},
        {"markers": []},
        {"layers": 1, "dim": 32},
    ],
    ids=str,
)
def test_a_saved_one_opens_in_sentence_transformers_and_here(arguments, bert, tmp_path):
    model = colbert(bert, **arguments)
    model.save_pretrained(tmp_path / "saved")
    assert_equal_there(model, theirs(tmp_path / "saved"))
    again = open_model(tmp_path / "saved")
    assert isinstance(again, ColBERT)
    again.precision = "no"
    for encode in ("encode_queries", "encode_candidates"):
        assert torch.equal(getattr(again, encode)(QUERIES).values, getattr(model, encode)(QUERIES).values)
    assert again.identity == model.identity | {"checkpoint": again.checkpoint}
    assert [c.key for side in again.reads for c in side] == [c.key for side in model.reads for c in side]


def test_one_of_theirs_opens_here(bert, tmp_path):
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    filled = {"strategy": "fixed", "length": 10, "attend": True}
    word = Transformer(str(bert), query_expansion=filled, document_length=9)
    tokens = {"module_input_name": "token_embeddings"}
    dense = Dense(32, 16, bias=False, activation_function=torch.nn.Identity(), **tokens)
    made = st.MultiVectorEncoder(
        modules=[word, dense, MultiVectorMask([".", ";"]), Normalize(**tokens)],
        prompts={"query": "query ", "document": ""},
        device="cpu",
    )
    made.save_pretrained(str(tmp_path / "theirs"))
    ours = ColBERT(tmp_path / "theirs", precision="no")
    assert (ours.dim, ours.max_length, ours.reader.lengths[0], ours.reader.attend) == (16, 9, 10, True)
    assert ours.reader.prompts == ("query ", "") and [*ours.skip] == [".", ";"]
    assert_equal_there(ours, made)


def test_the_authors_layout_opens_here_as_there(bert, tmp_path):
    """ColBERT v2: linear.weight among the weights, settings in artifact.metadata."""
    folder = tmp_path / "colbertv2"
    folder.mkdir()
    for path in bert.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = {f"bert.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    weights["linear.weight"] = torch.randn(16, 32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", read_json(folder / "config.json") | {"architectures": ["HF_ColBERT"]})
    said = {"query_maxlen": 14, "doc_maxlen": 10, "mask_punctuation": True, "attend_to_mask_tokens": False}
    said |= {"query_token_id": "[unused0]", "doc_token_id": "[unused1]", "dim": 16, "similarity": "cosine"}
    (folder / "artifact.metadata").write_text(json.dumps(said))
    ours = open_model(folder)
    ours.precision = "no"
    assert (ours.dim, ours.max_length, ours.reader.words) == (16, 10, ("[unused0]", "[unused1]"))
    assert_equal_there(ours, theirs(folder))
    ours.save_pretrained(tmp_path / "saved")
    assert_equal_there(ours, theirs(tmp_path / "saved"))
    (folder / "artifact.metadata").write_text(json.dumps(said | {"similarity": "l2"}))
    with pytest.raises(RecipeError, match="similarity 'l2' does not open here"):
        ColBERT(folder)


def test_queries_are_framed_as_the_paper_says(bert):
    """[CLS] [Q] q ... [SEP] [MASK] ...; the mask tokens are read and scored, and nobody attends to them."""
    model = colbert(bert)
    words = model.encoder.tokenizer.tokenizer
    ids, places, attended = model.reader.frame("query", model.reader.columns[0].encode(["what is a wing ?"]))
    assert words.convert_ids_to_tokens(ids[0].tolist()) == [
        "[CLS]", "[unused0]", "what", "is", "a", "wing", "?", "[SEP]", *["[MASK]"] * 4,
    ]  # fmt: skip
    assert places[:, 0].tolist() == [-1, -1, 0, 1, 2, 3, 4, -1, -1, -1, -1, -1] and attended.tolist() == [8]
    ids, places, attended = model.reader.frame("candidate", model.reader.columns[1].encode(["a wing."]))
    assert words.convert_ids_to_tokens(ids[0].tolist()) == ["[CLS]", "[unused1]", "a", "wing", ".", "[SEP]"]
    assert attended.tolist() == [6] and model.encode_candidates(["a wing."]).lengths.tolist() == [5]
    longer = colbert(bert, query_max_length=20)
    torch.testing.assert_close(
        longer.encode_queries(QUERIES[:1])[0][:7], model.encode_queries(QUERIES[:1])[0][:7], atol=1e-5, rtol=0
    )


def test_scores_are_those_of_the_formula(bert):
    model = colbert(bert)
    batch = batch_of(model)
    needs = Needs("scores", "in_batch")
    said = model.compare(model.represent(batch, needs), batch, needs)
    queries, candidates = model.encode_queries(QUERIES), model.encode_candidates(PASSAGES)
    expected = torch.tensor(
        [[float((queries[b] @ candidates[p].T).max(1).values.sum()) for p in range(4)] for b in range(3)]
    )
    torch.testing.assert_close(said.in_batch, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(said.scores, expected.gather(1, batch.index) * batch.mask, atol=1e-5, rtol=0)
    torch.testing.assert_close(queries.values.norm(dim=1), torch.ones(len(queries.values)))
    assert said.scores.dtype == torch.float32


def test_texts_of_nothing_but_punctuation_and_empty_batches_are_answered(bert):
    model = colbert(bert)
    assert model.encode_candidates(["...", ""]).lengths.tolist() == [3, 3]  # [CLS] [D] [SEP]
    assert len(model.encode_queries([])) == 0 and model.score_pairs([], []).shape == (0,)
    batch = batch_of(model)
    none = torch.zeros(0, dtype=torch.int64)
    said = model.represent(batch.select(none, torch.tensor([1])), Needs("in_batch"))
    assert len(said.query_tokens) == 0 and len(said.candidate_tokens) == 1
    assert model.compare(said, batch.select(none, torch.tensor([1])), Needs("in_batch")).in_batch.shape == (
        0,
        1,
    )


def bridge_graph(bert, *arrows, **arguments) -> DistillationGraph:
    student = BiEncoder(bert, precision="no", max_length=40, dropout=0.0, **arguments)
    nodes = {"student": student, "bridge": ColBERT(of={"student": student}, dim=8, precision="no")}
    return DistillationGraph(nodes, arrows, ["student", "bridge"])


def test_it_stands_on_a_students_tokens_without_a_second_forward(bert):
    """Gradients pass to the student, which is run once; the teacher's tail is cut."""
    task = SampledSoftmax(temperature=1.0)
    graph = bridge_graph(
        bert,
        Arrow("task", task, "bridge"),
        Arrow("down", ScoreKL(in_batch=True), "student", "bridge"),
    )
    graph.check({"data": True})
    runs = []
    graph.nodes["student"].encoder.backbone.register_forward_hook(lambda *_: runs.append(1))
    losses = graph(batch_of(graph.nodes["student"]))
    assert len(runs) == len(graph.nodes["student"].encoder.cut(torch.ones(7), 2048))
    losses["task"].loss.sum().backward()
    names = {name for name, p in graph.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("bridge.projection" in name for name in names) and any("layer.0" in name for name in names)
    graph.zero_grad()
    graph(batch_of(graph.nodes["student"]))["down"].loss.sum().backward()
    assert graph.nodes["bridge"].projection.weight.grad is None
    assert len([n for n in graph.trainable() if "bridge" in n]) == 1  # the encoder is the student's


def test_one_on_a_student_is_saved_whole_and_encodes_as_it_is_trained(bert, tmp_path):
    graph = bridge_graph(bert, Arrow("task", SampledSoftmax(temperature=1.0), "bridge"))
    bridge, batch = graph.nodes["bridge"], batch_of(graph.nodes["bridge"])
    graph.eval()
    with torch.no_grad():
        asked = graph.asked(graph.arrows)
        said = graph.represent(batch, asked)["bridge"]
        scores = bridge.compare(said, batch, Needs("in_batch")).in_batch
    pairs = zip(*[(q, c) for q in QUERIES for c in PASSAGES], strict=True)
    torch.testing.assert_close(bridge.score_pairs(*pairs).view(3, 4), scores, atol=1e-5, rtol=0)
    bridge.save_pretrained(tmp_path / "bridge")
    assert_equal_there(bridge, theirs(tmp_path / "bridge"))
    again = ColBERT(tmp_path / "bridge", precision="no")
    assert_equal_there(again, theirs(tmp_path / "bridge"))


def test_a_cross_encoders_attention_teaches_its_tokens(bert):
    """Places agree though one frames with markers and the other reads pairs; punctuation has no token."""
    cross = CrossEncoder(bert, precision="no")
    for model in (colbert(bert, dropout=0.0), None):
        for objective in (AttentionKL(student="tokens", temperature=0.1), AttentionKL()):
            arrow = Arrow("words", objective, "bridge", "cross")
            if model is None:
                student = BiEncoder(bert, precision="no", max_length=40)
                nodes = {
                    "student": student,
                    "bridge": ColBERT(of={"student": student}, dim=8),
                    "cross": cross,
                }
                graph = DistillationGraph(nodes, [arrow], ["student", "bridge"])
            else:
                graph = DistillationGraph({"bridge": model, "cross": cross}, [arrow], ["bridge"], "bridge")
            graph.check({"data": True})
            loss = graph(batch_of(graph.nodes["bridge"]))["words"].loss
            loss.sum().backward()
            assert loss.isfinite().all() and (loss > 0).all()
            assert any(p.grad is not None and p.grad.any() for p in graph.parameters())


def test_the_worked_examples_of_training_and_of_the_cascade():
    """Late interaction by KL from a cross-encoder, and ERNIE-Search's three task losses and three arrows."""

    def kl(teacher, student):
        said = (Outputs(scores=torch.tensor([scores])) for scores in (student, teacher))
        return ScoreKL()(*said, Batch.of_scores(1, 3)).loss.item()

    def task(scores):
        said = Outputs(scores=torch.tensor([scores]))
        return SampledSoftmax(temperature=1.0, in_batch=False)(said, None, Batch.of_scores(1, 3)).loss.item()

    assert kl([4.0, 2.0, 1.0], [20.0, 18.5, 18.0]) == pytest.approx(0.037402, abs=1e-6)
    cross, late, dual = [3.0, 1.0, 0.0], [2.0, 1.5, 0.5], [1.0, 1.2, 0.3]
    tasks, arrows = map(task, (cross, late, dual)), (kl(cross, late), kl(late, dual), kl(cross, dual))
    assert sum(tasks) + sum(arrows) == pytest.approx(2.522189, abs=2e-6)


@pytest.mark.parametrize("of", [False, True])
def test_a_cached_gradient_is_the_plain_one(of, bert):
    gradients = []
    for rows in (None, 2):
        torch.manual_seed(0)
        arrow = Arrow("task", SampledSoftmax(temperature=1.0), "bridge")
        if of:
            graph = bridge_graph(bert, arrow)
        else:
            graph = DistillationGraph({"bridge": colbert(bert, dropout=0.0)}, [arrow], ["bridge"], "bridge")
        graph.gradient_cache = rows
        graph(batch_of(graph.nodes["bridge"]))["task"].loss.sum().backward()
        gradients.append({name: p.grad for name, p in graph.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "give either a `checkpoint`, or the node it stands on"),
        ({"checkpoint": "bert", "markers": ["[Q]", "[D]"]}, "two words of the vocabulary"),
        ({"checkpoint": "bert", "markers": ["wing"]}, "two words of the vocabulary"),
        ({"checkpoint": "bert", "query_max_length": 3}, "query_max_length must be between 4 and 64"),
        ({"checkpoint": "bert", "max_length": 3}, "max_length must be between 4 and 64"),
        ({"checkpoint": "bert", "markers": [], "max_length": 2}, "max_length must be between 3 and 64"),
        ({"of": "student", "max_length": 10}, "it reads nothing: give dim, punctuation"),
        ({"of": "cross"}, r"'cross' \(CrossEncoder\) says nothing of its tokens"),
        ({"of": "virtual"}, r"'virtual' \(VirtualInteraction\) is no bi-encoder"),
        ({"of": "two"}, "'two' has two encoders, and a ColBERT is saved and served with one"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, bert):
    if arguments.get("checkpoint"):
        arguments = arguments | {"checkpoint": bert}
    if name := arguments.get("of"):
        nodes = {"student": BiEncoder, "cross": CrossEncoder, "virtual": VirtualInteraction}
        node = BiEncoder(bert, encoders="separate") if name == "two" else nodes[name](bert)
        arguments = arguments | {"of": {name: node}}
    with pytest.raises(ValueError, match=message):
        ColBERT(**arguments)


def test_of_the_hub_the_authors_settings_are_wanted_too():
    there = ["artifact.metadata", "model.safetensors", "vocab.txt", "pytorch_model.bin"]
    wanted = filter_repo_objects(there, allow_patterns=WANTED, ignore_patterns=UNWANTED)
    assert list(wanted) == there[:3]


def test_a_projection_that_is_not_used_is_told(bert, tmp_path, caplog):
    colbert(bert, dim=8).save_pretrained(tmp_path / "saved")
    assert not caplog.messages
    ColBERT(tmp_path / "saved", dim=8)
    assert not caplog.messages
    ColBERT(tmp_path / "saved", dim=4)
    assert "dim 4 is not the 8 of" in caplog.text and "its projection is a new one" in caplog.text


@pytest.mark.parametrize("kind", [ColBERT, BiEncoder])
def test_what_is_said_of_no_text_is_of_one_type_with_what_is_said_of_some(kind, bert):
    """Processes put their parts together, also under autocast, and one of them may have no query."""
    model = kind(bert, dim=8, precision="no")
    batch = batch_of(model)
    none = torch.zeros(0, dtype=torch.int64)
    empty = batch.select(none, torch.tensor([1]))
    needs = Needs(*(("query_tokens",) if kind is ColBERT else ("queries", "query_tokens", "query_cls")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        some, nothing = model.represent(batch, needs), model.represent(empty, needs)
    for name, value in some.given():
        one, two = (v.values if isinstance(v, Tokens) else v for v in (value, getattr(nothing, name)))
        assert (one.dtype, one.shape[1:]) == (two.dtype, two.shape[1:]) and len(two) == 0


def test_a_real_encoder_gets_a_projection_that_keeps_its_order(minilm, tmp_path):
    """The new projection is orthogonal, so a candidate that fits is found before any training."""
    model = ColBERT(minilm, precision="no", max_length=64)
    assert (model.dim, model.reader.words) == (128, ("[unused0]", "[unused1]"))
    asked = ["how does an aeroplane stay in the air"]
    told = [
        "The lift of its wings holds an aircraft up.",
        "The heart pumps blood.",
        "Paris lies on the Seine.",
    ]
    scores = model.score_pairs(asked * 3, told)
    assert scores.argmax() == 0
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        theirs(tmp_path / "saved").similarity(
            theirs(tmp_path / "saved").encode_query(asked), theirs(tmp_path / "saved").encode_document(told)
        )[0],
        scores, atol=1e-4, rtol=0,
    )  # fmt: skip
    again = ColBERT(tmp_path / "saved")
    assert again.reads.keys == BiEncoder(minilm).reads.keys  # its ids are those of the base model


def test_ragged_rows_are_not_mixed_up_by_chunks(bert):
    """Many texts of many lengths give what each gives alone."""
    model = colbert(bert, chunk_tokens=40)
    texts = [" ".join(WORDS[i : i + 1 + i % 9]) for i in range(40)]
    found = model.encode_candidates(texts)
    assert isinstance(found, Ragged)
    for row in range(0, 40, 7):
        torch.testing.assert_close(found[row], model.encode_candidates([texts[row]])[0], atol=1e-5, rtol=0)
