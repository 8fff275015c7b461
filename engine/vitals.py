"""How the machine does while a run goes on: processor, memory, GPU and disk, each None where nothing gives the figure.

Needs no torch. nvidia-smi hangs where a driver does: it is a process of its own, given a few seconds, and one that even
SIGKILL does not end is left alone and not joined by others.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.stream import Vitals

SMI_SECONDS = 3.0
GPU_FIELDS = ("utilization.gpu", "memory.used", "memory.total", "temperature.gpu", "power.draw")
"""What nvidia-smi is asked for, in the order in which `parse_gpu` takes it."""

_NONE = ("[N/A]", "[Not Supported]", "N/A", "Not Supported")
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi tells of a GPU. `shares_memory`: it has no memory of its own to give figures of."""

    percent: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    temperature_c: float | None
    power_watts: float | None
    shares_memory: bool


class Smi:
    """nvidia-smi, one process at a time.

    Args:
        seconds: it has for an answer, `SMI_SECONDS` by default.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = SMI_SECONDS if seconds is None else seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def ask(self, fields: Sequence[str], gpu: str | None = None) -> str | None:
        """The first line of its answer, numbers without units; None where there is none in time.

        Args:
            fields: as `nvidia-smi --help-query-gpu` names them.
            gpu: UUID or index; None: every GPU that it knows.
        """
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        command += ["-i", gpu] if gpu is not None else []
        with self._lock:
            if self._closed or (self._process is not None and self._process.poll() is None):
                return None
            try:
                self._process = process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
            except OSError:
                return None
        try:
            output, _ = process.communicate(timeout=self._seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            # Killed at once, unless it hangs inside the driver: then no wait ends.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
            if process.stdout is not None:
                process.stdout.close()
            return None
        lines = output.decode(errors="replace").splitlines()
        return lines[0] if process.returncode == 0 and lines else None

    def close(self) -> None:
        """Ends a process that is being waited for; nothing is asked after that."""
        with self._lock:
            self._closed = True
            if self._process is not None and self._process.poll() is None:
                self._process.kill()


class Machine:
    """The machine that a run trains on.

    Args:
        directory: whose disk is looked at.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._smi = Smi()
        self._times = _cpu_times()
        self.gpu: str | None = None
        """UUID or index of the GPU that trains; None: none does, and none is asked for."""

    def look(self) -> Vitals:
        """Every figure as it is now; the processor's over the time since the look before, or since the start."""
        before, self._times = self._times, _cpu_times()
        total, free = proc_bytes("/proc/meminfo", "MemTotal"), proc_bytes("/proc/meminfo", "MemAvailable")
        gpu = None
        if self.gpu is not None:
            gpu = parse_gpu(self._smi.ask(GPU_FIELDS, self.gpu) or "")
        used, all_of_it = (gpu.memory_used_bytes, gpu.memory_total_bytes) if gpu else (None, None)
        unified = gpu is not None and gpu.shares_memory
        if unified:
            used, all_of_it = None if total is None or free is None else total - free, total
        # Last, because it can take seconds until the GPU answers, and what is told of the disk is acted on.
        disk = _disk(self._directory)
        return Vitals(
            cpu_percent=cpu_percent(before, self._times),
            host_total_bytes=total,
            host_free_bytes=free,
            disk_free_bytes=disk[0] if disk else None,
            disk_total_bytes=disk[1] if disk else None,
            gpu_percent=gpu.percent if gpu else None,
            gpu_memory_used_bytes=used,
            gpu_memory_total_bytes=all_of_it,
            gpu_temperature_c=gpu.temperature_c if gpu else None,
            gpu_power_watts=gpu.power_watts if gpu else None,
            unified_memory=unified,
        )

    def close(self) -> None:
        """Ends what is still being asked."""
        self._smi.close()


def parse_gpu(line: str) -> Gpu | None:
    """One line of nvidia-smi's answer to `GPU_FIELDS`; None where it is no such line.

    A figure that the device does not give (`[N/A]`, `[Not Supported]`) or that is no number is None. Memory is in MiB.
    """
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(GPU_FIELDS):
        return None
    percent, used, total, temperature, power = (float(c) if _NUMBER.fullmatch(c) else None for c in cells)
    return Gpu(
        percent=percent,
        memory_used_bytes=None if used is None else int(used) << 20,
        memory_total_bytes=None if total is None else int(total) << 20,
        temperature_c=temperature,
        power_watts=power,
        shares_memory=cells[GPU_FIELDS.index("memory.total")] in _NONE,
    )


def cpu_percent(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """Share of all cores that was busy between two readings of all and idle ticks, 0 to 100."""
    if before is None or after is None or after[0] <= before[0]:
        return None
    busy = 1 - (after[1] - before[1]) / (after[0] - before[0])
    return round(100 * min(1.0, max(0.0, busy)), 1)


def proc_bytes(path: str, key: str) -> int | None:
    """A figure that a file below /proc gives in KiB, in bytes; None where there is no such figure."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _cpu_times() -> tuple[int, int] | None:
    """All and idle ticks since the machine started, over all cores; waiting for a disk is idle, guests are users."""
    try:
        with open("/proc/stat", encoding="ascii", errors="replace") as file:
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return user + nice + system + idle + iowait + irq + softirq + steal, idle + iowait


def _disk(directory: Path) -> tuple[int, int] | None:
    try:
        usage = shutil.disk_usage(directory)
    except OSError:
        return None
    return usage.free, usage.total
