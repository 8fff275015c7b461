"""Where in its past a run is looked at, and how fast that goes on: what the keys of time move."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from console.run_state import RunState

SPEEDS = (1, 3, 10, 30, 100, 300, 1_000)
"""Seconds of the run in one of ours; of a log without times, lines in a second."""
SCRUBS = 50
"""Presses of a key from the end of a run to its beginning."""
_SPAN_LEAST = 1e-3
_COMFORT_SECONDS = 60.0
"""So long a whole replay takes at most at the speed that it begins with, where a speed is high enough for that."""


@dataclass(frozen=True)
class Replay:
    """A place in the past of a run. Moves make new ones.

    `moment` counts as the run's own times do: Unix seconds, or numbers of lines; None is the latest that is known.
    `speed` is one of `SPEEDS`; None until it is played, or chosen.
    """

    moment: float | None = None
    speed: int | None = None
    playing: bool = False

    def toggled(self, state: RunState) -> Replay:
        """Plays, from the beginning when it stands at the end; or stops where it is."""
        if self.playing or not state.events:
            return replace(self, playing=False)
        moment = state.first_t if self.moment is None else self.moment
        return Replay(moment, self.speed or comfortable(state), playing=True)

    def passed(self, seconds: float, state: RunState) -> Replay:
        """So many seconds of ours later; at the end it stops."""
        if not self.playing or self.moment is None:
            return self
        return self._at(self.moment + seconds * (self.speed or 1), state)

    def faster(self, by: int, state: RunState) -> Replay:
        """So many speeds up, or down for a negative number; it stays within `SPEEDS`."""
        at = SPEEDS.index(self.speed or comfortable(state)) + by
        return replace(self, speed=SPEEDS[min(max(0, at), len(SPEEDS) - 1)])

    def scrubbed(self, presses: int, state: RunState) -> Replay:
        """So many `SCRUBS`-ths of the run later, or earlier for a negative number."""
        if not state.events:
            return self
        now = state.last_t if self.moment is None else self.moment
        return self._at(now + presses * _span(state) / SCRUBS, state)

    def at_start(self, state: RunState) -> Replay:
        """At the first thing that is known."""
        return self._at(state.first_t, state) if state.events else self

    def at_end(self) -> Replay:
        """At the latest that is known, and no longer played."""
        return replace(self, moment=None, playing=False)

    def _at(self, moment: float, state: RunState) -> Replay:
        if not moment < state.last_t:
            return self.at_end()
        return replace(self, moment=max(moment, state.first_t))


def comfortable(state: RunState) -> int:
    """The lowest speed at which all of a run is seen within a minute; else the highest."""
    wanted = _span(state) / _COMFORT_SECONDS
    return next((speed for speed in SPEEDS if speed >= wanted), SPEEDS[-1])


def _span(state: RunState) -> float:
    span = state.last_t - state.first_t
    return max(span, _SPAN_LEAST) if math.isfinite(span) else _SPAN_LEAST
