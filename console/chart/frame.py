"""One picture of the chart: where things stand, the curves as dots, and everything written around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from console.chart import marks
from console.chart.braille import ACROSS, BLANK, DOWN, characters, dots
from console.chart.canvas import CURSOR, Canvas
from console.chart.envelope import Envelope, averaged, edges, envelope, joints, stroke
from console.chart.grown import Column, Rows
from console.chart.lane import Axis, Lane
from console.chart.legend import legend
from console.chart.model import Curve, Plot, slot
from console.chart.scale import Scale, Tick, fit
from console.chart.xticks import round_span, x_ticks

_DASH, _DOTTED = (6, 4), (4, 2)
"""Columns of a period, and how many of them are drawn: of a dashed line, and of the line between points."""


@dataclass(frozen=True)
class Look:
    """How the operator wants to see it.

    Args:
        log: logarithmic y.
        axis: what stands on x.
        smoothing: share of the past in the moving average, 0 for none.
        window: first and last x, in steps or in seconds since the beginning; None for all.
        cursor: x of the cursor.
    """

    log: bool = True
    axis: Axis = "step"
    smoothing: float = 0.9
    window: tuple[float, float] | None = None
    cursor: float | None = None


@dataclass(frozen=True)
class Box:
    """Where the curves are, in cells of the canvas."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Shape:
    """A curve in the columns of a window: what the picture on a screen and the one in a file are both drawn from.

    `line` is the moving average, None where the envelope itself is the curve.
    """

    curve: Curve
    rows: Rows
    envelope: Envelope
    line: Column | None
    pairs: tuple[Rows, Rows]


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture, and how its cells and the data belong together."""

    canvas: Canvas
    box: Box
    window: tuple[float, float]
    scale: Scale
    at: Column
    """The x at which each column of cells begins, and the last one ends, shape [columns + 1]."""
    shapes: tuple[Shape, ...] = ()

    def x_at(self, cell: float) -> float:
        """The x in the middle of a column of cells, counted from the left of the box."""
        low, high = self.window
        return low + (cell + 0.5) / max(1, self.box.width) * (high - low)

    def cell_of(self, x: float) -> int:
        """The column of cells in which an x stands, the right edge being inside; -1 for what is not in the window."""
        low, high = self.window
        if not low <= x <= high:
            return -1
        return min(self.box.width, int(self.at.searchsorted(x, "right"))) - 1


def window_of(plot: Plot, look: Look) -> tuple[float, float]:
    """The x of both edges. While a run goes on there is some room on the right, so that the past stands still."""
    if look.window is not None:
        return look.window
    low, high = plot.span(look.axis) or (0.0, 1.0)
    if plot.growing:
        reach = low + round_span(high - low)
        if look.axis == "step" and plot.target is not None and high <= plot.target < reach:
            reach = plot.target
        high = reach
    if not high > low:
        low, high = low - 0.5, high + 0.5
    return low, high if high > low else math.nextafter(high, math.inf)


def shapes_of(plot: Plot, look: Look, window: tuple[float, float], columns: int) -> list[Shape]:
    """Every curve in so many columns of a window."""
    at = edges(*window, columns)
    shapes = []
    for curve in plot.curves:
        lane = curve.lane
        if not lane.rows:
            continue
        rows = lane.columns(look.axis, at + curve.zero(look.axis))
        track = lane.tracks[curve.column]
        line = averaged(track, look.smoothing, rows) if look.smoothing and curve.kind != "points" else None
        shape = envelope(track, rows)
        gaps = lane.gaps(look.axis) if curve.kind != "points" else np.empty(0, np.intp)
        shapes.append(Shape(curve, rows, shape, line, joints(~np.isnan(shape.last), rows, gaps)))
    return shapes


def scale_of(plot: Plot, look: Look, shapes: list[Shape]) -> Scale:
    """The vertical axis that suits all curves."""
    low = [s.line if s.line is not None and s.curve.kind == "line" else s.envelope.low for s in shapes]
    high = [s.line if s.line is not None and s.curve.kind == "line" else s.envelope.high for s in shapes]
    nothing = np.empty(0)
    within = (0.0, 1.0) if plot.page == "agreement" else None
    log = look.log and plot.page == "loss"
    return fit(np.concatenate([nothing, *low]), np.concatenate([nothing, *high]), log, within)


def draw(plot: Plot, look: Look, width: int, height: int) -> Frame:
    """The chart in so many cells."""
    with np.errstate(all="ignore"):
        return _draw(plot, look, width, height)


def _draw(plot: Plot, look: Look, width: int, height: int) -> Frame:
    canvas = Canvas(max(0, width), max(0, height))
    legend_row = height - 1 if height > 1 else height
    if plot.empty or width < 4 or height < 1:
        marks.message(canvas, plot.message)
        return Frame(
            canvas, Box(0, 0, width, height), (0.0, 1.0), Scale(0.0, 1.0, False), edges(0.0, 1.0, max(1, width))
        )
    under = 0 if height < 5 else 1 if height < 7 else 2
    rows = legend_row - under
    window = window_of(plot, look)
    # The labels' width has to be known before the columns are, and it depends on them; a guess is nearly always right.
    labels = 6 if width >= 44 else 5 if width >= 24 else 0
    box = Box(labels + 2 if labels else 0, 0, width - (labels + 2 if labels else 0), rows)
    shapes = shapes_of(plot, look, window, box.width * ACROSS)
    scale = scale_of(plot, look, shapes)
    ticks = scale.ticks(max(2, rows // 3 + 1))
    needed = max((len(tick.label) for tick in ticks), default=0)
    if labels and needed > labels and needed < width // 3:
        box = Box(needed + 2, 0, width - needed - 2, rows)
        shapes = shapes_of(plot, look, window, box.width * ACROSS)
        scale = scale_of(plot, look, shapes)
        ticks = scale.ticks(max(2, rows // 3 + 1))
    frame = Frame(canvas, box, window, scale, edges(*window, box.width), tuple(shapes))
    _curves(frame)
    gaps = marks.gaps(plot, look.axis, window, box.width) if plot.page == "loss" else []
    beyond = marks.write(frame, plot, look.axis, gaps)
    if box.left:
        _y_axis(frame, ticks)
    if under:
        _x_axis(frame, look.axis, under, gaps)
    if legend_row < height:
        legend(canvas, legend_row, 1 if width >= 44 else 0, plot, look.axis, gaps, beyond)
    if look.cursor is not None:
        _cursor(frame, look.cursor, look.axis)
    return frame


def _curves(frame: Frame) -> None:
    """Envelopes first, then lines over them.

    A cell has one colour, and shows the uppermost of what passes through it. So a spike of an envelope is seen once it
    leaves the cell that the line over it is in; without smoothing every envelope is a line itself.
    """
    box, canvas = frame.box, frame.canvas
    place = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
    codes, slots = canvas.codes[place], canvas.slots[place]
    height = box.height * DOWN

    def lay(top: Column, bottom: Column, color: int) -> None:
        drawn = characters(dots(top, bottom, height))
        lit = drawn != BLANK
        codes[lit], slots[lit] = drawn[lit], color

    for shape in frame.shapes:
        if shape.line is not None and shape.curve.kind == "main":
            lay(*_strokes(frame.scale, shape, height), shape.curve.band)
    for shape in frame.shapes:
        if shape.line is None:
            top, bottom = _strokes(frame.scale, shape, height)
        else:
            y = frame.scale.position(shape.line) * height
            top, bottom = stroke(y, y, y, y, shape.pairs, height)
        if shape.curve.dashed:
            period, drawn = _DOTTED if shape.curve.kind == "points" else _DASH
            # What is tall is drawn whole: a dash must not hide a spike.
            hidden = (np.arange(len(top)) % period >= drawn) & (bottom - top < DOWN)
            top[hidden] = np.nan
        lay(top, bottom, shape.curve.slot)


def _strokes(scale: Scale, shape: Shape, height: int) -> tuple[Column, Column]:
    e = shape.envelope
    top, bottom, first, last = (scale.position(y) * height for y in (e.high, e.low, e.first, e.last))
    return stroke(top, bottom, first, last, shape.pairs, height)


def _y_axis(frame: Frame, ticks: list[Tick]) -> None:
    box, canvas = frame.box, frame.canvas
    column = box.left - 1
    canvas.codes[box.top : box.top + box.height, column] = ord("│")
    canvas.slots[box.top : box.top + box.height, column] = slot("axis")
    taken: set[int] = set()
    for tick in sorted(ticks, key=lambda t: -t.at):
        share = (frame.scale.high - tick.at) / (frame.scale.high - frame.scale.low)
        row = box.top + min(box.height - 1, int(share * box.height))
        if row not in taken and len(tick.label) <= column - 1:
            taken.add(row)
            canvas.put(row, column, "┤", slot("axis"))
            canvas.put(row, column - 1 - len(tick.label), tick.label, slot("text"))


def _x_axis(frame: Frame, axis: Axis, rows: int, gaps: list[marks.Gap]) -> None:
    box, canvas = frame.box, frame.canvas
    line, labels = box.top + box.height, box.top + box.height + rows - 1
    if rows > 1:
        canvas.put(line, box.left, "─" * box.width, slot("axis"))
        if box.left:
            canvas.put(line, box.left - 1, "└", slot("axis"))
    free = 0
    for tick in x_ticks(axis, *frame.window, box.width):
        cell = box.left + frame.cell_of(tick.at)
        if rows > 1:
            canvas.put(line, cell, "┬", slot("axis"))
        begin = max(free, min(cell - len(tick.label) // 2, canvas.width - len(tick.label)))
        if begin <= cell and begin + len(tick.label) <= canvas.width:
            free = canvas.put(labels, begin, tick.label, slot("text")) + 2
    if rows > 1:
        for gap in gaps:
            text = "╌" * (gap.end - gap.begin) or "┊"
            canvas.put(line, box.left + gap.begin, text, slot("gap"))


def _cursor(frame: Frame, x: float, axis: Axis) -> None:
    box, canvas, cell = frame.box, frame.canvas, frame.cell_of(x)
    if cell < 0:
        return
    place = slice(box.top, box.top + box.height), box.left + cell
    blank = canvas.codes[place] == ord(" ")
    canvas.codes[place][blank] = ord("│")
    canvas.slots[place][blank] = slot("faint")
    for shape in frame.shapes:
        if shape.curve.kind != "main" or not shape.curve.lane.rows:
            continue
        row = nearest(shape.curve.lane, axis, x + shape.curve.zero(axis))
        share = float(frame.scale.position(shape.curve.lane.values(shape.curve.column)[row : row + 1])[0])
        if 0 <= share <= 1:
            canvas.put(box.top + min(box.height - 1, int(share * box.height)), box.left + cell, "○", slot("text"))
    canvas.slots[place] |= CURSOR


def nearest(lane: Lane, axis: Axis, x: float) -> int:
    """The row whose x (steps, or Unix seconds) is nearest."""
    values = lane.x(axis)
    after = int(np.searchsorted(values, x))
    if after == len(values) or (after and x - values[after - 1] < values[after] - x):
        return after - 1
    return after
