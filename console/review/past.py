"""A past run looked at as a whole: how it ended, what was found in it, what it promised, whether its files hold."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from console.conclusion import Conclusion, conclude
from console.elapsed import wall_seconds
from console.findings.finding import unasked
from console.findings.rules import Finding, find
from console.outlook import EXIT_MEANINGS, outlook
from console.row import UNASKED, UNREADABLE
from console.run_index import find_smoke
from console.run_reader import LoadedRun
from console.run_state import STATED, RunState
from console.view import Link, View
from dispatch.ended import attempts_of
from dispatch.evidence import Kind
from dispatch.manifest import MANIFEST, SUMS, Attempt
from dispatch.sums import Checked, check_sums
from engine.errors import ExitCode, RunError
from engine.stream import Checkpoint, Eval, Verdict
from engine.text import clean

JUDGED = "judged"
"""What is behind a verdict that the run's own contract gave, from its stream."""
Range = tuple[float, float, float]
"""10th, 50th and 90th percentile; the outer two NaN where only one number was said."""


@dataclass(frozen=True)
class Loss:
    """Losses of one moment, in nats per token; None where nobody says them. `step` is None for an end of a summary."""

    total: float
    ce: float | None = None
    kd: float | None = None
    step: int | None = None


@dataclass(frozen=True)
class Losses:
    """First, last and best of a kind of losses."""

    first: Loss | None = None
    last: Loss | None = None
    best: Loss | None = None


@dataclass(frozen=True)
class Judgement:
    """A verdict, and what is behind it: judged, derived, stated."""

    verdict: Verdict
    basis: str


@dataclass(frozen=True)
class Review:
    """Everything that the report says of one run.

    `checked` is None where there are no checksums to hold it against, and `unchecked` says why.
    """

    loaded: LoadedRun
    conclusion: Conclusion
    findings: tuple[Finding, ...] = ()
    checked: Checked | None = None
    unchecked: str = ""
    attempts: tuple[Attempt, ...] = ()
    smoke: Range | None = None
    """What a smoke of the same configuration beside it promised for all its steps, in seconds."""

    @property
    def state(self) -> RunState:
        """What was folded."""
        return self.loaded.state

    @property
    def steps(self) -> int | None:
        """Steps (or epochs) that were made; None where nobody says it."""
        state, outcome = self.state, self.loaded.manifest.outcome if self.loaded.manifest else None
        if state.end is not None and (state.end.steps or state.source.timed):
            return state.end.steps
        if state.last_step is not None:
            return state.last_step.step
        if state.source.timed and state.events:
            return 0
        return outcome.steps if outcome and not state.events else None

    @property
    def seconds(self) -> float | None:
        """Wall seconds of all attempts; of a run of ours whose stream is lost as its manifest says.

        Of several attempts what their processes took, where that is on record: of steps that were lost and made again
        the stream no longer shows the first time.
        """
        took = [e.ended - e.started for e in self.attempts if e.started is not None and e.ended is not None]
        if len(self.attempts) > 1 and len(took) == len(self.attempts) and min(took) >= 0:
            return math.fsum(took)
        stated = self.loaded.manifest.seconds if self.loaded.manifest else None
        told = wall_seconds(self.state)
        return stated if stated is not None and (told is None or not self.state.source.timed) else told

    @property
    def open(self) -> bool:
        """It may go on: nothing of how it ended can be said yet."""
        return self.loaded.going_on or unasked(self.loaded)

    @property
    def train_seconds(self) -> float | None:
        """Seconds of training alone, of the last attempt."""
        return known(self.summary("train_seconds"))

    @property
    def steps_per_second(self) -> float | None:
        """As told; else of all steps in all the seconds that were told."""
        told = known(self.summary("steps_per_second"))
        if told is not None or self.state.source.timed:
            return told
        seconds, steps = self.train_seconds or wall_seconds(self.state), self.steps
        return steps / seconds if steps and seconds and self.state.source.unit == "step" else None

    @property
    def meaning(self) -> str:
        """What the exit code means here."""
        if self.open:
            return "it is not over, as far as is known here"
        known_here = {
            UNREADABLE: "not all of it can be read",
            "CHANGED": "its files are not as they were sealed",
            "DISPUTED": "undecided, verdicts contradict",
            "LOST": "undecided, its end is not known",
        }
        if not self.state.events:
            return "undecided, nothing is here to judge it by"
        return known_here.get(self.conclusion.status) or EXIT_MEANINGS[self.conclusion.exit_code]

    @property
    def decision(self) -> str:
        """GO or NO-GO of a smoke of ours; else empty."""
        if self.loaded.about.mode != "smoke" or self.loaded.kind is not Kind.RUN or self.open:
            return ""
        return "GO" if self.conclusion.exit_code == ExitCode.OK else "NO-GO"

    @property
    def asked(self) -> int | None:
        """Steps (or epochs) that were asked for; None where nobody says it."""
        old = self.loaded.evidence.old if self.loaded.evidence else None
        if old is not None and self.state.source.unit == "epoch":
            return old.epochs
        return (old.max_steps if old else None) or self.loaded.about.steps_asked

    @property
    def whole(self) -> bool:
        """Every step that was asked for was made."""
        return self.asked is not None and (self.steps or 0) >= self.asked

    def summary(self, name: str) -> float | None:
        """A number of the summary at the end."""
        end = self.state.end
        return None if end is None else end.summary.get(name)

    def judgements(self) -> list[Judgement]:
        """Every verdict, PASS first and FAIL last; of a run whose stream is lost as its manifest states them."""
        state, manifest = self.state, self.loaded.manifest
        found = [Judgement(v, state.bases.get(v.id, JUDGED)) for v in state.judged]
        if not found and manifest is not None and not state.events:
            found = [
                Judgement(
                    Verdict(
                        id=v.id, verdict=v.verdict, severity=v.severity, claim="", expected=v.expected,
                        observed=v.observed, step=v.step,
                    ),
                    f"{STATED}, {MANIFEST}",
                )
                for v in manifest.verdicts
            ]  # fmt: skip
        order = {"PASS": 0, "PENDING": 1, "UNKNOWN": 2, "FAIL": 3}
        return sorted(found, key=lambda each: order.get(each.verdict.verdict, 3))


