"""The training stream, version 1: typed events as JSON Lines, written once and read by every front end.

One event is one line. Every event carries `v` (format version), `run` (uuid), `seq` (0, 1, 2, … without a gap),
`t` (Unix seconds) and `event` (its type). NaN and infinity travel as the strings "NaN", "Infinity" and "-Infinity".
A reader skips events and fields that it does not know and refuses another `v`.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Annotated, Any

import msgspec

from engine.errors import StreamError
from engine.text import clean

VERSION = 1
MAX_LINE_BYTES = 64 * 1024
_MAX_TEXT = 8 * 1024
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


Integer = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""An integer as other languages have it; a longer one in a stream is an error there and nowhere later."""


Version = Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]
"""No other one is decoded."""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=str.lower):
    """What every event carries; the writer stamps these four fields."""

    v: Version = VERSION
    run: str = ""
    seq: Integer = -1
    t: float = 0.0


class Run(Event, frozen=True, kw_only=True):
    """What is being run, on what; the first thing known once the device is."""

    attempt: Integer
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
    world_size: Integer = 1
    versions: dict[str, str] = {}
    target_steps: Integer
    max_steps: Integer | None = None
    budget_seconds: float | None = None
    temperature: float
    alpha: float
    tokens_per_step: Integer
    accumulation: Integer = 1
    """Parts in which a device takes its share of a step's batch."""
    teacher_source: str = "online"

    @property
    def steps_asked(self) -> int:
        """Steps that the run makes if nothing ends it before."""
        return self.target_steps if self.max_steps is None else min(self.max_steps, self.target_steps)


class Inputs(Event, frozen=True, kw_only=True):
    """SHA-256 of what was loaded, by name: teacher, student, tokenizer, data; a later attempt says it again."""

    digests: dict[str, str]


class Phase(Event, frozen=True, kw_only=True):
    """A phase begins and the one before it ends; after `budget_seconds` in it the run counts as stalled."""

    name: str
    budget_seconds: float | None = None
    detail: str = ""


class Heartbeat(Event, frozen=True, kw_only=True):
    """Sent every few seconds from a thread of its own: the process lives, in this phase."""

    phase: str
    step: Integer
    rss_bytes: Integer
    host_free_bytes: Integer | None = None
    device_used_bytes: Integer | None = None
    device_total_bytes: Integer | None = None


class Vitals(Event, frozen=True, kw_only=True):
    """How the machine does, every ten seconds; None where it gives no figure, as on a CPU for all of the GPU's.

    Percentages are 0 to 100, the processor's over all cores and the time since the event before. The disk is the run
    directory's. With `unified_memory` the GPU uses the host's memory, and its figures are the host's.
    """

    cpu_percent: float | None = None
    host_total_bytes: Integer | None = None
    host_free_bytes: Integer | None = None
    disk_free_bytes: Integer | None = None
    disk_total_bytes: Integer | None = None
    gpu_percent: float | None = None
    gpu_memory_used_bytes: Integer | None = None
    gpu_memory_total_bytes: Integer | None = None
    gpu_temperature_c: float | None = None
    gpu_power_watts: float | None = None
    unified_memory: bool = False


class Measure(Event, frozen=True, kw_only=True):
    """One number that a falsifier is judged on, such as a self-check's error."""

    name: str
    value: float
    detail: str = ""


class Step(Event, frozen=True, kw_only=True):
    """One optimizer step. Losses in nats per labelled token; `seconds` runs from the end of the step before."""

    step: Integer
    loss: float
    ce: float
    kd: float
    lr: float
    grad_norm: float
    tokens: Integer
    seconds: float
    again: bool = False
    """An earlier attempt made this step already and could not keep it; a reader shows the later one."""


class Efficiency(Event, frozen=True, kw_only=True):
    """How fast the last steps were, where their time went, and what part of the device's arithmetic they used.

    `split` holds seconds a step by name (data, teacher, student, loss, backward, optimizer, other); they add up to the
    mean step. `mfu` is tokens_per_second x flops_per_token / peak_flops, over all devices; None where no peak is known.
    """

    step: Integer
    steps: Integer
    """Steps that the figures are means of, this one being the last."""
    tokens_per_second: float
    mfu: float | None = None
    flops_per_token: float
    peak_flops: float | None = None
    peak_source: str = ""
    formula: str = ""
    split: dict[str, float] = {}


