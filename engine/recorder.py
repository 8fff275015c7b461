"""Where everything that happens in a run goes: the stream, the judge, the human lines and the heartbeat.

Needs no torch, so that it stands before torch is imported: from its first second a run can be told from a hung one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from engine.errors import ExitCode
from engine.falsifiers import FAIL, PENDING, Contract, Judge
from engine.human import human_lines
from engine.stream import VERSION, End, Event, Heartbeat, Log, Phase, Run, Step, Verdict, Vitals, decode_line
from engine.stream_writer import StreamWriter
from engine.vitals import Machine, proc_bytes

HEARTBEAT_SECONDS = 5.0
VITALS_SECONDS = 10.0
_FIRST_VITALS_SECONDS = 1.0
"""After the start: so long the processor is watched for its first figure."""
_WATCH_SECONDS = 0.5
_LOCK_SECONDS = 2.0
DeviceMemory = Callable[[], tuple[int, int] | None]


class Writer(Protocol):
    """Where events go; `engine.stream_writer.StreamWriter` is one."""

    failed_writes: int

    @property
    def pending(self) -> int:
        """Events that wait to be written."""

    def emit(self, event: Event) -> Event:
        """Takes an event and returns it as stamped."""

    def sync(self) -> None:
        """Returns when everything is safe."""

    def close(self) -> None:
        """Takes no more."""


class Unwritten:
    """Stamps events and keeps none: of several processes that train one run, rank 0 alone writes its stream."""

    failed_writes = 0
    pending = 0

    def __init__(self, run: str) -> None:
        self._run, self._seq = run, -1

    def emit(self, event: Event) -> Event:
        """The event with version, run, seq and time."""
        self._seq += 1
        return msgspec.structs.replace(event, v=VERSION, run=self._run, seq=self._seq, t=time.time())

    def sync(self) -> None:
        """Nothing is kept, so nothing is waited for."""

    def close(self) -> None:
        """There is nothing to close."""


class Recorder:
    """Writes events, judges them and prints them, all under one lock, so that stream and verdicts never disagree.

    Args:
        path: `events.jsonl`; with a writer of its own a file that is not there, and so no past.
        run: uuid of the run.
        contract: what is judged as the run goes.
        writer: takes the events; None for the file.
    """

    def __init__(self, path: Path, run: str, contract: Contract, writer: Writer | None = None) -> None:
        self._lock = threading.RLock()
        self._writer = StreamWriter(path, run) if writer is None else writer
        self._judge = Judge(contract)
        self._run: Run | None = None
        self.run_id = run
        self.attempt = 1
        self.first_run: Run | None = None
        """Of the attempt that made the run's first step; None while there is none."""
        self._highest_step = 0
        self._unstated: list[Verdict] = []
        self._ended = threading.Event()
        self._device: tuple[int, int] | None = None
        self._failures_told = 0
        self.device_memory: DeviceMemory = lambda: None
        self.machine = Machine(path.parent)
        self.on_vitals: Callable[[Vitals], None] = lambda vitals: None
        """Called after each of them, from their thread."""
        self.phase, self.step = "start", 0
        self.phase_seconds: dict[str, float] = {}
        self._phase_started = time.monotonic()
        self.fatal: Verdict | None = None
        self._replay(path)

    @property
    def parts(self) -> int | None:
        """Parts of a device's share of a batch in this attempt; None before its `run` event."""
        return None if self._run is None else self._run.accumulation

    @property
    def highest_step(self) -> int:
        """The last step that any attempt made, as far as the stream tells."""
        return max(self.step, self._highest_step)

    @property
    def verdicts(self) -> list[Verdict]:
        """Every falsifier that applies, as judged so far."""
        with self._lock:
            return self._judge.verdicts

    def emit(self, event: Event) -> None:
        """Appends an event, judges it, appends the verdicts that it changed, and prints what a person would read."""
        with self._lock:
            if self._ended.is_set():
                return
            if isinstance(event, Run):
                event = msgspec.structs.replace(event, attempt=self.attempt)
                self._run = event
            elif isinstance(event, Phase):
                self._change_phase(event.name)
            elif isinstance(event, Step):
                event = msgspec.structs.replace(event, again=event.step <= self._highest_step)
                self.step = event.step
            stamped = self._writer.emit(event)
            if stamped.seq < 0:  # left out of the stream, so nobody else could judge it
                return
            changed = self._judge.observe(stamped)
            self._print(stamped)
            if isinstance(event, Run):
                changed, self._unstated = [*self._unstated, *changed], []
            for verdict in changed:
                self._print(self._writer.emit(verdict))
                if verdict.verdict == FAIL and verdict.severity == "fatal" and self.fatal is None:
                    self.fatal = verdict
            if not isinstance(event, End):  # nothing follows the end
                self._tell_failures()

    def sync(self) -> None:
        """Waits until the disk has the stream so far; raises OSError where it refuses."""
        with self._lock:
            self._writer.sync()

    def _replay(self, path: Path) -> None:
        """Judges what earlier attempts left in the stream, so that this one goes on where they stopped."""
        if not path.is_file():  # a device or a pipe has no past
            return
        stated: dict[str, str] = {}
        runs = 0
        latest: Run | None = None
        with path.open("rb") as file:
            for line in file:
                event = decode_line(line)
                if event is None:
                    continue
                self._judge.observe(event)
                if isinstance(event, Run):
                    runs, latest = runs + 1, event
                elif isinstance(event, Step):
                    self.first_run = self.first_run or latest
                    self._highest_step = max(self._highest_step, event.step)
                elif isinstance(event, Verdict):
                    stated[event.id] = event.verdict
        self.attempt = runs + 1
        judged = [v for v in self._judge.verdicts if v.verdict != PENDING]
        # A process that was killed between an event and the verdict that it brought never said the verdict.
        self._unstated = [v for v in judged if stated.get(v.id) != v.verdict]
        self.fatal = next((v for v in judged if v.verdict == FAIL and v.severity == "fatal"), None)

    def log(self, message: str, level: str = "info") -> None:
        """A line for the operator."""
        self.emit(Log(level=level, message=message))

    def enter(self, phase: str, detail: str = "", budget_seconds: float | None = None) -> None:
        """Begins a phase."""
        self.emit(Phase(name=phase, detail=detail, budget_seconds=budget_seconds))

    def finish(self, end: End) -> bool:
        """Appends the `end` event and closes the stream; False if it had been closed already.

        Raises:
            OSError: the disk did not take the whole stream; it is closed all the same.
        """
        with self._lock:
            if self._ended.is_set():
                return False
            self._change_phase("")
            self.emit(end)
            self._ended.set()
            self.machine.close()
            self._writer.close()
            return True

    def start_heartbeat(self, deadline: float | None, started: float) -> None:
        """Starts the threads that say the process lives and how the machine does, and end a smoke over its budget.

        Args:
            deadline: `time.monotonic()` after which the process is ended with exit code 4, whatever it is doing.
            started: `time.monotonic()` when the engine started.
        """
        self.emit(self._beat())
        threads: dict[str, Callable[[], None]] = {
            "heartbeat": lambda: self._watch(deadline, started),
            "device": self._sample,
            "vitals": self._look,
        }
        for name, work in threads.items():
            threading.Thread(target=work, name=name, daemon=True).start()

    def _watch(self, deadline: float | None, started: float) -> None:
        due = time.monotonic() + HEARTBEAT_SECONDS
        while not self._ended.wait(min(_WATCH_SECONDS, max(0.0, due - time.monotonic()))):
            now = time.monotonic()
            if deadline is not None and now > deadline:
                self._overran(now - started)
                return
            if now >= due:
                due = now + HEARTBEAT_SECONDS
                self.emit(self._beat())

    def _overran(self, seconds: float) -> None:
        """Ends the process: the main thread sits in a call that cannot be interrupted, and nobody else is there."""
        end = End(
            status="TIMEOUT",
            reason=f"the time budget ended in phase {self.phase}, after {self.step} steps",
            exit_code=ExitCode.TIMEOUT,
            steps=self.step,
            seconds=seconds,
        )
        overran = True
        try:
            # The main thread may hold the lock in a write that hangs; what it writes then does not matter any more.
            if self._lock.acquire(timeout=_LOCK_SECONDS):
                try:
                    overran = self.finish(end)
                finally:
                    self._lock.release()
        except OSError as error:
            self._say(f"error: the stream could not be closed: {error}")
        finally:
            if overran:
                os._exit(ExitCode.TIMEOUT)

    def _sample(self) -> None:
        """Asks for the device's memory in a thread of its own: a driver that hangs must not stop the heartbeat."""
        while not self._ended.wait(HEARTBEAT_SECONDS / 2):
            try:
                self._device = self.device_memory()
            except Exception:  # noqa: BLE001 - whatever a driver raises, it is no figure and nothing more
                self._device = None

    def _look(self) -> None:
        """Looks at the machine in a thread of its own, for the same reason: a disk can hang as well as a driver."""
        wait = min(_FIRST_VITALS_SECONDS, VITALS_SECONDS)
        while not self._ended.wait(wait):
            wait = VITALS_SECONDS
            try:
                vitals = self.machine.look()
                self.emit(vitals)
                self.on_vitals(vitals)
            except Exception as error:  # noqa: BLE001 - they only tell, and must not end what they tell of
                self._say(f"warning: vitals: {type(error).__name__}: {error}")

    def _beat(self) -> Heartbeat:
        device = self._device
        return Heartbeat(
            phase=self.phase,
            step=self.step,
            rss_bytes=proc_bytes("/proc/self/status", "VmRSS") or 0,
            host_free_bytes=proc_bytes("/proc/meminfo", "MemAvailable"),
            device_used_bytes=device[0] if device else None,
            device_total_bytes=device[1] if device else None,
        )

    def _tell_failures(self) -> None:
        """Says once, when the disk takes lines again, that for a while it did not."""
        failures = self._writer.failed_writes - self._failures_told
        if failures and not self._writer.pending:
            self._failures_told = self._writer.failed_writes
            self.log(
                f"the stream could not be written {failures:,} times and was caught up; is the disk full?", "warning"
            )

    def _change_phase(self, name: str) -> None:
        now = time.monotonic()
        self.phase_seconds[self.phase] = self.phase_seconds.get(self.phase, 0.0) + now - self._phase_started
        self.phase, self._phase_started = name, now

    def _print(self, event: Event) -> None:
        for line in human_lines(event, self._run):
            self._say(line)

    def _say(self, line: str) -> None:
        try:
            try:
                print(line, flush=True)
            except UnicodeEncodeError:  # a file name that is not UTF-8, or an output that takes ASCII only
                print(line.encode("ascii", "backslashreplace").decode(), flush=True)
        except (OSError, ValueError):
            return  # a full disk, or nobody there to read: the stream has it all, and training goes on


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far, 0 where the platform does not tell."""
    return proc_bytes("/proc/self/status", "VmHWM") or 0