def known(value: float | None) -> float | None:
    """A number, None for NaN: what a source cannot tell stands as NaN."""
    return None if value is None or math.isnan(value) else value


def review(loaded: LoadedRun, smokes: Sequence[Path] = (), now: float | None = None) -> Review:
    """Looks at a run as a whole.

    Args:
        loaded: a run of any kind, read whole.
        smokes: directories in which a smoke of its configuration may be; it is held against what that promised.
        now: Unix seconds; the present by default.
    """
    checked, unchecked = _checked(loaded)
    ended = concluded(loaded, time.time() if now is None else now)
    changed = checked is not None and checked.problems
    if changed and checked is not None and ended.exit_code == ExitCode.OK:  # nothing that was changed is believed
        reason = f"not as it was when the run ended: {', '.join(checked.problems[:3])}"
        ended = Conclusion("CHANGED", reason, ExitCode.FAILED)
    attempts: tuple[Attempt, ...] = ()
    if loaded.kind is Kind.RUN:
        attempts = attempts_of(loaded.path, loaded.exit)
    elif loaded.manifest is not None:
        attempts = loaded.manifest.attempts
    smoke = _smoke(loaded, smokes) if smokes else None
    return Review(loaded, ended, find(loaded, checked), checked, unchecked, attempts, smoke)


