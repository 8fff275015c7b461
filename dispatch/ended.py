"""What the files of an ended run say of it: attempts, outcome, verdicts, inputs; the manifest completed with them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from dispatch.manifest import (
    EVENTS,
    EXIT,
    VERSION,
    Attempt,
    ExitRecord,
    Judged,
    Manifest,
    Outcome,
    decode,
)
from dispatch.supervisor import MAX_JOURNAL_BYTES, open_regular, read_regular
from engine.errors import ExitCode, KdError, RunError
from engine.stream import MAX_LINE_BYTES, End, Event, Inputs, Run, Step, Verdict, decode_line
from engine.text import clean

JOURNAL: Final = "supervisor.jsonl"
_MAX_EXIT_BYTES: Final = 1 << 20
_UNTOLD: Final = tuple(
    f'{{"event":"{kind}"'.encode()
    for kind in ("heartbeat", "vitals", "measure", "eval", "log", "phase", "projection", "checkpoint")
)
"""How lines begin that say nothing of a run as a whole; there are many, and they need not be read."""
_STEP: Final = b'{"event":"step"'


@dataclass
class Told:
    """What the stream says of a run as a whole."""

    run: Run | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    end: End | None = None
    """Only where nothing follows it: a later attempt may have ended without a word."""
    step: int | None = None
    """The last one that was made."""


def read_stream(path: Path) -> Told:
    """What a stream says of its run; lines that cannot be read are passed over, however long they are."""
    told, last_step = Told(), b""
    for line in _whole_lines(path):
        told.end = None
        if line.startswith(_STEP):
            last_step = line
        elif not line.startswith(_UNTOLD):
            _absorb(told, _event(line))
    step = _event(last_step) if last_step else None
    told.step = step.step if isinstance(step, Step) else None
    return told


def _whole_lines(path: Path) -> Iterator[bytes]:
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except OSError:
        return
    with os.fdopen(descriptor, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            if line.endswith(b"\n"):
                yield line


def _event(line: bytes) -> Event | None:
    with contextlib.suppress(KdError):
        return decode_line(line)
    return None


def _absorb(told: Told, event: Event | None) -> None:
    if isinstance(event, Run):
        told.run = event
    elif isinstance(event, Inputs):
        told.inputs = dict(event.digests)
    elif isinstance(event, Verdict):
        told.verdicts[event.id] = event
    elif isinstance(event, End):
        told.end = event


def exit_record(directory: Path) -> ExitRecord | None:
    """How the last attempt's process ended, as its supervisor saw it."""
    path = directory / EXIT
    try:
        return decode(ExitRecord, read_regular(path, _MAX_EXIT_BYTES), str(path))
    except (OSError, RunError):
        return None


def attempts_of(directory: Path, record: ExitRecord | None) -> tuple[Attempt, ...]:
    """Every start of the trainer, from the supervisor's journal; `record` is the last one's end."""
    found: list[Attempt] = []
    for line in _journal(directory):
        when = line.get("t")
        moment = float(when) if isinstance(when, (int, float)) else None
        match line.get("event"):
            case "starting":
                found.append(Attempt(number=len(found) + 1, started=moment))
            case "exited" if found:
                with contextlib.suppress(msgspec.ValidationError):
                    found[-1] = _ended(found[-1], msgspec.convert({"v": 1, **line}, ExitRecord))
    if record is not None:  # the journal misses lines where the disk was full
        found[-1:] = [_ended(found[-1] if found else Attempt(number=1), record)]
    return tuple(found)


def _ended(attempt: Attempt, record: ExitRecord) -> Attempt:
    return Attempt(number=attempt.number, started=record.started, ended=record.ended, end=record.describe())


def _journal(directory: Path) -> Iterator[dict[str, Any]]:
    try:
        raw = read_regular(directory / JOURNAL, MAX_JOURNAL_BYTES)
    except OSError:
        return
    for line in raw.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                yield value


def outcome_of(told: Told, record: ExitRecord | None) -> Outcome:
    """How a run ended: the word of its stream where there is one, else what became of its process."""
    code = None if record is None else record.exit_code
    signal = None if record is None else record.signal
    end = told.end if record is None or record.wrote else None
    if end is not None:
        known = code if record is not None else end.exit_code
        return Outcome(status=end.status, reason=end.reason, exit_code=known, signal=signal, steps=end.steps)
    if record is None:
        return Outcome(status="LOST", reason="its end was not recorded", steps=told.step)
    status = "STOPPED" if code == ExitCode.INTERRUPTED else "CRASHED"
    reason = f"{record.describe()}, " + ("without an end event" if record.wrote else "before its first event")
    return Outcome(status=status, reason=reason, exit_code=code, signal=signal, steps=told.step)


def completed(directory: Path, manifest: Manifest) -> Manifest:
    """The manifest of an ended run with everything that its files say. The same files make the same manifest."""
    told, record = read_stream(directory / EVENTS), exit_record(directory)
    attempts = attempts_of(directory, record)
    ran = [each.ended - each.started for each in attempts if each.started is not None and each.ended is not None]
    run = told.run
    return msgspec.structs.replace(
        manifest,
        v=VERSION,
        ran_on=manifest.ran_on if manifest.remote is None else manifest.remote.facts,
        engine_versions={} if run is None else run.versions,
        device=None if run is None else f"{run.device} {clean(run.device_name, 200)}, {run.precision}",
        inputs=told.inputs,
        started=attempts[0].started if attempts else None,
        ended=attempts[-1].ended if attempts else None,
        seconds=sum(ran) if ran else None,
        attempts=attempts,
        outcome=outcome_of(told, record),
        verdicts=tuple(
            Judged(
                id=v.id,
                verdict=v.verdict,
                severity=v.severity,
                expected=v.expected,
                observed=v.observed,
                step=v.step,
            )
            for v in told.verdicts.values()
        ),
    )


def reopened(manifest: Manifest) -> Manifest:
    """The manifest of a run that goes on: without what it said of an end that is none any more."""
    return msgspec.structs.replace(manifest, ended=None, seconds=None, attempts=(), outcome=None, verdicts=())
