"""A little shop: users with histories, items, and what happened between them; also as a source of batches."""

from __future__ import annotations

import polars as pl
import torch

from distill.batch import Batch, Ragged
from distill.data.features import Features
from distill.data.judged import Judged
from distill.data.source import JudgedSource

SCHEMA = [
    {"name": "user_id", "kind": "categorical", "side": "user"},
    {"name": "country", "kind": "categorical", "side": "user"},
    {"name": "age", "kind": "dense", "side": "user", "transform": "standard"},
    {"name": "income", "kind": "dense", "side": "user", "buckets": 4},
    {"name": "history", "kind": "sequence", "side": "user", "vocabulary": "item_id"},
    {"name": "loyalty", "kind": "categorical", "side": "user", "privileged": True},
    {"name": "item_id", "kind": "categorical", "side": "item"},
    {"name": "genres", "kind": "sequence", "side": "item", "separator": "|"},
    {"name": "price", "kind": "dense", "side": "item", "transform": "log"},
    {"name": "returns", "kind": "dense", "side": "item", "privileged": True},
    {"name": "hour", "kind": "categorical", "side": "context"},
    {"name": "dwell", "kind": "dense", "side": "context", "privileged": True},
    {"name": "source", "kind": "categorical", "side": "context", "privileged": True},
]
USERS, ITEMS = 24, 15


def users(n=USERS):
    return [
        {
            "user_id": f"u{i}",
            "country": ["fr", "de", "jp"][i % 3],
            "age": 18.0 + i,
            "income": float(i % 7),
            "history": [f"i{j}" for j in range(i % 5)],
            "loyalty": f"l{i % 2}",
        }
        for i in range(n)
    ]


def items(n=ITEMS):
    return [
        {
            "item_id": f"i{i}",
            "genres": "|".join(["old", "new", "loud"][: i % 4]),
            "price": 1.0 + i,
            "returns": i / 10,
        }
        for i in range(n)
    ]


def public(rows):
    """Rows without what only training knows."""
    return [{k: v for k, v in row.items() if k not in ("loyalty", "returns")} for row in rows]


def fitted(user_buckets=None):
    """The features of the shop; with ``user_buckets`` the user's id is a hash."""
    pairs = [{"hour": f"h{i % 3}", "dwell": i / 20, "source": f"s{i % 2}"} for i in range(20)]
    schema = [{**SCHEMA[0], **({"hash_buckets": user_buckets} if user_buckets else {})}, *SCHEMA[1:]]
    return Features(schema).fit(
        user=pl.DataFrame(users()).drop("history"), item=pl.DataFrame(items()), context=pl.DataFrame(pairs)
    )


def judged(features, listed=4, seed=0):
    """Each user lists ``listed`` items; a label follows from user and item, and dwell from the label."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(ITEMS, generator=draw)[:listed] for _ in range(USERS)])
    labels = ((rows + torch.arange(USERS)[:, None]) % 3 == 0).float()
    labels[:, 0], labels[:, 1] = 1.0, 0.0
    n = rows.numel()
    sides = ("user", "item")
    tables = [
        features.encode(table, features.side(side, privileged=True), ids=[str(i) for i in range(len(table))])
        for table, side in zip((users(), items()), sides, strict=True)
    ]
    pair = {
        "hour": torch.randint(2, 5, (n,), generator=draw),
        "dwell": labels.flatten() * 2 + torch.rand(n, generator=draw),
        "source": torch.randint(2, 4, (n,), generator=draw),
    }
    return Judged(
        "pairs",
        *tables,
        Ragged.of_lengths(rows.flatten(), torch.full((USERS,), listed)),
        labels.flatten(),
        name="shop:train",
        pair=pair,
        groups=torch.arange(USERS) // 2,
    )


class Shop(JudgedSource):
    """Batches of a judged split with all columns, of listed pairs too."""

    def _filled(self, queries, candidates, index, mask, **others):
        pair = {}
        if index.numel():
            listed = self.judged.listed
            for name, column in self.judged.pair.items():
                pair[name] = torch.zeros(index.shape, dtype=column.dtype)
                for b, n in mask.nonzero().tolist():
                    row = listed[int(queries[b])].tolist()
                    item = int(candidates[index[b, n]])
                    if item in row:
                        pair[name][b, n] = column[listed.offsets[queries[b]] + row.index(item)]
        else:
            pair = {name: torch.zeros(index.shape, dtype=c.dtype) for name, c in self.judged.pair.items()}
        return Batch(
            index,
            mask,
            queries,
            candidates,
            queries=dict(self.queries.take(queries).columns),
            candidates=dict(self.candidates.take(candidates).columns),
            pair=pair,
            source=self.name,
            **others,
        )


def shop(features, batch_size=8, **arguments):
    return Shop(judged(features), batch_size, candidates=4, name="shop", **arguments)
