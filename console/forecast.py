"""When a run that goes on will end, from what its steps, evaluations and checkpoints have cost so far."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from console.long_work import work
from console.outlook import host_now, outlook
from console.run_state import RunState
from console.view import View
from engine.projection import MIN_STEPS, FixedCosts, project
from engine.stream import Checkpoint

WINDOW_STEPS = 2_000
"""Steps that the estimate stands on: the last ones of this attempt."""
_REFRESH = 100
"""The estimate is made again after one in so many more of those steps."""
_RECENT = 10
"""Evaluations and checkpoints whose costs are averaged."""
_NAMED_DAYS = 6
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

Range = tuple[float, float, float]
"""10th, 50th and 90th percentile."""


@dataclass(frozen=True)
class Forecast:
    """When a run ends if it goes on as it did.

    `seconds` from the view's moment to the end, and `ends` in Unix seconds of our clock, both as p10, p50 and p90.
    `step_seconds` is the wall time that one more step costs, evaluations and checkpoints left out; NaN before
    anything can be said of it.
    """

    seconds: Range
    ends: Range
    step_seconds: float


@dataclass(frozen=True)
class _Costs:
    """What was measured, in seconds: a step (with what stands between two), an evaluation, a checkpoint."""

    step: Range
    evaluation: float
    evaluate_every: int | None
    checkpoint: float
    checkpoint_every: int | None
    closing: float
    """The last evaluation and the last checkpoint, which training waits for."""


_known: OrderedDict[tuple[object, ...], _Costs | None] = OrderedDict()
_KNOWN_MOST = 32


def forecast(view: View) -> Forecast | None:
    """When the run ends; None for one that is over, has fewer than `MIN_STEPS` steps, or none left, or
    whose lines have no times.

    The steps that are left cost what blocks of recent steps cost, resampled; evaluations and checkpoints come on top,
    as many as are still due. A step that takes longer than expected moves the end by what it takes longer. The time
    budget of a smoke is an upper bound, and known before its first step.
    """
    state, run = view.state, view.state.run
    if run is None or not view.timed or outlook(view).ended:
        return None
    now = host_now(view)
    if not state.makes_steps:  # what does the work says itself how long it will take
        made = work(view, now)
        left = made.seconds_left if made and made.last else None
        return None if left is None else Forecast((left,) * 3, (view.now + left,) * 3, math.nan)
    costs = _costs(state)
    by_steps = None if costs is None else _left(state, run.steps_asked, costs, now)
    budget = math.inf
    if run.mode == "smoke" and run.budget_seconds is not None:
        budget = max(0.0, state.first_t + run.budget_seconds - now)
    p10, p50, p90 = (min(budget, each) for each in by_steps or (math.inf,) * 3)
    if not math.isfinite(p90):
        return None
    ends = (view.now + p10, view.now + p50, view.now + p90)
    return Forecast((p10, p50, p90), ends, costs.step[1] if costs else math.nan)


def _left(state: RunState, target: int, costs: _Costs, now: float) -> Range | None:
    """Seconds from `now` (of the host's clock) to the end."""
    last = state.last_step
    if last is None or last.step >= target:
        return None
    due, since = 0.0, last.t
    if state.evals and state.evals[-1].step == last.step:
        since = max(since, state.evals[-1].t)
    elif costs.evaluate_every and last.step % costs.evaluate_every == 0:
        due = costs.evaluation  # being made now
    fixed = FixedCosts(
        start_seconds=costs.closing,
        evaluation_seconds=costs.evaluation,
        evaluations=_multiples(costs.evaluate_every, last.step, target),
        checkpoint_seconds=costs.checkpoint,
        checkpoints=_multiples(costs.checkpoint_every, last.step, target),
    ).total_seconds
    more = target - last.step - 1
    # What is being done now cannot end before now, however long it takes already.
    p10, p50, p90 = (max(due + step - (now - since), 0.0) + more * step + fixed for step in costs.step)
    return p10, p50, p90


def _multiples(every: int | None, after: int, before: int) -> int:
    """How many multiples of `every` lie strictly between two steps."""
    return max(0, (before - 1) // every - after // every) if every else 0


def _costs(state: RunState) -> _Costs | None:
    """What things cost, measured again only when a hundredth of the window is new. The same steps, the same answer."""
    steps = state.steps
    grid = max(1, min(len(steps), WINDOW_STEPS) // _REFRESH)
    rows = len(steps) - len(steps) % grid
    if rows < MIN_STEPS:
        return None
    run = state.run.run if state.run else ""
    stamp = float(steps.column("t")[rows - 1])
    key = (run, rows, stamp, state.train_started, len(state.evals), len(state.checkpoints))
    if key not in _known:
        with np.errstate(all="ignore"):  # a stream may hold any number
            _known[key] = _measure(state, rows)
        while len(_known) > _KNOWN_MOST:
            _known.popitem(last=False)
    return _known[key]


def _measure(state: RunState, rows: int) -> _Costs | None:
    number, t = (state.steps.column(name)[:rows] for name in ("step", "t"))
    begin = int(np.argmax(t >= state.train_started)) if state.train_started is not None else 0
    if rows - begin < MIN_STEPS:  # a later attempt that has just begun
        begin = 0
    # `project` leaves out a tenth at the beginning, compilation or not: in the middle of a run that much more is given.
    begin = max(begin, rows - WINDOW_STEPS * 10 // 9)
    apart = np.diff(t[begin:], prepend=t[begin])
    seconds = state.steps.column("seconds")[begin:rows]
    seconds = np.where(np.isfinite(seconds) & (seconds > 0), seconds, apart)
    sane = np.isfinite(seconds) & (seconds >= 0)
    nothing = FixedCosts(0.0, 0.0, 0, 0.0, 0)
    one = project(seconds[sane].tolist(), 1, nothing)
    if one is None or not math.isfinite(one.p90_seconds):
        return None
    # Between the end of a step and its event something may pass each time; a rare gap is an evaluation, a checkpoint
    # or a clock that was set, and none of that belongs to every step.
    gaps = (apart - seconds)[sane][1:]
    between = max(0.0, float(np.median(gaps)) if len(gaps) else 0.0)
    saves = [c for c in state.checkpoints if isinstance(c, Checkpoint)]
    periodic = [c for c in saves if "periodic" in c.kind.split("+")]
    # A best checkpoint comes by no calendar: those of the window are shared out among its steps.
    first = int(number[begin])
    extra = [c.waited_seconds for c in saves if c.kind == "best" and first <= c.step <= number[-1]]
    between += _sane_sum(extra) / (rows - begin)
    evals = [e for e in state.evals if e.step > 0]
    evaluation = _mean([e.seconds for e in (evals or state.evals)])
    p10, p50, p90 = (between + each for each in (one.p10_seconds, one.p50_seconds, one.p90_seconds))
    return _Costs(
        step=(p10, p50, p90),
        evaluation=evaluation,
        evaluate_every=period([e.step for e in evals]),
        checkpoint=_mean([c.waited_seconds for c in periodic]),
        checkpoint_every=checkpoint_period(state),
        closing=evaluation + _mean([c.seconds for c in saves]),
    )


def _mean(seconds: Sequence[float]) -> float:
    """Of the last few, what is a time; 0 for none."""
    recent = [each for each in seconds[-_RECENT:] if math.isfinite(each) and each >= 0]
    return math.fsum(recent) / len(recent) if recent else 0.0


def _sane_sum(seconds: Sequence[float]) -> float:
    return math.fsum(each for each in seconds if math.isfinite(each) and each >= 0)


def period(steps: Sequence[int]) -> int | None:
    """Every how many steps something happens, as its last few times show; None where it did not happen yet."""
    recent = sorted({step for step in steps[-_RECENT - 1 :] if step > 0})
    if len(steps) <= _RECENT:
        recent.insert(0, 0)  # what comes by the calendar is counted from the first step on
    apart = [later - earlier for earlier, later in pairwise(recent)]
    return max(apart, key=lambda each: (apart.count(each), each), default=None)


def checkpoint_period(state: RunState) -> int | None:
    """Every how many steps a periodic checkpoint is due, failed ones included; None where there was none."""
    recent = state.checkpoints[-20 * _RECENT :]
    return period([c.step for c in recent if "periodic" in c.kind.split("+")])


def end_text(ends: float, now: float) -> str:
    """A moment to come as the operator's clock will show it: `Sun 14:05`; `Sun 29 Nov 14:05` when days are far off."""
    try:
        there, here = time.localtime(ends), time.localtime(now)
    except (OverflowError, ValueError, OSError):
        return "?"
    day = _DAYS[there.tm_wday]
    if ends - now > _NAMED_DAYS * 86_400:
        day += f" {there.tm_mday} {_MONTHS[there.tm_mon - 1]}"
        if there.tm_year != here.tm_year:
            day += f" {there.tm_year}"
    return f"{day} {there.tm_hour:02d}:{there.tm_min:02d}"
