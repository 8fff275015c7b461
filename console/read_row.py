"""One run's row: at once from its manifest and the ends of its files, or exactly from all that was read of it."""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
from dataclasses import replace
from pathlib import Path

from console.about import About, about
from console.log_fold import LOG
from console.outlook import SILENCE_SECONDS, outlook, verdict_counts
from console.row import UNASKED, UNREADABLE, Row
from console.run_files import host_state, read_config, read_exit, read_manifest, read_small
from console.run_reader import LoadedRun, read_ends
from console.run_state import WITHOUT_STEPS, RunState
from console.stored import shown_progress
from console.view import Link, View
from console.without_steps import came
from dispatch.evidence import Evidence, Kind
from dispatch.legacy import LegacyLog
from dispatch.manifest import CONFIG, CONTRACT, EVENTS, EXIT, MANIFEST, SUMS, Manifest, Remote
from dispatch.manifest import RunState as HostState
from engine.errors import ConfigError, RunError, StreamError
from engine.stream import End, Eval, Event, Progress, Run, Step
from engine.text import clean

NEVER_STARTED_SECONDS = 120.0
"""From then on a run directory whose run was not started counts as one that nobody will start."""
LOG_TAIL_BYTES = 1 << 13
"""Of a text log, for a quick row: some hundred lines, and half a millisecond of parsing."""
MAX_LOGS = 16
_ALONE = "its manifest is all that is here: neither a stream nor a log"

RUN_FILES = (MANIFEST, EVENTS, EXIT, CONTRACT, CONFIG, SUMS)
"""What the row of a run directory of ours comes from."""
STREAM_AT = RUN_FILES.index(EVENTS)

_SEQUENCE = re.compile(rb"^train:\n(?:  .*\n)*?  sequence: (\d{1,9})$", re.MULTILINE)
"""As every config.yaml of ours has it; reading the YAML of a thousand runs takes seconds."""


def files_of(evidence: Evidence) -> tuple[str, ...]:
    """Names of the files that a row comes from, relative to the evidence's path; `.` is the path itself."""
    if evidence.kind is Kind.RUN:
        return RUN_FILES
    if evidence.logs[:1] == (evidence.path,):
        return (".",)
    logs = (os.path.relpath(each, evidence.path) for each in evidence.logs[:MAX_LOGS])
    return (".", *RUN_FILES, *logs)


# Quick


def quick_row(evidence: Evidence, now: float) -> Row:
    """A row from the manifest, the exit record and the ends of the stream or the log.

    Args:
        evidence: of any kind.
        now: Unix seconds.
    """
    row = Row(path=evidence.path, id=clean(evidence.path.name, 200), kind=evidence.kind.value)
    if odd := _in_the_place_of(row.path, evidence.kind):
        return unreadable(row, odd)
    try:
        if evidence.kind is Kind.RUN:
            return _quick_run(row, now)
        return _quick_log(row, evidence)
    except (RunError, StreamError, OSError) as error:
        return unreadable(row, str(error))


def _in_the_place_of(path: Path, kind: Kind, manifest: Manifest | None = None) -> str:
    """What is said of something that stands where the stream or the manifest should; empty where there is none."""
    if kind is not Kind.RUN and os.path.lexists(path / EVENTS):
        return f"{EVENTS}: no regular file"
    if kind is Kind.RUN and manifest is None and os.path.islink(path / MANIFEST):
        return f"{MANIFEST}: no regular file"
    return ""


def unreadable(row: Row, why: str) -> Row:
    """The row of what cannot be read."""
    problem = clean(why, 500)
    return replace(row, status=UNREADABLE, reason=problem, problem=problem)


def _quick_run(row: Row, now: float) -> Row:
    path = row.path
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(path)
    except RunError:
        if os.path.lexists(path / MANIFEST):
            raise
    record = read_exit(path)
    state: HostState = "ended" if record is not None else host_state(path) if manifest else "lost"
    events = read_ends(path)
    run = next((each for each in events if isinstance(each, Run)), None)
    mode = manifest.mode if manifest else run.mode if run else ""
    config = {"train.sequence": _sequence(path)} if mode == "smoke" else {}
    begun = RunState(run=run, first_t=events[0].t if events else 0.0, events=len(events))
    row = _with_about(row, about(manifest, None, begun, config))
    row = replace(row, last_t=row.created)
    for event in events:
        row = _with_event(row, event)
    end = events[-1] if events and isinstance(events[-1], End) else None
    row = replace(row, last_t=_time(max((e.t for e in events), default=0.0), row))
    if end is not None:
        return replace(row, status=end.status, reason=end.reason)
    if record is not None:
        return replace(row, status="CRASHED", reason=f"{record.describe()}, without an end event; see launch.log")
    if manifest is not None and manifest.remote is not None:
        return replace(row, status=UNASKED, reason=_elsewhere(manifest.remote))
    return _with_host_state(row, state, now, heard=bool(events))


def _sequence(path: Path) -> int | None:
    """Tokens of a window, as the configuration has it; None where it does not say."""
    try:
        found = _SEQUENCE.search(read_small(path / CONFIG) or b"")
        told = int(found[1]) if found else read_config(path).get("train.sequence")
    except (RunError, ConfigError):
        return None
    return told if isinstance(told, int) else None


def _with_host_state(row: Row, state: HostState, now: float, *, heard: bool) -> Row:
    if state == "starting" and not (row.path / "supervisor.jsonl").exists():
        if now - row.created > NEVER_STARTED_SECONDS:
            return replace(row, status="LOST", reason="it was never started")
        return replace(row, status="STARTING")
    if state == "lost":
        return replace(row, status="LOST", reason="neither an end nor a process was found")
    if heard and now - row.last_t > SILENCE_SECONDS:
        return replace(row, status="STALLED", reason="nothing is heard from it")
    return replace(row, status="RUNNING" if row.device else "STARTING")


