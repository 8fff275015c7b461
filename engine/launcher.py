"""More than one device: torchrun and its processes below one that answers for them. Needs no torch itself.

The supervisor knows one process, and this is it: it takes the signals, passes them to the processes that train (never
to torchrun, which would end them by a clock of its own), and its exit code is that of the run's own `end` event:
torchrun leaves 1 even where a run was stopped in good order.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

from engine.errors import ExitCode
from engine.falsifiers import Contract
from engine.rank_process import (
    DIRECTORY,
    STARTED_VARIABLE,
    Record,
    die_with_parent,
    forget_records,
    read_records,
)
from engine.recorder import Recorder
from engine.stop import SAME_REQUEST_SECONDS
from engine.stream import End, decode_line

_POLL_SECONDS = 0.1
FOLLOW_SECONDS = 15.0
"""So long the others may stay after rank 0, which speaks for all of them, has ended; one may hang in a collective."""
LOST_SECONDS = 300.0
"""So long rank 0 may stay after another is lost: to save what it has, or, on a GPU, in a collective that never ends."""
_SHUTDOWN_SECONDS = 86_400
"""What torchrun gives the rest when one process is gone: they are ours to end, after rank 0 has saved what it can."""

_IN_ORDER = ("COMPLETED", "STOPPED")


class Launcher:
    """Starts the processes of one run, and stays until the last one is gone.

    Args:
        run_dir: of the run.
        run: its uuid.
        contract: for the `end` event where no process could write it.
        devices: how many processes.
        started: `time.monotonic()` of this one's start.
    """

    def __init__(self, run_dir: Path, run: str, contract: Contract, devices: int, started: float) -> None:
        self._run_dir, self._run, self._contract, self._devices = run_dir, run, contract, devices
        self._started = started
        self._stop: signal.Signals | None = None
        self._asked = 0.0
        self._again = False
        self._stacks = 0
        self._told: dict[int, int] = {}
        self._main_gone = self._lost_since = 0.0
        self._lost: list[Record] = []

    def run(self) -> int:
        """The whole run; returns its exit code (see `engine.errors.ExitCode`)."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_stop)
        if hasattr(signal, "SIGUSR1"):
            faulthandler.unregister(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, self._on_stacks)
        stream = self._run_dir / "events.jsonl"
        written = stream.stat().st_size if stream.exists() else 0
        try:
            (self._run_dir / DIRECTORY).mkdir(mode=0o700, exist_ok=True)
            forget_records(self._run_dir)
            child = self._start()
        except OSError as error:
            return self._crashed(f"torchrun cannot be started: {error}")
        try:
            while child.poll() is None:
                self._look()
                if self._again:
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_POLL_SECONDS)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            self._kill(read_records(self._run_dir).values())
        if self._again:
            return ExitCode.INTERRUPTED
        end = self._end_after(stream, written)
        if end is not None:
            return ExitCode.UNDECIDED if end.exit_code is None else end.exit_code
        if self._stop is not None and not self._gone():
            return self._finish("STOPPED", f"{self._stop.name} in phase start", ExitCode.INTERRUPTED)
        return self._crashed(self._why(child.returncode))

    def _why(self, code: int) -> str:
        """What happened where no process was left to say it."""
        if code < 0:
            return f"torchrun was ended by {_signal_name(-code)}, and the processes of the run with it"
        # Who was lost first; then who said nothing: who said how it ends may have ended because of those.
        causes = self._lost or [record for record in self._gone() if not record.status] or self._gone()
        told = "; ".join(str(record) for record in causes) or "no process came as far as to say who it is"
        return f"{told}; torchrun ended with exit code {code}, see launch.log"

    def _start(self) -> subprocess.Popen[bytes]:
        """torchrun in our process group, which the kernel ends with us: `python -P`, as everything here."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment = {
            # torchrun would say 1, and warn; processes that share the cores without a word would take all of them each.
            "OMP_NUM_THREADS": str(max(1, cores // self._devices)),
            # One machine: no name of it needs to resolve.
            **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform.startswith("linux") else {}),
            **os.environ,
            "PYTHONSAFEPATH": "1",
            STARTED_VARIABLE: repr(self._started),
        }
        command = [sys.executable, "-P", "-m", "torch.distributed.run"]
        command += ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(self._devices)]
        command += ["--max-restarts", "0", "--shutdown-timeout", str(_SHUTDOWN_SECONDS)]
        command += ["--no-python", sys.executable, "-P", "-m", "engine", str(self._run_dir)]
        parent = os.getpid()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env=environment,
            preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509 - there is no other thread here
        )

    def _look(self) -> None:
        """Passes on what was asked for, to those that have not heard it yet, and ends who stays too long."""
        records = read_records(self._run_dir)
        stacks, self._stacks = self._stacks, 0
        for record in records.values():
            if stacks:
                _signal(record, signal.SIGUSR1)
            if self._stop is not None and self._told.get(record.rank) != record.pid:
                self._told[record.rank] = record.pid
                _signal(record, self._stop)
        now, gone = time.monotonic(), [record for record in records.values() if not record.alive]
        if any(record.rank == 0 for record in gone):
            self._main_gone = self._main_gone or now
        if lost := [record for record in gone if record.status not in _IN_ORDER]:
            self._lost, self._lost_since = self._lost or lost, self._lost_since or now
        if (self._main_gone and now - self._main_gone > FOLLOW_SECONDS) or (
            self._lost_since and now - self._lost_since > LOST_SECONDS
        ):
            self._kill(records.values())

    def _kill(self, records: Iterable[Record]) -> None:
        for record in records:
            _signal(record, signal.SIGKILL)

    def _gone(self) -> list[Record]:
        """The processes that did not end in good order."""
        records = read_records(self._run_dir).values()
        return [record for record in records if record.status not in _IN_ORDER]

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._stop is None:
            self._stop, self._asked = signal.Signals(number), now
        elif now - self._asked >= SAME_REQUEST_SECONDS:
            self._again = True

    def _on_stacks(self, number: int, frame: FrameType | None) -> None:
        self._stacks += 1

    def _end_after(self, stream: Path, offset: int) -> End | None:
        """The `end` event of this attempt."""
        try:
            with stream.open("rb") as file:
                file.seek(offset)
                events = [decode_line(line) for line in file if b'"end"' in line and line.endswith(b"\n")]
        except OSError:
            return None
        return next((event for event in reversed(events) if isinstance(event, End)), None)

    def _crashed(self, reason: str) -> int:
        return self._finish("CRASHED", reason, ExitCode.UNDECIDED)

    def _finish(self, status: str, reason: str, code: ExitCode) -> int:
        """Writes the end that nobody else is left to write."""
        try:
            recorder = Recorder(self._run_dir / "events.jsonl", self._run, self._contract)
            seconds = time.monotonic() - self._started
            recorder.finish(
                End(status=status, reason=reason, exit_code=code, steps=recorder.highest_step, seconds=seconds)
            )
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError):
                print(f"error: {self._run_dir}: {reason}; {error}", file=sys.stderr, flush=True)
        return code


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _signal(record: Record, number: int) -> None:
    if record.alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, number)
