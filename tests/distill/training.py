"""A small training: an encoder of a few lines, queries that list candidates, and a graph with a teacher."""

import json
import signal
from zlib import crc32

import torch
from torch import nn

from distill.batch import Columns, Ragged
from distill.data import Judged, TextSource, TextTable
from distill.graph import Arrow, DistillationGraph
from distill.model import Encoder
from distill.nn.dropout import Dropout
from distill.objectives import SampledSoftmax, ScoreKL
from distill.outputs import Outputs
from distill.settings import TrainSettings
from distill.trainer import Trainer

QUERIES = 11


class Words:
    """A column whose ids are hashes of words."""

    key = fingerprint = "words"

    def encode(self, texts):
        return Ragged.of([[crc32(w.encode()) % 50 for w in t.split()] for t in texts], dtype=torch.int32)


class Bag(Encoder):
    """The mean of its words' vectors, after dropout, through a matrix: a text encoder of a few lines."""

    reads = Columns((Words(),), (Words(),))
    provides = frozenset({"queries", "candidates", "scores", "in_batch"})
    dim = 6

    def __init__(self, seed=0, dropout=0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.linear = nn.Embedding(50, 8), nn.Linear(8, 6)
        self.dropout = Dropout(dropout)
        self.asked = 0

    def vectors(self, ids):
        padded, mask = ids.padded(0)
        summed = (self.words(padded.long()) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.linear(self.dropout(summed))

    def represent(self, batch, needs):
        self.asked += 1
        queries, candidates = batch.queries["words"], batch.candidates["words"]
        return Outputs(queries=self.vectors(queries), candidates=self.vectors(candidates))

    def compare(self, outputs, batch, needs):
        listed = (outputs.candidates[batch.index] * outputs.queries[:, None]).sum(-1)
        return outputs.with_(scores=listed, in_batch=outputs.queries @ outputs.candidates.T)

    def encode_queries(self, queries, progress=False):
        return self.vectors(Words().encode(queries))

    encode_candidates = encode_queries

    def save_pretrained(self, folder):
        raise NotImplementedError


def judged() -> Judged:
    """Queries that list one to five candidates, the first relevant (of one query none)."""
    lists = [[(3 * q + i) % 20 for i in range(1 + q % 5)] for q in range(QUERIES)]
    labels = [float(i == 0 and q != 7) for q, rows in enumerate(lists) for i in range(len(rows))]
    return Judged(
        task="rerank",
        queries=TextTable(
            [str(q) for q in range(QUERIES)], [f"which w{q} of x{q % 3}" for q in range(QUERIES)]
        ),
        candidates=TextTable(
            [str(c) for c in range(20)], [f"w{c} " * (1 + c % 4) + f"c{c}" for c in range(20)]
        ),
        listed=Ragged.of(lists),
        labels=torch.tensor(labels),
    )


def source(batch_size=4, **arguments):
    made = TextSource(judged(), batch_size, candidates=8, seed=5, **arguments)
    made.prepare([Words()], [Words()])
    return made


def labels_arrow(**arguments):
    return Arrow("labels", SampledSoftmax(temperature=1.0), "student", **arguments)


def with_teacher(**arguments):
    return [labels_arrow(), Arrow("scores", ScoreKL(), "student", "teacher", weight=0.5, **arguments)]


def graph(arrows=None, dropout=0.0, trained=("student",), teachers=("teacher",)):
    nodes = {"student": Bag(1, dropout), **{name: Bag(2, dropout) for name in teachers}}
    return DistillationGraph(nodes, arrows or with_teacher(), trained)


def trainer(folder, made=None, given=None, evaluate=None, select=None, steps=None, **settings):
    settings = {"epochs": 2, "learning_rate": 0.05, "mixed_precision": "no", "log_every": 1, **settings}
    return Trainer(
        made or graph(), given or source(), TrainSettings(**settings), folder, evaluate, select, steps
    )


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def weights(made):
    return {name: p.detach().clone() for name, p in made.trainable().items()}


def equal(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def stopping(made, place):
    """A source that is stopped by Ctrl-C while its ``place``-th batch is made."""
    batch = made.batch
    count = [0]

    def stopped(epoch, step):
        count[0] += 1
        if count[0] == place:
            signal.raise_signal(signal.SIGINT)
        return batch(epoch, step)

    made.batch = stopped
    return made
