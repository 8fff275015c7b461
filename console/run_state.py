"""What the operator sees of a run: a fold over its stream, the same for a live run and for a past one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import attrgetter, lt
from typing import Any, TypeVar

import msgspec
import numpy as np

from console.answers import Answers, AnswersBuffer
from console.kept_pace import Pace
from console.run_log import MAX_LOG_LINES, LogLine, LogPart, RunLog, level_of
from console.series import STEP_COLUMNS, StepBuffer, StepSeries
from console.source import DERIVED, STATED, STREAM, UNDER_NO_CONTRACT, Source
from engine.falsifiers import CALM, FAIL, PASS, PENDING, Contract, Judge
from engine.human import human_lines
from engine.stream import (
    Checkpoint,
    CheckpointFailed,
    Control,
    Efficiency,
    End,
    Eval,
    Event,
    Heartbeat,
    Log,
    Measure,
    Phase,
    Problem,
    Progress,
    Projection,
    Run,
    Step,
    Verdict,
    Vitals,
)
from engine.text import clean

__all__ = [
    "DERIVED",
    "MAX_LOG_LINES",
    "MAX_MARKS",
    "STATED",
    "STREAM",
    "UNDER_NO_CONTRACT",
    "LogLine",
    "PhaseSpan",
    "Reducer",
    "RunState",
    "Source",
]

WITHOUT_STEPS = frozenset(("prepare", "evaluate", "publish"))
"""Modes of runs that nobody misses steps and losses of."""
MAX_MARKS = 10_000
"""Of evaluations, checkpoints, phases and verdict changes each: what a hostile stream may make us keep."""
_LONG, _CUT = 4_096, 1_000
"""Characters: of one of these events, and of each of its texts where it has more."""

_Mark = TypeVar("_Mark", bound=Event)
_NO_STEPS = StepBuffer().series
_columns_of_step = tuple(attrgetter(name) for name in STEP_COLUMNS)
_number_of_step, _time_of, _is_again = attrgetter("step"), attrgetter("t"), attrgetter("again")


@dataclass(frozen=True)
class PhaseSpan:
    """A phase that began at `started` (Unix seconds) and has taken `seconds` so far."""

    name: str
    started: float
    seconds: float
    budget_seconds: float | None = None


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
    pace: Pace = field(default_factory=Pace)
    measures: Mapping[str, Measure] = field(default_factory=dict)
    """Each by its name, as it was told last."""
    answers: Answers = field(default_factory=Answers)
    """Of an evaluation on problems."""
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
    source: Source = STREAM
    bases: Mapping[str, str] = field(default_factory=dict)
    """Of verdicts that no contract of the run's own stands behind: `derived`, `stated`, or `stated, derived`."""

    @property
    def phase(self) -> str:
        """The phase that the run is in."""
        return self.phases[-1].name if self.phases else "starting"

    @property
    def efficiency(self) -> Efficiency | None:
        """How fast the last steps were."""
        return self.pace.windows[-1] if self.pace.windows else None

    @property
    def progress(self) -> Progress | None:
        """How far work without steps has come."""
        return self.pace.reports[-1] if self.pace.reports else None

    @property
    def target_steps(self) -> int | None:
        """Steps that the run will make if nothing ends it before; None for one that makes none."""
        return self.run.steps_asked if self.run is not None and self.makes_steps else None

    @property
    def makes_steps(self) -> bool:
        """Whether it is a run that trains at all; one that did not say what it is counts as one."""
        return self.run is None or self.run.mode not in WITHOUT_STEPS

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
        if self.source.judged_by_us:
            return [
                f"{v.id}: it says {self.stated[v.id].verdict}, its numbers say {v.verdict}"
                for v in self.judged
                if self.bases.get(v.id) == DERIVED and v.id in self.stated and self.stated[v.id].verdict in (PASS, FAIL)
            ]
        if self.answers and self.end is not None:
            different += self.answers.contradictions(self.measures)
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
            pace=self.pace.until(t),
            measures={name: m for name, m in self.measures.items() if m.t <= t},
            answers=self.answers.until(t),
            stated={key: v for key, v in self.stated.items() if v.t <= t},
            judged=tuple(latest.get(v.id) or _pending(v) for v in self.judged),
            bases={key: basis for key, basis in self.bases.items() if key in latest},
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
        source: what the lines can tell.
    """

    def __init__(self, contract: Contract, source: Source = STREAM) -> None:
        self._judge = Judge(contract)
        self._source = source
        self._buffer = StepBuffer()
        self._fresh: list[Step] = []
        """Steps that the series does not have yet."""
        self._phases: list[PhaseSpan] = []
        self._phase_latest = 0.0
        self._evals: list[Eval] = []
        self._checkpoints: list[Checkpoint | CheckpointFailed] = []
        self._measures: dict[str, Measure] = {}
        self._answers = AnswersBuffer()
        self._stated: dict[str, Verdict] = {}
        self._history: list[Verdict] = []
        self._log = RunLog()
        self._lines: list[Log | LogLine] = []
        self._now: dict[str, Any] = {"first_t": 0.0, "last_t": 0.0, "events": 0}
        """Fields of the state that hold one value, as they changed."""
        self.state = RunState(source=source)

    def feed(self, events: Iterable[Event]) -> RunState:
        """The state after these events."""
        before = count = self.state.events
        calm: list[Event] = []
        for event in events:
            count += 1
            if type(event) in CALM:
                calm.append(event)
                continue
            if calm:
                self._see_calm(calm)
                calm = []
            self._see(event)
        if calm:
            self._see_calm(calm)
        if count == before:
            return self.state
        self._take_over()
        for marks in (self._phases, self._evals, self._checkpoints, self._history):
            del marks[:-MAX_MARKS]
        self._now["events"] = count
        judged, bases = self._verdicts()
        self.state = replace(
            self.state,
            steps=self._buffer.series,
            phases=self._spans(),
            evals=tuple(self._evals),
            checkpoints=tuple(self._checkpoints),
            measures=dict(self._measures),
            answers=self._answers.snapshot(),
            stated=dict(self._stated),
            judged=judged,
            bases=bases,
            history=tuple(self._history),
            log=self._log,
            **self._now,
        )
        return self.state

    def _verdicts(self) -> tuple[tuple[Verdict, ...], dict[str, str]]:
        """All verdicts, and what is behind each where that is not the run's own contract."""
        ours = tuple(self._judge.verdicts)
        if not self._source.judged_by_us:
            return ours, {}
        derived = {v.id: v for v in ours if v.verdict in (PASS, FAIL)}
        bases = {key: STATED for key in self._stated} | {key: DERIVED for key in derived}
        agreed = (key for key, v in derived.items() if key in self._stated and self._stated[key].verdict == v.verdict)
        bases |= {key: f"{STATED}, {DERIVED}" for key in agreed}
        return tuple((self._stated | derived).values()), bases

    def _see(self, event: Event) -> None:
        now, t = self._now, event.t
        now["last_t"] = t
        now["first_t"] = now["first_t"] or t
        if t > self._phase_latest:
            self._phase_latest = t
        for verdict in self._judge.observe(event):
            self._history.append(msgspec.structs.replace(verdict, t=t, seq=event.seq))
        if isinstance(event, Phase | Verdict | Checkpoint | CheckpointFailed | Measure):
            event = _bounded(event)
        if isinstance(event, Vitals):
            now["vitals"] = event
        elif isinstance(event, Eval):
            self._eval(event)
        elif isinstance(event, Phase):
            self._phase(event)
        elif isinstance(event, Verdict):
            if event.id in self._stated or len(self._stated) < MAX_MARKS:
                self._stated[event.id] = event
                if self._source.judged_by_us:
                    self._history.append(event)
        elif isinstance(event, Checkpoint | CheckpointFailed):
            self._checkpoints.append(event)
        elif isinstance(event, Projection):
            now["projection"] = event
        elif isinstance(event, Measure):
            if event.name in self._measures or len(self._measures) < MAX_MARKS:
                self._measures[event.name] = event
        elif isinstance(event, Problem):
            self._answers.answer(event)
        elif isinstance(event, Control):
            self._answers.control(event)
        elif isinstance(event, Efficiency | Progress):
            now["pace"] = now.get("pace", Pace()).then(event)
        elif isinstance(event, End):
            now["end"] = event
        elif isinstance(event, Run):
            now["run"], now["end"] = event, None  # a later attempt: the run goes on
            self._answers.begin()
        if not self._source.verbatim:
            self._lines += [LogLine(t, level_of(event), line) for line in human_lines(event, now.get("run"))]

    def _see_calm(self, events: list[Event]) -> None:
        """Events that came one after the other, of the kinds that most are of, taken together."""
        now, times = self._now, list(map(_time_of, events))
        now["last_t"] = times[-1]
        now["first_t"] = now["first_t"] or next(filter(None, times), 0.0)
        self._phase_latest = max(self._phase_latest, *times)
        for event, verdicts in self._judge.observe_calm(events):
            self._history += [msgspec.structs.replace(verdict, t=event.t, seq=event.seq) for verdict in verdicts]
        steps = [event for event in events if isinstance(event, Step)]
        if steps:
            self._steps(steps)
        if len(steps) < len(events):
            self._lines += [event for event in events if isinstance(event, Log)]
            for beat in [event for event in events if isinstance(event, Heartbeat)][-1:]:
                now["heartbeat"] = beat

    def _steps(self, steps: list[Step]) -> None:
        now = self._now
        now["last_step"] = steps[-1]
        now.setdefault("first_step", steps[0])
        if self._evals and any(map(_is_again, steps)):
            lowest = min(event.step for event in steps if event.again)
            self._evals = [e for e in self._evals if e.step < lowest]
        numbers, fresh = list(map(_number_of_step, steps)), self._fresh
        if all(map(lt, numbers, islice(numbers, 1, None))) and (not fresh or fresh[-1].step < numbers[0]):
            fresh += steps
        else:
            for event in steps:
                while fresh and fresh[-1].step >= event.step:  # made again, since the same batch
                    fresh.pop()
                fresh.append(event)

    def _take_over(self) -> None:
        """What waited for the end of a batch."""
        fresh = self._fresh
        if fresh:
            columns = [np.fromiter(map(column, fresh), np.float64, len(fresh)) for column in _columns_of_step]
            self._buffer.append(np.stack(columns))
            self._fresh = []
        self._log = self._log.then(LogPart(self._lines, self._source.verbatim))
        self._lines = []

    def _eval(self, event: Eval) -> None:
        while self._evals and self._evals[-1].step > event.step:
            self._evals.pop()
        self._evals.append(event)

    def _phase(self, event: Phase) -> None:
        self._phases[-1:] = self._last_span()
        self._phases.append(PhaseSpan(event.name, event.t, 0.0, event.budget_seconds))
        self._phase_latest = event.t

    def _spans(self) -> tuple[PhaseSpan, ...]:
        return (*self._phases[:-1], *self._last_span())

    def _last_span(self) -> list[PhaseSpan]:
        """The last phase, if any, with the time that it has taken; a clock set back makes it no shorter."""
        return [replace(last, seconds=max(0.0, self._phase_latest - last.started)) for last in self._phases[-1:]]


def _step_of(steps: StepSeries, row: int) -> Step:
    """A row of the series as the event that it came from."""
    values = {name: steps.column(name)[row].item() for name in STEP_COLUMNS}
    return Step(**(values | {"step": int(values["step"]), "tokens": int(values["tokens"])}))


def _bounded(event: _Mark) -> _Mark:
    """A mark as it is kept; no writer of ours makes one that is cut here."""
    texts = {name: text for name in event.__struct_fields__ if isinstance(text := getattr(event, name), str)}
    if sum(map(len, texts.values())) <= _LONG:
        return event
    return msgspec.structs.replace(event, **{name: clean(text, _CUT) for name, text in texts.items()})


def _pending(verdict: Verdict) -> Verdict:
    return msgspec.structs.replace(verdict, verdict=PENDING, observed="nothing yet", step=0)
