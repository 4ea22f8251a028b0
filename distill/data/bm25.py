"""BM25 over texts, asked once: what ``hard_negatives.py`` searches by words."""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from distill.data.cache import content_hash, replacing
from distill.paths import cache_folder

# Chinese and Japanese characters one by one, else words of two letters or more
WORDS = r"(?u)[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]{2,}"


def best_by_words(texts: list[str], queries: list[str], k: int) -> Tensor:
    """For each query the k best texts by BM25, best first: [queries, k] int32, -1 where no word is shared."""
    import bm25s

    settings = json.dumps([bm25s.__version__, WORDS, k, len(texts)])
    path = cache_folder() / "bm25" / f"{content_hash([settings, *texts, *queries])}.npy"
    if path.exists():
        try:
            return torch.from_numpy(np.load(path))
        except (ValueError, OSError, EOFError):  # a damaged file is made again
            path.unlink()
    quiet = {"show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, token_pattern=WORDS, **quiet), **quiet)
    words = bm25s.tokenize(queries, token_pattern=WORDS, return_ids=False, **quiet)
    rows, scores = index.retrieve(words, k=k, **quiet)
    found = np.where(scores > 0, rows, -1).astype(np.int32)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, found)
    return torch.from_numpy(found)
