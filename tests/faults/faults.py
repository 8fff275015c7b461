"""The faults themselves: what is done to a disk, to a file, to a process. Needs no torch."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HOLD_SECONDS = 60.0
WRITE_SECONDS = 0.04
"""About what writing a small checkpoint takes."""


@functools.cache
def can_mount() -> bool:
    """Whether real file systems can be mounted here, which takes root and the permission to."""
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as there:
        try:
            with small_disk(Path(there), 1):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def can_make_read_only() -> bool:
    """Whether a directory can be made read-only for this user: modes do not stop root."""
    return os.geteuid() != 0 or can_mount()


@contextlib.contextmanager
def small_disk(where: Path, mib: int) -> Iterator[Path]:
    """A real file system of a few MiB while inside."""
    where.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(where))
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


def remount(where: Path, how: str) -> None:
    """Makes a mounted file system read-only (`ro`) or writable again (`rw`)."""
    _mount("-o", f"remount,{how}", str(where))


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """While inside nothing below the directory can be made or removed by its path; files that are open stay writable.

    For root a read-only view is mounted over it, for others modes are changed.
    """
    if os.geteuid() == 0:
        _mount("--bind", str(directory), str(directory))
        try:
            _mount("-o", "remount,bind,ro", str(directory))
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)
        return
    modes = {path: path.stat().st_mode for path in (directory, *directory.rglob("*")) if path.is_dir()}
    try:
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def fill_up(where: Path, leave: int = 0) -> Path:
    """Fills a disk but for `leave` bytes; returns the file that does it."""
    ballast = where / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(where).free - leave)))
    return ballast


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """While inside this process can make no file larger than so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def flip(path: Path, at: float) -> None:
    """Turns one bit of a file, `at` from 0 (in its first byte) to 1 (in its last but one: the last is a line's end)."""
    raw = bytearray(path.read_bytes())
    raw[int(at * (len(raw) - 2))] ^= 1
    path.write_bytes(raw)


def hold(pid: int) -> None:
    """Stops a process with SIGSTOP, and returns when each of its threads stands still."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + HOLD_SECONDS
    while not held(pid):
        assert time.monotonic() < deadline, f"process {pid} does not stand still"


def held(pid: int) -> bool:
    """Whether a process was stopped, every thread of it."""
    with contextlib.suppress(OSError):
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        states = {(task / "stat").read_bytes().rpartition(b")")[2].split()[0] for task in tasks}
        return states == {b"T"}
    return False


def is_being_written(run_dir: Path) -> bool:
    """Whether a checkpoint of a run is half made, half removed or half pointed to; after a kill: whether one was."""
    root = run_dir / "checkpoints"
    try:
        return any(any(root.glob(name)) for name in (".ckpt-step-*", ".LATEST.*", "ckpt-step-*/.manifest.json.*"))
    except FileNotFoundError:  # one that was there is being removed under our eyes
        return True


def hold_in_a_write(pid: int, run_dir: Path, chance: random.Random, seconds: float = HOLD_SECONDS) -> bool:
    """Holds a process at a random moment of a checkpoint's write; not held and False where none was met in time."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            if not is_being_written(run_dir):
                time.sleep(0.001)
                continue
            time.sleep(chance.uniform(0, WRITE_SECONDS))  # a write's first moment is not its only one
            hold(pid)
            if is_being_written(run_dir):
                return True
            os.kill(pid, signal.SIGCONT)
    return False
