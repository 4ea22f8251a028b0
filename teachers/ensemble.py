"""Several teachers as one: their scores put together by a rule. Next: ``concatenation.py``, their vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.batch import Batch, Columns, Ragged
from distill.data.feature_schema import Feature
from distill.data.features import UNKNOWN, Features
from distill.measure import can_be_measured
from distill.model import Model
from distill.objectives.checks import check_choice, check_positive, check_shapes, labels_of, unpadded
from distill.objectives.sampled_softmax import sampled_softmax
from distill.outputs import Needs, Outputs
from teachers.parts import check_parts, open_parts, read_parts, score_texts, write_parts

Combine = Literal["scores", "standardized", "probabilities"]


def standardized(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores [B, N], of each row less its mean and over its deviation; 0 where a row is all equal."""
    scores, n = unpadded(scores, mask), mask.sum(dim=-1, keepdim=True).clamp(min=1)
    for _ in range(2):  # the mean is rounded: what is left of it would pass for a deviation
        scores = (scores - scores.sum(dim=-1, keepdim=True) / n).masked_fill(~mask, 0.0)
    variance = scores.square().sum(dim=-1, keepdim=True) / n
    return torch.where(variance > 1e-12, scores / variance.clamp(min=1e-12).sqrt(), 0.0)


def combined(scores: Sequence[Tensor], mask: Tensor, weights: Tensor, combine: Combine) -> Tensor:
    """One score for those [B, N] of each of M teachers, which weigh ``weights`` [M, B], of sum 1: [B, N]."""
    check_shapes(mask=mask, **{f"teacher_{m}": said for m, said in enumerate(scores)})
    weights = weights[..., None]
    if combine == "probabilities":
        limits = torch.finfo(torch.float32)
        shares = [said.float().masked_fill(~mask, limits.min).softmax(dim=-1) for said in scores]
        return (torch.stack(shares) * weights).sum(dim=0).clamp(min=limits.tiny).log()
    rescale = standardized if combine == "standardized" else unpadded
    rescaled = [rescale(said, mask) for said in scores]
    return (torch.stack(rescaled) * weights).sum(dim=0)


def confidence(scores: Sequence[Tensor], mask: Tensor, positive: Tensor, kappa: float) -> Tensor:
    """How much each of M teachers is to be heard on each query, by its own loss on the labels: [M, B].

    Scores [B, N] each; ``positive`` [B, N]. Queries without a positive or a negative hear all alike.
    """
    losses = [sampled_softmax(said, mask & positive, mask & ~positive) for said in scores]
    return (-torch.stack(losses) / kappa).softmax(dim=0)


