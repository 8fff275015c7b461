"""What the supervisor of a run wrote down: stalls that it saw, signals that it sent, starts and boots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from console.run_files import read_small
from dispatch.ended import JOURNAL
from dispatch.supervisor import MAX_JOURNAL_BYTES
from engine.errors import RunError
from engine.text import clean


@dataclass(frozen=True)
class SeenStall:
    """A stall as the supervisor recorded it; `since` in Unix seconds of the host's clock.

    `process` is the kernel's letter for the trainer's state. `ended`: the supervisor ended the trainer for it.
    """

    phase: str
    since: float
    seconds: float
    process: str = ""
    stacks: bool = False
    recovered: bool = False
    ended: bool = False


@dataclass(frozen=True)
class Journal:
    """What `supervisor.jsonl` tells of a run as a whole."""

    stalls: tuple[SeenStall, ...] = ()
    starts: int = 0
    """How often the trainer was started."""
    boots: tuple[str, ...] = ()
    """Of each start the boot of the host, empty where it is not told."""
    recorded: frozenset[int] = frozenset()
    """Numbers of the attempts, from 1, whose end is on record."""
    killed_by_stop: bool = False
    """Somebody stopped it, and had to kill it."""
    unkillable: int = 0
    """Processes that not even SIGKILL ended."""

    @property
    def rebooted_after(self) -> tuple[int, ...]:
        """Numbers of the attempts that nobody saw end, and after which the host was another boot."""
        pairs = zip(self.boots, self.boots[1:], strict=False)
        moved = (number for number, (one, other) in enumerate(pairs, 1) if one and other and one != other)
        return tuple(number for number in moved if number not in self.recorded)


def read_journal(directory: Path) -> Journal:
    """The journal of a run directory; what cannot be read of it is passed over."""
    stalls: list[SeenStall] = []
    boots: list[str] = []
    recorded: set[int] = set()
    killed, unkillable = False, 0
    for line in _lines(directory):
        match line.get("event"):
            case "starting":
                boots.append(_boot(line.get("supervisor")))
            case "started" if not boots:  # a journal whose beginning is lost
                boots.append(_boot(line.get("supervisor")))
            case "exited" if boots:
                recorded.add(len(boots))
            case "stall":
                stalls.append(_stall(line))
            case "recovered" if stalls:
                stalls[-1] = replace(stalls[-1], recovered=True)
            case "signal" if line.get("by") == "stall" and stalls:
                stalls[-1] = replace(stalls[-1], ended=True)
            case "signal" if line.get("by") == "stop" and line.get("signal") == 9:
                killed = True
            case "unkillable" if isinstance(line.get("pids"), list):
                unkillable += len(line["pids"])
    return Journal(tuple(stalls), len(boots), tuple(boots), frozenset(recorded), killed, unkillable)


def _stall(line: dict[str, Any]) -> SeenStall:
    return SeenStall(
        phase=clean(str(line.get("phase", "")), 80),
        since=_number(line.get("since")),
        seconds=max(0.0, _number(line.get("seconds"))),
        process=clean(str(line.get("process", "")), 4),
        stacks=line.get("stacks") is True,
    )


def _boot(identity: object) -> str:
    return str(identity.get("boot_id", "")) if isinstance(identity, dict) else ""


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        return 0.0
    with suppress(OverflowError):
        return float(value) if math.isfinite(value) else 0.0
    return 0.0


def _lines(directory: Path) -> Iterator[dict[str, Any]]:
    try:
        raw = read_small(directory / JOURNAL, MAX_JOURNAL_BYTES) or b""
    except RunError:
        return
    for line in raw.split(b"\n"):
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                yield value
