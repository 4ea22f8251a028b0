"""One optimiser step of several little graphs, in this process or in each of several: run as a module."""

import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from distill import processes
from distill.batch import Columns, Ragged
from distill.data import Judged, RandomNegatives, TextSource, TextTable
from distill.graph import Arrow, DistillationGraph
from distill.maxsim import maxsim_all
from distill.model import Model
from distill.objectives import (
    AttentionKL,
    BinaryCrossEntropy,
    EmbeddingMatch,
    MarginMSE,
    PointwiseScore,
    SampledSoftmax,
    ScoreKL,
)
from distill.outputs import Needs, Outputs
from distill.tokens import Tokens
from students import TwoTower
from teachers import PrivilegedRanker
from tests.distill.training import Bag, Words, judged, stopping, trainer
from tests.shop import fitted, shop


class Cross(Model):
    """Scores each listed pair by a bag of both texts' words, and says nothing else."""

    reads = Columns((Words(),), (Words(),))
    provides = frozenset({"scores"})

    def __init__(self, dropout=0.0):
        super().__init__()
        self.bag, self.head = Bag(3, dropout), nn.Linear(6, 1)

    def represent(self, batch, needs):
        rows, places = batch.mask.nonzero(as_tuple=True)
        queries = batch.queries["words"].select(rows)
        candidates = batch.candidates["words"].select(batch.index[rows, places])
        said = self.head(self.bag.vectors(Ragged.join([queries, candidates])).tanh())[:, 0]
        scores = said.new_zeros(batch.mask.shape)
        scores[rows, places] = said
        return Outputs(scores=scores)

    def save_pretrained(self, folder):
        raise NotImplementedError


class Head(Model):
    """Built from the student: its scores through one learned matrix."""

    reads = Columns()
    provides = frozenset({"scores"})
    of = ("student",)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def of_needs(self, needs):
        return Needs("queries", "candidates")

    def represent_of(self, heard, batch, needs):
        said = heard["student"]
        return Outputs(scores=(said.candidates[batch.index] * self.linear(said.queries)[:, None]).sum(-1))

    def represent(self, batch, needs):
        raise AssertionError("it hears the student")

    def save_pretrained(self, folder):
        raise NotImplementedError


class Scaled(Bag):
    """A Bag whose comparison has a parameter of its own, and whose represent says only what it is asked."""

    def __init__(self, seed, dropout=0.0):
        super().__init__(seed, dropout)
        self.factor = nn.Parameter(torch.tensor(1.5))

    def represent(self, batch, needs):
        said = super().represent(batch, needs)
        wanted = self.represents(needs).fields
        return Outputs(**{name: value for name, value in said.given() if name in wanted})

    def compare(self, outputs, batch, needs):
        said = super().compare(outputs, batch, needs)
        return said.with_(scores=said.scores * self.factor, in_batch=said.in_batch * self.factor)


def said_of(ids, *places, layers=(), values):
    """Tokens of rows of ids."""
    return Tokens(values, ids.offsets, torch.stack(places, dim=1), layers)


def places_of(ids):
    return torch.arange(len(ids.values)) - ids.offsets[:-1].repeat_interleave(ids.lengths)


class Late(Bag):
    """A vector for each word, compared by MaxSim, and attention of one layer of two heads."""

    provides = frozenset({"in_batch", "query_tokens", "candidate_tokens"}) | {
        "query_attention",
        "candidate_attention",
    }
    sizes = {"layers": 1, "heads": 2}

    def represents(self, needs):
        late = {"query_tokens", "candidate_tokens"} if "in_batch" in needs else set()
        return needs.only((needs.fields - {"in_batch"}) | late)

    def represent(self, batch, needs):
        outputs = Outputs()
        for name in self.represents(needs).fields:
            side, kind = name.split("_")
            ids = (batch.queries if side == "query" else batch.candidates)["words"]
            values = self.linear(self.dropout(self.words(ids.values.long())))
            if kind == "attention":
                values = torch.stack([values, values.tanh()], dim=1).view(-1, 1, 2, 2, 3)
            layers = (-1,) if kind == "attention" else ()
            outputs = outputs.with_(**{name: said_of(ids, places_of(ids), layers=layers, values=values)})
        return outputs

    def compare(self, outputs, batch, needs):
        sides = (outputs.query_tokens, outputs.candidate_tokens)
        return outputs.with_(in_batch=maxsim_all(*(Ragged(side.values, side.offsets) for side in sides)))