def concluded(loaded: LoadedRun, now: float) -> Conclusion:
    """How it ended, as `attach` and the list of runs tell it.

    Args:
        loaded: a run of any kind.
        now: Unix seconds.
    """
    state, manifest = loaded.state, loaded.manifest
    if loaded.problem:
        return Conclusion(UNREADABLE, loaded.problem, ExitCode.UNDECIDED)
    if not state.events and manifest is not None and manifest.outcome is not None and loaded.kind is not Kind.RUN:
        told = manifest.outcome
        return Conclusion(told.status, f"{told.reason}, says {MANIFEST}; the stream is lost", ExitCode.UNDECIDED)
    if loaded.kind is Kind.MANIFEST:
        return Conclusion("LOST", "there is a manifest, and neither a stream nor a log", ExitCode.UNDECIDED)
    if loaded.kind is not Kind.RUN:
        return conclude(state, loaded.exit)
    remote = manifest.remote if manifest else None
    if remote is not None and unasked(loaded):
        reason = f"on {remote.host}, which was not asked; kdconsole attach asks it"
        return Conclusion(UNASKED, reason, ExitCode.UNDECIDED)
    link = Link(status=loaded.host_state, heard=state.last_t, exit=loaded.exit, live=loaded.going_on)
    seen = outlook(View(state, link, now if loaded.going_on else state.last_t, manifest))
    if seen.exit_code is None:
        reason = "; ".join(seen.alarm) or f"it goes on, in phase {state.phase}; kdconsole attach follows it"
        return Conclusion(seen.status, reason, ExitCode.UNDECIDED)
    return Conclusion(seen.status, seen.reason, seen.exit_code)


def _checked(loaded: LoadedRun) -> tuple[Checked | None, str]:
    """The small files against their checksums, or why that cannot be done."""
    if loaded.going_on:
        return None, "it goes on"
    if not loaded.path.is_dir():
        return None, "a log alone has no checksums"
    if not (loaded.path / SUMS).exists():
        ours = loaded.kind is Kind.RUN and loaded.manifest is not None
        return None, f"no {SUMS}: it was never sealed" if ours else f"no {SUMS}"
    try:
        return check_sums(loaded.path, weights=False), ""
    except RunError as error:
        return None, clean(str(error), 300)


def _smoke(loaded: LoadedRun, places: Sequence[Path]) -> Range | None:
    manifest, asked = loaded.manifest, loaded.about.steps_asked
    if manifest is None or manifest.mode != "train" or not asked:
        return None
    return find_smoke(places, manifest.gate_fingerprint, manifest.where, asked)


# Losses


def train_losses(state: RunState) -> Losses:
    """First, last and best training losses; a log's own summary counts before the steps that it happens to show."""
    totals = state.steps.column("loss")
    rows = len(totals)
    first = _row(state, 0) if rows else None
    last = _row(state, rows - 1) if rows else None
    finite = np.isfinite(totals)
    best = _row(state, int(np.argmin(np.where(finite, totals, np.inf)))) if finite.any() else None
    summary = state.end.summary if state.end is not None and not state.source.timed else {}
    if "initial_loss" in summary and not (first and first.total == summary["initial_loss"]):
        first = Loss(summary["initial_loss"])
    if "final_loss" in summary and not (last and last.total == summary["final_loss"]):
        last = Loss(summary["final_loss"])
    return Losses(first, last, best)


def _row(state: RunState, row: int) -> Loss:
    def part(name: str) -> float | None:
        return float(state.steps.column(name)[row]) if name in state.source.columns else None

    total = part("loss")
    return Loss(
        math.nan if total is None else total, part("ce"), part("kd"), int(state.steps.column("step")[row])
    )  # fmt: skip


def heldout_losses(state: RunState) -> Losses:
    """First, last and best held-out losses; last is None where there is one evaluation only."""
    evals = state.evals
    if not evals:
        return Losses()
    finite = [each for each in evals if math.isfinite(each.loss)]
    best = min(finite, key=lambda each: each.loss, default=None)
    last = _held(evals[-1], state) if len(evals) > 1 else None
    return Losses(_held(evals[0], state), last, None if best is None else _held(best, state))


def _held(event: Eval, state: RunState) -> Loss:
    whole = state.source.timed
    ce, kd = (event.ce, event.kd) if whole else (known(event.ce), known(event.kd))
    return Loss(event.loss, ce, kd, event.step)


def waited_for_checkpoints(state: RunState) -> float | None:
    """Seconds that training stood still for checkpoints; None where nobody says it."""
    waits = [each.waited_seconds for each in state.checkpoints if isinstance(each, Checkpoint)]
    return math.fsum(waits) if waits and all(map(math.isfinite, waits)) else None
