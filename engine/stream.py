"""The training stream, version 1: typed events as JSON Lines, written once and read by every front end.

One event is one line. Every event carries `v` (format version), `run` (uuid), `seq` (0, 1, 2, … without a gap),
`t` (Unix seconds) and `event` (its type). NaN and infinity travel as the strings "NaN", "Infinity" and "-Infinity".
A reader skips events and fields that it does not know and refuses another `v`.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from engine.errors import StreamError
from engine.text import clean

VERSION = 1
MAX_LINE_BYTES = 64 * 1024
_MAX_TEXT = 8 * 1024
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=str.lower):
    """What every event carries; the writer stamps these four fields."""

    v: int = VERSION
    run: str = ""
    seq: int = -1
    t: float = 0.0


class Run(Event, frozen=True, kw_only=True):
    """What is being run, on what; the first thing known once the device is."""

    attempt: int
    mode: str
    config: str
    gate: str
    contract: str
    teacher: str | None
    student: str
    host: str
    device: str
    device_name: str
    precision: str
    world_size: int = 1
    versions: dict[str, str] = {}
    target_steps: int
    max_steps: int | None = None
    budget_seconds: float | None = None
    temperature: float
    alpha: float
    tokens_per_step: int


class Phase(Event, frozen=True, kw_only=True):
    """A phase begins and the one before it ends. `budget_seconds` is how long it may take before it counts as stalled."""

    name: str
    budget_seconds: float | None = None
    detail: str = ""


class Heartbeat(Event, frozen=True, kw_only=True):
    """Sent every few seconds from a thread of its own: the process lives, in this phase."""

    phase: str
    step: int
    rss_bytes: int
    host_free_bytes: int | None = None
    device_used_bytes: int | None = None
    device_total_bytes: int | None = None


class Measure(Event, frozen=True, kw_only=True):
    """One number that a falsifier is judged on, such as a self-check's error."""

    name: str
    value: float
    detail: str = ""


class Step(Event, frozen=True, kw_only=True):
    """One optimizer step. Losses in nats per labelled token; `seconds` runs from the end of the step before."""

    step: int
    loss: float
    ce: float
    kd: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float


class Eval(Event, frozen=True, kw_only=True):
    """Losses on the held-out part; top-1 agreement (0 to 1) and cosine of the logits with the teacher's, if there is one."""

    step: int
    loss: float
    ce: float
    kd: float
    agreement: float | None = None
    cosine: float | None = None
    tokens: int
    seconds: float


class Projection(Event, frozen=True, kw_only=True):
    """Wall time of a run of `target_steps`, in seconds, as 10th, 50th and 90th percentile."""

    target_steps: int
    p10_seconds: float
    p50_seconds: float
    p90_seconds: float
    step_seconds: float
    fixed_seconds: float
    samples: int


class Verdict(Event, frozen=True, kw_only=True):
    """A falsifier's state changed. `verdict` is PASS, FAIL, PENDING or UNKNOWN."""

    id: str
    verdict: str
    severity: str
    claim: str
    expected: str
    observed: str
    step: int


class Log(Event, frozen=True, kw_only=True):
    """A line for the operator; `level` is info, warning or error."""

    level: str
    message: str


class End(Event, frozen=True, kw_only=True):
    """The run is over. `status` is COMPLETED, FAILED, STOPPED, TIMEOUT or CRASHED."""

    status: str
    reason: str
    exit_code: int
    steps: int
    seconds: float
    summary: dict[str, float] = {}


EVENT_TYPES: tuple[type[Event], ...] = (
    Run, Phase, Heartbeat, Measure, Step, Eval, Projection, Verdict, Log, End
)  # fmt: skip
_BY_TAG: dict[str, type[Event]] = {cls.__name__.lower(): cls for cls in EVENT_TYPES}
_FLOAT_FIELDS: dict[str, frozenset[str]] = {
    tag: frozenset(f.name for f in msgspec.structs.fields(cls) if "float" in str(f.type))
    for tag, cls in _BY_TAG.items()
}
_decoder = msgspec.json.Decoder(
    Run | Phase | Heartbeat | Measure | Step | Eval | Projection | Verdict | Log | End
)
_encoder = msgspec.json.Encoder()


def encode(event: Event) -> bytes:
    """The event as one line with its newline, at most `MAX_LINE_BYTES`; over-long texts are cut and marked."""
    raw = _finite(msgspec.to_builtins(event))
    line = _encoder.encode(raw) + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raw = {k: v[:_MAX_TEXT] + "… (cut)" if isinstance(v, str) and len(v) > _MAX_TEXT else v for k, v in raw.items()}
        line = _encoder.encode(raw) + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise StreamError(f"event {raw.get('event')}: {len(line):,} bytes", expected=f"at most {MAX_LINE_BYTES:,}")
    return line


