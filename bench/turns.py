"""Processes that take turns: one a row, one repetition each, so that whatever else the machine does falls on all alike.

A child is the same script with `--serve ROW`: it writes one line of JSON after each repetition and waits for a line on
its standard input before the next one. A child that cannot run says why, and its row is shown with that reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "torchtune", "torchao", "triton", "accelerate")
FIGURES = ("wall_seconds", "cpu_seconds", "peak_bytes")


def resident_bytes(kind: str) -> int:
    """`VmRSS` (now) or `VmHWM` (highest since it was reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {kind}: this benchmark needs Linux")


class Turn:
    """What a child measures of one repetition after another; made before anything prints.

    Args:
        device: "cpu" or "cuda": whose memory counts, and whether the clock waits for it.
        repeats: repetitions after the first.
    """

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.left = device, 1 + repeats
        # Libraries print; the pipe is for figures alone.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._before, self._cpu, self._wall = 0, 0.0, 0.0

    def begin(self) -> None:
        """Starts the clock; what the process holds now is what its peak is counted from."""
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed shall not count as held
            Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew from here
            self._before = resident_bytes("VmRSS")
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def figures(self) -> dict[str, float]:
        """Stops the clock: seconds and the highest memory since `begin`."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else resident_bytes("VmHWM")
        return {"wall_seconds": wall, "cpu_seconds": cpu, "peak_bytes": float(peak - self._before)}

    def end(self, figures: Mapping[str, float], **more: float) -> bool:
        """Tells the parent of a repetition and waits for the next turn; False after the last one."""
        self.tell({**figures, **more})
        self.left -= 1
        return self.left > 0 and bool(sys.stdin.readline())

    def tell(self, figures: Mapping[str, object]) -> None:
        """One line for the parent."""
        self._answers.write(json.dumps(figures) + "\n")
        self._answers.flush()

    def serve(self, work: Callable[[], None]) -> None:
        """Runs the child's repetitions; what it cannot run for goes to the parent as one line."""
        try:
            work()
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.tell({"error": f"{type(error).__name__}: {lines[0]}"[:300]})
            if os.environ.get("KD_BENCH_DEBUG"):
                raise


@dataclass
class Row:
    """What was seen of one row."""

    warm: dict[str, float] = field(default_factory=dict)
    """The first repetition, compiling and all."""
    seen: list[dict[str, float]] = field(default_factory=list)
    error: str = ""
    """Why it did not run; empty where it did."""

    def median(self, key: str) -> float:
        """Of the repetitions after the first."""
        return statistics.median(figures[key] for figures in self.seen)

    @property
    def first_seconds(self) -> float:
        """Of the warm-up above a usual repetition: compiling, first of all."""
        return max(0.0, self.warm["wall_seconds"] - self.median("wall_seconds"))

    def figures(self) -> dict[str, Any]:
        """All of it for a JSON document."""
        if self.error:
            return {"error": self.error}
        keys = sorted({key for figures in self.seen for key in figures})
        return {
            "median": {key: self.median(key) for key in keys},
            "best_wall_seconds": min(figures["wall_seconds"] for figures in self.seen),
            "first_seconds": self.first_seconds,
            "repetitions": [self.warm, *self.seen],
        }


def take_turns(commands: Mapping[str, Sequence[str]], repeats: int, *, note: Callable[[str], None]) -> dict[str, Row]:
    """Starts a process a row, one after another, and lets them take turns.

    Args:
        commands: how to start each row.
        repeats: repetitions after the first.
        note: told of progress, one line at a time.
    """
    rows = {name: Row() for name in commands}
    with tempfile.TemporaryDirectory() as cache, contextlib.ExitStack() as stack:
        # An empty cache, so that the time to compile is what a first run sees.
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TOKENIZERS_PARALLELISM": "false"}
        children: dict[str, subprocess.Popen[str]] = {}
        for name, command in commands.items():
            note(f"starting {name}")
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            child = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
            stack.callback(child.wait)
            stack.callback(child.kill)
            children[name] = child
            rows[name].warm = _answer(rows[name], child, errors)
            if rows[name].error:
                children.pop(name)
        for turn in range(repeats):
            note(f"turn {turn + 1} of {repeats}")
            for name, child in list(children.items()):
                with contextlib.suppress(BrokenPipeError):
                    print("", file=child.stdin, flush=True)
                rows[name].seen.append(_answer(rows[name], child, None))
                if rows[name].error:
                    children.pop(name)
    return rows


def _answer(row: Row, child: subprocess.Popen[str], errors: Any) -> dict[str, float]:
    line = child.stdout.readline() if child.stdout else ""
    if not line:
        row.error = f"its process ended with exit status {child.wait()}"
        if errors is not None:
            errors.seek(0)
            row.error += "".join(f": {text}" for text in errors.read().strip().splitlines()[-1:])[:300]
        return {}
    figures: dict[str, Any] = json.loads(line)
    row.error = str(figures.get("error", ""))
    return figures


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were taken on: processor, versions, load."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    told: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": versions,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device == "cuda":
        import torch

        told["gpu"] = torch.cuda.get_device_name()
    return told


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def describe(told: Mapping[str, Any]) -> Iterator[str]:
    """The machine in lines for people."""
    load = " ".join(f"{value:.1f}" for value in told["load"])
    gpu = f", {told['gpu']}" if "gpu" in told else ""
    yield f"{told['processor']}, {told['cores']} cores, {told['memory_gib']} GiB{gpu}; load {load}"
    yield f"Python {told['python']}, " + ", ".join(f"{name} {version}" for name, version in told["versions"].items())


def save(name: str, document: Mapping[str, Any]) -> Path:
    """Writes a run's figures below bench/results, under its name and time; the path is given back."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    path.write_text(json.dumps(_short(document), indent=1) + "\n")
    return path


def _short(value: Any) -> Any:
    """Floats at six digits: a result is small, and no clock is better than that."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    return value
