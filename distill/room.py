"""Which cells of a study may run at the same time: memory decides, as earlier runs have held it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from distill.hub.files import read_json
from distill.one_run import FINISHED
from distill.study import Cell


@dataclass
class Room:
    """Which cells may run at the same time: what their variants have held before must fit together.

    A variant that has not run yet is taken for twice the largest of the others; the first of all runs alone.
    """

    jobs: int
    memory: dict[str, float]  # in MB, by the name under which a run's cost tells its peak
    peaks: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)  # of (data, variant)

    @classmethod
    def free(cls, jobs: int, memory: float | None) -> Room:
        """``memory``: GB of the machine's; None: what is free now. Of a GPU, what is free now."""
        room = {
            "peak_memory_mb": (psutil.virtual_memory().available if memory is None else memory * 1e9) / 1e6
        }
        if torch.cuda.is_available():
            room["peak_gpu_memory_mb"] = torch.cuda.mem_get_info()[0] / 1e6
        return cls(jobs, room)

    def learn(self, cell: Cell, folder: Path) -> None:
        """What a finished run has held."""
        if (path := folder / FINISHED).exists():
            cost, known = (
                read_json(path).get("cost", {}),
                self.peaks.setdefault((cell.data, cell.variant), {}),
            )
            for name in self.memory:
                known[name] = max(known.get(name, 0.0), cost.get(name) or 0.0)

    def holds(self, cells: Sequence[Cell]) -> bool:
        places = [(cell.data, cell.variant) for cell in cells]
        if len(cells) > self.jobs or not self.peaks:
            return False
        for name, there in self.memory.items():
            most = max(known[name] for known in self.peaks.values())
            if sum(self.peaks.get(place, {name: 2 * most})[name] for place in places) > there:
                return False
        return True
