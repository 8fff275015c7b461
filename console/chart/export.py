"""The chart as files: every point as CSV, the picture as SVG and PNG."""

from __future__ import annotations

import csv
import importlib
import io
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from console.chart import marks
from console.chart.envelope import Mask
from console.chart.frame import Look, Shape, scale_of, shapes_of, window_of
from console.chart.grown import Column
from console.chart.lane import Lane
from console.chart.model import SLOTS, Plot
from console.chart.scale import Scale, number
from console.chart.xticks import x_ticks
from console.palette import BLUE, GREEN, PURPLE, RUN_COLOURS_LIGHT, VERMILLION
from engine.errors import RunError
from engine.text import clean

WIDTH, HEIGHT = 1200, 675
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 74, 52
_FONT = "DejaVu Sans, Helvetica, Arial, sans-serif"


class Colours(NamedTuple):
    """What everything but the curves is drawn in; a page may put others in their place."""

    ground: str = "#ffffff"
    ink: str = "#222222"
    faint: str = "#555555"
    grid: str = "#e4e4e4"
    axis: str = "#666666"
    bad: str = "#B00020"
    beyond: str = "#7A4A00"
    gap: str = "#8A6D00"


COLOURS = Colours()
_BAD, _BEYOND, _GAP = COLOURS.bad, COLOURS.beyond, COLOURS.gap
_COLOURS = {
    "total": BLUE, "ce": VERMILLION, "kd": PURPLE, "held-out": "#8A6D00", "agreement": BLUE, "cosine": GREEN,
    **{f"run-{i}": colour for i, colour in enumerate(RUN_COLOURS_LIGHT)},
}  # fmt: skip
_CHUNK = 10_000
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})
_APART = 12
"""Pixels between two marks, at least."""
CSV_COLUMNS = ("run", "series", "step", "t_unix_seconds", "value")


def csv_lines(plot: Plot) -> Iterator[str]:
    """All points of every series of a page, whatever part of it is looked at; lines with their ends.

    Columns are `CSV_COLUMNS`; numbers are written so that reading them back gives the same bits, and NaN, Infinity and
    -Infinity as in the training stream. `run` is empty where there is one run, and times where a log tells none.
    """
    yield _csv([CSV_COLUMNS])
    for curve in reversed(plot.curves):
        run, series = (curve.label, curve.column) if curve.marked else ("", curve.label)
        steps, times, values = curve.lane.x("step"), curve.lane.x("time"), curve.lane.values(curve.column)
        for begin in range(0, curve.lane.rows, _CHUNK):
            part = slice(begin, begin + _CHUNK)
            rows = zip(steps[part].tolist(), times[part].tolist(), values[part].tolist(), strict=True)
            yield _csv(
                [
                    (run, series, f"{step:.0f}", _exact(t) if plot.timed else "", _exact(value))
                    for step, t, value in rows
                ]
            )


