"""Times in a past run in which nothing went on: between two steps, in a phase, as its supervisor saw it; odd clocks."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from console.concerns import PROCESS_STATES
from console.findings.finding import MOST, NOTE, SEVERE, WARNING, Case, Finding, steps_word
from console.report import duration
from dispatch.ended import JOURNAL
from dispatch.liveness import STEP_SECONDS, phase_budget, step_budget
from dispatch.manifest import EXIT, SMALL_FILES
from dispatch.supervisor import STALL_SECONDS
from engine.falsifiers import FIRST_PHASE
from engine.stream import Checkpoint

NO_STALL = "F-NO-STALL"
MEAN_STEPS = 2_000
"""Steps before a wait whose mean it is held against."""
CANDIDATES = 1_000
"""The longest gaps between steps, which alone are looked into."""
SET_BACK_SECONDS = 1.0
"""By less than this, stamps of two threads may be out of order."""


@dataclass(frozen=True)
class _Wait:
    """Nothing went on from `start` (Unix seconds) for so many seconds. `step` is the last one made before."""

    start: float
    seconds: float
    phase: str
    step: int | None
    allowed: float = 0.0
    forever: bool = False
    """It was never over: the run ended in it."""
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        told = duration(self.seconds)
        if self.phase == "train":
            text = f"no step for {told}"
            text += f" after step {self.step:,}" if self.step else ": the first one did not come"
        elif self.allowed:
            text = f"phase {self.phase} took {told} of its {duration(self.allowed)}"
        else:
            text = f"no progress for {told} in phase {self.phase}"
        ended = ["it never went on"] if self.forever else []
        return "; ".join([text, *self.notes, *ended])


def stalls(case: Case) -> Iterator[Finding]:
    """Waits that were longer than a watched run may take: by the stream, by the supervisor, by the contract."""
    failing = list(case.failing(NO_STALL))
    waits = _merged([*_between_steps(case), *_in_phases(case), *_seen(case)]) if case.state.source.timed else []
    rules = case.loaded.manifest.supervise if case.loaded.manifest else None
    long = rules.stall_seconds if rules is not None else STALL_SECONDS
    waits.sort(key=lambda wait: -wait.seconds)
    for number, wait in enumerate(waits[:MOST], 1):
        told = failing.pop(0) if failing else None
        rest = len(waits) - MOST if number == MOST else 0
        more = f"; and {rest:,} shorter ones" if rest > 0 else ""
        severe = wait.forever or wait.seconds >= long or (told is not None and told.severity != "warn")
        yield Finding(
            kind="stall",
            severity=SEVERE if severe else WARNING,
            text=wait.text + more,
            step=wait.step,
            at=case.at(wait.start),
            source=", ".join(name for name in dict.fromkeys((case.source, *SMALL_FILES)) if name in wait.sources),
            count=1 + max(0, rest),
            verdict=told.id if told else "",
        )
    for verdict in failing:
        severity = WARNING if verdict.severity == "warn" else SEVERE
        yield Finding("stall", severity, verdict.observed, verdict.step, case.when(verdict), case.source, 1, verdict.id)


def _merged(waits: Iterable[_Wait]) -> list[_Wait]:
    """Waits that overlap are one: the longest of them, with everything that was said of any."""
    found: list[_Wait] = []
    for wait in sorted(waits, key=lambda each: each.start):
        if not found or wait.start >= found[-1].start + found[-1].seconds:
            found.append(wait)
            continue
        last = found[-1]
        longest = wait if wait.seconds > last.seconds else last
        found[-1] = replace(
            longest,
            forever=last.forever or wait.forever,
            sources=tuple(dict.fromkeys(last.sources + wait.sources)),
            notes=tuple(dict.fromkeys(last.notes + wait.notes)),
        )
    return found


def _between_steps(case: Case) -> Iterator[_Wait]:
    """Waits for a step, as the live screen would have called them stalls."""
    state = case.state
    t, numbers, seconds = (case.column(name) for name in ("t", "step", "seconds"))
    begins = [phase.started for phase in state.phases if phase.name == "train"]
    attempts = case.attempt_starts()
    # What ends a wait, as in the falsifiers; a checkpoint is work too.
    marks = [*(e.t for e in state.evals), *(c.t for c in state.checkpoints), *(p.started for p in state.phases)]
    marks = sorted(each for each in marks if math.isfinite(each))
    pairs: list[tuple[float, float, int]] = []
    if len(t):
        gaps = np.diff(t)
        if state.steps.thinned > 1:  # between two rows lie steps that are not kept; the contract still saw their waits
            gaps[np.diff(numbers) > 1] = 0.0
        wide = np.flatnonzero(gaps > STEP_SECONDS)
        wide = wide[np.argsort(-gaps[wide])[:CANDIDATES]]
        pairs += [(float(t[row]), float(t[row + 1]), int(row) + 1) for row in wide]
        pairs += [(begins[0], float(t[0]), 0)] if begins and begins[0] <= t[0] else []
    if state.phase == "train" and case.over:
        # The last wait of all, if the last thing that was done was to train.
        last = float(t[-1]) if len(t) else 0.0
        pairs.append((max(last, begins[-1]), case.until, len(t)))
    for before, after, row in pairs:
        first = row == 0
        if any(before < each <= after for each in attempts):
            later = [each for each in begins if before < each <= after]
            if not later:
                continue
            before, first = later[-1], True
        within = marks[bisect_right(marks, before) : bisect_left(marks, after)]
        start, wait = max(
            ((a, b - a) for a, b in zip([before, *within], [*within, after], strict=True)), key=lambda each: each[1]
        )
        if wait > _allowed(case, seconds[max(0, row - MEAN_STEPS) : row], first, before):
            step = int(numbers[row - 1]) if row else 0
            forever = row == len(t) and start + wait >= after
            yield _Wait(start, wait, "train", step, forever=forever, sources=(case.source,))


def _allowed(case: Case, seconds: np.ndarray[tuple[int], np.dtype[np.float64]], first: bool, before: float) -> float:
    sane = seconds[np.isfinite(seconds)]
    state = case.state
    evaluated = max((e.seconds for e in state.evals if e.t <= before), default=0.0)
    saves = (c for c in state.checkpoints if isinstance(c, Checkpoint) and c.t <= before)
    saved = max((c.waited_seconds for c in saves), default=0.0)
    mean = float(sane.mean()) if len(sane) and not first else None
    return step_budget(mean, 2 * (evaluated + saved))


def _in_phases(case: Case) -> Iterator[_Wait]:
    """Phases that took longer than they may; training without a budget is judged by its steps."""
    phases = case.state.phases
    for number, phase in enumerate(phases):
        last = number + 1 == len(phases)
        follower = None if last else phases[number + 1]
        spent = phase.seconds
        if last and case.over:
            spent = max(spent, case.until - phase.started)
        if follower is not None and follower.name == FIRST_PHASE:  # what passed between two attempts was no phase
            continue
        if phase.name == "train" and phase.budget_seconds is None:
            continue
        budget = phase_budget(phase.name, phase.budget_seconds)
        reports = [each.t for each in case.state.pace.reports if phase.started <= each.t <= phase.started + spent]
        if reports:  # it said how far it had come: only what passed between two of these words is a wait
            yield from _between_reports(case, phase.name, [phase.started, *reports, phase.started + spent], budget)
            continue
        if spent > budget and math.isfinite(spent):
            step = case.state.last_step.step if last and case.state.last_step else None
            forever = last and case.over and case.state.end is None
            yield _Wait(phase.started, spent, phase.name, step, budget, forever, (case.source,))


def _between_reports(case: Case, phase: str, times: list[float], budget: float) -> Iterator[_Wait]:
    start, seconds = max(((a, b - a) for a, b in pairwise(times)), key=lambda each: each[1])
    if seconds > budget and math.isfinite(seconds):
        yield _Wait(start, seconds, phase, None, sources=(case.source,))


def _seen(case: Case) -> Iterator[_Wait]:
    """Stalls that the supervisor recorded while it watched."""
    t, numbers = case.column("t"), case.column("step")
    record = case.loaded.exit.stall if case.loaded.exit else None
    for stall in case.journal.stalls:
        notes = ["the supervisor saw it"]
        if why := PROCESS_STATES.get(stall.process):
            notes.append(f"the process {why}")
        if stall.stacks:
            notes.append("its stacks are in launch.log")
        seconds, sources = stall.seconds, [JOURNAL]
        if stall.ended:
            notes.append("the supervisor ended the run for it")
            if record is not None:
                seconds, sources = max(seconds, record.seconds), [JOURNAL, EXIT]
        row = int(np.searchsorted(t, stall.since, "right"))
        step = int(numbers[row - 1]) if row else 0
        forever = stall.ended or (case.over and not stall.recovered and case.state.end is None)
        yield _Wait(stall.since, seconds, stall.phase, step, 0.0, forever, tuple(sources), tuple(notes))


def clock_set_back(case: Case) -> Iterator[Finding]:
    """Stamps that go backwards: ages and times of day before and after do not agree."""
    if not case.state.source.timed:
        return
    t = case.column("t")
    back: list[tuple[float, int | None]] = []
    moved = np.flatnonzero(np.diff(t) < -SET_BACK_SECONDS)
    back += [(float(t[row] - t[row + 1]), int(case.column("step")[row + 1])) for row in moved[:CANDIDATES]]
    starts = [phase.started for phase in case.state.phases]
    if not back:
        back = [(one - other, None) for one, other in pairwise(starts) if one - other > SET_BACK_SECONDS]
    if back:
        worst, step = max(back, key=lambda each: each[0])
        times = "" if len(back) == 1 else f" {len(back):,} times, most"
        text = f"the host's clock was set back{times} by {duration(worst)}: times before and after do not agree"
        yield Finding("clock-set-back", WARNING, text, step, None, case.source, len(back))


def resumed(case: Case) -> Iterator[Finding]:
    """Attempts after the first, and what they had to do again."""
    run = case.state.run
    attempts = max(case.journal.starts, run.attempt if run is not None else 0)
    if attempts < 2:
        return
    again = case.made_again
    lost = f"; {steps_word(again)} lost and made again" if again else "; no step was lost" if case.ours else ""
    text = f"it took {attempts} attempts{lost}"
    starts = case.attempt_starts()
    at = case.at(starts[1]) if len(starts) > 1 else None
    yield Finding("resumed", WARNING if again else NOTE, text, None, at, case.source, attempts - 1)
