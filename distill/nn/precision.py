"""Which precision is fast on a device, asked of the device itself."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "no", "bf16", "fp16"]


def native_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether bfloat16 matrix products have hardware of their own (else they are far slower than float32)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        from torch import cpu

        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(cpu, probe, lambda: False)() for probe in probes)
    return False


def resolve_precision(wanted: Precision, device: torch.device | str) -> Literal["no", "bf16", "fp16"]:
    """``auto`` is bf16 where the device has native bf16, else none."""
    if wanted != "auto":
        return wanted
    return "bf16" if native_bf16(device) else "no"


def serving_autocast(model) -> torch.autocast:
    """The autocast context for asking a model outside training, by its ``precision``."""
    return autocast(model.precision, model.device)


def autocast(wanted: Precision, device: torch.device) -> torch.autocast:
    """A context in which models run in the precision that ``wanted`` means on the device."""
    precision = resolve_precision(wanted, device.type)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "no")
