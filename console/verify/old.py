"""The predecessor's evidence, and bare logs: what they state twice held against each other, for they have no hashes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from console.run_reader import LoadedRun, load_run
from console.run_state import DERIVED
from console.verify.claims import Claim, compared, differs, same, untold
from console.verify.directory import Verified
from dispatch.evidence import Kind, open_evidence
from dispatch.manifest import MANIFEST
from dispatch.old_manifest import OldManifest
from engine.errors import RunError
from engine.stream import End, Step
from engine.text import clean

_LOSS_DIGITS = 5e-5
"""Half of the last digit that a loss is printed with."""
_SPEED_DIGITS = 5e-3
"""The same of throughput and seconds."""


def verify_old(path: Path, given_id: str | None = None) -> Verified:
    """Holds a manifest of the predecessor against the log beside it, and the log against itself.

    Args:
        path: a directory or a log.
        given_id: an evidence id; such evidence has none, which is a difference.

    Raises:
        RunError: nothing of that kind is there.
    """
    open_evidence(path)  # says what is wrong where it is none
    run = load_run(path)
    state = run.state
    if run.kind is Kind.LOG and state.last_step is None and not state.stated and not (state.end and state.end.summary):
        shown = clean(str(path), 300)
        raise RunError(f"{shown}: no line of a training", expected="a run directory, the predecessor's, or a log")
    claims = list(_without_hashes(given_id))
    if run.problem:
        claims.append(untold("log", "the log", "", run.problem, essential=True))
    claims += [untold("log", "remark", "", remark) for remark in run.remarks]
    old = None if run.evidence is None else run.evidence.old
    if old is not None:
        claims += _asked(old, run)
    claims += _losses(run)
    claims += _verdicts(run, old)
    return Verified(path, str(run.kind), run.label, None, None, tuple(claims))


def _without_hashes(given_id: str | None) -> Iterator[Claim]:
    why = "it was made without checksums: no file can be told from a changed one"
    yield untold("files", "hashes", "none", why, essential=True)
    if given_id:
        yield differs("files", "evidence id", given_id, "none", why)


def _asked(old: OldManifest, run: LoadedRun) -> Iterator[Claim]:
    """What the manifest asked for, and what the log says was done."""
    unit = run.state.source.unit
    end, last = run.state.end, run.state.last_step
    wanted = old.epochs if unit == "epoch" else old.steps
    if unit == "step" and old.max_steps is not None:
        wanted = old.max_steps if wanted is None else min(wanted, old.max_steps)
    name = f"{unit}s asked for"
    if wanted is None:
        yield untold("manifest", name, "", f"{MANIFEST} does not say")
    elif end is None or (last is None and not end.steps):
        yield untold("manifest", name, wanted, "the log has no step")
    elif end.status == "COMPLETED":
        why = f"{MANIFEST} asks for {wanted:,} {unit}s, the log ran {end.steps:,}"
        yield compared("manifest", name, wanted, end.steps, why)
    else:
        yield untold("manifest", name, wanted, f"the log ran {end.steps:,}, and {end.reason}")


def _losses(run: LoadedRun) -> Iterator[Claim]:
    """The line that sums a run up, held against its steps."""
    state = run.state
    end, first, last = state.end, state.first_step, state.last_step
    if end is None or not end.summary:
        yield untold("end", "initial and final loss", "", "no line of the log sums the run up")
        return
    if last is not None:
        yield _ran(end, last, state.source.unit)
    last_one = last if last is not None and last.step == end.steps else None
    first_one = first if first is not None and first.step == 1 else None
    for name, step in (("initial_loss", first_one), ("final_loss", last_one)):
        if name not in end.summary:
            continue
        if step is None:
            yield untold("end", name, end.summary[name], "the log has no line of that step")
        else:
            yield _near(name, end.summary[name], step.loss, 2 * _LOSS_DIGITS)
    yield from _speed(end)


def _ran(end: End, last: Step, unit: str) -> Claim:
    if last.step < end.steps:
        why = f"the last line of a step is that of {unit} {last.step:,}; not every one is printed"
        return untold("end", f"{unit}s", end.steps, why)
    return compared("end", f"{unit}s", end.steps, last.step, f"its last {unit} is {last.step:,}")


def _speed(end: End) -> Iterator[Claim]:
    """Throughput, of steps and seconds that are printed with two digits."""
    speed, seconds = end.summary.get("steps_per_second"), end.summary.get("train_seconds")
    if speed is None:
        return
    if seconds is None or not seconds > _SPEED_DIGITS:
        yield untold("end", "steps_per_second", speed, "the log does not say how long it took")
        return
    found = end.steps / seconds
    tolerance = _SPEED_DIGITS + end.steps * _SPEED_DIGITS / (seconds * (seconds - _SPEED_DIGITS))
    yield _near("steps_per_second", speed, round(found, 2), 2 * tolerance)


def _near(name: str, stated: float, found: float, tolerance: float) -> Claim:
    if stated == found or (math.isnan(stated) and math.isnan(found)) or abs(stated - found) <= tolerance:
        return same("end", name, stated, found)
    return differs("end", name, stated, found, "the log contradicts itself")


def _verdicts(run: LoadedRun, old: OldManifest | None) -> Iterator[Claim]:
    """What the log states of falsifiers, and what its numbers make of them."""
    state = run.state
    for verdict in state.judged:
        basis, stated = state.bases.get(verdict.id, ""), state.stated.get(verdict.id)
        if DERIVED not in basis:
            yield untold("verdicts", verdict.id, verdict.verdict, "stated; the log has nothing to judge it by")
        elif stated is None:
            why = f"derived: {verdict.verdict}, {verdict.observed}"
            yield untold("verdicts", verdict.id, "not stated", why)
        else:
            found = f"{verdict.verdict}: {verdict.observed}"
            yield compared("verdicts", verdict.id, stated.verdict, verdict.verdict, f"{stated.observed}; {found}")
    if old is not None and old.falsifier and old.falsifier not in {verdict.id for verdict in state.judged}:
        why = "the log neither states a verdict on it nor has anything to judge it by"
        yield untold("verdicts", old.falsifier, f"named by {MANIFEST}", why)
