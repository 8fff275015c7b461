"""Long work that makes no steps, such as storing a teacher: how far it came, how fast, and when it will be done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from console.stored import prepares, shown_progress
from console.view import View
from engine.stream import Progress

EARLY_PHASES = ("controls", "generate")
"""Of an evaluation: when the work of one is done, that of the next begins."""
RATE_SECONDS = 60.0
"""What the rate is taken over, where there are reports of so long."""


@dataclass(frozen=True)
class Work:
    """How far long work that makes no steps has come at the moment of a view.

    `rate` is in units a second over the last reports of its attempt; `seconds_left` from the view's moment on. Each is
    None where nothing tells it.
    """

    done: int
    total: int
    unit: str
    rate: float | None
    seconds_left: float | None
    last: bool = True
    """Nothing of the kind comes after it, so that the run ends with it."""

    @property
    def fraction(self) -> float | None:
        """How much is done, 0 to 1; None where nobody said of how much."""
        return min(1.0, max(0.0, self.done / self.total)) if self.total > 0 else None


def work(view: View, now: float) -> Work | None:
    """The long work that a run is at, or was at when it ended; None for one that makes steps.

    Args:
        view: of the run.
        now: the time by the clock of its host, in Unix seconds.
    """
    state, last = view.state, shown_progress(view.state)
    if last is None or (state.last_step is not None and state.last_step.t >= last.t):
        return None
    # Of an evaluation that ended before its first answer was judged, what the controls took says nothing of it.
    ended = state.end is not None and bool(state.answers.rows or not state.answers)
    over = not state.makes_steps and (prepares(state) or ended)
    if not over and state.phases and state.phases[-1].started > last.t:
        return None
    left = last.seconds_left
    if left is not None:
        left = max(0.0, left - max(0.0, now - last.t)) if math.isfinite(left) and left >= 0 else None
    goes_on = state.end is None and last.done < last.total
    alike = [each for each in state.pace.reports if each.unit == last.unit]
    more_comes = state.phase in EARLY_PHASES and not prepares(state)
    return Work(last.done, last.total, last.unit, _rate(alike), left if goes_on else None, last=not more_comes)


def _rate(reports: Sequence[Progress]) -> float | None:
    """Of the last minute's reports; a report that has done less, or took less long, is of another attempt."""
    run = 1
    for later, earlier in pairwise(reversed(reports)):
        if earlier.done > later.done or earlier.seconds >= later.seconds:
            break
        run += 1
        if reports[-1].seconds - earlier.seconds >= RATE_SECONDS:
            break
    first, last = reports[-run], reports[-1]
    passed = last.seconds - first.seconds
    return (last.done - first.done) / passed if passed > 0 and math.isfinite(passed) else None
