"""The losses of a whole run in little room: lowest and highest of some hundred stretches, and a picture in dots."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
from rich.text import Text

from console.chart.canvas import Canvas
from console.chart.frame import Look, draw
from console.chart.model import RunLanes, one_run, slot
from console.run_state import RunState
from console.series import Column

MOST_POINTS = 200
_STYLES = {slot("total"): "cyan", slot("held-out"): "yellow", slot("bad"): "bold red", slot("beyond"): "bold yellow"}
_FAINT = {slot("axis"), slot("faint"), slot("gap")}


@dataclass(frozen=True)
class Point:
    """A stretch of steps, `first` to `last`; `low`, `high` and `end` (its last) are NaN where none of it is finite."""

    first: int
    last: int
    low: float
    high: float
    end: float
    bad: int = 0
    """Steps of it whose loss is NaN or infinite."""


def points(steps: Column, values: Column, most: int = MOST_POINTS) -> list[Point]:
    """At most so many stretches of equal numbers of steps; no spike is lost, whatever is between.

    Args:
        steps: their numbers, shape [steps].
        values: a loss of each.
        most: stretches.
    """
    if not len(steps):
        return []
    finite = np.isfinite(values)
    shown = np.where(finite, values, np.nan)
    cuts = np.unique(np.linspace(0, len(steps), min(most, len(steps)) + 1).astype(int))
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a stretch without a finite value has none
        lows, highs = np.fmin.reduceat(shown, cuts[:-1]), np.fmax.reduceat(shown, cuts[:-1])
    bad = np.add.reduceat((~finite).astype(int), cuts[:-1])
    for number, (begin, after) in enumerate(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)):
        stretch = shown[begin:after]
        known = stretch[~np.isnan(stretch)]
        end = float(known[-1]) if len(known) else math.nan
        first, last = int(steps[begin]), int(steps[after - 1])
        found.append(Point(first, last, float(lows[number]), float(highs[number]), end, int(bad[number])))
    return found


def picture(state: RunState, width: int, height: int) -> list[Text]:
    """Training and held-out losses over the steps, in so many cells; empty where there is nothing to draw."""
    if len(state.steps) < 2:
        return []
    lanes = RunLanes()
    lanes.update(state)
    plot = one_run(lanes, "loss", live=False, now=state.last_t)
    # The parts of a loss are in the table: in a few rows of cells they would only hide each other.
    plot = replace(plot, curves=tuple(curve for curve in plot.curves if curve.column == "loss"))
    canvas = draw(plot, Look(smoothing=0.0), width, height).canvas
    return [_line(canvas, row) for row in range(canvas.height)]


def _line(canvas: Canvas, row: int) -> Text:
    text = Text(no_wrap=True)
    for piece, number in canvas.line(row):
        text.append(piece, style="dim" if number in _FAINT else _STYLES.get(number, ""))
    text.rstrip()
    return text
