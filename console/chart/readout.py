"""The exact numbers of the step under the cursor."""

from __future__ import annotations

import math
import time

import numpy as np

from console.chart.frame import Frame, Look, nearest
from console.chart.grown import Column
from console.chart.lane import Axis, Lane
from console.chart.model import Curve, Plot
from console.chart.scale import number
from console.report import duration
from console.run_state import RunState


def worst_in(frame: Frame, curve: Curve, axis: Axis, cell: int) -> int | None:
    """The row to look at first in a column of cells: one that is not finite, else the one with the highest value."""
    lane, (first, after) = curve.lane, rows_in(frame, curve, axis, cell)
    if first >= after:
        return None
    values = lane.values(curve.column)[first:after]
    bad = np.flatnonzero(~np.isfinite(values))
    return first + int(bad[0] if len(bad) else values.argmax())


def rows_in(frame: Frame, curve: Curve, axis: Axis, cell: int) -> tuple[int, int]:
    """The first row in a column of cells, and the row after the last."""
    at = frame.at[cell : cell + 2] + curve.zero(axis)
    x = curve.lane.x(axis)
    first = int(np.searchsorted(x, at[0]))
    after = int(np.searchsorted(x, at[1], "right" if cell == frame.box.width - 1 else "left"))
    return first, after


def readout(frame: Frame, plot: Plot, look: Look, state: RunState | None) -> list[str]:
    """What the cursor says, the most important first; empty without a cursor or without data.

    Args:
        frame: the picture.
        plot: what it shows.
        look: how, and where the cursor is.
        state: a single run, for what the chart does not draw of its steps.
    """
    curves = [c for c in reversed(plot.curves) if c.lane.rows]
    if look.cursor is None or not curves:
        return []
    if any(c.marked for c in curves):
        return _overlaid(curves, look, plot.unit)
    main = curves[0]
    row = nearest(main.lane, look.axis, look.cursor + main.zero(look.axis))
    parts = [f"{plot.unit} {main.lane.x('step')[row]:,.0f}{_among(frame, main, look.axis, row)}"]
    for curve in curves:
        here = row if curve.lane is main.lane else _same_step(curve.lane, float(main.lane.x("step")[row]))
        if here is not None:
            average = _average(curve, look.smoothing, here) if curve.kind == "main" and look.smoothing else ""
            parts.append(f"{curve.label} {exact(curve, here)}{average}")
    drawn = state if state is not None and plot.page == "loss" and row < len(state.steps) else None
    parts.append(_told(drawn, "lr", row, "lr {:.3g}"))
    if plot.timed:
        t = float(main.lane.x("time")[row])
        parts += [f"after {duration(max(0.0, t - main.origin))}", clock(main.lane.clock(row))]
    parts.append(_told(drawn, "grad_norm", row, "grad norm {:.3g}"))
    parts.append(_told(drawn, "seconds", row, "{:.3g} s a step"))
    return [part for part in parts if part]


def _told(state: RunState | None, column: str, row: int, form: str) -> str:
    """A value that is not drawn; empty where the run's lines do not tell it."""
    if state is None or column not in state.source.columns:
        return ""
    return form.format(state.steps.column(column)[row])


def exact(curve: Curve, row: int) -> str:
    """A value as it came, with as many digits as are worth reading."""
    value = float(curve.lane.values(curve.column)[row])
    return f"{value:.2%}" if curve.column == "agreement" else number(value, 5)


def clock(t: float) -> str:
    """Unix seconds as a local time of day; empty where no clock shows it."""
    try:
        return time.strftime("%H:%M:%S", time.localtime(t))
    except (OverflowError, ValueError, OSError):
        return ""


def _overlaid(curves: list[Curve], look: Look, unit: str) -> list[str]:
    x = look.cursor or 0.0
    parts = [f"{unit} {x:,.0f}" if look.axis == "step" else f"after {duration(x)}"]
    for curve in curves:
        at = curve.lane.x(look.axis)
        zero = curve.zero(look.axis)
        if at[0] - zero <= x <= at[-1] - zero:
            parts.append(f"{curve.key} {exact(curve, nearest(curve.lane, look.axis, x + zero))}")
        else:
            parts.append(f"{curve.key} none")
    return parts


def _among(frame: Frame, curve: Curve, axis: Axis, row: int) -> str:
    """Where several steps share the column: how many, and whether this is the highest."""
    x = float(curve.lane.x(axis)[row]) - curve.zero(axis)
    cell = frame.cell_of(x)
    if cell < 0:
        return ""
    first, after = rows_in(frame, curve, axis, cell)
    if after - first < 2 or not first <= row < after:
        return ""
    values: Column = curve.lane.values(curve.column)[first:after]
    value = float(values[row - first])
    highest = math.isfinite(value) and value == np.max(values, where=np.isfinite(values), initial=-np.inf)
    return f" ({'highest' if highest else 'one'} of {after - first:,})"


def _average(curve: Curve, beta: float, row: int) -> str:
    track = curve.lane.tracks[curve.column]
    finite = int(track.finite_before(np.array([row + 1]))[0])
    return f" (EMA {number(track.average(beta)[finite - 1])})" if finite else ""


def _same_step(lane: Lane, step: float) -> int | None:
    row = int(np.searchsorted(lane.x("step"), step))
    return row if row < lane.rows and lane.x("step")[row] == step else None
