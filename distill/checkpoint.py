"""The state of a training on disk: parameters, optimiser, random numbers. Next: ``trainer.py``.

Everything is safetensors or JSON; nothing is pickled. A checkpoint appears by rename, never half-written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.errors import DataError
from distill.hub.files import atomic_folder
from distill.processes import gather, is_first, rank, world


def save_checkpoint(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    state: Mapping[str, Any],
) -> None:
    """Write one checkpoint: trained parameters, their optimiser state, the random state, and ``state``.

    All processes take part, the first one writes.
    """
    random = _random_states()
    if not is_first():
        return
    with atomic_folder(folder) as path:
        save_parameters(path / "model.safetensors", parameters)
        moments = {
            f"{name}|{key}": value.detach().cpu().contiguous()
            for name, parameter in parameters.items()
            for optimizer in optimizers
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        save_file(moments, path / "optimizer.safetensors")
        save_file(random, path / "random.safetensors")
        (path / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")


def load_checkpoint(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Put a checkpoint's parameters, optimiser and random state back; returns ``state``."""
    try:
        load_parameters(folder / "model.safetensors", parameters)
        moments = load_file(folder / "optimizer.safetensors")
        random = load_file(folder / "random.safetensors")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:  # a ValueError: JSON, or text, that is none
        raise DataError(_unreadable(folder, error)) from error
    moved_by = {p: one for one in optimizers for group in one.param_groups for p in group["params"]}
    for place, value in moments.items():
        name, _, key = place.rpartition("|")
        parameter = parameters[name]
        step = key == "step"  # fused optimisers keep their step count on the parameter's device
        moved_by[parameter].state[parameter][key] = (
            value if step and parameter.device.type == "cpu" else value.to(parameter.device)
        )
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        if (name := _of_process(device, rank())) in random:
            (torch if device == "cpu" else torch.cuda).set_rng_state(random[name])
    return state


def _random_states() -> dict[str, Tensor]:
    """The random state of each process and device, by name."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    return {
        _of_process(device, of): one.clone()
        for device, mine in own.items()
        for of, one in enumerate(gather(mine[None], [1] * world()))
    }


def _of_process(device: str, of: int) -> str:
    return device if of == 0 else f"{device}.{of}"


def save_parameters(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, path)


@torch.no_grad()
def load_parameters(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy saved values into parameters of the same names and shapes."""
    try:
        saved: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(_unreadable(path.parent, error)) from error
    if different := saved.keys() ^ parameters.keys():
        raise DataError(
            f"{path} holds other parameters than this graph trains ({sorted(different)[0]}, ...): the "
            f"recipe's models or losses have changed since. Use another run name, or --overwrite."
        )
    for name, parameter in parameters.items():
        if saved[name].shape != parameter.shape:
            raise DataError(
                f"{path}: {name} has shape {[*saved[name].shape]}, the model {[*parameter.shape]}."
            )
        parameter.copy_(saved[name])


def _unreadable(folder: Path, error: Exception) -> str:
    return (
        f"the checkpoint {folder} cannot be read ({error}). Remove this folder to go on from an earlier "
        f"checkpoint, or from the start."
    )


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run, None if there is none."""
    found = sorted(folder.glob("step-*"))
    return found[-1] if found else None


def keep_newest(folder: Path, newest: Path) -> None:
    for other in folder.glob("step-*"):
        if other != newest:
            shutil.rmtree(other, ignore_errors=True)
