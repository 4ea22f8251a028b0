"""A checkpoint gives back what was saved, says what is wrong with it, and holds no code."""

import json

import pytest
import torch
from torch import nn

from distill.checkpoint import (
    keep_newest,
    latest,
    load_checkpoint,
    load_parameters,
    save_checkpoint,
    save_parameters,
)
from distill.errors import DataError


def made(steps=2, frozen=False):
    """A model that learnt for a few steps; one of its parameters has no gradient, hence no moments."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(2, 1)})
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    for _ in range(steps):
        model["used"](torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, parameters, optimizer


def test_parameters_moments_and_random_state_come_back(tmp_path):
    model, parameters, optimizer = made()
    save_checkpoint(
        tmp_path / "step-1", parameters, [optimizer], {"progress": {"step": 2}, "best": 0.1 + 0.2}
    )
    drawn = torch.rand(3)
    other, theirs, fresh = made(steps=0)
    state = load_checkpoint(tmp_path / "step-1", theirs, [fresh])
    assert state == {"progress": {"step": 2}, "best": 0.1 + 0.2}
    assert torch.equal(torch.rand(3), drawn)
    for name, parameter in parameters.items():
        assert torch.equal(theirs[name], parameter)
        saved, loaded = optimizer.state.get(parameter, {}), fresh.state.get(theirs[name], {})
        assert saved.keys() == loaded.keys() and bool(saved) is name.startswith("used")
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    for module, by in ((model, optimizer), (other, fresh)):  # and both learn on alike
        module["used"](torch.ones(4, 3)).square().sum().backward()
        by.step()
    assert all(torch.equal(theirs[name], parameters[name]) for name in parameters)


def test_nothing_is_pickled_and_nothing_half_written_stays(tmp_path):
    _, parameters, optimizer = made()
    folder = tmp_path / "checkpoints" / "step-1"
    save_checkpoint(folder, parameters, [optimizer], {})
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    with pytest.raises(TypeError):
        save_checkpoint(folder.with_name("step-2"), parameters, [optimizer], {"no": object()})
    assert [path.name for path in folder.parent.iterdir()] == ["step-1"]
    assert latest(folder.parent) == folder


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
)
@pytest.mark.parametrize("harm", ["truncated", "missing", "garbage"])
def test_a_damaged_file_is_named_with_the_remedy(file, harm, tmp_path):
    _, parameters, optimizer = made()
    folder = tmp_path / "step-1"
    save_checkpoint(folder, parameters, [optimizer], {"progress": {}})
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes(content[: len(content) // 2] if harm == "truncated" else b"\x80\xff" * 50)
    with pytest.raises(DataError, match=r"the checkpoint .*step-1 cannot be read .* Remove this folder"):
        load_checkpoint(folder, parameters, [optimizer])


def test_parameters_of_another_graph_are_refused(tmp_path):
    _, parameters, _ = made()
    save_parameters(tmp_path / "x.safetensors", parameters)
    fewer = {name: p for name, p in parameters.items() if name != "used.bias"}
    with pytest.raises(DataError, match=r"holds other parameters than this graph trains \(used.bias"):
        load_parameters(tmp_path / "x.safetensors", fewer)
    wider = {**parameters, "used.bias": nn.Parameter(torch.zeros(5))}
    with pytest.raises(DataError, match=r"used.bias has shape \[2\], the model \[5\]"):
        load_parameters(tmp_path / "x.safetensors", wider)


def test_latest_is_the_highest_step_and_the_others_go(tmp_path):
    assert latest(tmp_path) is None
    for step in (3, 20, 100):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "best").mkdir()
    (tmp_path / ".step-00000200.tmp").mkdir()  # half-written when the machine went down
    assert latest(tmp_path).name == "step-00000100"
    keep_newest(tmp_path, latest(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["best", "step-00000100"]


def test_state_is_plain_json(tmp_path):
    _, parameters, optimizer = made()
    save_checkpoint(
        tmp_path / "step-1", parameters, [optimizer], {"progress": {"best": None, "dev": {"MAP": 0.5}}}
    )
    assert json.loads((tmp_path / "step-1" / "state.json").read_text()) == {
        "progress": {"best": None, "dev": {"MAP": 0.5}}
    }
