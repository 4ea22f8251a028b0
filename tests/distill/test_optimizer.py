"""The row-wise optimiser of tables: its formula, sparse and dense alike, and its part in a training."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distill.errors import RecipeError, RunError
from distill.graph import Arrow, DistillationGraph
from distill.nn.feature_embedding import SPARSE_ABOVE, Table
from distill.objectives import BinaryCrossEntropy
from distill.optimizer import RowAdagrad, optimizers, table_names
from distill.settings import TrainSettings
from distill.trainer import Trainer
from students import TwoTower
from tests.distill.training import stopping
from tests.shop import fitted, shop


def test_equals_the_formula():
    table = nn.Parameter(torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]]))
    optimizer = RowAdagrad([table], lr=0.1)
    for gradient in ([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]):
        table.grad = torch.tensor(gradient)
        optimizer.step()
    first, both = (25 / 2) ** 0.5, (25 / 2 + 1 / 2) ** 0.5
    expected = [1.0 - 0.1 * 3 / first - 0.1 * 1 / both, 2.0 - 0.1 * 4 / first]
    assert table[1].tolist() == pytest.approx(expected)
    assert table[2].tolist() == [3.0, 4.0], "a row without a gradient stays"


def test_sparse_and_dense_gradients_give_the_same_numbers_and_padding_never_moves():
    weights, ids = torch.randn(50, 4), torch.tensor([3, 7, 3, 0, 9])
    found = []
    for sparse in (False, True):
        table = nn.Parameter(weights.clone())
        optimizer = RowAdagrad([table], lr=0.5)
        for step in range(3):
            rows = nn.functional.embedding(ids + (step if step < 2 else 0) * (ids > 0), table, sparse=sparse)
            rows.square().sum().backward()
            assert table.grad.is_sparse == sparse
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(table[0], weights[0])
        found.append((table.detach(), optimizer.state[table]["sum"]))
    for dense, sparse in zip(*found, strict=True):
        torch.testing.assert_close(dense, sparse)
    assert (found[0][0] != weights).any(dim=1).sum() == 6


def test_a_large_table_has_a_gradient_of_what_was_read_only():
    table = Table(SPARSE_ABOVE + 1, 4)
    table(torch.tensor([5, 5, 9])).sum().backward()
    assert table.weight.grad.is_sparse and table.weight.grad.coalesce().values().shape == (2, 4)
    small = Table(SPARSE_ABOVE, 4)
    small(torch.tensor([5])).sum().backward()
    assert not small.weight.grad.is_sparse


def graph_of(features, seed=0, **arguments):
    torch.manual_seed(seed)
    student = TwoTower(features, dim=8, embedding_dim=4, unknown=0.1, **arguments)
    return DistillationGraph(
        {"student": student}, [Arrow("labels", BinaryCrossEntropy(), "student")], ["student"]
    )


@pytest.fixture(scope="module")
def features():
    return fitted()


def test_tables_have_their_own_optimiser(features):
    graph = graph_of(features)
    rest, tables = optimizers(graph, TrainSettings(table_learning_rate=0.3))
    assert isinstance(tables, RowAdagrad) and tables.param_groups[0]["lr"] == 0.3
    of_tables = {id(p) for p in tables.param_groups[0]["params"]}
    assert of_tables == {id(table.weight) for table in graph.nodes["student"].tables.by_name().values()}
    of_rest = {id(p) for group in rest.param_groups for p in group["params"]}
    assert not of_rest & of_tables
    assert len(of_rest | of_tables) == len(graph.trainable())
    graph.nodes["student"].requires_grad_(False)
    assert table_names(graph) == set()


def trained(features, folder, steps=6, **settings):
    graph = graph_of(features)
    given = {"learning_rate": 0.01, "evaluate_every": None, "mixed_precision": "no", **settings}
    it = Trainer(graph, shop(features), TrainSettings(steps=steps, **given), folder)
    return it, graph


def weights(graph):
    return {name: p.detach().clone() for name, p in graph.trainable().items()}


def test_a_training_that_was_stopped_ends_bit_for_bit_where_another_ends(features, tmp_path, monkeypatch):
    it, graph = trained(features, tmp_path / "a", checkpoint_every=2)
    start = weights(graph)
    it.fit()
    monkeypatch.setattr("distill.nn.feature_embedding.SPARSE_ABOVE", 0)  # all gradients are sparse
    other, sparse = trained(features, tmp_path / "b", checkpoint_every=2)
    other.fit()
    stopped, _ = trained(features, tmp_path / "c", checkpoint_every=2)
    stopping(stopped.source, 4)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    again, resumed = trained(features, tmp_path / "c", checkpoint_every=2)
    again.fit()
    for name, value in weights(sparse).items():
        assert torch.equal(value, weights(resumed)[name]), name
        torch.testing.assert_close(value, weights(graph)[name], atol=1e-6, rtol=1e-4)
    tables = [name for name in start if "tables" in name]
    assert len(tables) == 5 and all(not torch.equal(start[n], weights(graph)[n]) for n in tables)
    lines = [json.loads(line) for line in (tmp_path / "c" / "history.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6


def test_tables_are_neither_clipped_nor_decayed(features, tmp_path):
    """A row that is not read stays; under a tiny limit of the norm, those read move at their own rate."""
    it, graph = trained(features, tmp_path, steps=1, clip=1e-12, weight_decay=0.5, warmup=0.0)
    table = graph.nodes["student"].tables.by_name()["user_id"].weight
    before = table.detach().clone()
    it.fit()
    moved = (table.detach() - before).abs().amax(dim=1)
    read = shop(features).batch(0, 0).queries["user_id"].unique()
    still = torch.ones(len(table), dtype=torch.bool)
    still[[1, *read.tolist()]] = False
    assert moved[still].max() == 0
    assert moved[read].median() > 0.01


def test_a_gradient_that_is_not_finite_is_blamed_on_its_arrow(features, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.nn.feature_embedding.SPARSE_ABOVE", 0)
    it, graph = trained(features, tmp_path)
    tower = graph.nodes["student"].user_tower
    tower.layers[0].weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(Exception, match=r"the gradient of losses\.labels is not finite"):
        it.fit()


def test_a_gradient_that_is_not_finite_in_a_table_alone_stops_the_run_at_its_step(features, tmp_path):
    it, graph = trained(features, tmp_path)
    tables = graph.nodes["student"].tables.by_name()
    next(iter(tables.values())).weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(RunError, match=r"step 1: the gradient of losses.labels is not finite"):
        it.fit()


def test_fp16_and_tables_do_not_go_together(features, tmp_path, monkeypatch):
    half = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext, mixed_precision="fp16")
    monkeypatch.setattr("distill.trainer._accelerator", lambda *_: half)
    with pytest.raises(RecipeError, match=r"train.mixed_precision: fp16 .* embedding tables .* use bf16"):
        trained(features, tmp_path, mixed_precision="fp16")
