"""Falsifiers: acceptance checks stated before a run, judged as a fold over its stream.

A contract (`engine.contract`) is a YAML file of falsifiers. The engine judges as it runs and emits the verdicts; a
front end feeds the same events to a `Judge` of its own and holds both results against each other. Nothing but events
is looked at, so a verdict can be judged again years later.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from functools import reduce
from operator import add, attrgetter

from engine.contract import (
    LIMITS,
    METRICS,
    AllAtMost,
    Contract,
    ExactSteps,
    Finite,
    Kind,
    NoStall,
    Present,
    Threshold,
    Trend,
    builtin_contract,
    limit_of,
    metrics_of,
    parse_contract,
)
from engine.errors import ExitCode
from engine.judging import Clock, as_text, counted, keep_extreme, mean_of, short_name
from engine.stream import (
    Efficiency,
    End,
    Eval,
    Event,
    Heartbeat,
    Log,
    Measure,
    Phase,
    Progress,
    Projection,
    Run,
    Step,
    Verdict,
    Vitals,
)

__all__ = [
    "CALM",
    "FAIL",
    "FIRST_PHASE",
    "JUDGE_PHASE",
    "PASS",
    "PENDING",
    "UNKNOWN",
    "Contract",
    "Judge",
    "builtin_contract",
    "exit_code_of",
    "parse_contract",
]

PASS, FAIL, PENDING, UNKNOWN = "PASS", "FAIL", "PENDING", "UNKNOWN"
FIRST_PHASE = "import"
"""What every attempt of a run begins with."""
JUDGE_PHASE = "judge"
"""The phase whose beginning closes every falsifier that waits for the end; its `detail` is why training ended."""
_SAID = frozenset((Verdict, End, Vitals, Progress))
"""What was said of the run, of the machine or of how far work has come: nothing of it may change a verdict, not even by
its time. A reader that does not know these and skips them judges the same."""
_JUDGED = frozenset((Run, Phase, Measure, Step, Efficiency, Eval, Projection))
"""Of the other kinds nothing counts but their time."""
CALM = frozenset((Step, Heartbeat, Log))
"""What nearly all events of a stream are."""
_seconds, _again = attrgetter("seconds"), attrgetter("again")


def exit_code_of(verdicts: Iterable[Verdict]) -> ExitCode:
    """FAILED when a fatal or gate verdict is FAIL, UNDECIDED when one is not PASS or nothing was judged, else OK."""
    verdicts = list(verdicts)
    binding = {v.verdict for v in verdicts if v.severity != "warn"}
    if FAIL in binding:
        return ExitCode.FAILED
    return ExitCode.OK if verdicts and binding <= {PASS} else ExitCode.UNDECIDED


class _State:
    """One falsifier being judged: what was seen of its metric, and the verdict so far."""

    def __init__(self, falsifier: Kind) -> None:
        self.falsifier = falsifier
        self.verdict, self.expected, self.observed, self.step = PENDING, "", "nothing yet", 0
        self.values: list[float] = []


class Judge:
    """Folds events into verdicts.

    Args:
        contract: what to judge.

    Feed every event to `observe`, in order; `verdicts` is the state after the last one.
    """

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        self._states: list[_State] = []
        self._takers: dict[str, list[_State]] = {}
        self._watchers: list[_State] = []
        self._run: Run | None = None
        self._clock = Clock()
        self._phase = ""
        self._phase_budget: float | None = None
        self._step, self._steps_seen, self._steps_made = 0, 0, 0
        self._step_seconds = self._longest_wait = 0.0
        self._finals: dict[str, float] = {}
        self._named = {name for falsifier in contract.falsifiers for name in metrics_of(falsifier)}
        self._fields = _fields(self._named)
        self._changed: dict[str, str] = {}
        """Of each falsifier that the present event touched: the verdict before it."""

    @property
    def verdicts(self) -> list[Verdict]:
        """Every falsifier that applies to this run, with its present verdict, in the contract's order."""
        return [self._as_event(state) for state in self._states]

    def observe(self, event: Event) -> list[Verdict]:
        """The verdicts that this event changed."""
        kind = type(event)
        if kind in _SAID:
            return []
        if isinstance(event, Run):
            self._begin(event)
        self._changed.clear()
        if isinstance(event, Phase) and event.name == FIRST_PHASE:  # between two attempts nobody waited for a step
            self._clock, self._phase, self._phase_budget = Clock(), "", None
        self._clock.advance(event.t)
        # Before the event ends the wait: where no heartbeat came in between, it alone shows how long that was.
        for state in self._watchers:
            if state.verdict == PENDING and isinstance(state.falsifier, NoStall):
                self._watch(state, state.falsifier)
        if kind in _JUDGED:
            self._count(event)
        if not self._changed:
            return []
        return [self._as_event(s) for s in self._states if s.verdict != self._changed.get(s.falsifier.id, s.verdict)]

    def _count(self, event: Event) -> None:
        self._advance(event)
        if isinstance(event, Measure):
            name = f"measure.{event.name}"
            if name in self._named:  # a stream may measure ever new things
                self._note(name, event.value)
        else:
            for field, name in self._fields.get(type(event), ()):
                value = getattr(event, field)
                if value is not None:
                    self._note(name, float(value))
        if isinstance(event, Phase) and event.name == JUDGE_PHASE:
            for state in self._states:
                if state.verdict == PENDING:
                    self._close(state, event.detail)

    def observe_calm(self, events: Sequence[Event]) -> list[tuple[Event, list[Verdict]]]:
        """Those of several events, all of `CALM`, that changed verdicts, with these: what `observe` gives, sooner."""
        if self._take_calm(events):
            return []
        return [(event, changed) for event in events if (changed := self.observe(event))]

    def _take_calm(self, events: Sequence[Event]) -> bool:
        """Takes all events at once where it is certain that none changes a verdict; False, and nothing done, if not."""
        if not events:
            return True
        waits = self._clock.ahead([(event.t, type(event) is Step) for event in events])
        for state in self._watchers:
            if state.verdict == PENDING and isinstance(state.falsifier, NoStall):
                stalled = self._phase == "train" and waits.longest > state.falsifier.seconds
                if stalled or (self._phase_budget is not None and waits.in_phase > self._phase_budget):
                    return False
        steps = [event for event in events if isinstance(event, Step)]
        noted = [(name, [float(getattr(s, field)) for s in steps]) for field, name in self._fields[Step] if steps]
        for name, values in noted:
            if any(_might_change(state, values) for state in self._takers.get(name, ())):
                return False
        for name, values in noted:
            self._finals[name] = values[-1]
            for state in self._takers.get(name, ()):
                _take_all(state, values)
        if self._phase == "train":
            self._longest_wait = max(self._longest_wait, waits.longest_ended)
        self._clock.last, self._clock.waited, self._clock.in_phase = events[-1].t, waits.waited, waits.in_phase
        if steps:
            self._step, self._steps_seen = steps[-1].step, self._steps_seen + len(steps)
            self._steps_made += len(steps) - sum(map(_again, steps))
            self._step_seconds = reduce(add, map(_seconds, steps), self._step_seconds)
        return True

    def _note(self, name: str, value: float) -> None:
        self._finals[name] = value
        for state in self._takers.get(name, ()):
            self._take(state, value)

    def _begin(self, run: Run) -> None:
        if self._run is not None:  # a later attempt of the same run goes on with what was seen
            return
        self._run = run
        has = {"teacher": run.teacher is not None, "max_steps": run.max_steps is not None}
        takers = defaultdict(list)
        for falsifier in self._contract.falsifiers:
            needs = [*falsifier.needs, *(["max_steps"] if isinstance(falsifier, ExactSteps) else [])]
            if not all(has[need] for need in needs):
                continue
            state = _State(falsifier)
            state.expected = self._expectation(falsifier)
            self._states.append(state)
            if isinstance(falsifier, Threshold | Trend | Finite):
                takers[falsifier.metric].append(state)
            elif isinstance(falsifier, NoStall):
                self._watchers.append(state)
        self._takers = dict(takers)

    def _advance(self, event: Event) -> None:
        if isinstance(event, Phase):
            self._phase, self._phase_budget = event.name, event.budget_seconds
            self._clock.begin_phase()
        elif isinstance(event, Step):
            if self._phase == "train":
                self._longest_wait = max(self._longest_wait, self._clock.waited)
            self._clock.begin_wait()
            self._step, self._steps_seen = event.step, self._steps_seen + 1
            self._steps_made += not event.again  # what an earlier attempt lost and a later one made again is one step
            self._step_seconds += event.seconds
        elif isinstance(event, Eval):  # between two steps, and no wait for the next one
            self._clock.begin_wait()

    def _take(self, state: _State, value: float) -> None:
        f = state.falsifier
        if isinstance(f, Threshold):
            if f.over != "each":
                keep_extreme(state.values, value, f.over)
            elif state.verdict != FAIL:
                self._hold(state, f, value)
        elif isinstance(f, Trend):
            # The first window and the last are all that is ever needed.
            state.values.append(value)
            if len(state.values) > 2 * f.window:
                del state.values[f.window]
        elif isinstance(f, Finite) and state.verdict == PENDING:
            state.values[:] = [value]
            if not math.isfinite(value):
                self._set(state, FAIL, f"{as_text(value)} at step {self._step}")

    def _watch(self, state: _State, f: NoStall) -> None:
        clock = self._clock
        if self._phase == "train":
            mean = self._step_seconds / self._steps_seen if self._steps_seen else 0.0
            if clock.waited > max(f.seconds, f.factor * mean):
                self._set(state, FAIL, f"no step for {clock.waited:.0f} s after step {self._step}")
                return
        if self._phase_budget is not None and clock.in_phase > self._phase_budget:
            spent = f"phase {self._phase} took {clock.in_phase:.0f} s of its {self._phase_budget:.0f} s"
            self._set(state, FAIL, spent)

    def _close(self, state: _State, reason: str) -> None:
        f = state.falsifier
        if isinstance(f, Threshold) and state.values:
            self._hold(state, f, state.values[0])
        elif isinstance(f, Trend) and len(state.values) >= 2 * f.window:
            first, last = (mean_of(v) for v in (state.values[: f.window], state.values[-f.window :]))
            gain = first - last if f.direction == "falls" else last - first
            # What is not finite is beyond everything, and still no trend.
            holds = math.isfinite(first) and math.isfinite(last) and gain > 0 and gain >= abs(first) * f.by
            self._set(state, PASS if holds else FAIL, f"{as_text(first)} to {as_text(last)}")
        elif isinstance(f, Finite) and state.values:
            self._set(state, PASS, f"all finite to step {self._step}")
        elif isinstance(f, Present):
            self._close_present(state, f)
        elif isinstance(f, AllAtMost):
            self._close_all_at_most(state, f)
        elif isinstance(f, NoStall) and self._steps_seen:
            self._set(state, PASS, f"longest wait {self._longest_wait:.1f} s")
        elif isinstance(f, ExactSteps):
            goal = self._steps_asked()
            by_budget = reason == "budget" and self._steps_made < goal
            ended = counted(self._steps_made, "step") + (", ended by the time budget" if by_budget else "")
            self._set(state, PASS if self._steps_made == goal or by_budget else FAIL, ended)
        elif isinstance(f, NoStall):
            self._set(state, UNKNOWN, "not enough data: no step")
        else:
            needed = f" of {2 * f.window}" if isinstance(f, Trend) else ""
            self._set(state, UNKNOWN, f"not enough data: {counted(len(state.values), 'value', needed)}")

    def _close_present(self, state: _State, f: Present) -> None:
        missing = [name for name in f.metrics if name not in self._finals]
        seen = {name: self._finals[name] for name in f.metrics if name in self._finals}
        told = [f"{name} {as_text(value)}" for name, value in seen.items()]
        if not all(map(math.isfinite, seen.values())):
            self._set(state, FAIL, ", ".join(told))
        elif missing:
            # A projection needs a number of steps to stand on; its absence is a lack of data, not a failure.
            self._set(state, UNKNOWN, f"missing: {', '.join(missing)}")
        else:
            self._set(state, PASS, ", ".join(told))

    def _close_all_at_most(self, state: _State, f: AllAtMost) -> None:
        seen = {name: self._finals[name] for name in f.limits if name in self._finals}
        broken = {name: value for name, value in seen.items() if not value <= f.limits[name]}
        missing = [name for name in f.limits if name not in seen]
        if missing and not broken:
            self._set(state, UNKNOWN, f"missing: {', '.join(missing)}")
            return
        told = ", ".join(f"{short_name(name)} {as_text(value)}" for name, value in (broken or seen).items())
        self._set(state, FAIL if broken else PASS, told)

    def _hold(self, state: _State, f: Threshold, value: float) -> None:
        name, limit = limit_of(f, self._precision())
        if math.isnan(limit):
            self._set(state, UNKNOWN, f"{as_text(value)}, and no limit for precision {self._precision()}")
            return
        holds = {"at_most": value <= limit, "at_least": value >= limit, "below": value < limit, "above": value > limit}
        shown = as_text(value)
        if shown == as_text(limit) and value != limit:
            shown = repr(value)  # "expected < 3, observed 3" would say nothing
        self._set(state, PASS if holds[name] else FAIL, shown)

    def _set(self, state: _State, verdict: str, observed: str) -> None:
        if verdict != state.verdict:
            self._changed.setdefault(state.falsifier.id, state.verdict)
        state.verdict, state.observed, state.step = verdict, observed, self._step

    def _precision(self) -> str:
        return self._run.precision if self._run else ""

    def _steps_asked(self) -> int:
        return self._run.steps_asked if self._run else 0

    def _expectation(self, f: Kind) -> str:
        if isinstance(f, Threshold):
            name, limit = limit_of(f, self._precision())
            short = f.metric.removeprefix("measure.").replace("_", " ")
            which = "" if f.over == "each" else f"{f.over} "
            if math.isnan(limit):
                return f"{which}{short} {LIMITS[name]} a limit for precision {self._precision()}"
            return f"{which}{short} {LIMITS[name]} {as_text(limit)}"
        if isinstance(f, Trend):
            by = f" by {100 * f.by:.4g}% or more" if f.by else ""
            return f"{f.metric} {f.direction}{by}"
        if isinstance(f, ExactSteps):
            budget = ", or fewer by the time budget" if self._run and self._run.budget_seconds is not None else ""
            return f"exactly {counted(self._steps_asked(), 'step')}{budget}"
        if isinstance(f, NoStall):
            return f"a step within {f.seconds:g} s or {f.factor:g} mean steps"
        if isinstance(f, Finite):
            return f"{f.metric} always finite"
        if isinstance(f, AllAtMost):
            return ", ".join(f"{short_name(name)} <= {as_text(limit)}" for name, limit in f.limits.items())
        return f"present: {', '.join(f.metrics)}"

    @staticmethod
    def _as_event(state: _State) -> Verdict:
        f = state.falsifier
        return Verdict(
            id=f.id,
            verdict=state.verdict,
            severity=f.severity,
            claim=f.claim,
            expected=state.expected,
            observed=state.observed,
            step=state.step,
        )


