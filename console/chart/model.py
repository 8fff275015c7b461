"""From runs to curves: what is drawn, in which order and by which name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from console.chart.grown import Column
from console.chart.lane import Axis, Lane
from console.run_state import RunState
from console.stored import prepares
from engine.stream import Eval

Page = Literal["loss", "agreement"]
PAGES: tuple[Page, ...] = ("loss", "agreement")
_LOSSES = ("loss", "ce", "kd")

Kind = Literal["main", "line", "points"]
"""A main curve is smoothed over its own dim envelope; a line is one or the other; points are joined thinly."""

SLOTS = (
    "text", "axis", "faint", "total", "band", "ce", "kd", "held-out", "agreement", "cosine", "bad", "beyond", "gap",
    *(f"run-{i}" for i in range(6)), *(f"band-{i}" for i in range(6)),
)  # fmt: skip
"""What has a colour of its own; a slot's number is its place here."""
RUN_SLOTS = 6


def slot(name: str) -> int:
    """The number of a slot."""
    return SLOTS.index(name)


@dataclass(frozen=True, eq=False)
class Curve:
    """One series as it is drawn.

    Args:
        label: its name in the legend.
        key: the character that stands for it there, and for a run at the end of its line.
        lane: the rows it belongs to.
        column: its column there.
        kind: how it is drawn.
        slot: its colour.
        band: the colour of the envelope behind it.
        origin: Unix seconds of its run's beginning.
        dashed: told from others by its dashes.
        marked: `key` stands at its end.
    """

    label: str
    key: str
    lane: Lane
    column: str
    kind: Kind
    slot: int
    band: int
    origin: float
    dashed: bool = False
    marked: bool = False

    def zero(self, axis: Axis) -> float:
        """What is 0 on an axis, in steps or in Unix seconds."""
        return self.origin if axis == "time" else 0.0

    def last(self) -> float:
        """Its last value; NaN before the first."""
        return float(self.lane.values(self.column)[-1]) if self.lane.rows else float("nan")


@dataclass(frozen=True, eq=False)
class Plot:
    """One page: curves in the order in which they are drawn, the most important last."""

    page: Page
    curves: tuple[Curve, ...] = ()
    message: str = ""
    """What is said instead where there is nothing to draw."""
    target: float | None = None
    """Steps that the run is to make."""
    growing: bool = False
    """More may come: the window is not cut to what is there."""
    now: float | None = None
    """Unix seconds; the time axis reaches as far as this while a run goes on."""
    unit: str = "step"
    """What x counts where it counts no time."""
    timed: bool = True
    """There is a time axis."""

    @property
    def empty(self) -> bool:
        """There is nothing to draw."""
        return all(not curve.lane.rows for curve in self.curves)

    def span(self, axis: Axis) -> tuple[float, float] | None:
        """First and last x of all curves, in steps or in seconds since each run's beginning."""
        ends = [
            (float(x[0]) - curve.zero(axis), float(x[-1]) - curve.zero(axis))
            for curve in self.curves
            if len(x := curve.lane.x(axis))
        ]
        if not ends:
            return None
        low, high = min(e[0] for e in ends), max(e[1] for e in ends)
        if axis == "time" and self.now is not None:
            high = max(high, self.now - self.curves[-1].origin)
        return low, high


class RunLanes:
    """The lanes of one run, kept up with its state; what its source cannot tell has no column."""

    def __init__(self) -> None:
        self.steps = Lane(_LOSSES)
        self.heldout = Lane(("loss",))
        self.agreement = Lane(("agreement",))
        self.cosine = Lane(("cosine",))
        self.origin = 0.0
        self.teacher = True
        self.state = RunState()

    def update(self, state: RunState) -> bool:
        """Takes a later or earlier state; returns whether a curve changed."""
        changed = False
        series, told = state.steps, tuple(name for name in _LOSSES if name in state.source.columns)
        if told != tuple(self.steps.tracks):
            self.steps, self.state, changed = Lane(told), RunState(), True
        if series is not self.state.steps:
            columns = {name: series.column(name) for name in self.steps.tracks}
            changed = self.steps.update(series.column("step"), series.column("t"), columns)
        if state.evals != self.state.evals:
            changed |= _update(self.heldout, "loss", ((e, e.loss) for e in state.evals))
            changed |= _update(self.agreement, "agreement", ((e, e.agreement) for e in state.evals))
            changed |= _update(self.cosine, "cosine", ((e, e.cosine) for e in state.evals))
        self.state = state
        teacher = state.run is None or state.run.teacher is not None
        origin = self._origin()
        changed |= (teacher, origin) != (self.teacher, self.origin)
        self.teacher, self.origin = teacher, origin
        return changed

    def _origin(self) -> float:
        """When the first thing that is drawn happened, in Unix seconds."""
        starts = [float(lane.x("time")[0]) for lane in (self.heldout, self.agreement, self.cosine) if lane.rows]
        if self.steps.rows:
            starts.append(float(self.steps.x("time")[0]))
        return min(starts, default=0.0)

    @property
    def kd_shown(self) -> bool:
        """There is a teacher, and it has been heard."""
        return self.teacher and "kd" in self.steps.tracks and self.steps.tracks["kd"].nonzero


