"""What stands on a host: every run there, made from here or from elsewhere, and what else takes room."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from dispatch.manifest import ExitRecord, decode
from dispatch.places import Reach
from dispatch.streams import resolve
from dispatch.tool_client import Answer, ask, python_of
from dispatch.transport import Transport
from engine.errors import RunError
from engine.text import clean

MODULE: Final = "dispatch.host_runs"

State = Literal["running", "starting", "new", "ended", "lost", "unknown"]
"""New: never started. Lost: no process and no exit record. Unknown: no run's directory, or one that cannot be read."""
What = Literal["unused", "damaged", "part", "removed"]


class HostCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A committed checkpoint on a host, as its own manifest tells; nothing of it is verified."""

    name: str
    kinds: tuple[str, ...] = ()
    best_loss: float | None = None
    bytes: int
    sha256: str | None
    """Of its manifest; None where that cannot be read."""

    @property
    def step(self) -> int:
        """The step that its name speaks of."""
        return int(self.name.rpartition("-")[2])


class HostRun(msgspec.Struct, frozen=True, kw_only=True):
    """A run's directory on a host. Times are Unix seconds of that host."""

    id: str
    run: str | None
    label: str | None
    mode: str | None
    by: str | None
    """The machine whose console made it."""
    created: float | None
    state: State
    exit: ExitRecord | None = None
    step: int | None = None
    last: float | None = None
    """When its newest event was written."""
    changed: float
    """When its newest file was written."""
    bytes: int
    events_bytes: int
    """Of its stream, whole lines."""
    checkpoints: tuple[HostCheckpoint, ...]
    """Newest first."""
    model_bytes: int
    """0: it has no model."""
    others: tuple[str, ...] = ()
    """What has a checkpoint's or the model's name and is no directory: a symbolic link, say."""


class Rest(msgspec.Struct, frozen=True, kw_only=True):
    """Something besides runs that takes room on a host."""

    name: str
    """Below the host's run directory: `store/HASH`."""
    what: What
    bytes: int
    seen: float
    """When it was put there, or last written to."""
    busy: bool
    used: bool


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """All of a host."""

    host: str = ""
    base: str
    time: float
    """Now, by the host's clock."""
    free: int
    """Bytes."""
    runs: tuple[HostRun, ...]
    """Newest first."""
    rest: tuple[Rest, ...]


@functools.cache
def _source() -> str:
    return Path(__file__).with_name("host_runs.py").read_text(encoding="utf-8")


async def ask_runs(
    transport: Transport,
    op: str,
    *,
    python: str | None = None,
    say: Callable[[str], None] | None = None,
    **arguments: object,
) -> Answer:
    """An operation of `dispatch.host_runs`; see `tool_client.ask`."""
    return await ask(transport, op, python=python, say=say, modules=[[MODULE, _source()]], **arguments)


def typed(kind: type[Any], answer: Answer, host: str) -> Any:
    """An answer as what it should be, its texts cleaned.

    Raises:
        RunError: it is something else.
    """
    return decode(kind, json.dumps(answer).encode(), host)


async def base_of(reach: Reach, host: str) -> str:
    """The directory on a host below which everything stands.

    Raises:
        ConfigError, TransportError: it is no host, or cannot be reached.
    """
    return await resolve(reach.transport(host), reach.host(host).run_dir)


async def survey(reach: Reach, host: str, say: Callable[[str], None] | None = None) -> Survey:
    """Looks at everything below a host's run directory; changes nothing.

    Raises:
        ConfigError: no host's name.
        TransportError: it cannot be reached: what is there is unknown.
        HostToolError: it cannot be looked at.
    """
    transport = reach.transport(host)
    base = await base_of(reach, host)
    answer = await ask_runs(transport, "runs", python=await python_of(transport), say=say, base=base)
    found: Survey = typed(Survey, answer, host)
    newest = sorted(found.runs, key=lambda each: (each.created or 0.0, each.id), reverse=True)
    return msgspec.structs.replace(found, host=host, runs=tuple(newest))


async def look(transport: Transport, run_dir: str, python: str) -> HostRun:
    """One run by its directory on a host.

    Raises:
        RunError: there is none.
        TransportError, HostToolError: it cannot be asked.
    """
    answer = await ask_runs(transport, "run", python=python, run_dir=run_dir)
    if answer.get("present") is not True:
        raise RunError(f"{transport.host}: {clean(run_dir, 300)}: no such run there", do="it may have been cleaned up")
    found: HostRun = typed(HostRun, answer, transport.host)
    return found