class Looks(Cross):
    """Attention of one layer of two heads over each listed pair."""

    provides = frozenset({"joint_attention"})
    sizes = {"layers": 1, "heads": 2}

    def represent(self, batch, needs):
        rows, places = batch.mask.nonzero(as_tuple=True)
        queries = batch.queries["words"].select(rows)
        candidates = batch.candidates["words"].select(batch.index[rows, places])
        sides = [Ragged(places_of(ids), ids.offsets) for ids in (queries, candidates)]
        nowhere = [Ragged(torch.full_like(side.values, -1), side.offsets) for side in sides]
        ids = Ragged.join([queries, candidates])
        values = self.bag.linear(self.bag.dropout(self.bag.words(ids.values.long())))
        said = said_of(
            ids,
            Ragged.join([sides[0], nowhere[1]]).values,
            Ragged.join([nowhere[0], sides[1]]).values,
            layers=(-1,),
            values=torch.stack([values, values.tanh()], dim=1).view(-1, 1, 2, 2, 3),
        )
        width = batch.mask.shape[1]
        return Outputs(joint_attention=said.among(rows * width + places, batch.mask.numel()))


def texts():
    """A source without queries."""
    table = TextTable([str(i) for i in range(9)], [f"w{i} y{i % 2}" for i in range(9)])
    made = TextSource(
        Judged(task="texts", queries=TextTable([], []), candidates=table, listed=Ragged.of([])), 5
    )
    made.prepare([Words()], [Words()])
    return made


def drawn():
    """Queries whose lists end in candidates that were drawn at random: some of them several times a batch."""
    made = TextSource(judged(), 8, candidates=8, negatives=[RandomNegatives(count=3)], seed=5)
    made.prepare([Words()], [Words()])
    return made


def case(name, dropout=0.0):
    """A graph and the source it is trained on."""
    labels = Arrow("labels", SampledSoftmax(temperature=1.0), "student")
    teach = {"student": Scaled(1, dropout), "teacher": Bag(2)}
    both = {"student": Scaled(1, dropout), "peer": Scaled(4, dropout)}
    nodes, arrows = {
        "in_batch": (
            teach,
            [labels, Arrow("scores", ScoreKL(in_batch=True), "student", "teacher", weight=0.5)],
        ),
        "lists": (
            teach,
            [
                Arrow("scores", ScoreKL(), "student", "teacher"),
                Arrow("margins", MarginMSE(), "student", "teacher", weight=0.1),
            ],
        ),
        "vectors": (teach, [labels, Arrow("vectors", EmbeddingMatch(projection=True), "student", "teacher")]),
        "pairs": (
            {"student": Cross(dropout), "teacher": Bag(2)},
            [
                Arrow("labels", SampledSoftmax(temperature=1.0, in_batch=False), "student"),
                Arrow("points", PointwiseScore(), "student", "teacher"),
            ],
        ),
        "taught": (  # a cross-encoder that is trained beside the student, and is not detached
            {"student": Scaled(1, dropout), "peer": Cross(dropout)},
            [labels, Arrow("scores", ScoreKL(), "student", "peer", detach=False)],
        ),
        "cycle": (
            both,
            [
                labels,
                Arrow("there", ScoreKL(), "student", "peer"),
                Arrow("back", ScoreKL(), "peer", "student", detach=False),
            ],
        ),
        "built": (
            {"student": Scaled(1, dropout), "head": Head()},
            [
                labels,
                Arrow("head", SampledSoftmax(temperature=1.0, in_batch=False), "head"),
                Arrow("scores", ScoreKL(), "student", "head"),
            ],
        ),
        "tokens": (  # rows of several tokens, of queries, candidates and pairs
            {"student": Late(1, dropout), "peer": Looks(dropout)},
            [labels, Arrow("words", AttentionKL(), "student", "peer", detach=False)],
        ),
        "texts": (teach, [Arrow("vectors", EmbeddingMatch(fields=["candidates"]), "student", "teacher")]),
    }[name]
    torch.manual_seed(7)
    graph = DistillationGraph(nodes, arrows, {"student", *({"peer", "head"} & nodes.keys())})
    given = texts() if name == "texts" else drawn()
    return graph, given