class Progress(Event, frozen=True, kw_only=True):
    """How far long work that makes no steps has come, such as storing a teacher."""

    done: Integer
    total: Integer
    unit: str
    seconds: float
    """Since that work began, in this attempt."""
    seconds_left: float | None = None


class Control(Event, frozen=True, kw_only=True):
    """Answers whose score is known before, put through an evaluator that is to be believed: the score that they got.

    `name` is empty, pass, constant or canonical; `expected` and `observed` are shares of `problems`, 0 to 1.
    """

    name: str
    expected: float
    observed: float
    problems: Integer
    detail: str = ""
    """The problems that make the difference, the first of them by name."""


class Problem(Event, frozen=True, kw_only=True):
    """One generated answer of a problem was judged: the program ran, or it was ended.

    `outcome` is passed, wrong, error, time, memory or gone; `sample` counts the answers of a problem from 0.
    """

    task: str
    sample: Integer = 0
    passed: bool
    outcome: str
    detail: str = ""
    tokens: Integer
    """Generated ones."""
    seconds: float
    """Of the program."""
    again: bool = False
    """An earlier attempt told the same."""


class Eval(Event, frozen=True, kw_only=True):
    """Losses on the held-out part; top-1 agreement (0 to 1) and cosine of logits with the teacher, if there is one."""

    step: Integer
    loss: float
    ce: float
    kd: float
    agreement: float | None = None
    cosine: float | None = None
    tokens: Integer
    seconds: float


class Checkpoint(Event, frozen=True, kw_only=True):
    """A checkpoint stands on disk and was read back whole.

    `kind` is periodic, best, interrupt or final, or several of them joined by "+"; `path` is relative to the run
    directory; `sha256` is that of its `model.safetensors`. `seconds` covers everything from the request on;
    `waited_seconds` is the part of them that training stood still.
    """

    step: Integer
    kind: str
    path: str
    bytes: Integer
    tensors: Integer
    sha256: str
    seconds: float
    waited_seconds: float


class CheckpointFailed(Event, frozen=True, kw_only=True, tag="checkpoint_failed"):
    """A checkpoint could not be made; those before it are as they were."""

    step: Integer
    kind: str
    error: str
    seconds: float


class Projection(Event, frozen=True, kw_only=True):
    """Wall time of a run of `target_steps`, in seconds, as 10th, 50th and 90th percentile."""

    target_steps: Integer
    p10_seconds: float
    p50_seconds: float
    p90_seconds: float
    step_seconds: float
    fixed_seconds: float
    samples: Integer


class Verdict(Event, frozen=True, kw_only=True):
    """A falsifier's state changed. `verdict` is PASS, FAIL, PENDING or UNKNOWN."""

    id: str
    verdict: str
    severity: str
    claim: str
    expected: str
    observed: str
    step: Integer


class Log(Event, frozen=True, kw_only=True):
    """A line for the operator; `level` is info, warning or error."""

    level: str
    message: str


class End(Event, frozen=True, kw_only=True):
    """The run is over. `status` is COMPLETED, FAILED, STOPPED, TIMEOUT or CRASHED.

    `exit_code` is None where nobody said one: logs of other programs tell how a run ended, and not with what.
    """

    status: str
    reason: str
    exit_code: Integer | None
    steps: Integer
    seconds: float
    summary: dict[str, float] = {}


EVENT_TYPES: tuple[type[Event], ...] = (
    Run, Inputs, Phase, Heartbeat, Vitals, Measure, Step, Efficiency, Progress, Control, Problem, Eval,
    Checkpoint, CheckpointFailed, Projection, Verdict, Log, End,
)  # fmt: skip
_BY_TAG: dict[str, type[Event]] = {str(cls.__struct_config__.tag): cls for cls in EVENT_TYPES}
_FLOAT_FIELDS: dict[str, frozenset[str]] = {
    tag: frozenset(f.name for f in msgspec.structs.fields(cls) if "float" in str(f.type))
    for tag, cls in _BY_TAG.items()
}
EVENT_DECODER = msgspec.json.Decoder(
    Run | Inputs | Phase | Heartbeat | Vitals | Measure | Step | Efficiency | Progress | Control | Problem | Eval
    | Checkpoint | CheckpointFailed | Projection | Verdict | Log | End
)  # fmt: skip
_encoder = msgspec.json.Encoder()


