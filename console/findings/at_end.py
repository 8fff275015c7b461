"""How a past run ended and what is left of it: crashes, ends that nobody saw, files that changed, verdicts at odds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from console.conclusion import conclude
from console.findings.finding import MOST, NOTE, SEVERE, WARNING, Case, Finding, steps_word
from console.report import duration
from console.stored import prepares, shown_progress
from dispatch.evidence import Kind
from dispatch.manifest import EVENTS, EXIT, MANIFEST, SUMS
from dispatch.supervisor import open_regular
from engine.errors import ExitCode
from engine.falsifiers import FAIL, PASS, exit_code_of
from engine.text import clean

LAUNCH_LOG: Final = "launch.log"
_TAIL_BYTES: Final = 1 << 16
_FAILING_LINE: Final = re.compile(
    r"^(?:[\w.]+(?:Error|Exception|Interrupt|Exit)\b.*|.*(?:Fatal Python error|CUDA_ERROR_|\bpanick?(?:ed)?\b|[Ee]rror:"
    r"|Segmentation fault|Killed\b|MemoryError).*)$"
)
"""What the last line of a program that broke looks like."""


def ended_badly(case: Case) -> Iterator[Finding]:
    """An end that is none: a crash with its failing line, a time-out, a stop; or one that nobody recorded."""
    state, record = case.state, case.loaded.exit
    end = state.end if record is None or record.wrote else None
    step = state.last_step.step if state.last_step else None
    where = f"in phase {state.phase}" if case.ours and state.phases else ""
    if not case.over:
        return
    if end is None and record is None:
        stated = case.loaded.manifest.outcome if case.loaded.manifest and not state.events else None
        if stated is None or stated.status == "LOST":
            yield _unrecorded(case, step, where)
        return
    at = case.at(end.t if end is not None else case.until)
    if end is None and record is not None:
        line = _failing_line(case.loaded.path)
        said = f": {line}" if line else "; launch.log does not say why"
        after = f" after step {step:,}" if step else ""
        killed = record.signal is not None and case.journal.killed_by_stop
        if record.exit_code == ExitCode.INTERRUPTED or killed:
            text = f"it was stopped and ended without a word: {record.describe()} {where}{after}"
            yield Finding("stopped", WARNING, text.strip(), step, at, EXIT)
        elif record.stall is None:  # else it is told as a stall
            sources = f"{EXIT}, {LAUNCH_LOG}" if line else EXIT
            yield Finding("crash", SEVERE, f"{record.describe()} {where}{after}{said}", step, at, sources)
        return
    assert end is not None
    if end.status == "LOST":
        yield _unrecorded(case, step, where)
    elif end.status == "CRASHED":
        yield Finding("crash", SEVERE, f"it crashed: {end.reason}", step, at, case.source)
    elif end.status == "TIMEOUT":
        yield Finding("timeout", SEVERE, f"its time was over: {end.reason}", step, at, case.source)
    elif end.status == "STOPPED":
        asked = f" of {steps_word(state.target_steps)}" if state.target_steps else ""
        after = f"after {end.steps:,}{asked}"
        if not state.makes_steps:
            made = shown_progress(state)
            after = f"after {made.done:,} of {made.total:,} {made.unit}" if made else f"in phase {state.phase}"
            after = after if made or not prepares(state) else "before anything was stored"
        text = f"it was stopped {after}: {end.reason}"
        yield Finding("stopped", NOTE, text, step, at, case.source)
    elif end.status != "COMPLETED" and not any(v.verdict == FAIL for v in state.judged):
        yield Finding("failed", SEVERE, f"{end.status}: {end.reason}", step, at, case.source)


def _unrecorded(case: Case, step: int | None, where: str) -> Finding:
    state = case.state
    if case.loaded.kind is Kind.RUN:
        after = f" after step {step:,}" if step else ""
        text = "nobody recorded how it ended: neither an end in the stream nor an exit record"
        text += f", {where or 'before any phase'}{after}"
        return Finding("end-unrecorded", SEVERE, text, step, case.at(state.last_t), EVENTS)
    if case.loaded.kind is Kind.MANIFEST:
        return Finding("end-unrecorded", WARNING, "nothing tells how it ended: there is no log", None, None, MANIFEST)
    last = f"; its last {state.source.unit} is {step:,}" if step else ""
    return Finding("end-unrecorded", WARNING, f"the log does not say how it ended{last}", step, None, case.source)


def _failing_line(directory: Path) -> str:
    """The last line of launch.log that looks like a failure; of a traceback its last line."""
    try:
        with os.fdopen(open_regular(directory / LAUNCH_LOG, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((clean(line.strip(), 300) for line in reversed(lines) if _FAILING_LINE.match(line)), "")


def torn(case: Case) -> Iterator[Finding]:
    """A last line that was not written whole: the process, or its disk, was cut off in the middle of it."""
    if not case.ours or not case.over or not case.state.events:
        return
    try:
        descriptor = open_regular(case.loaded.path / EVENTS, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        size = os.fstat(descriptor).st_size
        whole = not size or os.pread(descriptor, 1, size - 1) == b"\n"
    finally:
        os.close(descriptor)
    if not whole:
        yield Finding("torn-line", NOTE, "the stream's last line was not written whole", None, None, EVENTS)


def disputed(case: Case) -> Iterator[Finding]:
    """Verdicts that are stated in one way and judged in another."""
    told = case.state.disagreements if case.over else []
    end = case.state.end
    if not told and end is not None and case.over and conclude(case.state, case.loaded.exit).status == "DISPUTED":
        told = [f"its end says exit code {end.exit_code}, its verdicts say {exit_code_of(case.state.judged)}"]
    for number, line in enumerate(told[:MOST], 1):
        rest = len(told) - MOST if number == MOST else 0
        more = f"; and {rest:,} more" if rest > 0 else ""
        text = f"verdicts contradict: {line}{more}"
        yield Finding("disputed", SEVERE, text, None, None, case.source, 1 + max(0, rest))


def changed(case: Case) -> Iterator[Finding]:
    """Files that are not as they were when the run was sealed."""
    problems = case.checked.problems if case.checked else ()
    for number, problem in enumerate(problems[:MOST], 1):
        rest = len(problems) - MOST if number == MOST else 0
        more = f"; and {rest:,} more" if rest > 0 else ""
        yield Finding("changed", SEVERE, f"not as it was sealed: {problem}{more}", None, None, SUMS, 1 + max(0, rest))


def rebooted(case: Case) -> Iterator[Finding]:
    """A host that was started anew while the run was on it."""
    for attempt in case.journal.rebooted_after:
        text = f"the host was started anew while attempt {attempt} ran"
        yield Finding("host-rebooted", WARNING, text, None, None, "supervisor.jsonl")


def orphans(case: Case) -> Iterator[Finding]:
    """Processes that the trainer left behind."""
    left = case.loaded.exit.orphans if case.loaded.exit else ()
    if left:
        named = ", ".join(f"{each.name} ({each.pid})" for each in left[:MOST]) + (", …" if len(left) > MOST else "")
        killed = sum(each.signal == 9 for each in left)
        how = f"; {killed} had to be killed" if killed else "; they were ended"
        text = f"{len(left)} of its processes outlived it: {clean(named, 300)}{how}"
        yield Finding("orphans", WARNING, text, None, None, EXIT, len(left))
    if case.journal.unkillable:
        text = f"{case.journal.unkillable} of its processes could not be ended"
        yield Finding("orphans", SEVERE, text, None, None, "supervisor.jsonl", case.journal.unkillable)


def overridden(case: Case) -> Iterator[Finding]:
    """Checks against which it was started."""
    overrides = case.loaded.manifest.overrides if case.loaded.manifest else []
    for each in overrides[:MOST]:
        yield Finding("overridden", NOTE, f"started against a check: {each}", None, None, MANIFEST)


def verdicts(case: Case) -> Iterator[Finding]:
    """FAILs that nothing else tells of, and verdicts that a completed run left open."""
    for verdict in list(case.failing()):
        severity = WARNING if verdict.severity == "warn" else SEVERE
        expected = f"expected {verdict.expected}, observed " if verdict.expected else ""
        warns = " (warn)" if verdict.severity == "warn" else ""
        text = f"FAIL{warns} {verdict.id}: {expected}{verdict.observed}"
        step, when = verdict.step or None, case.when(verdict)
        yield Finding("verdict-failed", severity, text, step, when, case.source, 1, verdict.id)
    end = case.state.end
    if end is None or end.status != "COMPLETED":
        return
    undecided = [v for v in case.state.judged if v.verdict not in (PASS, FAIL) and v.severity != "warn"]
    if undecided:
        named = ", ".join(v.id for v in undecided[:MOST]) + (", …" if len(undecided) > MOST else "")
        text = f"not decided: {named} ({undecided[0].observed})"
        severity = WARNING if case.ours else NOTE
        yield Finding("verdict-undecided", severity, text, None, None, case.source, len(undecided))


def short_smoke(case: Case) -> Iterator[Finding]:
    """A smoke that took its time before it had trained: its projection stands on little or nothing."""
    state, run = case.state, case.state.run
    if not case.ours or run is None or run.mode != "smoke" or not run.budget_seconds or state.end is None:
        return
    before = state.train_started
    if before is not None and before - state.first_t > run.budget_seconds / 2 and state.end.status != "CRASHED":
        text = f"it took {duration(before - state.first_t)} of its {duration(run.budget_seconds)} to begin training"
        yield Finding("slow-start", NOTE, text, None, case.at(before), case.source)


def unread(case: Case) -> Iterator[Finding]:
    """What could not be read, and what is not there."""
    if case.loaded.problem:
        text = f"not all of it can be read: {case.loaded.problem}"
        yield Finding("unreadable", SEVERE, text, None, None, case.source)
    for remark in case.loaded.remarks:
        yield Finding("missing", NOTE, remark, None, None, "")