def _elsewhere(remote: Remote) -> str:
    return f"on {remote.host}, which was not asked; open it to follow it"


def _quick_log(row: Row, evidence: Evidence) -> Row:
    manifest: Manifest | None = None
    if evidence.old is None and evidence.path.is_dir():
        with contextlib.suppress(RunError):
            manifest = read_manifest(evidence.path)
    log = LegacyLog(evidence.old)
    events = [*log.feed(_tail(evidence.logs[0])), *log.finish()] if evidence.logs else log.finish()
    run = next((each for each in events if isinstance(each, Run)), None)
    row = _with_about(row, about(manifest, evidence.old, RunState(run=run, source=LOG), {}))
    wanted: dict[type[Event], Event] = {type(each): each for each in events if isinstance(each, Run | Step | Eval)}
    for event in wanted.values():
        row = _with_event(row, event)
    end = next((each for each in reversed(events) if isinstance(each, End)), None)
    row = replace(row, unit=log.unit, target=row.target or (evidence.old.steps if evidence.old else None))
    if not evidence.logs or end is None:
        return replace(row, status="LOST", reason=_ALONE)
    return replace(_with_summary(row, end), status=end.status, reason=end.reason)


def _tail(path: Path) -> bytes:
    """The last lines of a log, from the beginning of one on."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise StreamError(f"{clean(path.name, 200)}: no regular file")
        before = max(0, found.st_size - LOG_TAIL_BYTES)
        data = os.pread(descriptor, LOG_TAIL_BYTES, before)
    finally:
        os.close(descriptor)
    return data.partition(b"\n")[2] if before else data


# Exact


def exact_row(loaded: LoadedRun, now: float) -> Row:
    """A row from the whole stream or log.

    Args:
        loaded: what was read of it.
        now: Unix seconds.
    """
    state = loaded.state
    row = Row(path=loaded.path, id=clean(loaded.path.name, 200), exact=True, problem=loaded.problem)
    row = _with_about(replace(row, kind=loaded.kind.value, unit=state.source.unit), loaded.about)
    for event in (state.run, state.last_step, *state.evals[-1:], shown_progress(state)):
        row = row if event is None else _with_event(row, event)
    row = replace(
        row,
        target=row.target or (loaded.about.steps_asked if loaded.kind is not Kind.RUN else None),
        verdicts=dict(verdict_counts(state)) if state.judged else {},
        judged={v.id: v.verdict for v in state.judged},
        failing=tuple(v.id for v in state.judged if v.verdict == "FAIL"),
        last_t=_time(state.last_t, row) if state.source.timed else 0.0,
        score=result.short if (result := came(state)) is not None else "",
    )
    if odd := loaded.problem or _in_the_place_of(row.path, loaded.kind, loaded.manifest):
        return unreadable(row, odd)
    remote = loaded.manifest.remote if loaded.manifest else None
    if remote is not None and state.end is None and loaded.exit is None:
        return replace(row, status=UNASKED, reason=_elsewhere(remote))
    if loaded.kind is not Kind.RUN and state.end is not None:
        row = _with_summary(row, state.end)
    if loaded.kind is Kind.MANIFEST:
        return replace(row, status="LOST", reason=_ALONE)
    if loaded.host_state == "starting" and not state.events:
        return _with_host_state(row, "starting", now, heard=False)
    told = outlook(view_of(loaded, now))
    doing = f"phase {state.phase}" if loaded.going_on else ""
    return replace(row, status=told.status, reason=told.reason or "; ".join(told.alarm) or doing)


def view_of(loaded: LoadedRun, now: float) -> View:
    """A run that was read from its directory, as the panes see one."""
    link = Link(
        status=loaded.host_state, heard=loaded.state.last_t, exit=loaded.exit, live=loaded.going_on
    )  # fmt: skip
    return View(loaded.state, link, now if loaded.going_on else loaded.state.last_t, loaded.manifest)


# Both


def _with_about(row: Row, told: About) -> Row:
    return replace(
        row,
        name=told.name,
        mode=told.mode,
        host=told.host,
        created=told.created or 0.0,
        teacher=told.teacher,
        student=told.student,
        phase=told.phase,
        ticket=told.ticket,
    )


def _with_event(row: Row, event: Event) -> Row:
    if isinstance(event, Run):
        # A smoke goes on for as long as it may, and not to the steps of the run that it stands for.
        steps = None if event.mode in WITHOUT_STEPS else event.steps_asked
        target = event.max_steps if event.mode == "smoke" else steps
        device = f"{event.device} {event.device_name}, {event.precision}".strip(" ,")
        return replace(row, host=row.host or event.host, device=device, target=target)
    if isinstance(event, Step):
        return replace(row, step=event.step, loss=event.loss)
    if isinstance(event, Eval):
        return replace(row, heldout=event.loss)
    if isinstance(event, Progress):
        return replace(row, done=event.done, total=event.total, counted=clean(event.unit, 40))
    return row


def _with_summary(row: Row, end: End) -> Row:
    """A log need not have a line for every step; the one that tells of its end is about the last."""
    if end.steps <= (row.step or 0):
        return row
    return replace(row, step=end.steps, loss=end.summary.get("final_loss", row.loss))


def _time(t: float, row: Row) -> float:
    """A time that a stream told, if it is one; else when the run was created."""
    return t if 0 < t < math.inf else row.created