def _csv(rows: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _exact(value: float) -> str:
    return repr(value) if math.isfinite(value) else number(value)


def _escaped(text: str) -> str:
    """A text of a run, safe in a document: shortened, and neither control characters nor markup in it."""
    return clean(text, 200).translate(_ESCAPES)


def svg(plot: Plot, look: Look, title: str, height: int = HEIGHT) -> str:
    """The picture as an SVG document on white, complete in itself.

    Args:
        plot: what to draw.
        look: how; the cursor is left out.
        title: written over it, as text.
        height: of the picture, in its own units; it is `WIDTH` wide.
    """
    with np.errstate(all="ignore"):
        return _Picture(plot, replace(look, cursor=None), height).document(title)


def png(document: str) -> bytes:
    """An SVG document of ours as a PNG, twice as many pixels wide and high.

    Raises:
        RunError: the package that draws it is not installed.
    """
    try:
        resvg = importlib.import_module("resvg_py")
    except ImportError:
        raise RunError(
            "chart: cannot write PNG: resvg_py is not installed", do="pip install 'kdconsole[png]', or export SVG"
        ) from None
    drawn: bytes = resvg.svg_to_bytes(svg_string=document, zoom=2, background="#ffffff")
    return bytes(drawn)


def pictures(plot: Plot, look: Look, title: str) -> dict[str, str | bytes]:
    """The picture by file suffix: `.svg` always, `.png` where the package that draws it is installed; see `svg`."""
    document = svg(plot, look, title)
    try:
        return {".svg": document, ".png": png(document)}
    except RunError:
        return {".svg": document}


class _Picture:
    """An SVG document in the making."""

    def __init__(self, plot: Plot, look: Look, height: int = HEIGHT) -> None:
        self.plot, self.look, self.whole = plot, look, height
        self.width, self.height = WIDTH - _LEFT - _RIGHT, height - _TOP - _BOTTOM
        self.window = window_of(replace(plot, growing=False), look)
        self.shapes = shapes_of(plot, look, self.window, self.width)
        self.scale: Scale = scale_of(plot, look, self.shapes)
        self.parts: list[str] = []
        self.labels: list[tuple[float, float, float]] = []
        """Where labels stand: left, right, and their line."""

    def document(self, title: str) -> str:
        """Everything."""
        self._axes()
        if self.plot.empty:
            self._text(WIDTH / 2, self.whole / 2, self.plot.message, anchor="middle", colour=COLOURS.faint)
        for shape in self.shapes:
            if shape.line is not None and shape.curve.kind == "main":
                self._band(shape)
        for shape in self.shapes:
            self._line(shape)
        for shape in self.shapes:
            if shape.curve.kind != "line":
                self._non_finite(shape)
            self._beyond(shape)
            self._end(shape)
        self._legend()
        safe = _escaped(title)
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{self.whole}" '
            f'viewBox="0 0 {WIDTH} {self.whole}" font-family="{_FONT}" font-size="13">\n<title>{safe}</title>\n'
            f'<rect width="{WIDTH}" height="{self.whole}" fill="{COLOURS.ground}"/>\n'
            f'<clipPath id="plot"><rect x="{_LEFT}" y="{_TOP}" width="{self.width}" height="{self.height}"/></clipPath>'
        )
        self._text(_LEFT, 26, title, size=16, weight="bold")
        return "\n".join((head, *self.parts, "</svg>\n"))

    def _text(self, x: float, y: float, text: str, *, anchor: str = "start", colour: str = COLOURS.ink,
              size: int = 13, weight: str = "normal") -> None:  # fmt: skip
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}" '
            f'font-weight="{weight}">{_escaped(text)}</text>'
        )

    def _axes(self) -> None:
        bottom = _TOP + self.height
        for tick in self.scale.ticks(10):
            y = _TOP + (self.scale.high - tick.at) / (self.scale.high - self.scale.low) * self.height
            self.parts.append(f'<path d="M{_LEFT} {y:.1f}h{self.width}" stroke="{COLOURS.grid}"/>')
            self._text(_LEFT - 8, y + 4.5, tick.label, anchor="end")
        low, high = self.window
        for tick in x_ticks(self.look.axis, low, high, self.width // 8):
            x = _LEFT + (tick.at - low) / (high - low) * self.width
            self.parts.append(f'<path d="M{x:.1f} {bottom}v5" stroke="{COLOURS.axis}"/>')
            self._text(x, bottom + 20, tick.label, anchor="middle")
        self.parts.append(f'<path d="M{_LEFT} {_TOP}v{self.height}h{self.width}" fill="none" stroke="{COLOURS.axis}"/>')
        across = self.plot.unit if self.look.axis == "step" else "wall time since start"
        self._text(_LEFT + self.width / 2, self.whole - 12, across, anchor="middle")
        loss = self.plot.page == "loss"
        smoothing = f" · line: EMA {self.look.smoothing:g}, area: every step" if self.look.smoothing and loss else ""
        unit = "loss, nats per token" if loss else "on held-out text"
        self._text(_LEFT, 62, f"{unit}{' · log y' if self.scale.log else ''}{smoothing}", size=12, colour=COLOURS.faint)
        for gap in marks.gaps(self.plot, self.look.axis, self.window, self.width) if loss else []:
            missing = _escaped(gap.text or "steps missing")
            self.parts.append(
                f'<path d="M{_LEFT + gap.begin} {bottom}h{max(1, gap.end - gap.begin)}" stroke="{_GAP}" '
                f'stroke-width="5"><title>{missing}</title></path>'
            )

    def _x(self, columns: Column) -> Column:
        return _LEFT + columns + 0.5

    def _y(self, values: Column) -> Column:
        return _TOP + np.clip(self.scale.position(values), -0.02, 1.02) * self.height

    def _band(self, shape: Shape) -> None:
        """The envelope: an area for every unbroken stretch of columns."""
        colour = _COLOURS[SLOTS[shape.curve.slot]]
        top, bottom = self._y(shape.envelope.high), self._y(shape.envelope.low)
        shapes = []
        for part in _stretches(~np.isnan(top), shape.pairs):
            x = self._x(part.astype(np.float64))
            outline = [*zip(x, top[part], strict=True), *zip(x[::-1], bottom[part][::-1], strict=True)]
            shapes.append("M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in outline) + "Z")
        self.parts.append(
            f'<path d="{"".join(shapes)}" fill="{colour}" fill-opacity="0.22" stroke="{colour}" stroke-opacity="0.3" '
            f'stroke-width="1" stroke-linejoin="round" clip-path="url(#plot)"/>'
        )

    def _line(self, shape: Shape) -> None:
        curve, colour = shape.curve, _COLOURS[SLOTS[shape.curve.slot]]
        width = {"main": 2.0, "line": 1.3, "points": 1.0}[curve.kind]
        dash = ' stroke-dasharray="5 3"' if curve.dashed else ""
        e = shape.envelope
        columns = [shape.line] if shape.line is not None else [e.first, e.low, e.high, e.last]
        drawn = []
        for part in _stretches(~np.isnan(columns[0]), shape.pairs):
            x = self._x(part.astype(np.float64)).repeat(len(columns))
            y = np.stack([self._y(each[part]) for each in columns], axis=1).reshape(-1)
            points = [f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True)]
            drawn.append("M" + "L".join(points) + ("h0" if len(points) == 1 else ""))
        self.parts.append(
            f'<path d="{"".join(drawn)}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linecap="round" '
            f'stroke-linejoin="round"{dash} clip-path="url(#plot)"/>'
        )
        if curve.kind == "points":
            for x, y in zip(*self._points(shape), strict=True):
                self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')

    def _points(self, shape: Shape) -> tuple[Column, Column]:
        low, high = self.window
        rows = np.arange(shape.rows[0], shape.rows[-1])
        rows = rows[np.isfinite(shape.curve.lane.values(shape.curve.column)[rows])]
        rows = rows if len(rows) <= self.width // _APART else rows[-1:]
        x = shape.curve.lane.x(self.look.axis)[rows] - shape.curve.zero(self.look.axis)
        return _LEFT + (x - low) / (high - low) * self.width, self._y(shape.curve.lane.values(shape.curve.column)[rows])

    def _label(self, x: float, y: float, text: str, colour: str) -> None:
        """A label at a mark, or some lines lower, or nowhere where others stand already; left of one at the edge."""
        if x + 7.0 * len(text) > WIDTH:
            x -= 7.0 * len(text) + 18
        for line in (y, y + 14, y + 28, y + 42):
            right = x + 7.0 * len(text)
            if all(right < a or x > b or abs(line - other) > 12 for a, b, other in self.labels):
                self.labels.append((x, right, line))
                self._text(x, line, text, colour=colour, size=12)
                return

    def _non_finite(self, shape: Shape) -> None:
        """A triangle at the last finite value before each stretch without one, and how many steps it has."""
        lane = shape.curve.lane
        bad, since = lane.bad, lane.bad_since
        values = lane.tracks[shape.curve.column].clean
        cuts = np.unique(np.append(np.arange(0, self.width, _APART), self.width))
        until = np.searchsorted(bad, shape.rows[cuts])
        for group in np.flatnonzero(np.diff(until)).tolist():
            row, begin = int(bad[until[group]]), int(since[until[group]])
            column = int(np.searchsorted(shape.rows, row, "right")) - 1
            level = float(self._y(values[begin - 1 : begin])[0]) if begin else np.nan
            x, y = _LEFT + column + 0.5, level if np.isfinite(level) else _TOP + self.height / 2
            self.parts.append(f'<path d="M{x:.1f} {y - 6:.1f}l6 11h-12z" fill="{_BAD}"/>')
            self._label(x + 9, y - 6, f"{until[group + 1] - until[group]:,} non-finite", _BAD)

    def _beyond(self, shape: Shape) -> None:
        """An arrow and the value at the edge where something lies beyond it."""
        e = shape.envelope
        high = shape.line if shape.line is not None and shape.curve.kind == "line" else e.high
        low = shape.line if shape.line is not None and shape.curve.kind == "line" else e.low
        for values, above in ((high, True), (low, False)):
            measured = self.scale.measure(values)
            outside: Mask = measured > self.scale.high if above else measured < self.scale.low
            columns = np.flatnonzero(outside)
            for part in np.split(columns, np.flatnonzero(np.diff(columns) > _APART) + 1) if len(columns) else []:
                extreme = float(values[part].max() if above else values[part].min())
                x = _LEFT + float(part.mean()) + 0.5
                y, tip = (_TOP, "l5 9h-10z") if above else (_TOP + self.height, "l5 -9h-10z")
                self.parts.append(f'<path d="M{x:.1f} {y}{tip}" fill="{_BEYOND}"/>')
                self._label(x + 8, y + (11 if above else -46), number(extreme), _BEYOND)

    def _end(self, shape: Shape) -> None:
        """The key of a run at the end of its line."""
        line = shape.envelope.last if shape.line is None else shape.line
        there = np.flatnonzero(~np.isnan(line))
        if shape.curve.marked and len(there):
            y = float(self._y(line[there[-1:]])[0])
            self._label(_LEFT + int(there[-1]) + 5, y + 4, shape.curve.key, _COLOURS[SLOTS[shape.curve.slot]])

    def _legend(self) -> None:
        x = float(WIDTH - _RIGHT)
        lanes: dict[int, Lane] = {id(c.lane): c.lane for c in self.plot.curves}
        count = sum(len(lane.bad) for lane in lanes.values())
        parts = [(f"▲ {count:,} non-finite", _BAD)] if count else []
        for curve in self.plot.curves:
            if curve.lane.rows:
                value = f"{curve.last():.1%}" if curve.column == "agreement" else number(curve.last())
                key = curve.key if curve.marked else "●" if curve.kind == "points" else "━"
                parts.append((f"{key} {curve.label} {value}", _COLOURS[SLOTS[curve.slot]]))
        rows, row = [62, 44, 26], 0
        for text, colour in parts:
            width = 8.0 * len(text) + 16
            if x - width < WIDTH * 0.42 and row + 1 < len(rows):
                x, row = float(WIDTH - _RIGHT), row + 1
            self._text(x, rows[row], text, anchor="end", colour=colour, size=12)
            x -= width


def _stretches(shown: Mask, pairs: tuple[Column, Column] | Any) -> list[Any]:
    """Columns that are joined, stretch by stretch."""
    there = np.flatnonzero(shown)
    if not len(there):
        return []
    joined = np.isin(there[1:], pairs[1])
    return np.split(there, np.flatnonzero(~joined) + 1)
