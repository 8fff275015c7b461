"""What a host is and has at this moment, as `dispatch.host_tool` told it: checked, cleaned, typed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from dispatch.tool_client import HostToolError
from engine.text import clean

MAX_TEXT = 500
MAX_CONFIG = 1 << 20
"""Characters of a config.json that is on the host already."""
MAX_ITEMS = 1000
MAX_DEPTH = 6


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU of the host; memory in bytes, None where it has none of its own (GB10)."""

    index: int
    uuid: str
    name: str
    driver: str
    capability: str
    memory_total: int | None = None


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What stays true of a host from its pre-flight to the end of a run; it stands in the manifest."""

    hostname: str
    arch: str
    system: str
    uid: int
    cores: int | None = None
    python: str
    executable: str
    torch: str | None = None
    torch_cuda: str | None = None
    """The CUDA that torch was built for; None: for the CPU."""
    driver_cuda: str | None = None
    """The newest CUDA that the driver takes."""
    packages: dict[str, str | None] = {}
    devices: tuple[Device, ...] = ()
    unified_memory: bool = False
    memory_total: int | None = None
    """Of the host, in bytes."""
    clock_ahead_seconds: float | None = None
    """How far the host's clock is ahead of this machine's, and by how much that can be wrong."""
    clock_bound_seconds: float | None = None


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process that computes on a GPU; memory in bytes, None where nvidia-smi does not tell."""

    pid: int
    uuid: str
    memory: int | None = None
    uid: int | None = None
    user: str | None = None
    command: str = ""
    """Its first words, without values that could be secrets."""


class GpuLock(msgspec.Struct, frozen=True, kw_only=True):
    """The lock file of the GPU. `held` is None where this could not be told."""

    path: str
    held: bool | None = None
    by: str | None = None
    """What the file says of its holder; of the last one where it is not held."""


class Named(msgspec.Struct, frozen=True, kw_only=True):
    """A path that a configuration names as being on the host already."""

    path: str
    kind: str | None = None
    """`directory`, `file`, `other`; None where nothing is there."""
    bytes: int = 0
    files: int = 0
    more: bool = False
    """There is more than was counted."""
    config: str | None = None
    """Its config.json, as it is there: to be parsed and not to be printed."""
    weights: bool = False
    problem: str | None = None


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """Of the file system that the run directory is on, in bytes."""

    total: int
    free: int


class Base(msgspec.Struct, frozen=True, kw_only=True):
    """The host's run directory, or where it would be made."""

    path: str
    exists: bool
    writable: bool
    problem: str | None = None
    disk: Disk | None = None


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a host is, and how it stands at this moment."""

    host: HostFacts
    base: Base
    gpu: Device | None = None
    """The device that a run would take."""
    gpu_free: int | None = None
    """Of its own memory, in bytes."""
    gpu_problem: str | None = None
    """Why nvidia-smi told nothing, or not of the device that is asked for."""
    gpu_nodes: bool = False
    """Whether the system has device files of an NVIDIA GPU."""
    hidden: bool = False
    """Whether CUDA_VISIBLE_DEVICES hides every GPU."""
    processes: tuple[GpuProcess, ...] = ()
    """Those on that device."""
    lock: GpuLock | None = None
    memory_available: int | None = None
    named: tuple[Named, ...] = ()


def parse_facts(answer: Mapping[str, Any], host: str, clock: tuple[float, float] | None = None) -> Facts:
    """The tool's answer to `facts`.

    Args:
        answer: from the host, not trusted.
        host: its name, for messages.
        clock: by how many seconds its clock is ahead, and how wrong that can be.

    Raises:
        HostToolError: it is not what the tool answers.
    """
    configs = _configs(answer.get("named"))
    told: Any = _cleaned({key: value for key, value in answer.items() if key != "named"})
    named: Any = _cleaned([each for each, _ in configs])
    try:
        memory, torch, devices = told["memory"] or {}, told["torch"] or {}, told["devices"]
        chosen = next((each for each in devices if each["uuid"] == told["gpu"]), None)
        if chosen is None and told["gpu"] is not None:  # a part of a GPU, whose memory nobody tells
            part = {"uuid": told["gpu"], "name": "MIG device", "memory_total": None, "memory_free": None}
            chosen = {**devices[0], **part}
        whole: dict[str, Any] = {name: told[name] for name in ("hostname", "arch", "system", "uid", "cores", "python")}
        whole |= {"executable": told["executable"], "torch": torch.get("version"), "torch_cuda": torch.get("cuda")}
        whole |= {"driver_cuda": told["driver_cuda"], "packages": told["packages"], "devices": devices}
        whole |= {"unified_memory": told["unified_memory"], "memory_total": memory.get("total")}
        if clock is not None:
            whole |= {"clock_ahead_seconds": round(clock[0], 4), "clock_bound_seconds": round(clock[1], 4)}
        found = {
            "host": whole,
            "base": told["base"],
            "gpu": chosen,
            "gpu_free": chosen and chosen["memory_free"],
            "gpu_problem": told["nvidia_smi"],
            "gpu_nodes": told["gpu_nodes"],
            "hidden": told["gpu_hidden"],
            "processes": [each for each in told["processes"] if each["uuid"] == told["gpu"]],
            "lock": told["lock"],
            "memory_available": memory.get("available"),
            "named": [{**each, "config": config} for each, (_, config) in zip(named, configs, strict=True)],
        }
        return msgspec.convert(found, Facts)
    except (msgspec.ValidationError, KeyError, TypeError, AttributeError) as error:
        raise HostToolError(
            f"{host}: its facts cannot be read: {clean(f'{type(error).__name__}: {error}', 300)}",
            do="see what its Python is: kdconsole hosts check",
        ) from None


def _configs(named: object) -> list[tuple[dict[str, Any], str | None]]:
    """What was asked for by path, and the text of config.json apart: it is read as JSON, and must not be cut."""
    found = []
    for each in named if isinstance(named, list) else []:
        if isinstance(each, dict):
            text = each.get("config")
            whole = isinstance(text, str) and len(text) <= MAX_CONFIG
            found.append(({key: value for key, value in each.items() if key != "config"}, text if whole else None))
    return found


def _cleaned(value: object, depth: int = 0) -> object:
    """Every text of it made safe to be shown; what is too deep or too much is left out."""
    if isinstance(value, str):
        return clean(value, MAX_TEXT)
    if depth > MAX_DEPTH:
        return None
    if isinstance(value, list):
        return [_cleaned(each, depth + 1) for each in value[:MAX_ITEMS]]
    if isinstance(value, dict):
        return {clean(str(key), 100): _cleaned(each, depth + 1) for key, each in list(value.items())[:MAX_ITEMS]}
    return value