def _fields(wanted: Collection[str]) -> dict[type[Event], tuple[tuple[str, str], ...]]:
    """Of each kind of event the fields that the contract looks at, each with the metric's name."""
    kinds: tuple[tuple[str, type[Event]], ...] = (
        ("step", Step), ("efficiency", Efficiency), ("eval", Eval), ("projection", Projection),
    )  # fmt: skip
    return {
        kind: tuple((name.removeprefix(f"{tag}."), name) for name in METRICS if name in wanted and name.startswith(tag))
        for tag, kind in kinds
    }


def _might_change(state: _State, values: Sequence[float]) -> bool:
    f = state.falsifier
    if isinstance(f, Threshold):
        return f.over == "each" and state.verdict != FAIL
    return isinstance(f, Finite) and state.verdict == PENDING and not all(map(math.isfinite, values))


def _take_all(state: _State, values: Sequence[float]) -> None:
    """What `Judge._take` does with one value after the other, where no verdict changes."""
    f = state.falsifier
    if isinstance(f, Threshold) and f.over != "each":
        for value in values:
            keep_extreme(state.values, value, f.over)
    elif isinstance(f, Trend):
        state.values += values
        del state.values[f.window : max(f.window, len(state.values) - f.window)]
    elif isinstance(f, Finite) and state.verdict == PENDING:
        state.values[:] = values[-1:]