def decode_line(line: bytes) -> Event | None:
    """The event of one line, its texts cleaned for a terminal; None for an event type of a later writer.

    Raises:
        StreamError: not JSON, not an object, another format version, or a known event with wrong fields.
    """
    try:
        event: Event | None = _decoder.decode(line)
    except msgspec.ValidationError:
        event = _decode_slowly(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StreamError(f"stream: a line is not JSON: {clean(str(error), 200)}", expected="one event a line") from None
    if event is None:
        return None
    if event.v != VERSION:
        raise _unknown_version(event.v)
    # JSON holds control characters only as escapes: a plain ASCII line without a backslash has nothing to clean.
    if b"\\" in line or b"\x7f" in line or not line.isascii():
        return _cleaned(event)
    return event


def _decode_slowly(line: bytes) -> Event | None:
    """What the typed decoder refused: an unknown event, a non-finite number, another version, or a broken one."""
    raw = msgspec.json.decode(line)
    if not isinstance(raw, dict):
        raise StreamError("stream: a line is not an object", expected="one event a line")
    if raw.get("v") != VERSION:
        raise _unknown_version(raw.get("v"))
    tag = raw.get("event")
    if not isinstance(tag, str) or tag not in _BY_TAG:
        return None
    for name in _FLOAT_FIELDS[tag] & raw.keys():
        value = raw[name]
        if isinstance(value, dict):
            raw[name] = {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in value.items()}
        elif isinstance(value, str):
            raw[name] = _NON_FINITE.get(value, value)
    try:
        return msgspec.convert(raw, _BY_TAG[tag])
    except msgspec.ValidationError as error:
        where = f"event {tag!r} with seq {clean(str(raw.get('seq')), 40)}"
        raise StreamError(f"stream: {where}: {clean(str(error), 300)}") from None


def _unknown_version(v: object) -> StreamError:
    return StreamError(
        f"stream: format version {clean(repr(v), 40)}",
        expected=f"{VERSION}",
        do="read this run with the kdconsole that wrote it, or a newer one",
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return value


def _cleaned(event: Event) -> Event:
    changes: dict[str, object] = {}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if isinstance(value, str):
            changes[name] = clean(value, MAX_LINE_BYTES)
        elif isinstance(value, dict):
            changes[name] = {
                clean(k, 200): clean(v, _MAX_TEXT) if isinstance(v, str) else v for k, v in value.items()
            }
    return msgspec.structs.replace(event, **changes)


class StreamWriter:
    """Appends events to one file, each with one `write`, under one lock.

    A line that the disk takes only in part is cut back, kept and tried again with the next event, so that a full disk
    never leaves a torn line in the middle and never ends training.

    Args:
        path: the stream; made with mode 0600 if missing, continued (torn tail cut, `seq` going on) if there.
        run: uuid of the run.
    """

    max_backlog: ClassVar[int] = 10_000
    """Events kept in memory while the disk is full; beyond it heartbeats, and they alone, are left out."""

    def __init__(self, path: Path, run: str) -> None:
        self._lock = threading.RLock()
        self._run = run
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._seq = _cut_torn_tail(self._fd, run) + 1
        self._backlog: deque[bytes] = deque()
        self.failed_writes = 0

    def emit(self, event: Event) -> Event:
        """Stamps the event with version, run, seq and time, appends it, and returns it as stamped."""
        with self._lock:
            if len(self._backlog) >= self.max_backlog and isinstance(event, Heartbeat):
                return event
            stamped = msgspec.structs.replace(event, v=VERSION, run=self._run, seq=self._seq, t=time.time())
            self._backlog.append(encode(stamped))
            self._seq += 1
            self._flush()
            return stamped

    def sync(self) -> None:
        """Flushes what is pending and waits until the disk has it."""
        with self._lock:
            self._flush()
            os.fsync(self._fd)

    def close(self) -> None:
        """Syncs and closes; raises OSError where the disk still refuses lines."""
        with self._lock:
            self.sync()
            os.close(self._fd)
            if self._backlog:
                raise OSError(f"{len(self._backlog)} events of the stream could not be written")

    def _flush(self) -> None:
        while self._backlog:
            line = self._backlog[0]
            before = os.fstat(self._fd).st_size
            try:
                written = os.write(self._fd, line)
            except OSError:
                written = 0
            if written != len(line):
                os.ftruncate(self._fd, before)
                self.failed_writes += 1
                return
            self._backlog.popleft()


def _cut_torn_tail(fd: int, run: str) -> int:
    """Cuts an unfinished last line off and returns the last whole line's seq, -1 for an empty stream."""
    size = os.fstat(fd).st_size
    tail_start = max(0, size - 2 * MAX_LINE_BYTES)
    tail = os.pread(fd, size - tail_start, tail_start)
    end = tail.rfind(b"\n") + 1
    if end != len(tail):
        os.ftruncate(fd, tail_start + end)
    if end == 0:
        if tail_start > 0:
            raise StreamError("stream: its last 128 KiB hold no line end", expected="JSON Lines")
        return -1
    last = tail[tail.rfind(b"\n", 0, end - 1) + 1 : end]
    head = msgspec.json.decode(last)
    if not isinstance(head, dict) or head.get("run") != run or not isinstance(head.get("seq"), int):
        raise StreamError(f"stream: its last line is not of run {run}", expected="one run a directory")
    return int(head["seq"])
