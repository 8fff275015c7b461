"""Falsifiers: acceptance checks stated before a run, judged as a fold over its stream.

A contract is a YAML file of falsifiers. The engine judges as it runs and emits the verdicts; a front end feeds the
same events to a `Judge` of its own and holds both results against each other. Nothing but events is looked at, so a
verdict can be judged again years later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from engine.errors import ConfigError, ExitCode
from engine.stream import Eval, Event, Measure, Phase, Projection, Run, Step, Verdict
from engine.yaml_io import parse_yaml

PASS, FAIL, PENDING, UNKNOWN = "PASS", "FAIL", "PENDING", "UNKNOWN"
JUDGE_PHASE = "judge"
"""The phase whose beginning closes every falsifier that waits for the end; its `detail` is why training ended."""

Identifier = Annotated[str, msgspec.Meta(pattern=r"^[A-Z][A-Z0-9-]{2,63}$")]
Metric = Annotated[str, msgspec.Meta(pattern=r"^(step|eval|measure|projection)\.[a-z0-9_]+$")]
Limit = float | dict[str, float]


class Falsifier(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True):
    """One acceptance check. `needs` names what a run must have for the check to apply to it at all."""

    id: Identifier
    claim: str
    severity: Literal["fatal", "gate", "warn"] = "gate"
    needs: list[Literal["teacher", "max_steps"]] = []


class Threshold(Falsifier, frozen=True, kw_only=True, tag="threshold"):
    """A metric stays on the right side of a limit; exactly one limit. A mapping gives one limit for each precision.

    `over` says which values count: `each` (judged as they come), or the `last`, `min` or `max` of them at the end.
    """

    metric: Metric
    at_most: Limit | None = None
    at_least: Limit | None = None
    below: Limit | None = None
    above: Limit | None = None
    over: Literal["each", "last", "min", "max"] = "each"


class Trend(Falsifier, frozen=True, kw_only=True, tag="trend"):
    """A metric's last values stand below (or above) its first, each end averaged over `window` values.

    `by` is the fraction of the first value by which they must differ.
    """

    metric: Metric
    direction: Literal["falls", "rises"]
    window: Annotated[int, msgspec.Meta(ge=1)] = 1
    by: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0


class ExactSteps(Falsifier, frozen=True, kw_only=True, tag="exact_steps"):
    """A run with max_steps = N makes N steps, unless its time budget ended it first."""


class NoStall(Falsifier, frozen=True, kw_only=True, tag="no_stall"):
    """No wait for a step longer than `seconds` and `factor` times the mean step; no phase over its own budget."""

    seconds: Annotated[float, msgspec.Meta(gt=0)]
    factor: Annotated[float, msgspec.Meta(ge=1)] = 20.0


class Finite(Falsifier, frozen=True, kw_only=True, tag="finite"):
    """Every value of a metric is a number, neither NaN nor infinite."""

    metric: Metric


class Present(Falsifier, frozen=True, kw_only=True, tag="present"):
    """Each of these metrics has a finite value by the end."""

    metrics: Annotated[list[Metric], msgspec.Meta(min_length=1)]


Kind = Threshold | Trend | ExactSteps | NoStall | Finite | Present


class Contract(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A named list of falsifiers."""

    version: Literal[1]
    name: str
    falsifiers: Annotated[list[Kind], msgspec.Meta(min_length=1)]


def parse_contract(text: str, source: str) -> Contract:
    """Reads a contract.

    Raises:
        ConfigError: not YAML, an unknown kind or key, a limit missing or doubled, or an identifier that stands twice.
    """
    try:
        contract = msgspec.convert(parse_yaml(text, source), Contract)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}", do="see docs/falsifiers.md for kinds and keys") from None
    seen: set[str] = set()
    for falsifier in contract.falsifiers:
        if falsifier.id in seen:
            raise ConfigError(f"{source}: {falsifier.id} stands twice", expected="each identifier once")
        seen.add(falsifier.id)
        if isinstance(falsifier, Threshold):
            given = [name for name in _LIMITS if getattr(falsifier, name) is not None]
            if len(given) != 1:
                raise ConfigError(
                    f"{source}: {falsifier.id}: {len(given)} limits", expected=f"exactly one of {', '.join(_LIMITS)}"
                )
    return contract


