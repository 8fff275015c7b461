"""The tail of a run's stream, exact to the byte: no event lost, none twice, none before it is whole.

The cursor always stands at the beginning of a line and all that is kept between two reads is the cursor itself. A torn
last line is therefore read again rather than remembered: its writer may cut it back (a full disk, a resumed run) and
write another in its place. Each read begins one byte before the cursor, so that a file that was cut or replaced below
it is seen without asking for its size.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from dispatch import runs
from dispatch.liveness import Clocks, Liveness
from dispatch.manifest import EVENTS, EXIT, ExitRecord, RunState, SupervisorHeartbeat, decode
from dispatch.supervisor import HEARTBEAT
from dispatch.transport import MissingFile, Transport
from engine.errors import RunError, StreamError
from engine.stream import MAX_LINE_BYTES, Event, decode_line

READ_BYTES = 1 << 20
TICK_SECONDS = 1.0
CALM = 5
STATUS_SECONDS = 5.0
"""So long nothing has to arrive before the host is asked whether the run is still there, and between two questions."""
SUPERVISOR_SECONDS, UNMOVED_SECONDS = 60.0, 15.0
"""Between two looks at the supervisor's heartbeat, and since when without progress it is looked at more often."""
SUPERVISOR_SOON_SECONDS = 10.0
_MAX_EXIT_BYTES = 1 << 20
_MAX_HEARTBEAT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Batch:
    """What one read brought; empty once a second while nothing arrives, and at the end."""

    events: tuple[Event, ...]
    """Decoded lines; those of a later writer's event types are left out."""
    lines: tuple[bytes, ...]
    """All lines as they stand in the file, without their newlines."""
    offset: int
    """The cursor after this batch: bytes of whole lines so far. A follower that starts there continues exactly."""
    status: RunState
    """As last known; `ended` and `lost` stand in the last batch only."""
    ended: ExitRecord | None
    """How the trainer ended; in the last batch, unless the run is lost."""
    silent_seconds: float
    """Since the last line arrived, or since the following began; what was not asked for does not count."""
    liveness: Liveness | None = None
    """Link, process and progress, each by its own clock; None in the last batch."""
    rebooted: bool = False
    """The run is lost because its host was started anew; in the last batch."""