def encode(event: Event) -> bytes:
    """The event as one line with its newline, at most `MAX_LINE_BYTES`; over-long texts are cut and marked.

    Raises:
        StreamError: too long even with every text cut, which takes a run id or a type of several KiB.
    """
    raw = _finite(msgspec.to_builtins(event))
    try:
        line = _encoder.encode(raw) + b"\n"
    except UnicodeEncodeError:  # a lone surrogate: how Python spells a file name that is not UTF-8
        raw = _encodable(raw)
        line = _encoder.encode(raw) + b"\n"
    limit = _MAX_TEXT
    while len(line) > MAX_LINE_BYTES and limit:
        line = _encoder.encode(_cut(raw, limit)) + b"\n"
        limit //= 2
    if len(line) > MAX_LINE_BYTES:
        raise StreamError(f"event {raw.get('event')}: {len(line):,} bytes", expected=f"at most {MAX_LINE_BYTES:,}")
    return line


def decode_line(line: bytes) -> Event | None:
    """The event of one line, its texts cleaned for a terminal; None for an event type of a later writer.

    Raises:
        StreamError: not JSON, not an object, another format version, or a known event with wrong fields.
    """
    try:
        event: Event | None = EVENT_DECODER.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        event = _decode_slowly(line)
    if event is None:
        return None
    # A field that is not there reads as its default, and only the line itself tells the one from the other.
    if b'"v"' not in line:
        raise _unknown_version(None)
    if event.seq < 0 or not event.run:
        raise StreamError("stream: an event without run or seq", expected="a stream that was written whole")
    # JSON holds control characters only as escapes: a plain ASCII line without a backslash has nothing to clean.
    if b"\\" in line or b"\x7f" in line or not line.isascii():
        return cleaned(event)
    return event


def _decode_slowly(line: bytes) -> Event | None:
    """What the typed decoder refused: an unknown event, a non-finite number, another version, or a broken line."""
    try:
        raw = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = f"stream: a line is not JSON: {clean(str(error), 200)}"
        raise StreamError(what, expected="one event a line") from None
    if not isinstance(raw, dict):
        raise StreamError("stream: a line is not an object", expected="one event a line")
    if raw.get("v") != VERSION or isinstance(raw["v"], bool):
        raise _unknown_version(raw.get("v"))
    tag = raw.get("event")
    if not isinstance(tag, str):
        raise StreamError("stream: a line without an event type", expected="one event a line")
    if tag not in _BY_TAG:
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


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(k): _encodable(v) for k, v in value.items()}
    return value


def _cut(raw: dict[str, Any], limit: int) -> dict[str, Any]:
    """The event with texts and mappings cut to `limit` characters and entries; its type and run stay whole."""

    def text(value: Any) -> Any:
        return value[:limit] + "… (cut)" if isinstance(value, str) and len(value) > limit else value

    shorter: dict[str, Any] = {}
    for key, value in raw.items():
        if key in ("event", "run"):
            shorter[key] = value
        elif isinstance(value, dict):
            shorter[key] = {text(k): text(v) for k, v in islice(value.items(), limit)}
        else:
            shorter[key] = text(value)
    return shorter


def cleaned(event: Event) -> Event:
    """The event with every text of it made safe to print."""
    changes: dict[str, object] = {}
    for name in event.__struct_fields__:
        value = getattr(event, name)
        if isinstance(value, str):
            changes[name] = clean(value, MAX_LINE_BYTES)
        elif isinstance(value, dict):
            changes[name] = {clean(k, 200): clean(v, _MAX_TEXT) if isinstance(v, str) else v for k, v in value.items()}
    return msgspec.structs.replace(event, **changes)