class Ensemble(Model):
    r"""Several teachers as one: each query's scores of all of them, put together.

    .. math:: t_{bn} = \sum_m w_{bm} t^m_{bn}/\tau_m, \qquad
              t_{bn} = \sum_m w_{bm} z(t^m_b/\tau_m)_n \qquad\text{or}\qquad
              t_{bn} = \log \sum_m w_{bm} \sigma(t^m_b/\tau_m)_n

    with the scores :math:`t^m_b` of teacher m on the list of query b, z the list less its mean and over its
    deviation (0 where all are equal), :math:`\sigma` the softmax over the list, and weights w of sum 1. The
    logarithm of a mean of probabilities gives just these back to ``ScoreKL`` at a teacher temperature of 1.

    The parts are asked as if they stood alone, frozen ones once, out of the teacher store. With learned
    weights a recipe trains it (``train: true``) on labels that its teachers have not seen: on those they
    have, it would follow the one that remembers best. One number a teacher is learnt, the same for all
    queries. Learned and confidence weights are our re-implementation; no paper gives their details.

    Provides ``scores`` [B, N], and ``in_batch`` [B, P] where all parts do.

    Args:
        of: The teachers.
        combine: ``scores``: their mean as they are, for teachers of one scale. ``standardized``: the mean of
            standardised lists. ``probabilities``: the mean of softmaxes. None: ``standardized``.
        weights: ``equal``; a number for each teacher; ``learned``; or ``confidence``:
            :math:`w_b = \sigma(-\mathrm{CE}_b / \kappa)` over the teachers, with the loss of each on the
            query's labels, so it can neither teach without labels nor be measured. None: ``equal``.
        temperatures: :math:`\tau_m` of single teachers, as 0.05 for cosines beside logits; else 1.
        kappa: Of confidence: the lower, the more the most confident teacher is heard alone.
        routes: Which teachers are heard, by data set (or by value of ``column``); others hear all. Where an
            empty list says that none is, no arrow from here says anything. None: all everywhere.
        column: A user's feature whose value chooses the route, instead of the data set.
        features: What the column belongs to: ``{data: NAME}``.
        checkpoint: A saved ensemble of these teachers, which says how it combines; its weights are a start
            for learned ones.

    References:
        Hofstätter et al., 2020. Improving Efficient Neural Ranking Models with Cross-Architecture
        Knowledge Distillation (mean of scores). arXiv:2010.02666
    """

    def __init__(
        self,
        of: Mapping[str, Model],
        combine: Combine | None = None,
        weights: Literal["equal", "learned", "confidence"] | Mapping[str, float] | None = None,
        temperatures: Mapping[str, float] | None = None,
        kappa: float | None = None,
        routes: Mapping[Any, Sequence[str]] | None = None,
        column: str | None = None,
        features: Features | None = None,
        checkpoint: str | Path | None = None,
    ):
        super().__init__()
        self.parts = check_parts(of, "scores")  # a plain mapping: they stay nodes of their own
        if silent := [name for name, part in self.parts.items() if getattr(part, "silent", False)]:
            raise ValueError(f"of: '{silent[0]}' is an ensemble that says nothing somewhere; give its parts.")
        self.of = tuple(self.parts)
        saved: dict[str, Tensor] = {}
        if checkpoint is not None:
            given = {"combine": combine, "weights": weights, "temperatures": temperatures, "kappa": kappa}
            if there := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"the checkpoint says how it combines: leave out {', '.join(there)}.")
            settings, saved = read_parts(checkpoint, "Ensemble", list(self.of))
            if settings.get("routed") and routes is None:
                raise ValueError(
                    f"checkpoint {checkpoint} was saved from a recipe with routes: use it in a recipe, with "
                    f"these, so that it hears whom it heard there."
                )
            combine, weights, kappa = settings["combine"], settings["weights"], settings["kappa"]
        self.combine: Combine = combine or "standardized"
        self.weights = "given" if isinstance(weights, Mapping) else weights or "equal"
        self.kappa = 1.0 if kappa is None else kappa
        check_choice("combine", self.combine, ("scores", "standardized", "probabilities"))
        check_choice("weights", self.weights, ("equal", "learned", "confidence", "given"))
        check_positive(kappa=self.kappa)
        self.labelled = self.weights == "confidence"
        if not self.labelled and kappa is not None and not saved:
            raise ValueError("kappa does nothing without `weights: confidence`.")
        if not self.labelled and temperatures and self.combine == "standardized":
            raise ValueError("temperatures do nothing to standardised lists: leave them out.")
        logits = torch.tensor(self._each("weights", weights if isinstance(weights, Mapping) else {})).log()
        taus = torch.tensor(self._each("temperatures", temperatures or {}))
        self.temperatures: Tensor
        self.logits: Tensor  # of the weights
        self.register_buffer("temperatures", saved.get("temperatures", taus))
        logits = saved.get("logits", logits)
        if self.weights == "learned":
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)
        self._route(routes, column, features)
        alone = all(can_be_measured(part) for part in self.parts.values())
        self.measurable = alone and not self.labelled and routes is None
        self.eval()

    def _each(self, what: str, given: Mapping[str, float]) -> list[float]:
        """A positive number of each part; 1 where none is given."""
        if strangers := set(given) - set(self.of):
            raise ValueError(f"{what}: '{min(strangers)}' is not in `of`, which names {', '.join(self.of)}.")
        if what == "weights" and given and len(given) < len(self.of):
            raise ValueError(f"weights: give one to each of {', '.join(self.of)}.")
        check_positive(**{f"{what}.{name}": value for name, value in given.items()})
        return [float(given.get(name, 1.0)) for name in self.of]

    def _route(
        self, routes: Mapping[Any, Sequence[str]] | None, column: str | None, features: Features | None
    ) -> None:
        """Keep by which value who is heard."""
        if (column is None) != (features is None) or (column is not None and routes is None):
            raise ValueError(
                "a column needs `features: {data: NAME}`, where it is, and `routes` by its values."
            )
        for value, names in (routes or {}).items():
            if strangers := set(names) - set(self.of):
                raise ValueError(
                    f"routes.{value}: '{min(strangers)}' is not in `of`, which names {', '.join(self.of)}."
                )
        self.routes = {value: set(names) for value, names in (routes or {}).items()}
        self.column: Any = None
        self.silent = not all(self.routes.values())  # somewhere nobody is heard
        self.by_data = () if column is not None else tuple(self.routes)
        if column is not None and features is not None:
            self.column, ids = _ids(features, column, list(self.routes))
            self.routes = dict(zip(ids, self.routes.values(), strict=True))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Ensemble:
        """A saved ensemble with the teachers that its folder refers to."""
        return cls(open_parts(folder), checkpoint=folder)

    @property
    def provides(self) -> frozenset[str]:
        shared = frozenset.intersection(*(part.provides for part in self.parts.values()))
        return shared & ({"scores"} if self.silent else {"scores", "in_batch"})

    @property
    def reads(self) -> Columns:
        return Columns(() if self.column is None else (self.column,))

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def of_needs(self, needs: Needs) -> Needs:
        return Needs(*needs.fields, *(("scores",) if self.labelled else ()))

    def represent(self, batch: Batch, needs: Needs) -> Outputs:
        raise NotImplementedError("an Ensemble hears its parts: it is asked by represent_of.")

    def represent_of(self, heard: Mapping[str, Outputs], batch: Batch, needs: Needs) -> Outputs:
        weights, known = self._weights(heard, batch), self.knows(batch)
        answer = Outputs(known=known)
        for field in sorted(needs.fields):
            said = [getattr(heard[name], field) for name in self.of]
            mask = batch.mask if field == "scores" else torch.ones_like(said[0], dtype=torch.bool)
            answer = answer.with_(**{field: self._together(said, mask, weights)})
        return answer

    def _together(self, said: Sequence[Tensor], mask: Tensor, weights: Tensor) -> Tensor:
        cooled = [scores.float() / tau for scores, tau in zip(said, self.temperatures, strict=True)]
        return combined(cooled, mask, weights, self.combine)

    def _weights(self, heard: Mapping[str, Outputs], batch: Batch) -> Tensor:
        """What each teacher weighs on each query: [M, B], of sum 1, or 0 where nobody is heard."""
        queries = len(batch.query_ids)
        weights = self.logits.float().softmax(dim=0)[:, None].expand(-1, queries)
        if self.labelled:
            said = [heard[name].scores / tau for name, tau in zip(self.of, self.temperatures, strict=True)]
            weights = confidence(said, batch.mask, labels_of(batch) > 0, self.kappa)
        if (chosen := self._chosen(batch)) is None:
            return weights
        weights = weights * chosen
        return weights / weights.sum(dim=0).clamp(min=torch.finfo(weights.dtype).tiny)

    def _chosen(self, batch: Batch) -> Tensor | None:
        """Which teachers are heard on which query: [M, B] bool; None: all on all."""
        if not self.routes:
            return None
        chosen = torch.ones(len(self.of), len(batch.query_ids), dtype=torch.bool, device=batch.mask.device)
        for value, names in self.routes.items():
            here = torch.tensor([[name in names] for name in self.of], device=chosen.device)
            if self.column is None:
                chosen = here.expand_as(chosen) if value == batch.source else chosen
            else:
                chosen = torch.where(batch.queries[self.column.key] == value, here, chosen)
        return chosen

    def knows(self, batch: Batch) -> Tensor | None:
        chosen = self._chosen(batch)
        return None if chosen is None else chosen.any(dim=0)[:, None].expand_as(batch.mask)

    def combined(self, said: Mapping[str, Tensor], query: Tensor) -> Tensor:
        """Scores [T] of T pairs, from those of each part; pairs with one ``query`` [T] are one list."""
        order = query.argsort(stable=True)
        lengths = query[order].unique_consecutive(return_counts=True)[1]
        weights = self.logits.detach().float().softmax(dim=0).cpu()[:, None].expand(-1, len(lengths))
        lists = [Ragged.of_lengths(said[name].float()[order], lengths).padded(0.0) for name in self.of]
        mask = lists[0][1]
        taus = self.temperatures.cpu()
        cooled = [scores / tau for (scores, _), tau in zip(lists, taus, strict=True)]
        scores = combined(cooled, mask, weights, self.combine)[mask]
        return torch.empty_like(scores).index_copy_(0, order, scores)

    def score_pairs(
        self, queries: Sequence[str], candidates: Sequence[str], progress: bool = False
    ) -> Tensor:
        """Scores [n] float32 on the CPU, of n raw pairs; those with one query are its list."""
        texts = list(queries), list(candidates)
        said = {name: score_texts(part, *texts, progress) for name, part in self.parts.items()}
        first = {text: row for row, text in reversed(list(enumerate(texts[0])))}
        return self.combined(said, torch.tensor([first[text] for text in texts[0]], dtype=torch.int64))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights and rule; the teachers stay where they are, and the folder refers to them."""
        rule = {"combine": self.combine, "weights": self.weights, "kappa": self.kappa}
        rule["routed"] = bool(self.routes)
        write_parts(folder, "Ensemble", self.parts, rule, self.state_dict())


def _ids(features: Features, column: str, values: Sequence[Any]) -> tuple[Feature, list[int]]:
    """A user's categorical feature, and the ids of these values of it."""
    if column not in features or features[column].kind != "categorical" or features[column].side != "user":
        there = [f.name for f in features.side("user", privileged=True) if f.kind == "categorical"]
        raise ValueError(
            f"column: '{column}' is no categorical feature of users, of which there are: {', '.join(there)}."
        )
    feature = features[column]
    rows = [{feature.source: value} for value in values]
    found = features.encode(rows, [feature], where="routes").columns[column]
    assert isinstance(found, Tensor)
    for value, one in zip(values, found.tolist(), strict=True):
        if one == UNKNOWN:
            raise ValueError(f"routes.{value}: no user of train has this value of '{column}'.")
    if len(found.unique()) < len(values):
        raise ValueError(
            f"routes: two values of '{column}' have one id, it is hashed; choose another column."
        )
    return feature, found.tolist()
