"""What is drawn of a run, kept so that a redraw costs only what is new: cleaned columns, averages, gaps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from console.chart.grown import Column, Grown, Rows, same_until
from console.chart.smooth import Ema

Axis = Literal["step", "time"]

_KEPT_AVERAGES = 2
"""Smoothings of a column kept at a time: the one that is shown and the one before."""
GAP = {"step": 1.5, "time": 10.0}
"""How many times the usual distance two rows must be apart for a gap to stand between them."""
_SAMPLE = 4_096
_FARTHEST = 1e14
"""Seconds; a time beyond that is no time."""
BLOCK = 32
"""Rows of which the lowest and the highest value are kept."""


class Track:
    """One column of a lane: its values with every non-finite one as NaN, and its moving averages."""

    def __init__(self) -> None:
        self._raw: Column = np.empty(0)
        self._clean: Grown[np.float64] | None = None
        self._bad = Grown(np.intp)
        self._averages: dict[float, tuple[Ema, int]] = {}
        self._lows, self._highs = Grown(np.float64), Grown(np.float64)
        self.drawn: dict[object, tuple[Rows, Column]] = {}
        """What was computed last for columns of dots, and the rows of each column; see `console.chart.envelope`."""
        self.nonzero = False
        """Some value is not zero."""

    def cut(self, length: int) -> None:
        """Forgets all rows from `length` on."""
        for beta, (ema, seen) in self._averages.items():
            if seen > length:
                ema.cut(length - int(np.searchsorted(self._bad.values, length)))
                self._averages[beta] = ema, length
        self._bad.cut(int(np.searchsorted(self._bad.values, length)))
        self._raw = self._raw[:length]
        self.drawn.clear()
        self._lows.cut(length // BLOCK)
        self._highs.cut(length // BLOCK)
        if self._clean is not None:
            self._clean.cut(length)

    def extend(self, column: Column) -> None:
        """Takes a column whose beginning is what is here already."""
        begin, new = len(self._raw), column[len(self._raw) :]
        self.nonzero = self.nonzero or bool(new.any())
        finite = np.isfinite(new)
        if not finite.all():
            self._bad.append(np.flatnonzero(~finite) + begin)
            if self._clean is None:
                self._clean = Grown(np.float64)
                self._clean.append(self._raw)
        self._raw = column
        if self._clean is not None:
            self._clean.append(np.where(finite, new, np.nan))
        blocks = np.arange(len(self._lows), len(column) // BLOCK) * BLOCK
        if len(blocks):
            whole = self.clean[blocks[0] : blocks[-1] + BLOCK]
            self._lows.append(np.fmin.reduceat(whole, blocks - blocks[0]))
            self._highs.append(np.fmax.reduceat(whole, blocks - blocks[0]))

    @property
    def raw(self) -> Column:
        """The values as they came, shape [rows]."""
        return self._raw

    @property
    def clean(self) -> Column:
        """The values, NaN for each that is not finite, shape [rows]."""
        return self._raw if self._clean is None else self._clean.values

    @property
    def blocks(self) -> tuple[Column, Column]:
        """Lowest and highest value of every whole block of `BLOCK` rows, NaN where none is finite."""
        return self._lows.values, self._highs.values

    @property
    def bad(self) -> Rows:
        """The rows whose value is not finite, in order."""
        return self._bad.values

    def finite_before(self, rows: Rows) -> Rows:
        """How many finite values stand before each of these rows."""
        return rows - np.searchsorted(self.bad, rows) if len(self.bad) else rows

    def average(self, beta: float) -> Column:
        """The moving average after every finite value, shape [finite values]; see `finite_before` for its rows."""
        ema, seen = self._averages.pop(beta, (Ema(beta), 0))
        while len(self._averages) >= _KEPT_AVERAGES:
            del self._averages[next(iter(self._averages))]
        new = self.clean[seen:]
        ema.extend(new[~np.isnan(new)] if len(self.bad) else new)
        self._averages[beta] = ema, len(self._raw)
        return ema.values


class _Clock:
    """Times that never fall, from times that may: where a clock was set back, time goes on from there."""

    def __init__(self) -> None:
        self._last = float("nan")
        self._behind = 0.0
        self._latest = -np.inf

    def told(self, t: Column) -> Column:
        """Further times, in seconds; one that is not finite is the one before it."""
        if not len(t):
            return t
        finite = np.isfinite(t)
        rows = np.maximum.accumulate(np.where(finite, np.arange(len(t)), -1))
        if math.isnan(self._last):
            self._last = float(np.clip(t[finite.argmax()], -_FARTHEST, _FARTHEST)) if finite.any() else 0.0
        known = np.clip(np.where(rows >= 0, t[rows], self._last), -_FARTHEST, _FARTHEST)
        behind = self._behind + np.maximum(-np.diff(known, prepend=self._last), 0.0).cumsum()
        told: Column = np.maximum.accumulate(np.maximum(known + behind, self._latest))
        self._last, self._behind, self._latest = float(known[-1]), float(behind[-1]), float(told[-1])
        return told


class Lane:
    """Rows measured at the same steps: their step numbers, their times, and any number of columns.

    The newest rows may be left out again (a look into the past) without anything being computed anew: what is kept
    is that of the longest columns seen, and `rows` says how many of them are meant.

    Args:
        names: the columns.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.tracks = {name: Track() for name in names}
        self.rows = 0
        self._step: Column = np.empty(0)
        self._raw_time: Column = np.empty(0)
        self._time = Grown(np.float64)
        self._clock = _Clock()
        self._bad = Grown(np.intp)
        self._bad_since = Grown(np.intp)
        self._gaps: dict[Axis, tuple[int, Rows]] = {}
        self._usual: dict[Axis, tuple[int, float]] = {}
        self._columns: dict[Axis, tuple[int, Column, Rows]] = {}

    def update(self, step: Column, t: Column, columns: Mapping[str, Column]) -> bool:
        """Takes the columns of a later or earlier moment of the same run, or of another run.

        Args:
            step: step numbers, never falling, shape [rows].
            t: Unix seconds, shape [rows].
            columns: values by name, shape [rows] each.

        Returns:
            Whether anything differs from what was here.
        """
        same = min(
            same_until(self._step, step),
            same_until(self._raw_time, t),
            *(same_until(track.raw, columns[name]) for name, track in self.tracks.items()),
        )
        rows, known = len(step), len(self._step)
        changed = rows != self.rows or same < min(rows, known)
        self.rows = rows
        if same < min(rows, known):
            self._cut(same)
        if rows > len(self._step):
            self._extend(step, t, columns)
        return changed

    def _cut(self, length: int) -> None:
        keep = int(np.searchsorted(self._bad.values, length))
        for grown in (self._bad, self._bad_since):
            grown.cut(keep)
        self._time.cut(0)  # with its clock, made anew
        self._clock = _Clock()
        for track in self.tracks.values():
            track.cut(length)
        self._step, self._raw_time = self._step[:length], self._raw_time[:length]
        self._gaps.clear()
        self._usual.clear()
        self._columns.clear()

    def _extend(self, step: Column, t: Column, columns: Mapping[str, Column]) -> None:
        begin = len(self._step)
        bad = np.zeros(len(step) - begin, bool)
        for name, track in self.tracks.items():
            track.extend(columns[name])
            bad |= ~np.isfinite(columns[name][begin:])
        rows = np.flatnonzero(bad) + begin
        if len(rows):
            before = self._bad.values[-1] if len(self._bad) else -2
            since = np.where(np.diff(rows, prepend=before) == 1, -1, rows)
            if since[0] < 0:
                since[0] = self._bad_since.values[-1]
            self._bad.append(rows)
            self._bad_since.append(np.maximum.accumulate(since))
        self._time.append(self._clock.told(t[len(self._time) :]))
        self._step, self._raw_time = step, t

    def x(self, axis: Axis) -> Column:
        """Step numbers, or Unix seconds that never fall, shape [rows]."""
        return (self._step if axis == "step" else self._time.values)[: self.rows]

    def clock(self, row: int) -> float:
        """Unix seconds of a row as its run's host told them."""
        return float(self._raw_time[row])

    def columns(self, axis: Axis, at: Column) -> Rows:
        """The first row of each column of dots, and the row after the last; the right edge counts as inside.

        Args:
            axis: what stands on x.
            at: where the columns begin and the last one ends, shape [columns + 1]; see `console.chart.envelope.edges`.
        """
        x = self.x(axis)
        known, before, rows = self._columns.get(axis, (0, at, np.zeros(len(at), np.intp)))
        if known > self.rows or not np.array_equal(before, at):
            known, rows = 0, np.zeros(len(at), np.intp)
        if known < self.rows:
            # Only edges that lay behind all rows can have moved.
            first = int(np.searchsorted(rows, known))
            rows = rows.copy()
            rows[first:] = known + np.searchsorted(x[known:], at[first:])
            if first < len(rows):
                rows[-1] = known + np.searchsorted(x[known:], at[-1], "right")
            self._columns[axis] = self.rows, at, rows
        return rows

    def values(self, name: str) -> Column:
        """A column as it came, shape [rows]."""
        return self.tracks[name].raw[: self.rows]

    @property
    def bad(self) -> Rows:
        """The rows in which some column is not finite, in order."""
        rows = self._bad.values
        return rows[: np.searchsorted(rows, self.rows)]

    @property
    def bad_since(self) -> Rows:
        """For each of `bad`, the row with which its unbroken stretch of such rows began."""
        return self._bad_since.values[: len(self.bad)]

    def usual(self, axis: Axis) -> float:
        """The usual distance between two rows, in steps or seconds; 0 with fewer than two rows.

        It is taken from as many first rows as the largest power of two that there are, so it changes seldom.
        """
        if self.rows < 2:
            return 0.0
        sample = 1 << (self.rows.bit_length() - 1)
        known = self._usual.get(axis)
        if known is None or known[0] != sample:
            apart = np.diff(self.x(axis)[:sample])
            known = self._usual[axis] = sample, float(np.median(apart[:: max(1, sample // _SAMPLE)]))
        return known[1]

    def gaps(self, axis: Axis) -> Rows:
        """The rows before which others are missing, or before which nothing happened for long."""
        x = self.x(axis)
        seen, found = self._gaps.get(axis, (1, np.empty(0, np.intp)))
        if seen.bit_length() != self.rows.bit_length() or seen > self.rows:
            seen, found = 1, np.empty(0, np.intp)
        if self.rows > seen:
            new = np.flatnonzero(np.diff(x[seen - 1 :]) > GAP[axis] * self.usual(axis)) + seen
            found = np.concatenate((found, new)) if len(new) else found
            self._gaps[axis] = self.rows, found
        return found
