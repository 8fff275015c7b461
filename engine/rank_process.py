"""What the processes of one run know of each other before torch is there: their places, and what became of each.

Every process keeps one small file below the run directory, `ranks/rank-001.json`: who it is, and at its end how it
ended. From these the others, and the launcher, can name the one that is gone. Needs no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from engine.errors import ConfigError
from engine.stop import StopRequest
from engine.text import clean

DIRECTORY = "ranks"
STARTED_VARIABLE = "KD_RUN_STARTED"
"""`time.monotonic()` of the launcher's start: a smoke's budget counts from there."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Seat:
    """The place of this process among those of a run, as torchrun names it."""

    rank: int
    """0 is the one that writes the stream and the checkpoints."""
    world: int
    local: int
    """Number of its device on this machine."""


@dataclass(frozen=True)
class Record:
    """One process of a run; `status`, `reason` and `exit_code` are those of its end, empty while there is none."""

    rank: int
    pid: int
    start_ticks: int
    ready: bool = False
    """It has loaded what it needs to meet the others."""
    status: str = ""
    reason: str = ""
    exit_code: int = 0

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return start_ticks(self.pid) == self.start_ticks

    def __str__(self) -> str:
        if self.status:
            return f"rank {self.rank} ended: {self.status}: {self.reason}"
        return f"rank {self.rank} (pid {self.pid}) {'runs' if self.alive else 'is gone without a word, as if killed'}"


def seat_of(environ: Mapping[str, str]) -> Seat | None:
    """The place that torchrun gave to this process; None where it did not start it.

    Raises:
        ConfigError: RANK, WORLD_SIZE and LOCAL_RANK are not the numbers of one place.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in environ:
        return None
    try:
        rank, world, local = (int(environ.get(name, "")) for name in names)
    except ValueError:
        rank, world, local = -1, 0, 0
    if not (0 <= rank < world and local >= 0):
        given = ", ".join(f"{name} {clean(environ.get(name, 'not set'), 20)}" for name in names)
        raise ConfigError(given, expected="the three numbers that torchrun sets", do="unset RANK, or start by torchrun")
    return Seat(rank, world, local)


def record_path(run_dir: Path, rank: int) -> Path:
    """Where a process keeps its record."""
    return run_dir / DIRECTORY / f"rank-{rank:03}.json"


def write_record(
    run_dir: Path, rank: int, status: str = "", reason: str = "", exit_code: int = 0, *, ready: bool = False
) -> None:
    """Says who this process is and, with a status, how it ends. What the disk does not take is not said."""
    path = record_path(run_dir, rank)
    fields = {
        "rank": rank,
        "pid": os.getpid(),
        "start_ticks": start_ticks(os.getpid()),
        "ready": ready,
        "status": status,
        "reason": clean(reason, 2_000),
        "exit_code": int(exit_code),
    }
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(fields) + "\n", encoding="utf-8")
        temporary.replace(path)


def read_records(run_dir: Path) -> dict[int, Record]:
    """The processes that said who they are, by rank; what cannot be read is left out."""
    found: dict[int, Record] = {}
    for path in sorted((run_dir / DIRECTORY).glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            record = Record(**json.loads(path.read_text(encoding="utf-8")))
            found[record.rank] = record
    return found


def forget_records(run_dir: Path) -> None:
    """Removes what an earlier attempt left, so that nobody takes its processes for ours.

    Raises:
        OSError: they cannot be removed.
    """
    for path in (run_dir / DIRECTORY).glob("rank-*.json"):
        path.unlink()


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since the boot; 0 for one that is gone or a zombie.

    Where there is no /proc, 1 for any process that can be signalled.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return 0
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return 0
        except OSError:
            return 1
        return 1
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when its parent ends, however that ends; elsewhere than on Linux nothing.

    Args:
        parent: who it should be; where it is gone already, so are we.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def log_of_its_own(run_dir: Path, rank: int) -> None:
    """Sends what this process prints to `ranks/rank-001.log`, so that launch.log stays rank 0's."""
    path = run_dir / DIRECTORY / f"rank-{rank:03}.log"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        print(f"warning: rank {rank}: {path}: {error.strerror}: its lines come here", file=sys.stderr, flush=True)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)


def started_at(environ: Mapping[str, str]) -> float:
    """`time.monotonic()` at which the run began: the launcher's, where there is one."""
    now = time.monotonic()
    try:
        given = float(environ.get(STARTED_VARIABLE, "nan"))
    except ValueError:
        return now
    return given if 0 <= given <= now else now


class FirstStop(StopRequest):
    """Remembers the first signal and no other.

    The launcher is who ends everything at a second request. What reaches a single process besides may be torchrun,
    which ends the rest with SIGTERM as soon as one of them is gone.
    """

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """What `signal.signal` takes."""
        if self.signal is None:
            super().__call__(number, frame)
