"""A retrieval data set that every machine has: the docstrings of its Python packages."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import logging
import platform
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distill.batch import Ragged
from distill.data.cache import replacing, unit_hash
from distill.data.judged import Judged, TextTable
from distill.data.text_data import TextData
from distill.errors import DataError
from distill.paths import cache_folder

logger = logging.getLogger(__name__)

PACKAGES = ("python", "torch", "transformers", "numpy", "pandas", "datasets", "accelerate", "huggingface_hub")
COLUMNS = ("file", "query", "text", "query_key", "text_key")  # keys: what copies have in common
RULES = 4  # raise it when the rules below change, so that older caches are not read
SKIPPED = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "_vendor",
    "_inductor",
    "turtledemo",
    "ensurepip",
    "pydoc_data",
    "_dynamo",
}


HEADING = re.compile(r"([A-Z][\w ]{2,25}?)\s*:*")  # a line such as "Parameters" or "Args:"
TOLD = {
    "args",
    "arguments",
    "parameters",
    "params",
    "keyword args",
    "keyword arguments",
    "kwargs",
    "returns",
    "return",
    "yields",
    "raises",
    "attributes",
    "note",
    "notes",
    "warning",
    "warnings",
    "other parameters",
}
NOT_TOLD = {
    "example",
    "examples",
    "see also",
    "references",
    "reference",
    "usage",
    "methods",
    "shape",
    "inputs",
    "outputs",
    "variables",
    "example usage",
    "typical usage",
    "signature",
}


def _clean(text: str) -> str:
    """One line of plain words, without reST and Markdown markup."""
    text = re.sub(r":[\w:+-]+:`[~!.]*([^`<]*?)(?:\s*<[^>]*>)?`", r"\1", text)  # :class:`~torch.Tensor`
    text = re.sub(r"\[`?~?([^\]`]*)`?\](?:\([^)\s]*\))?", r"\1", text)  # [`name`], [text](link)
    text = re.sub(r"`([^`<]*?)\s*<[^>]*>`__?", r"\1", text)  # `text <link>`_
    text = re.sub(r"https?://\S+|</?\w+>|`+|\*\*|(?<!\w)[*_](?=\w)|(?<=\w)[*](?!\w)", "", text)
    return " ".join(text.split())


def _prose(docstring: str) -> list[str]:
    """The paragraphs that are words: no code, tables or doctests."""
    docstring = re.sub(r"```.*?(```|\Z)|<Tip.*?>|</Tip>", "", docstring, flags=re.DOTALL)
    paragraphs: list[str] = []
    above: int | None = None  # skip what is indented deeper than this: the inside of a block
    hidden = False  # inside a section such as Examples
    for block in re.split(r"\n\s*\n", docstring.expandtabs()):
        kept: list[str] = []
        for line in block.splitlines():
            text = line.strip()
            depth = len(line) - len(line.lstrip())
            if above is not None and text and depth > above:
                continue
            above = None
            if text.startswith((">>>", "$ ", "#")):
                break
            if (heading := HEADING.fullmatch(text)) and heading[1].lower() in TOLD | NOT_TOLD:
                hidden = heading[1].lower() in NOT_TOLD
                continue
            if hidden or not text:
                continue
            if text.startswith(".. "):
                above = depth
                continue
            if text.startswith("|") or not re.search(r"\w", text):  # tables, underlines
                continue
            if text.endswith("::"):
                above = depth
            text = re.sub(r"^:(?:param|returns?|raises?|keyword|arg)\s*([\w ]*):", r"\1:", text)
            text = re.sub(r"^(\w+) ?(?:\(.*?\) ?:| : .*$)", r"\1: ", text)  # an argument without its type
            kept.append(text.removesuffix("::"))
        if paragraph := _clean(" ".join(kept)):
            paragraphs.append(paragraph)
    return paragraphs


def _without(name: str, text: str) -> str:
    """``text`` without an identifier: a plain lower-case word may stand there for itself, and stays."""
    if name not in text or re.fullmatch(r"[a-z]+", name):
        return text
    return " ".join(re.sub(rf"\b(?:\w+\.)*{re.escape(name)}\b(?:\(\))?", "", text).split())


def pair_of(name: str, docstring: str) -> tuple[str, str] | None:
    """Summary and body of one docstring; None where they are not words enough to be searched.

    >>> body = "the name of the city in which the meeting takes place, as it is written in the invitation."
    >>> pair_of("place_of", f"Say where people meet. It is {body}")[0]
    'Say where people meet.'
    """
    summary, *body = _prose(inspect.cleandoc(docstring)) or [""]
    if (first := re.match(r"(.{15,}?[a-z)]\.) (?=[A-Z])(.*)", summary)) is not None:
        summary, body = first[1], [first[2], *body]
    summary, text = _without(name, summary), _without(name, " ".join(body))
    words = text.split()
    if not 4 <= len(summary.split()) <= 40 or not re.match(r"[A-Z][\w'-]* ", summary):
        return None
    if len(words) < 15 or len(_plain(text)) < 0.6 * len(words):
        return None
    return summary, text


def _plain(text: str) -> list[str]:
    """The words that are no names: what is left of copies that differ in names only is the same."""
    words = (word.strip(".,;:()\"'!?") for word in text.split())
    return [word.lower() for word in words if word.isalpha() and word[1:].islower()]


def _read_package(package: str) -> pa.Table:
    """All pairs of one installed package, with the files they stand in: parsed once, then cached."""
    folder = _folder(package)
    if folder is None:
        raise DataError(
            f"Documentation: the package '{package}' is not installed here; leave it out of packages."
        )
    path = cache_folder() / "documentation" / f"{package}-{_version(package)}-{RULES}.parquet"
    if path.exists():
        try:
            return pq.read_table(path)
        except (pa.ArrowException, OSError):
            logger.warning("%s: the cache file is damaged and is made again.", path)
    pairs = [
        (f"{package}/{file}", *pair, " ".join(_plain(pair[0])), " ".join(_plain(pair[1])[:20]))
        for file, name, docstring in _docstrings(folder)
        if (pair := pair_of(name, docstring))
    ]
    columns = zip(*pairs, strict=True) if pairs else [[]] * len(COLUMNS)
    table = pa.table({name: pa.array(c, pa.string()) for name, c in zip(COLUMNS, columns, strict=True)})
    with replacing(path) as temporary:
        pq.write_table(table, temporary)
    return table


def _folder(package: str) -> Path | None:
    if package == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _version(package: str) -> str:
    if package == "python":
        return platform.python_version()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # distributed under another name
        return metadata.version(metadata.packages_distributions()[package][0])


def _docstrings(folder: Path) -> Iterator[tuple[str, str, str]]:
    """File, name and docstring of every class and function below ``folder``; nothing is imported."""
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if SKIPPED & {*relative.parts}:
            continue
        if "models" in relative.parts and path.name.startswith(("modeling_", "modular_")):
            continue  # long files, and mostly copies of each other
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in others' sources
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):  # templates, and what is meant for other versions
                continue
        for node in _definitions(tree.body):
            docstring = ast.get_docstring(node, clean=False) or ""
            if len(docstring.split()) > 18:  # else too short for a pair
                yield relative.as_posix(), node.name, docstring


def _definitions(
    statements: list[ast.stmt],
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.If | ast.Try):
            yield from _definitions(statement.body)


class Documentation(TextData):
    """Find what a docstring goes on to say from its first sentence, in the packages installed here.

    Real text that needs no download. The query is a docstring's first sentence, its positive the rest.
    The name of what is described is taken out of both, and copies that differ in names only count as
    one. A file's docstrings are all in one split (80% train, 5% dev, 15% test); a split is searched
    over its own candidates.

    Args:
        packages: Import names; "python" is the standard library. None: those of ``PACKAGES`` that are
            installed.
        limit: At most so many train pairs, chosen by ``seed``.
        seed: Of ``limit`` alone; the splits do not depend on it.
    """

    def __init__(self, packages: Sequence[str] | None = None, limit: int | None = None, seed: int = 0):
        super().__init__(("train", "dev", "test"))
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}.")
        self.packages = tuple(packages or (name for name in PACKAGES if _folder(name) is not None))
        self.limit, self.seed = limit, seed

    @cached_property
    def _pairs(self) -> dict[str, list[tuple[str, str, str]]]:
        """(id, query, text) by split."""
        pairs: dict[str, list[tuple[str, str, str]]] = {name: [] for name in self.splits}
        seen: set[tuple[str, str]] = set()
        for package in self.packages:
            columns = _read_package(package).to_pydict()
            rows = zip(*(columns[name] for name in COLUMNS), strict=True)
            for row, (file, query, text, query_key, text_key) in enumerate(rows):
                keys = {("query", query_key), ("text", text_key)}
                if seen.isdisjoint(keys):
                    share = unit_hash(file)
                    split = "train" if share < 0.8 else "dev" if share < 0.85 else "test"
                    pairs[split].append((f"{package}/{row}", query, text))
                    seen |= keys
        return pairs

    def read(self, name: str) -> Judged:
        pairs = self._pairs[name]
        if not pairs:
            raise DataError(
                f"Documentation: of {', '.join(self.packages)} no docstring falls to {name}; name more "
                f"packages."
            )
        if name == "train" and self.limit is not None and self.limit < len(pairs):
            pairs = sorted(random.Random(self.seed).sample(pairs, self.limit))
        ids, queries, texts = (list(column) for column in zip(*pairs, strict=True))
        n = len(pairs)
        return Judged(
            task="retrieval",
            queries=TextTable(ids, queries),
            candidates=TextTable(ids, texts),
            listed=Ragged(torch.arange(n), torch.arange(n + 1)),
            labels=torch.ones(n),
            name=f"Documentation {name}",
        )
