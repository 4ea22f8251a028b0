"""Tiny random transformers of several families, each with a tokenizer of its own frame."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

WORDS = "a the small large model learns from teaches student teacher cat sat on mat query passage".split()
TEXTS = [
    "a cat sat on the mat",
    "the student learns",
    "model",
    "the large teacher teaches the small student from a large model",
    "",
    "student learns the",
]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random model: bert, roberta, distilbert, modernbert, qwen2 (causal), grouped (keys)."""

    @functools.cache
    def make(name: str) -> Path:
        from transformers import (
            AutoModel,
            BertConfig,
            DistilBertConfig,
            ModernBertConfig,
            Qwen2Config,
            RobertaConfig,
        )

        wide = {"initializer_range": 0.5}  # different texts get visibly different vectors
        sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
        sizes |= {"vocab_size": 40, **wide}
        ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
        config = {
            "bert": lambda: BertConfig(max_position_embeddings=32, pad_token_id=1, **sizes),
            "roberta": lambda: RobertaConfig(max_position_embeddings=34, **ends, **sizes),
            "distilbert": lambda: DistilBertConfig(
                vocab_size=40, max_position_embeddings=32, pad_token_id=1,
                dim=16, n_layers=3, n_heads=2, hidden_dim=24, **wide,
            ),
            "modernbert": lambda: ModernBertConfig(
                max_position_embeddings=32, cls_token_id=0, sep_token_id=2, local_attention=4, **ends, **sizes
            ),
            "qwen2": lambda: Qwen2Config(
                max_position_embeddings=32, num_key_value_heads=2, **ends, **sizes
            ),
            "grouped": lambda: Qwen2Config(
                max_position_embeddings=32, num_key_value_heads=2, **ends,
                **(sizes | {"num_attention_heads": 4}),
            ),
        }[name]()  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModel.from_config(config).save_pretrained(folder)
        tokenizer(name).save_pretrained(folder)
        return folder

    return make


def tokenizer(name: str):
    """Words as ids: ``<s> a </s> </s> b </s>`` as RoBERTa, ``<s> a </s> b </s>`` with segments as BERT."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    if name == "roberta":
        raw.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    else:
        raw.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    segments = ["token_type_ids"] if name == "bert" else []
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>",
        model_input_names=["input_ids", *segments, "attention_mask"],
        model_max_length=32,
    )  # fmt: skip


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Of several lengths, two of one length, one empty."""
    return list(TEXTS)
