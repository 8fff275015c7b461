"""The device and precision that a run trains with, and the device's memory."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from engine.config import Train
from engine.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Where and how a run computes; `autocast` is None in float32."""

    device: torch.device
    name: str
    precision: str
    autocast: torch.dtype | None

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the matrix products."""
        return self.autocast or torch.float32


def place(train: Train) -> Placement:
    """Resolves `auto` for device and precision.

    Raises:
        ConfigError: the device asked for is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = train.device if train.device != "auto" else next(name for name, there in available.items() if there)
    if not available[kind]:
        there = [name for name, is_there in available.items() if is_there]
        raise ConfigError(
            f"train.device: {kind}: this machine's torch {torch.__version__} finds no such device",
            expected=" or ".join(there),
            do="set train.device: auto, or install a torch build for the device",
        )
    precision = train.precision if train.precision != "auto" else "bf16" if kind == "cuda" else "fp32"
    name = torch.cuda.get_device_name() if kind == "cuda" else platform.processor() or platform.machine()
    return Placement(torch.device(kind), name, precision, torch.bfloat16 if precision == "bf16" else None)


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """Used and total bytes of the device, None where it has no memory of its own or gives no figure."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free, total


def device_free_bytes(device: torch.device) -> int | None:
    """Free bytes of the device, None where it has no memory of its own or gives no figure."""
    memory = device_memory(device)
    return None if memory is None else memory[1] - memory[0]


def shares_memory(device: torch.device) -> bool:
    """Whether the device is a GPU whose memory is the host's."""
    if device.type == "cuda":
        return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))
    return device.type == "mps"


def device_peak_bytes(device: torch.device) -> int | None:
    """Most bytes that torch has held on the device, None on the CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def smi_name(device: torch.device) -> str | None:
    """What nvidia-smi calls the device, None for one that it does not know.

    Its UUID: torch counts the visible GPUs alone, and in an order of its own.
    """
    if device.type != "cuda":
        return None
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", device.index or 0))
    return uuid if uuid.startswith(("GPU-", "MIG-")) or uuid.isdecimal() else f"GPU-{uuid}"
