"""What the operator sees of a run: a fold over its stream, the same for a live run and for a past one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from engine.falsifiers import Contract, Judge
from engine.stream import End, Eval, Event, Heartbeat, Log, Phase, Projection, Run, Step, Verdict

MAX_LOG_LINES = 1_000


@dataclass(frozen=True)
class PhaseSpan:
    """A phase that began at `started` (Unix seconds) and has taken `seconds` so far."""

    name: str
    started: float
    seconds: float


@dataclass(frozen=True)
class RunState:
    """A snapshot after some event; it never changes, later events make later snapshots.

    `evals` are in order of arrival; `stated` holds the engine's verdicts, `judged` our own from the same
    stream.
    """

    run: Run | None = None
    phases: tuple[PhaseSpan, ...] = ()
    first_step: Step | None = None
    last_step: Step | None = None
    evals: tuple[Eval, ...] = ()
    projection: Projection | None = None
    stated: dict[str, Verdict] = field(default_factory=dict)
    judged: tuple[Verdict, ...] = ()
    heartbeat: Heartbeat | None = None
    log: Sequence[Log] = ()
    end: End | None = None
    first_t: float = 0.0
    last_t: float = 0.0

    @property
    def phase(self) -> str:
        """The phase that the run is in."""
        return self.phases[-1].name if self.phases else "starting"

    @property
    def target_steps(self) -> int | None:
        """Steps that the run will make if nothing ends it before."""
        return None if self.run is None else self.run.steps_asked

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
            stated = self.stated[identifier].verdict if identifier in self.stated else "PENDING"
            if judged != stated:
                different.append(f"{identifier}: the engine says {stated}, the stream says {judged}")
            elif identifier in self.stated and self.stated[identifier].severity != ours[identifier].severity:
                severities = f"{self.stated[identifier].severity}, the contract says {ours[identifier].severity}"
                different.append(f"{identifier}: the engine says {severities}")
        return different


class Reducer:
    """Folds events into `RunState`.

    Args:
        contract: what the run is judged by.
    """

    def __init__(self, contract: Contract) -> None:
        self._judge = Judge(contract)
        self._log: deque[Log] = deque(maxlen=MAX_LOG_LINES)
        self.state = RunState()

    def feed(self, events: Iterable[Event]) -> RunState:
        """The state after these events."""
        state = self.state
        for event in events:
            self._judge.observe(event)
            state = self._one(state, event)
        self.state = replace(state, judged=tuple(self._judge.verdicts), log=tuple(self._log))
        return self.state

    def _one(self, state: RunState, event: Event) -> RunState:
        state = _timed(state, event)
        if isinstance(event, Step):
            return replace(state, first_step=state.first_step or event, last_step=event)
        if isinstance(event, Log):
            self._log.append(event)
        if isinstance(event, Run):
            return replace(state, run=event, end=None)  # a later attempt: the run goes on
        if isinstance(event, Phase):
            return replace(state, phases=(*state.phases, PhaseSpan(event.name, event.t, 0.0)))
        if isinstance(event, Eval):
            return replace(state, evals=(*state.evals, event))
        if isinstance(event, Projection):
            return replace(state, projection=event)
        if isinstance(event, Verdict):
            return replace(state, stated={**state.stated, event.id: event})
        if isinstance(event, Heartbeat):
            return replace(state, heartbeat=event)
        if isinstance(event, End):
            return replace(state, end=event)
        return state


def _timed(state: RunState, event: Event) -> RunState:
    phases = state.phases
    if phases:
        last = phases[-1]
        phases = (*phases[:-1], replace(last, seconds=max(last.seconds, event.t - last.started)))
    return replace(state, phases=phases, first_t=state.first_t or event.t, last_t=event.t)