def exit_code_of(verdicts: Iterable[Verdict]) -> ExitCode:
    """FAILED when a fatal or gate verdict is FAIL, UNDECIDED when one is not yet PASS, else OK."""
    binding = {v.verdict for v in verdicts if v.severity != "warn"}
    if FAIL in binding:
        return ExitCode.FAILED
    return ExitCode.OK if binding <= {PASS} else ExitCode.UNDECIDED


def builtin_contract(mode: str) -> str:
    """Text of the contract that ships for `smoke` or `train`."""
    return (Path(__file__).parent / "assets" / "contracts" / f"{mode}.yaml").read_text(encoding="utf-8")


_LIMITS = {"at_most": "<=", "at_least": ">=", "below": "<", "above": ">"}


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
        self._run: Run | None = None
        self._phase, self._phase_started = "", 0.0
        self._phase_budget: float | None = None
        self._step, self._steps_seen, self._last_step_t, self._longest_wait = 0, 0, 0.0, 0.0
        self._step_seconds = 0.0
        self._finals: dict[str, float] = {}

    @property
    def verdicts(self) -> list[Verdict]:
        """Every falsifier that applies to this run, with its present verdict, in the contract's order."""
        return [self._as_event(state) for state in self._states]

    def observe(self, event: Event) -> list[Verdict]:
        """The verdicts that this event changed."""
        if isinstance(event, Verdict):
            return []
        if isinstance(event, Run):
            self._begin(event)
        before = [state.verdict for state in self._states]
        self._advance(event)
        for name, value in _metrics(event):
            self._finals[name] = value
            for state in self._states:
                self._take(state, name, value)
        for state in self._states:
            if isinstance(state.falsifier, NoStall) and state.verdict == PENDING:
                self._watch(state, event.t)
        if isinstance(event, Phase) and event.name == JUDGE_PHASE:
            for state in self._states:
                if state.verdict == PENDING:
                    self._close(state, event.detail)
        return [self._as_event(s) for s, was in zip(self._states, before, strict=True) if s.verdict != was]

    def _begin(self, run: Run) -> None:
        if self._run is not None:  # a later attempt of the same run goes on with what was seen
            return
        self._run = run
        has = {"teacher": run.teacher is not None, "max_steps": run.max_steps is not None}
        self._states = [_State(f) for f in self._contract.falsifiers if all(has[need] for need in f.needs)]
        for state in self._states:
            state.expected = self._expectation(state.falsifier)

    def _advance(self, event: Event) -> None:
        if isinstance(event, Phase):
            self._phase, self._phase_started, self._phase_budget = event.name, event.t, event.budget_seconds
            self._last_step_t = event.t
        elif isinstance(event, Step):
            if self._phase == "train":
                self._longest_wait = max(self._longest_wait, event.t - self._last_step_t)
            self._last_step_t = event.t
            self._step, self._steps_seen = event.step, self._steps_seen + 1
            self._step_seconds += event.seconds

    def _take(self, state: _State, name: str, value: float) -> None:
        f = state.falsifier
        if isinstance(f, Threshold) and f.metric == name:
            if f.over == "each":
                holds = self._holds(f, value)
                if state.verdict != FAIL:
                    self._set(state, PASS if holds else FAIL, _number(value))
            else:
                _keep_extreme(state.values, value, f.over)
        elif isinstance(f, Trend) and f.metric == name:
            # The first window and the last are all that is ever needed.
            state.values.append(value)
            if len(state.values) > 2 * f.window:
                del state.values[f.window]
        elif isinstance(f, Finite) and f.metric == name and state.verdict == PENDING:
            if not math.isfinite(value):
                self._set(state, FAIL, f"{_number(value)} at step {self._step}")
            else:
                state.values[:] = [value]

    def _watch(self, state: _State, now: float) -> None:
        f = state.falsifier
        assert isinstance(f, NoStall)
        waited = now - self._last_step_t
        if self._phase == "train":
            mean = self._step_seconds / self._steps_seen if self._steps_seen else 0.0
            if waited > max(f.seconds, f.factor * mean):
                self._set(state, FAIL, f"no step for {waited:.0f} s after step {self._step}")
        elif self._phase_budget is not None and now - self._phase_started > self._phase_budget:
            spent = now - self._phase_started
            self._set(state, FAIL, f"phase {self._phase} took {spent:.0f} s of its {self._phase_budget:.0f} s")

    def _close(self, state: _State, reason: str) -> None:
        f = state.falsifier
        if isinstance(f, Threshold) and state.values:
            self._set(state, PASS if self._holds(f, state.values[0]) else FAIL, _number(state.values[0]))
        elif isinstance(f, Trend) and len(state.values) >= 2 * f.window:
            first, last = (math.fsum(v) / f.window for v in (state.values[: f.window], state.values[-f.window :]))
            margin = abs(first) * f.by
            holds = last < first - margin if f.direction == "falls" else last > first + margin
            self._set(state, PASS if holds else FAIL, f"{_number(first)} to {_number(last)}")
        elif isinstance(f, Finite) and state.values:
            self._set(state, PASS, f"all finite to step {self._step}")
        elif isinstance(f, Present):
            missing = [name for name in f.metrics if not math.isfinite(self._finals.get(name, math.nan))]
            seen = ", ".join(f"{name} {_number(self._finals[name])}" for name in f.metrics if name not in missing)
            # A projection needs a number of steps to stand on; its absence is a lack of data, not a failure.
            self._set(state, UNKNOWN if missing else PASS, f"missing: {', '.join(missing)}" if missing else seen)
        elif isinstance(f, NoStall):
            self._set(state, PASS, f"longest wait {self._longest_wait:.1f} s")
        elif isinstance(f, ExactSteps) and self._run is not None and self._run.max_steps is not None:
            by_budget = reason == "budget" and self._steps_seen < self._run.max_steps
            holds = self._steps_seen == self._run.max_steps or by_budget
            ended = f"{self._steps_seen} steps" + (", ended by the time budget" if by_budget else "")
            self._set(state, PASS if holds else FAIL, ended)
        else:
            count = len(state.values)
            self._set(state, UNKNOWN, f"not enough data: {count} value{'' if count == 1 else 's'}")

    def _set(self, state: _State, verdict: str, observed: str) -> None:
        state.verdict, state.observed, state.step = verdict, observed, self._step

    def _limit(self, f: Threshold) -> tuple[str, float]:
        name = next(name for name in _LIMITS if getattr(f, name) is not None)
        limit = getattr(f, name)
        precision = self._run.precision if self._run else "fp32"
        return name, float(limit.get(precision, math.nan) if isinstance(limit, dict) else limit)

    def _holds(self, f: Threshold, value: float) -> bool:
        name, limit = self._limit(f)
        if name == "at_most":
            return value <= limit
        if name == "at_least":
            return value >= limit
        return value < limit if name == "below" else value > limit

    def _expectation(self, f: Kind) -> str:
        if isinstance(f, Threshold):
            name, limit = self._limit(f)
            which = "" if f.over == "each" else f"{f.over} "
            return f"{which}{f.metric} {_LIMITS[name]} {_number(limit)}"
        if isinstance(f, Trend):
            by = f" by {f.by:.0%} or more" if f.by else ""
            return f"{f.metric} {f.direction}{by}"
        if isinstance(f, ExactSteps):
            return f"exactly {self._run.max_steps if self._run else '?'} steps, or fewer by the time budget"
        if isinstance(f, NoStall):
            return f"a step within {f.seconds:g} s or {f.factor:g} mean steps"
        if isinstance(f, Finite):
            return f"{f.metric} finite at every step"
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


def _metrics(event: Event) -> Iterable[tuple[str, float]]:
    if isinstance(event, Measure):
        yield f"measure.{event.name}", event.value
    elif isinstance(event, Step | Eval | Projection):
        kind = type(event).__name__.lower()
        for name in type(event).__struct_fields__:
            value = getattr(event, name)
            if name not in ("v", "run", "seq", "t") and isinstance(value, int | float):
                yield f"{kind}.{name}", float(value)


def _keep_extreme(values: list[float], value: float, over: str) -> None:
    if values and over == "min" and not value < values[0]:
        return
    if values and over == "max" and not value > values[0]:
        return
    values[:] = [value]


def _number(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.4f}".rstrip("0").rstrip(".") if 1e-2 <= abs(value) < 1e6 else f"{value:.3g}"
