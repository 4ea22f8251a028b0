"""What mining finds, and keeps on disk; what is too close to a positive. Next: ``neighbours.py``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
import xxhash
from torch import Tensor, nn

from distill.batch import Ragged
from distill.data.cache import content_hash, replacing
from distill.data.judged import Judged, TextTable

# the formulas


def highest_allowed(positive: Tensor, margin: float | None, relative_margin: float | None) -> Tensor:
    r"""The highest score that a negative may have, by its query's positive: [n] of scores [n].

    .. math:: s^- \le \min(s^+ - m,\; s^+ - r |s^+|)

    the absolute margin m (TopK-MarginPos) and the relative one r (TopK-PercPos: of a positive score it
    leaves the share 1 - r). The bars keep the limit below a positive whose score is negative. Without a
    positive (nan) there is no limit.

    References:
        Moreira et al., 2024. NV-Retriever: Improving text embedding models with effective hard-negative
        mining. arXiv:2407.15831

    Example:
        >>> highest_allowed(torch.tensor([0.8, -2.0]), None, 0.05)
        tensor([ 0.7600, -2.1000])
    """
    limit = torch.full_like(positive, math.inf)
    if margin is not None:
        limit = torch.minimum(limit, positive - margin)
    if relative_margin is not None:
        limit = torch.minimum(limit, positive - relative_margin * positive.abs())
    return limit.nan_to_num(nan=math.inf, posinf=math.inf)


@dataclass(frozen=True)
class Limits:
    """What a negative's score must keep to; the fields are arguments of ``HardNegatives``."""

    margin: float | None = None
    relative_margin: float | None = None
    keep_below: float | None = None

    def __post_init__(self) -> None:
        if self.margin is not None and not 0 <= self.margin < math.inf:
            raise ValueError(f"margin must be 0 or more, and finite, got {self.margin}.")
        if self.relative_margin is not None and not 0 <= self.relative_margin < 1:
            raise ValueError(f"relative_margin must be at least 0 and below 1, got {self.relative_margin}.")
        if self.keep_below is not None and not math.isfinite(self.keep_below):
            raise ValueError(f"keep_below must be finite, got {self.keep_below}.")

    @property
    def given(self) -> dict[str, float]:
        """Those that are set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def broken(self, scores: Tensor, positive: Tensor) -> Tensor:
        """Which scores [n, N] are too high for a negative, by the positives' [n]."""
        high = scores > highest_allowed(positive, self.margin, self.relative_margin)[:, None]
        return high if self.keep_below is None else high | (scores >= self.keep_below)


def turns(scores: Tensor, mask: Tensor, strata: int, generator: torch.Generator) -> Tensor:
    """In which order the candidates of each row are drawn, the lowest first, so that all strata take turns.

    The range from the lowest to the highest score of a row is cut into ``strata`` of equal width; one
    candidate of each is drawn, then a second of each, and so on. A stratum without candidates is passed over.

    Args:
        scores: [B, N]; ``mask`` says which are real.

    References:
        Jang et al., 2026. Beyond Hard Negatives: The Importance of Score Distribution in Knowledge
        Distillation for Dense Retrieval. arXiv:2604.04734
    """
    low = scores.masked_fill(~mask, math.inf).amin(dim=1, keepdim=True)
    high = scores.masked_fill(~mask, -math.inf).amax(dim=1, keepdim=True)
    place = (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny) * strata
    stratum = place.masked_fill(~mask, 0.0).long().clamp(0, strata - 1)  # [B, N]
    lots = torch.rand(scores.shape, generator=generator)
    before = (lots[:, None] < lots[:, :, None]) & (stratum[:, None] == stratum[:, :, None]) & mask[:, None]
    first = torch.rand(len(scores), strata, generator=generator)  # which stratum begins
    return before.sum(dim=2) + first.gather(1, stratum)


# what was found


