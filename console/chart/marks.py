"""What the dots cannot say: values that are not finite, values beyond the edges, points, gaps, and messages."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from console.chart.braille import ACROSS
from console.chart.canvas import Canvas, groups
from console.chart.lane import GAP, Axis
from console.chart.model import Plot, slot
from console.chart.scale import number

if TYPE_CHECKING:
    from console.chart.frame import Frame, Shape

NON_FINITE, ABOVE, BELOW = "▲", "↑", "↓"
_MOST_LABELS = 12
"""Of stretches without a finite value; of more, the legend tells."""
_MARKED_SHARE = 3
"""Points are marked one by one while there is one in so many cells at most."""


@dataclass(frozen=True)
class Gap:
    """Cells of the box without a row, and what is missing there; `begin` is `end` where it is within one cell."""

    begin: int
    end: int
    text: str


@dataclass(frozen=True)
class Beyond:
    """The farthest values above and below the edges, None where there are none."""

    high: float | None = None
    low: float | None = None


def write(frame: Frame, plot: Plot, axis: Axis, gaps: list[Gap]) -> Beyond:
    """Writes all marks over the curves, and labels where nothing else stands."""
    for shape in frame.shapes:
        if shape.curve.kind == "points":
            _points(frame, shape, axis)
    beyond = Beyond(_beyond(frame, ABOVE), _beyond(frame, BELOW))
    for shape in frame.shapes:
        if shape.curve.kind != "line":
            _non_finite(frame, shape)
        if shape.curve.marked and shape.curve.kind == "main":
            _end(frame, shape)
    if plot.page == "loss":
        for gap in gaps:
            text = gap.text if len(gap.text) + 2 <= gap.end - gap.begin else gap.text.partition(" ")[0]
            middle = frame.box.left + (gap.begin + gap.end - len(text)) // 2
            if text and len(text) + 2 <= gap.end - gap.begin:
                row = frame.box.top + frame.box.height - 1
                if frame.canvas.free(row, middle, middle + len(text)):
                    frame.canvas.put(row, middle, text, slot("gap"))
        if not plot.curves[-1].lane.rows:
            message(frame.canvas, plot.message)
    return beyond


def message(canvas: Canvas, text: str) -> None:
    """A sentence in the middle, broken where the canvas is narrow; nothing is written over."""
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= canvas.width - 2:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    top = max(0, (canvas.height - len(lines)) // 2)
    for row, line in enumerate(lines, top):
        begin = max(0, (canvas.width - len(line)) // 2)
        if canvas.free(row, begin, min(canvas.width, begin + len(line))):
            canvas.put(row, begin, line, slot("faint"))


def gaps(plot: Plot, axis: Axis, window: tuple[float, float], width: int) -> list[Gap]:
    """The gaps of the uppermost curve that can be seen in a window so many cells wide."""
    if not plot.curves or not plot.curves[-1].lane.rows:
        return []
    curve = plot.curves[-1]
    lane, x = curve.lane, curve.lane.x(axis)
    zero = curve.zero(axis)
    rows = lane.gaps(axis)
    ends = [x[rows - 1] - zero, x[rows] - zero]
    usual = lane.usual(axis)
    if axis == "time" and plot.now is not None and plot.now - float(x[-1]) > GAP["time"] * usual > 0:
        ends = [np.append(ends[0], x[-1] - zero), np.append(ends[1], plot.now - zero)]
    low, high = window
    inside = (ends[1] > low) & (ends[0] < high)
    left, right = ends[0][inside], ends[1][inside]
    cells = [np.clip(np.floor((at - low) / (high - low) * width), -1, width).astype(np.intp) for at in (left, right)]
    wide = cells[1] - cells[0] > 1
    found = []
    for begin, end, apart in zip(
        (cells[0][wide] + 1).tolist(), cells[1][wide].tolist(), (right - left)[wide].tolist(), strict=True
    ):
        missing = max(1, round(apart / max(usual, 1)) - 1)
        found.append(Gap(begin, end, f"{_span(apart)} without a step" if axis == "time" else f"{missing:,} missing"))
    if axis == "step":
        found += [Gap(cell, cell, "") for cell in np.unique(np.minimum(cells[1][~wide], width - 1)).tolist()]
    return found


def _span(seconds: float) -> str:
    for unit, letter in ((86_400.0, "d"), (3_600.0, "h"), (60.0, "m")):
        if seconds >= unit:
            return f"{seconds / unit:.1f}{letter}"
    return f"{seconds:.0f}s"


def _row(frame: Frame, value: float) -> int | None:
    """The row of the canvas in which a value stands, None for NaN."""
    share = float(frame.scale.position(np.array([value]))[0])
    if np.isnan(share):
        return None
    return frame.box.top + int(np.clip(np.floor(share * frame.box.height), 0, frame.box.height - 1))


def _beside(frame: Frame, row: int, begin: int, end: int, text: str, color: int, reach: int) -> None:
    """A label right of some marked cells, or left of them, or up to `reach` rows above or below, or nowhere."""
    box = frame.box
    right, left = end + 1, begin - len(text) - 1
    for down in sorted(range(-reach, reach + 1), key=abs):
        if not box.top <= row + down < box.top + box.height:
            continue
        for column in (right, left) if down == 0 else (begin, end - len(text)):
            inside = box.left < column and column + len(text) < box.left + box.width
            if inside and frame.canvas.free(row + down, column - 1, column + len(text) + 1):
                frame.canvas.put(row + down, column, text, color)
                return


def _non_finite(frame: Frame, shape: Shape) -> None:
    """A mark at the last finite value before each stretch of steps that have none, and how many they are."""
    lane, box = shape.curve.lane, frame.box
    bad, since = lane.bad, lane.bad_since
    if not len(bad):
        return
    until = np.searchsorted(bad, shape.rows[::ACROSS])
    counts = np.diff(until)
    cells = np.flatnonzero(counts)
    if not len(cells):
        return
    began = since[until[cells]]
    before = lane.tracks[shape.curve.column].clean[np.maximum(began - 1, 0)]
    share = np.where((began > 0) & ~np.isnan(before), frame.scale.position(before), 0.5)
    rows = box.top + np.clip(np.floor(share * box.height), 0, box.height - 1).astype(np.intp)
    frame.canvas.codes[rows, box.left + cells] = ord(NON_FINITE)
    frame.canvas.slots[rows, box.left + cells] = slot("bad")
    # Cells side by side are told together, and so are those of one stretch.
    one = (np.diff(cells) == 1) | (began[1:] == since[until[cells[:-1] + 1] - 1])
    cuts = [0, *(np.flatnonzero(~one) + 1).tolist(), len(cells)]
    if len(cuts) > _MOST_LABELS:
        return
    for first, after in pairwise(cuts):
        count = int(counts[cells[first:after]].sum())
        begin, end = box.left + int(cells[first]), box.left + int(cells[after - 1]) + 1
        _beside(frame, int(rows[after - 1]), begin, end, f"{count:,} non-finite", slot("bad"), 3)


def _beyond(frame: Frame, mark: str) -> float | None:
    """Arrows in the columns whose values lie beyond an edge, the farthest value beside them; returns the farthest."""
    above, box, scale = mark == ABOVE, frame.box, frame.scale
    row = box.top if above else box.top + box.height - 1
    farthest = np.full(box.width, -np.inf if above else np.inf)
    for shape in frame.shapes:
        values = shape.envelope.high if above else shape.envelope.low
        if shape.line is not None and shape.curve.kind == "line":
            values = shape.line
        measured = scale.measure(values)
        outside = np.flatnonzero(measured > scale.high if above else measured < scale.low)
        if len(outside):
            (np.maximum if above else np.minimum).at(farthest, outside // ACROSS, values[outside])
    cells = np.flatnonzero(np.isfinite(farthest))
    if not len(cells):
        return None
    frame.canvas.codes[row, box.left + cells] = ord(mark)
    frame.canvas.slots[row, box.left + cells] = slot("beyond")
    for first, after in groups(cells):
        part = farthest[cells[first:after]]
        begin, end = box.left + int(cells[first]), box.left + int(cells[after - 1]) + 1
        _beside(frame, row, begin, end, number(float(part.max() if above else part.min())), slot("beyond"), 1)
    return float(farthest[cells].max() if above else farthest[cells].min())


def _points(frame: Frame, shape: Shape, axis: Axis) -> None:
    """A marker at every point, or at the last one only where they stand close."""
    curve, box = shape.curve, frame.box
    first, after = int(shape.rows[0]), int(shape.rows[-1])
    finite = first + np.flatnonzero(np.isfinite(curve.lane.values(curve.column)[first:after]))
    if len(finite) > box.width // _MARKED_SHARE:
        finite = finite[-1:]
    x = curve.lane.x(axis)[finite] - curve.zero(axis)
    for at, value in zip(x.tolist(), curve.lane.values(curve.column)[finite].tolist(), strict=True):
        row, cell = _row(frame, value), frame.cell_of(at)
        if row is not None and cell >= 0:
            frame.canvas.put(row, box.left + cell, curve.key, curve.slot)


def _end(frame: Frame, shape: Shape) -> None:
    """The key of a run right of the end of its line."""
    line = shape.envelope.last if shape.line is None else shape.line
    there = np.flatnonzero(~np.isnan(line))
    if not len(there):
        return
    row = _row(frame, float(line[there[-1]]))
    cell = min(frame.box.width - 1, int(there[-1]) // ACROSS + 1)
    if row is not None:
        frame.canvas.put(row, frame.box.left + cell, shape.curve.key, shape.curve.slot)
