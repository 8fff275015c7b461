"""Stopping a run from afar: what is waited for meanwhile, and what it left when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Final

from dispatch.manifest import EVENTS
from dispatch.places import Place
from dispatch.runs import Stop
from dispatch.survey import HostCheckpoint, HostRun, look
from dispatch.tool_client import Say
from dispatch.transport import TransportError
from engine.errors import KdError, StreamError
from engine.stream import Event, Heartbeat, Phase, decode_line

LOOK_SECONDS: Final = 2.0
TELL_SECONDS: Final = 10.0
"""Between two lines while the same phase is waited for."""
TAIL_BYTES: Final = 256 << 10
_UNINTERRUPTED: Final = {
    "import": "importing torch cannot be interrupted",
    "load-teacher": "a file that is being loaded is loaded to its end",
    "load-student": "a file that is being loaded is loaded to its end",
    "resume": "a file that is being loaded is loaded to its end",
    "compile": "compiling cannot be interrupted",
    "train": "its step ends (the first one may compile), then a checkpoint is committed",
}


@dataclass(frozen=True, slots=True)
class Stopped:
    """What became of a stop, and of what the run had done."""

    stop: Stop
    step: int | None
    """The last one made; None where there was none, or nobody can tell."""
    checkpoint: HostCheckpoint | None
    """The newest that is committed."""
    mode: str | None = "train"
    """A smoke saves nothing, and nobody expects it to; a preparation saves no steps."""

    def describe(self) -> str:
        """One line: `CANCELLED: exit code 130; the GPU is free; 120 steps saved in checkpoints/ckpt-step-000120`."""
        if self.step is None or self.mode != "train" or self.stop.result == "still_running":
            return self.stop.describe()
        if self.checkpoint is None and self.step == 0:
            saved = "no step was made"
        elif self.checkpoint is None:
            saved = f"none of its {self.step:,} steps is saved in a checkpoint"
        else:
            of = "" if self.checkpoint.step == self.step else f" of {self.step:,}"
            saved = f"{self.checkpoint.step:,}{of} steps saved in checkpoints/{self.checkpoint.name}"
        return f"{self.stop.describe()}; {saved}"


async def stop_run(place: Place, *, grace: float, kill: bool, say: Say) -> Stopped:
    """Asks a run to stop and waits for its end, telling what it waits for.

    Args:
        place: where the run is.
        grace: seconds to wait for the end.
        kill: SIGKILL after the grace.
        say: told what is waited for.

    Raises:
        RunError: there is nothing to stop.
        TransportError: the host could not be asked; whether the run stops is unknown.
    """
    telling = asyncio.create_task(_tell(place, grace, kill, say))
    try:
        done = await place.stop(grace=grace, kill=kill)
    finally:
        telling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await telling
    left: HostRun | None = None
    with contextlib.suppress(KdError):  # the stop stands, whatever can be told of what is left
        left = await look(place.direct or place.transport, place.run_dir, place.python)
    newest = left.checkpoints[0] if left and left.checkpoints else None
    return Stopped(done, left.step if left else None, newest, left.mode if left else None)


async def _tell(place: Place, grace: float, kill: bool, say: Say) -> None:
    """Says every now and then in which phase the run is."""
    began, told, before = time.monotonic(), 0.0, ""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        waited = time.monotonic() - began
        if kill and waited > grace:
            say("the grace is over: SIGKILL")
            return
        try:
            events = await _newest(place)
        except TransportError as error:
            say(f"{error}; the stop may have reached the run, and may not")
            return
        phase, seconds = where(events)
        if phase and (phase != before or waited - told >= TELL_SECONDS):
            told, before = waited, phase
            why = f": {_UNINTERRUPTED[phase]}" if phase in _UNINTERRUPTED else ""
            say(
                f"asked {waited:.0f} s ago; it is in phase {phase}" + (f" for {seconds:.0f} s" if seconds else "") + why
            )


async def _newest(place: Place) -> list[Event]:
    """The end of the stream, as far as it can be read."""
    path, transport = f"{place.run_dir}/{EVENTS}", place.direct or place.transport
    found = await transport.stat(path)
    if found is None:
        return []
    raw = await transport.read(path, max(0, found.size - TAIL_BYTES), TAIL_BYTES)
    events = []
    for line in raw.split(b"\n")[:-1]:
        with contextlib.suppress(StreamError):
            event = decode_line(line)
            events += [event] if event is not None else []
    return events


def where(events: list[Event]) -> tuple[str, float | None]:
    """The phase that a run is in by the end of its stream, and for how many seconds; None where that is not told."""
    phase, since = "", None
    for event in events:
        if isinstance(event, Phase):
            phase, since = event.name, event.t
        elif isinstance(event, Heartbeat) and event.phase != phase:
            phase, since = event.phase, None
    return phase, None if since is None else max(0.0, events[-1].t - since)