@dataclass(frozen=True)
class Mined:
    """For n queries the candidates that may be their negatives, best first."""

    queries: Tensor  # [n] int64 rows of queries, ascending, one for each text
    rows: Ragged  # rows of candidates, int32
    ranks: Tensor  # [T] int32 of each, from 1; positives are not counted
    scores: Tensor  # [T] float32 by who judged them; nan where nobody did
    positive: (
        Tensor  # [n] float32, the lowest score of a query's positives; nan: it has none, or nobody judged
    )
    removed: Tensor  # [n] int32, how many candidates were taken out for their score

    @classmethod
    def join(cls, parts: Sequence[Mined]) -> Mined:
        names = ("queries", "ranks", "scores", "positive", "removed")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(rows=Ragged.stack([part.rows for part in parts]), **joined)

    def figures(self) -> dict[str, float]:
        """What a reader wants to know of it, by name; what nobody judged is left out."""
        found = {
            "per query": len(self.ranks) / max(1, len(self.queries)),
            "rank": self.ranks.double().mean().item(),
            "score": self.scores.double().mean().item(),
            "positive score": self.positive.double().nanmean().item(),
            "too close": float(self.removed.sum()),
            "queries without": float((self.rows.lengths == 0).sum()),
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def save(self, path: Path, key: str, state: str, in_cache: bool = True) -> None:
        """Write an Arrow file, by rename, that says what it was made of: see ``load``."""
        offsets = pa.array(self.rows.offsets.numpy())
        columns = {
            name: pa.LargeListArray.from_arrays(offsets, pa.array(values.numpy()))
            for name, values in (("row", self.rows.values), ("rank", self.ranks), ("score", self.scores))
        }
        columns = {"query": pa.array(self.queries.numpy()), **columns}
        columns |= {"positive": pa.array(self.positive.numpy()), "removed": pa.array(self.removed.numpy())}
        table = pa.table(columns)
        about = {"key": key, "state": state, "checksum": self._checksum()}
        table = table.replace_schema_metadata({"mined": json.dumps(about)})
        with replacing(path, in_cache) as temporary, pa.ipc.new_file(temporary, table.schema) as file:
            file.write_table(table)

    @classmethod
    def load(cls, path: Path, key: str, state: str | None = None) -> Mined | None:
        """What a file holds; None where there is none, or it was made of something else.

        Args:
            key: Of the settings and the texts.
            state: Of the models' weights; None: those of any moment will do.

        Raises:
            ValueError: The file is damaged.
        """
        if not path.exists():
            return None
        try:
            with pa.ipc.open_file(pa.BufferReader(path.read_bytes())) as file:
                table = file.read_all().combine_chunks()
            about = json.loads(table.schema.metadata[b"mined"])
            column = {name: table[name].combine_chunks() for name in table.column_names}
            lists = {name: column[name].values.to_numpy() for name in ("row", "rank", "score")}
            plain = {name: column[name].to_numpy() for name in ("query", "positive", "removed")}
            offsets = column["row"].offsets.to_numpy()
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error})") from error
        if about["key"] != key or state not in (None, about["state"]):
            return None
        values = {name: torch.from_numpy(array.copy()) for name, array in (lists | plain).items()}
        rows = Ragged(values["row"], torch.from_numpy(offsets.copy()))
        mined = cls(values["query"], rows, *(values[n] for n in ("rank", "score", "positive", "removed")))
        if mined._checksum() != about["checksum"]:
            raise ValueError(f"{path} is damaged (its checksum does not match)")
        return mined

    def _checksum(self) -> str:
        state = xxhash.xxh3_64()
        parts = (self.queries, self.rows.values, self.rows.offsets, self.ranks, self.scores, self.positive)
        for tensor in (*parts, self.removed):
            state.update(tensor.contiguous().numpy().tobytes())
        return state.hexdigest()


# of what it was made


def judged_hash(judged: Judged) -> str:
    """A hash of all content, and of which are positives."""
    positives = xxhash.xxh3_128()
    for tensor in (judged.taken.values, judged.taken.offsets, judged.who):
        positives.update(tensor.numpy().tobytes())
    rows = (
        xxhash.xxh3_128_hexdigest(table.keys().tobytes()) for table in (judged.queries, judged.candidates)
    )
    return content_hash([*rows, positives.hexdigest()])


def own_texts(judged: Judged) -> Tensor:
    """For each query the first candidate with the query's own text, -1 where there is none: [queries]."""
    if not (isinstance(judged.queries, TextTable) and isinstance(judged.candidates, TextTable)):
        return torch.full((len(judged.queries),), -1)
    asked, rows = set(judged.queries.texts), enumerate(judged.candidates.texts)
    first: dict[str, int] = {}
    for row, text in rows:
        if text in asked:
            first.setdefault(text, row)
    return torch.tensor([first.get(text, -1) for text in judged.queries.texts], dtype=torch.int64)


def fingerprint(model: nn.Module) -> str:
    """A hash of all that decides what a model says: classes, plain settings, columns it reads, weights."""
    columns = [column for side in getattr(model, "reads", ()) for column in side]
    told = [f"{column.key} {getattr(column, 'fingerprint', '')}" for column in columns]
    for name, module in model.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and not key.startswith("_") and key != "training"
        }
        told.append(f"{name} {type(module).__qualname__} {json.dumps(plain, sort_keys=True)}")
    weights = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        told.append(f"{name} {tensor.dtype} {[*tensor.shape]}")
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return content_hash([*told, weights.hexdigest()])