def users_and_items():
    """A two-tower and a ranker that shares its tables, one of them so large that its gradient is sparse."""
    features = fitted(user_buckets=2**15)
    torch.manual_seed(7)
    student = TwoTower(features, dim=6, embedding_dim=4, unknown=0.0, learned_temperature=True)
    ranker = PrivilegedRanker(
        features, student.tables, own_tables=["country"], history="attention", widths=(8,), unknown=0.0
    )
    arrows = [
        Arrow("labels", BinaryCrossEntropy(), "student"),
        Arrow("in_batch", SampledSoftmax(temperature=1.0), "student"),
        Arrow("ranker_labels", BinaryCrossEntropy(), "peer"),
        Arrow("soft", BinaryCrossEntropy(), "student", "peer"),
    ]
    graph = DistillationGraph({"student": student, "peer": ranker}, arrows, ["student", "peer"])
    return graph, shop(features, batch_size=20)


CASES = ("in_batch", "lists", "vectors", "pairs", "taught", "cycle", "built", "tokens", "texts", "features")


def step(name, cache=None, dropout=0.0, **settings):
    """Losses and summed gradients of the first optimiser step, of two batches, the last a small one."""
    graph, given = users_and_items() if name == "features" else case(name, dropout)
    found = {}

    def keep(*_):
        for n, p in graph.trainable().items():
            if p.grad is not None:
                assert p.grad.is_sparse == (len(p) > 2**15 if p.dim() else False)
                found[n] = p.grad.to_dense().clone()
        return 0.0

    with tempfile.TemporaryDirectory() as folder:
        it = trainer(folder, graph, given, accumulate=2, gradient_cache=cache, **settings)
        it._descend = keep
        torch.manual_seed(3)
        losses, _, _ = it._step()
    return {f"loss/{n}": loss for n, loss in losses.items()} | found


def interrupted(rank, place):
    """A source that is stopped by Ctrl-C in one process while its ``place``-th batch is made."""
    made = drawn()
    return stopping(made, place) if rank == 0 else made


def fit(folder, given=None):
    """Train with dropout for four epochs of two batches: the weights it ends with, or None if stopped."""
    graph, _ = case("taught", dropout=0.3)
    try:
        trainer(folder, graph, given or drawn(), epochs=4, gradient_cache=3, checkpoint_every=100).fit()
    except KeyboardInterrupt:
        return {}
    return {name: p.detach().clone() for name, p in graph.trainable().items()}


def main(folder):
    """What each process finds, as ``RANK.safetensors``; ``stopped`` is left as it was after Ctrl-C."""
    processes.start()
    rank, found = processes.rank(), {"world": torch.tensor(processes.world())}
    for cache in (None, 3):
        for name in CASES:
            found |= {f"{name}|{cache}|{key}": value for key, value in step(name, cache).items()}
    found |= {f"whole|{name}": value for name, value in fit(folder / "whole").items()}
    for kept in ("stopped", "resumed"):
        assert not fit(folder / kept, interrupted(rank, 3))
    found |= {f"resumed|{name}": value for name, value in fit(folder / "resumed").items()}
    rows = torch.arange(rank + 1)[:, None] + 10 * rank
    found["gathered"] = processes.gather(rows)
    found["in_shares"] = processes.in_shares(lambda part: torch.tensor([2 * x for x in part]), list(range(7)))
    shared = processes.in_shares(lambda part: Ragged.of([[x] * (x % 3) for x in part]), list(range(7)))
    found["ragged_in_shares"] = shared.values
    assert processes.from_first(rank) == 0
    assert processes.any_of(rank == 1, False) == (True, False)
    save_file(found, folder / f"{rank}.safetensors")
    processes.end()
    os._exit(0)  # as the command does


if __name__ == "__main__":
    main(Path(sys.argv[1]))
