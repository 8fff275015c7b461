"""How long a run took by the wall clock, without what passed between two attempts."""

from __future__ import annotations

import math

from console.run_state import RunState
from engine.falsifiers import FIRST_PHASE


def wall_seconds(state: RunState) -> float | None:
    """Wall seconds until a run's end, or until its last event, over all its attempts; None where nobody says it."""
    end = state.end
    if not state.source.timed:
        return end.seconds if end is not None and math.isfinite(end.seconds) else None
    if end is not None and (state.run is None or state.run.attempt == 1):
        return end.seconds if math.isfinite(end.seconds) else None
    if not state.phases:
        return max(0.0, state.last_t - state.first_t) if state.events else None
    spent = []
    for phase, then in zip(state.phases, (*state.phases[1:], None), strict=True):
        spent.append(phase.seconds)
        if then is not None and then.name == FIRST_PHASE:  # a later attempt: nothing ran before it began
            spent[-1] = min(phase.seconds, max(0.0, _last_heard(state, then.started) - phase.started))
    return math.fsum(spent)


def _last_heard(state: RunState, before: float) -> float:
    """When the last thing happened before a moment, in Unix seconds; to the second enough, for steps are made often."""
    steps = state.steps.column("t")
    made = steps[steps < before]
    marks = (*state.evals, *state.checkpoints, *state.log)
    return max([float(made[-1]) if len(made) else 0.0, *(mark.t for mark in marks if mark.t < before)])
