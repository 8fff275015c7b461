"""Three clocks of a run that is followed: is the host reached, does the process live, does the work go on.

Each counts by itself, on this machine's steady clock, and has its own budget. The process and the work are judged only
by what the host answered: while it cannot be asked their clocks stand still, and how they are is unknown.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dispatch.manifest import SupervisorHeartbeat
from engine.stream import (
    Checkpoint,
    CheckpointFailed,
    End,
    Eval,
    Event,
    Measure,
    Phase,
    Progress,
    Projection,
    Run,
    Step,
)

LINK_SECONDS = 16.0
"""Without an answer for this long the link is dead: its keepalives notice that sooner."""
HEARTBEAT_SECONDS = 20.0
"""Without any line for this long the process counts as silent; it sends a heartbeat every five seconds."""
STEP_SECONDS, STEP_FACTOR = 60.0, 20.0
"""Without a step for this long, and for this many mean steps, training counts as stalled."""
FIRST_STEP_SECONDS = 300.0
"""For the first step of an attempt, which may have to compile."""
PHASE_SECONDS = {"import": 300.0}
OTHER_PHASE_SECONDS = 1_800.0
"""For phases that bring no budget of their own; a smoke is bounded as a whole."""
SUPERVISOR_SECONDS = 60.0
"""Without a new heartbeat of the supervisor for this long, it is gone; it writes one every ten seconds."""
_GAP_SECONDS = 5.0
"""Between two looks at the host at most so much counts: a console that slept has watched nobody."""
_PROGRESS = (Run, Phase, Measure, Eval, Checkpoint, CheckpointFailed, Progress, Projection, End)
"""What the work itself brings, beside steps; heartbeats and vitals come from threads that may outlive it."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds since something was last seen, and how many of them are nothing to worry about."""

    seconds: float
    budget: float

    @property
    def late(self) -> bool:
        """It took longer than it may."""
        return self.seconds > self.budget


@dataclass(frozen=True, slots=True)
class Liveness:
    """The clocks at one moment, and what the supervisor on the host last said of its own."""

    link: Clock
    heartbeat: Clock
    progress: Clock
    phase: str = "start"
    reached: bool = True
    supervisor: SupervisorHeartbeat | None = None
    supervisor_seconds: float = 0.0
    """Since its heartbeat was last seen to move, while we looked."""

    @property
    def state(self) -> Literal["ALIVE", "SILENT", "STALLED", "UNKNOWN"]:
        """UNKNOWN while the host is not reached, whatever the other clocks show: that is no failure of the run."""
        if not self.reached or self.link.late:
            return "UNKNOWN"
        if self.heartbeat.late:
            return "SILENT"
        return "STALLED" if self.progress.late else "ALIVE"

    @property
    def unsupervised(self) -> bool:
        """The supervisor was there, and has not moved for long: nobody will record the run's end."""
        return self.supervisor is not None and self.supervisor_seconds > SUPERVISOR_SECONDS


def step_budget(mean_seconds: float | None, between: float = 0.0) -> float:
    """Seconds that may pass without a step.

    Args:
        mean_seconds: of a step; None before the first one.
        between: that an evaluation or a checkpoint between two steps takes.
    """
    if mean_seconds is None:
        return FIRST_STEP_SECONDS
    wanted = [each for each in (STEP_FACTOR * mean_seconds, between) if math.isfinite(each)]
    return max(STEP_SECONDS, *wanted)


def phase_budget(name: str, own: float | None) -> float:
    """Seconds that another phase than training may take."""
    return PHASE_SECONDS.get(name, OTHER_PHASE_SECONDS) if own is None else own


class Clocks:
    """Keeps the clocks; the follower tells it of every answer of the host."""

    def __init__(self) -> None:
        self._answered = self._asked = time.monotonic()
        self._silence = 0.0
        self._phase, self._budget = "start", phase_budget("import", None)
        self._latest = self._progressed = 0.0
        self._steps: deque[float] = deque(maxlen=200)
        self._between: dict[type[Event], float] = {}
        self._supervisor: SupervisorHeartbeat | None = None
        self._moved = self._seen = 0.0

    def heard(self, asked: float, lines: bool, events: Sequence[Event]) -> None:
        """The host answered a question for what is new.

        Args:
            asked: when the question was put, by `time.monotonic`: nothing that came later is known.
            lines: something was new.
            events: what of it could be read.
        """
        self._answered = time.monotonic()
        if lines:
            self._silence = 0.0
        else:
            self._silence += min(max(0.0, asked - self._asked), _GAP_SECONDS)
        self._asked = asked
        for event in events:
            if type(event) is Step:
                self._steps.append(event.seconds)
                self._progressed = event.t
            elif isinstance(event, _PROGRESS):
                self._see(event)
        if events:
            self._latest = events[-1].t

    def _see(self, event: Event) -> None:
        self._progressed = event.t
        if isinstance(event, Phase):
            self._phase, self._budget = event.name, phase_budget(event.name, event.budget_seconds)
            self._steps.clear()
        elif isinstance(event, Eval):
            self._between[Eval] = event.seconds
        elif isinstance(event, Checkpoint):
            self._between[Checkpoint] = event.waited_seconds

    def supervised(self, beat: SupervisorHeartbeat | None) -> None:
        """What was found of the supervisor's heartbeat; None: there is none, as of a run that has ended."""
        now = time.monotonic()
        moved = beat is None or self._supervisor is None or beat.beat != self._supervisor.beat
        self._moved = now if moved else self._moved
        self._supervisor, self._seen = beat, now

    @property
    def silent_seconds(self) -> float:
        """Since the last line arrived, as far as the host was asked."""
        return self._silence

    @property
    def unmoved_seconds(self) -> float:
        """Since the work last went on: silence, and the time by the run's own stamps before it began."""
        passed = self._latest - self._progressed
        return self._silence + (max(0.0, passed) if math.isfinite(passed) else 0.0)

    def at_once(self, reached: bool = True) -> Liveness:
        """All clocks now.

        Args:
            reached: the host can be asked.
        """
        allowed = self._budget
        if self._phase == "train":
            mean = sum(self._steps) / len(self._steps) if self._steps else None
            allowed = step_budget(mean, 2 * sum(self._between.values()))
        return Liveness(
            Clock(time.monotonic() - self._answered, LINK_SECONDS),
            Clock(self._silence, HEARTBEAT_SECONDS),
            Clock(self.unmoved_seconds, allowed),
            self._phase,
            reached,
            self._supervisor,
            self._seen - self._moved,
        )