def _update(lane: Lane, name: str, found: Iterable[tuple[Eval, float | None]]) -> bool:
    rows = [(e.step, e.t, value) for e, value in found if value is not None]
    data: Column = np.array(rows, np.float64).reshape(-1, 3).T.copy()
    return lane.update(data[0], data[1], {name: data[2]})


def one_run(lanes: RunLanes, page: Page, *, live: bool, now: float) -> Plot:
    """A page of the chart of one run."""
    state, origin, source = lanes.state, lanes.origin, lanes.state.source
    going = live and state.end is None
    waiting = f"phase {state.phase}" if state.end is None else f"{state.end.status}: {state.end.reason}"
    now_shown = now if going and lanes.steps.rows else None
    band = slot("band")
    if page == "agreement":
        points = (
            Curve("cosine", "◆", lanes.cosine, "cosine", "points", slot("cosine"), band, origin, dashed=True),
            Curve("agreement", "•", lanes.agreement, "agreement", "points", slot("agreement"), band, origin),
        )
        what = "no evaluation with the teacher yet" if lanes.teacher else "this run has no teacher"
        said = f"{what} · {waiting}" if lanes.teacher else what
        return Plot(page, points, said, state.target_steps, going, now_shown, source.unit, source.timed)
    curves = [Curve("held-out", "•", lanes.heldout, "loss", "points", slot("held-out"), band, origin, dashed=True)]
    if lanes.kd_shown:
        curves.append(Curve("kd", "┄", lanes.steps, "kd", "line", slot("kd"), band, origin, dashed=True))
    if "ce" in lanes.steps.tracks:
        curves.append(Curve("ce", "─", lanes.steps, "ce", "line", slot("ce"), band, origin))
    total = "total" if "ce" in lanes.steps.tracks else "loss"
    curves.append(Curve(total, "━", lanes.steps, "loss", "main", slot("total"), band, origin))
    nothing = "no step yet" if source.timed or going else "no step is told of"
    nothing = "it stores a teacher and makes no steps" if prepares(state) else nothing
    nothing = nothing if state.makes_steps or prepares(state) else "it makes no steps"
    if source.timed or state.end is not None:
        nothing += f" · {waiting}"
    return Plot(page, tuple(curves), nothing, state.target_steps, going, now_shown, source.unit, source.timed)


def many_runs(runs: Iterable[tuple[str, int, RunLanes]], page: Page) -> Plot:
    """A page of the chart of several runs: name, number (which gives its colour for good) and lanes of each."""
    curves: list[Curve] = []
    growing, timed = False, True
    units: set[str] = set()
    for name, number, lanes in runs:
        own, band = slot(f"run-{number % RUN_SLOTS}"), slot(f"band-{number % RUN_SLOTS}")
        key = str((number + 1) % 10)
        growing |= lanes.state.end is None
        timed &= lanes.state.source.timed
        units.add(lanes.state.source.unit)
        lane, column = (lanes.steps, "loss") if page == "loss" else (lanes.agreement, "agreement")
        kind: Kind = "main" if page == "loss" else "points"
        curves.append(Curve(name, key, lane, column, kind, own, band, lanes.origin, marked=True))
    what = "no steps in these runs" if page == "loss" else "no evaluations with a teacher in these runs"
    unit = " or ".join(sorted(units, reverse=True)) or "step"
    return Plot(page, tuple(reversed(curves)), what, growing=growing, unit=unit, timed=timed)
