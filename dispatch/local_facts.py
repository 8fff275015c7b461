"""This machine as a run's manifest has it: nothing is spawned and torch is not imported, so it takes no time."""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
from pathlib import Path
from typing import Final

from dispatch import host_tool
from dispatch.facts import Device, HostFacts

NVIDIA: Final = Path("/proc/driver/nvidia")
MAX_DEVICES: Final = 64


def local_facts(nvidia: Path = NVIDIA) -> HostFacts:
    """What is known of this machine for nothing; pre-flight finds more.

    Args:
        nvidia: where the driver tells of its GPUs.
    """
    torch = host_tool.torch_facts() or {}
    return HostFacts(
        hostname=socket.gethostname(),
        arch=platform.machine(),
        system=platform.platform(),
        uid=os.getuid(),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        python=platform.python_version(),
        executable=sys.executable,
        torch=torch.get("version"),
        torch_cuda=torch.get("cuda"),
        devices=_devices(nvidia),
        memory_total=_memory(),
    )


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _devices(nvidia: Path) -> tuple[Device, ...]:
    """GPUs as the driver's own files have them; empty where there is none, or another system."""
    version = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", _text(nvidia / "version"))
    try:
        found = sorted((nvidia / "gpus").iterdir())[:MAX_DEVICES]
    except OSError:
        return ()
    devices = []
    for index, path in enumerate(found):
        told = dict(re.findall(r"^([^:\n]+):\s*(.*?)\s*$", _text(path / "information"), re.MULTILINE))
        devices.append(
            Device(
                index=index,
                uuid=told.get("GPU UUID", ""),
                name=told.get("Model", ""),
                driver=version[1] if version else "",
                capability="",
            )
        )
    return tuple(devices)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:10_000]
    except OSError:
        return ""
