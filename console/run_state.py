"""What the operator sees of a run: a fold over its stream, the same for a live run and for a past one."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from console.series import STEP_COLUMNS, StepBuffer, StepSeries
from engine.falsifiers import FAIL, PENDING, Contract, Judge
from engine.human import human_lines
from engine.stream import (
    Checkpoint,
    CheckpointFailed,
    End,
    Eval,
    Event,
    Heartbeat,
    Log,
    Phase,
    Projection,
    Run,
    Step,
    Verdict,
    Vitals,
)

MAX_LOG_LINES = 5_000
MAX_MARKS = 10_000
"""Of evaluations, checkpoints, phases and verdict changes each: what a hostile stream may make us keep."""

_NO_STEPS = StepBuffer().series


@dataclass(frozen=True)
class PhaseSpan:
    """A phase that began at `started` (Unix seconds) and has taken `seconds` so far."""

    name: str
    started: float
    seconds: float
    budget_seconds: float | None = None


@dataclass(frozen=True)
class LogLine:
    """A line for the operator; `level` is info, warning or error, `t` in Unix seconds."""

    t: float
    level: str
    text: str


@dataclass(frozen=True)
class RunState:
    """A snapshot after some event; it never changes, later events make later snapshots.

    `evals` are in the order of their steps; `stated` holds the engine's verdicts, `judged` our own from the same
    stream, and `history` every change of ours, stamped with the time of the event that brought it.
    """

    run: Run | None = None
    phases: tuple[PhaseSpan, ...] = ()
    first_step: Step | None = None
    last_step: Step | None = None
    steps: StepSeries = _NO_STEPS
    evals: tuple[Eval, ...] = ()
    checkpoints: tuple[Checkpoint | CheckpointFailed, ...] = ()
    projection: Projection | None = None
    stated: dict[str, Verdict] = field(default_factory=dict)
    judged: tuple[Verdict, ...] = ()
    history: tuple[Verdict, ...] = ()
    heartbeat: Heartbeat | None = None
    vitals: Vitals | None = None
    log: Sequence[LogLine] = ()
    end: End | None = None
    first_t: float = 0.0
    last_t: float = 0.0
    events: int = 0

    @property
    def phase(self) -> str:
        """The phase that the run is in."""
        return self.phases[-1].name if self.phases else "starting"

    @property
    def target_steps(self) -> int | None:
        """Steps that the run will make if nothing ends it before."""
        return None if self.run is None else self.run.steps_asked

    @property
    def train_started(self) -> float | None:
        """When training began, in Unix seconds; of the last attempt."""
        return next((p.started for p in reversed(self.phases) if p.name == "train"), None)

    @property
    def disagreements(self) -> list[str]:
        """Where the engine's verdicts and ours differ, one sentence each; empty when all is well.

        The engine states a verdict when it changes, in the events right after the one that changed it; what it never
        stated is still PENDING. While a run goes on a batch may end between the two, and then they differ for a moment.
        """
        ours = {v.id: v for v in self.judged}
        different = []
        for identifier in sorted(ours.keys() | self.stated.keys()):
            judged = ours[identifier].verdict if identifier in ours else "not in the contract"
            stated = self.stated[identifier].verdict if identifier in self.stated else PENDING
            if judged != stated:
                different.append(f"{identifier}: the engine says {stated}, the stream says {judged}")
            elif identifier in self.stated and self.stated[identifier].severity != ours[identifier].severity:
                severities = f"{self.stated[identifier].severity}, the contract says {ours[identifier].severity}"
                different.append(f"{identifier}: the engine says {severities}")
        return different

    def at(self, t: float) -> RunState:
        """What was known at `t` (Unix seconds): this state with everything later left out.

        Heartbeats and vitals are not kept, so there are none. A step that was made again shows as it was at last.
        """
        if t >= self.last_t:
            return self
        steps = self.steps.until(t)
        latest = {v.id: v for v in self.history if v.t <= t}
        row = len(steps) - 1
        return replace(
            self,
            phases=tuple(
                replace(p, seconds=max(0.0, min(p.seconds, t - p.started))) for p in self.phases if p.started <= t
            ),
            steps=steps,
            first_step=self.first_step if len(steps) else None,
            last_step=_step_of(steps, row) if row >= 0 else None,
            evals=tuple(e for e in self.evals if e.t <= t),
            checkpoints=tuple(c for c in self.checkpoints if c.t <= t),
            projection=self.projection if self.projection and self.projection.t <= t else None,
            stated={key: v for key, v in self.stated.items() if v.t <= t},
            judged=tuple(latest.get(v.id) or _pending(v) for v in self.judged),
            history=tuple(v for v in self.history if v.t <= t),
            heartbeat=None,
            vitals=None,
            log=self.log[: bisect_right(self.log, t, key=lambda line: line.t)],
            end=self.end if self.end and self.end.t <= t else None,
            last_t=max(t, self.first_t),
        )


class Reducer:
    """Folds events into `RunState`.

    Args:
        contract: what the run is judged by.
    """

    def __init__(self, contract: Contract) -> None:
        self._judge = Judge(contract)
        self._buffer = StepBuffer()
        self._rows: list[tuple[float, ...]] = []
        self._phases: list[PhaseSpan] = []
        self._phase_latest = 0.0
        self._evals: list[Eval] = []
        self._checkpoints: list[Checkpoint | CheckpointFailed] = []
        self._stated: dict[str, Verdict] = {}
        self._history: list[Verdict] = []
        self._log: deque[LogLine] = deque(maxlen=MAX_LOG_LINES)
        self._now: dict[str, Any] = {"first_t": 0.0, "last_t": 0.0, "events": 0}
        """Fields of the state that hold one value, as they changed."""
        self.state = RunState()

    def feed(self, events: Iterable[Event]) -> RunState:
        """The state after these events."""
        before = count = self.state.events
        for event in events:
            count += 1
            self._see(event)
        if count == before:
            return self.state
        self._buffer.extend(self._rows)
        self._rows.clear()
        for marks in (self._phases, self._evals, self._checkpoints, self._history):
            del marks[:-MAX_MARKS]
        self._now["events"] = count
        self.state = replace(
            self.state,
            steps=self._buffer.series,
            phases=self._spans(),
            evals=tuple(self._evals),
            checkpoints=tuple(self._checkpoints),
            stated=dict(self._stated),
            judged=tuple(self._judge.verdicts),
            history=tuple(self._history),
            log=tuple(self._log),
            **self._now,
        )
        return self.state

    def _see(self, event: Event) -> None:
        now, t = self._now, event.t
        now["last_t"] = t
        now["first_t"] = now["first_t"] or t
        if t > self._phase_latest:
            self._phase_latest = t
        for verdict in self._judge.observe(event):
            self._history.append(msgspec.structs.replace(verdict, t=t, seq=event.seq))
        if isinstance(event, Step):
            self._step(event)
            return
        if isinstance(event, Heartbeat):
            now["heartbeat"] = event
        elif isinstance(event, Vitals):
            now["vitals"] = event
        elif isinstance(event, Eval):
            self._eval(event)
        elif isinstance(event, Phase):
            self._phase(event)
        elif isinstance(event, Verdict):
            if event.id in self._stated or len(self._stated) < MAX_MARKS:
                self._stated[event.id] = event
        elif isinstance(event, Checkpoint | CheckpointFailed):
            self._checkpoints.append(event)
        elif isinstance(event, Projection):
            now["projection"] = event
        elif isinstance(event, End):
            now["end"] = event
        elif isinstance(event, Run):
            now["run"], now["end"] = event, None  # a later attempt: the run goes on
        self._log.extend(LogLine(t, _level(event), line) for line in human_lines(event, now.get("run")))

    def _step(self, event: Step) -> None:
        self._now["last_step"] = event
        self._now.setdefault("first_step", event)
        rows = self._rows
        while rows and rows[-1][0] >= event.step:  # made again, since the same batch
            rows.pop()
        if event.again and self._evals and self._evals[-1].step >= event.step:
            self._evals = [e for e in self._evals if e.step < event.step]
        rows.append(
            (
                event.step,
                event.t,
                event.loss,
                event.ce,
                event.kd,
                event.lr,
                event.grad_norm,
                event.tokens,
                event.seconds,
            )
        )

    def _eval(self, event: Eval) -> None:
        while self._evals and self._evals[-1].step > event.step:
            self._evals.pop()
        self._evals.append(event)

    def _phase(self, event: Phase) -> None:
        self._phases[:] = self._spans()
        self._phases.append(PhaseSpan(event.name, event.t, 0.0, event.budget_seconds))
        self._phase_latest = event.t

    def _spans(self) -> tuple[PhaseSpan, ...]:
        """The phases, the last one with the time that it has taken; a clock set back makes it no shorter."""
        if not self._phases:
            return ()
        last = self._phases[-1]
        return (*self._phases[:-1], replace(last, seconds=max(0.0, self._phase_latest - last.started)))


def _level(event: Event) -> str:
    if isinstance(event, Log):
        return event.level
    if isinstance(event, CheckpointFailed) or (isinstance(event, Verdict) and event.verdict == FAIL):
        return "error"
    if isinstance(event, End) and event.status != "COMPLETED":
        return "error"
    return "info"


def _step_of(steps: StepSeries, row: int) -> Step:
    """A row of the series as the event that it came from."""
    values = {name: steps.column(name)[row].item() for name in STEP_COLUMNS}
    return Step(**(values | {"step": int(values["step"]), "tokens": int(values["tokens"])}))


def _pending(verdict: Verdict) -> Verdict:
    return msgspec.structs.replace(verdict, verdict=PENDING, observed="nothing yet", step=0)