class Follower:
    """Follows a run directory through a transport.

    Args:
        transport: reaches the host.
        run_dir: the run's directory on the host.
        run: uuid that every event must carry; None takes the first event's.
        offset: where to begin; an `offset` of an earlier batch.
        python: the host's Python, for the supervisor's status.
        supervisor: what `python -P` is given to run the supervisor.
    """

    def __init__(
        self,
        transport: Transport,
        run_dir: str | PurePath,
        run: str | None = None,
        *,
        offset: int = 0,
        python: str = sys.executable,
        supervisor: Sequence[str] = runs.SUPERVISOR,
    ) -> None:
        self.offset = offset
        self.run = run
        self.latency_seconds: float | None = None
        """How long the host took for the last read that brought nothing."""
        self.clocks = Clocks()
        self._transport = transport
        self._run_dir = str(run_dir)
        self._events = f"{run_dir}/{EVENTS}"
        self._python = python
        self._supervisor = supervisor
        self._seq = -1

    async def batches(self, poll: float = 0.1) -> AsyncIterator[Batch]:
        """Yields what arrives until the run has ended and everything was read.

        Args:
            poll: seconds between two looks when something has just arrived; up to `CALM` times as long while nothing
                does. Whether the run has ended is asked that seldom too.

        Raises:
            StreamError: the file shrank below the cursor or was replaced, belongs to another run, or has a line that
                cannot be read; what stands before that line was yielded.
            TransportError: the host cannot be reached; the state of the run is unknown.
            RunError: the host says that this is no run directory.
        """
        status: RunState = "starting" if self.offset == 0 else "running"
        ended: ExitRecord | None = None
        heard = asked = ticked = time.monotonic()
        sought = looked = float("-inf")
        rebooted = False
        while True:
            began = time.monotonic()
            lines, events = await self._read()
            now = time.monotonic()
            self.clocks.heard(began, bool(lines), events)
            if lines:
                heard = ticked = now
                status = "running" if status == "starting" else status
                yield Batch(events, lines, self.offset, "running", None, 0.0, self.clocks.at_once())
                continue
            self.latency_seconds = now - began
            silent = self.clocks.silent_seconds
            if status in ("ended", "lost"):  # And a read after that found nothing more.
                yield Batch((), (), self.offset, status, ended, silent, None, rebooted)
                return
            if now - sought >= CALM * poll:
                sought = now
                ended = await self._exit_record()
                if ended is not None:
                    status = "ended"
                    continue
            if now - max(heard, asked) >= STATUS_SECONDS:
                asked = now
                told = await runs.status(
                    self._transport, self._run_dir, python=self._python, supervisor=self._supervisor
                )
                status, ended, rebooted = told.state, told.exit, told.rebooted
                if status in ("ended", "lost"):
                    continue
            unmoved = self.clocks.unmoved_seconds > UNMOVED_SECONDS
            if now - looked >= (SUPERVISOR_SOON_SECONDS if unmoved else SUPERVISOR_SECONDS):
                looked = now
                self.clocks.supervised(await self._supervisor_heartbeat())
            if now - ticked >= TICK_SECONDS:
                ticked = now
                yield Batch((), (), self.offset, status, None, silent, self.clocks.at_once())
            await asyncio.sleep(min(CALM * poll, max(poll, (now - heard) / CALM)))

    async def _read(self) -> tuple[tuple[bytes, ...], tuple[Event, ...]]:
        """The whole lines after the cursor, up to READ_BYTES of them, and their events; moves the cursor."""
        overlap = 1 if self.offset else 0
        try:
            data = await self._transport.read(self._events, self.offset - overlap, READ_BYTES + overlap)
        except MissingFile:
            if self.offset:
                raise self._broken("is gone", "the file that was followed") from None
            return (), ()
        if overlap and data[:1] != b"\n":
            what = "was replaced, or this is no line's beginning" if data else "is shorter than what was read of it"
            raise self._broken(what, "the file that was followed")
        return self._take(data[overlap:])

    def _take(self, data: bytes) -> tuple[tuple[bytes, ...], tuple[Event, ...]]:
        *whole, torn = data.split(b"\n")
        lines: list[bytes] = []
        events: list[Event] = []
        for line in whole:
            try:
                event = self._decode(line)
            except StreamError:
                # What stands before a bad line is handed over first; the next read begins with it, and ends here.
                if lines:
                    return tuple(lines), tuple(events)
                raise
            lines.append(line)
            self.offset += len(line) + 1
            if event is not None:
                events.append(event)
        if not lines and len(torn) > MAX_LINE_BYTES:
            raise self._too_long()
        return tuple(lines), tuple(events)

    def _decode(self, line: bytes) -> Event | None:
        if len(line) > MAX_LINE_BYTES:
            raise self._too_long()
        try:
            event = decode_line(line)
        except StreamError as error:
            raise self._broken(f"{error}") from None
        if event is None:
            return None
        if self.run is None:
            self.run = event.run
        if event.run != self.run:
            raise self._broken(f"an event of run {event.run}", f"run {self.run}, one run a directory")
        if event.seq <= self._seq:
            raise self._broken(f"seq {event.seq} after seq {self._seq}", "a growing seq")
        self._seq = event.seq
        return event

    def _too_long(self) -> StreamError:
        return self._broken("a line without an end", f"at most {MAX_LINE_BYTES:,} bytes a line")

    def _broken(self, what: str, expected: str | None = None) -> StreamError:
        return StreamError(f"{self._transport.host}: {self._events}, byte {self.offset:,}: {what}", expected=expected)

    async def _supervisor_heartbeat(self) -> SupervisorHeartbeat | None:
        path = f"{self._run_dir}/{HEARTBEAT}"
        try:
            beat = decode(SupervisorHeartbeat, await self._transport.read(path, 0, _MAX_HEARTBEAT_BYTES), path)
        except (MissingFile, RunError):  # an older supervisor, or one that is writing it
            return None
        return beat if beat.run == self.run else None

    async def _exit_record(self) -> ExitRecord | None:
        path = f"{self._run_dir}/{EXIT}"
        try:
            record = decode(ExitRecord, await self._transport.read(path, 0, _MAX_EXIT_BYTES), path)
        except MissingFile:
            return None
        if self.run is not None and record.run != self.run:
            raise StreamError(f"{self._transport.host}: {path}: of run {record.run}", expected=f"run {self.run}")
        return record
