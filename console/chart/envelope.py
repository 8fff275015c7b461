"""Half a million steps in some hundred columns without losing one: the lowest and highest value of each column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from console.chart.grown import Column, Rows
from console.chart.lane import BLOCK, Track

Mask = NDArray[np.bool_]
_FEW_BLOCKS = 8


@dataclass(frozen=True)
class Envelope:
    """What a series does in each column of dots; NaN where it has no finite value. All of shape [columns]."""

    low: Column
    high: Column
    first: Column
    last: Column


def edges(low: float, high: float, columns: int) -> Column:
    """Where the columns of a window begin on x, and where the last one ends, shape [columns + 1]."""
    at: Column = low + (high - low) * (np.arange(columns + 1) / columns)
    at[-1] = high
    return at


def envelope(track: Track, rows: Rows) -> Envelope:
    """The envelope of a column of numbers over columns of dots.

    Args:
        track: the numbers.
        rows: as from `Lane.columns`.
    """
    return Envelope(*_only_new(track, "envelope", rows, partial(_envelope, track)))


def averaged(track: Track, beta: float, rows: Rows) -> Column:
    """The moving average as it stands at the end of each column, NaN where a column has no finite value."""
    line: Column = _only_new(track, beta, rows, partial(_averaged, track, track.average(beta)))[0]
    return line


def _only_new(track: Track, what: object, rows: Rows, compute: Callable[[Rows], Column]) -> Column:
    """What `compute` finds for these columns; asked only for the stretch of them that is not as it was last time."""
    before, found = track.drawn.get(what, (rows[:0], np.empty((0, 0))))
    if len(before) == len(rows):
        moved = np.flatnonzero(before != rows)
        if len(moved):
            first, after = max(0, int(moved[0]) - 1), min(len(rows) - 1, int(moved[-1]) + 1)
            found = found.copy()
            found[:, first:after] = compute(rows[first : after + 1])
    else:
        found = compute(rows)
    track.drawn[what] = rows, found
    return found


def _envelope(track: Track, rows: Rows) -> Column:
    clean = track.clean
    values = np.full((4, len(rows) - 1), np.nan)
    low, high, first, last = values
    filled = np.flatnonzero(rows[1:] > rows[:-1])
    if not len(filled):
        return values
    begin, after = rows[filled], rows[filled + 1]
    low[filled], high[filled] = _extremes(track, begin, after)
    first[filled], last[filled] = clean[begin], clean[after - 1]
    if len(track.bad):
        for column in np.flatnonzero(~np.isnan(low) & (np.isnan(first) | np.isnan(last))):
            finite = clean[rows[column] : rows[column + 1]]
            finite = finite[~np.isnan(finite)]
            first[column], last[column] = finite[0], finite[-1]
    return values


def _averaged(track: Track, average: Column, rows: Rows) -> Column:
    finite = track.finite_before(rows)
    line = np.full((1, len(rows) - 1), np.nan)
    filled = np.flatnonzero(finite[1:] > finite[:-1])
    line[0, filled] = average[finite[filled + 1] - 1]
    return line


def _extremes(track: Track, begin: Rows, after: Rows) -> tuple[Column, Column]:
    """Lowest and highest value of stretches of rows that follow each other, none of them empty.

    Of a long stretch the rows at its ends are looked at, and whole blocks between them.
    """
    if after[-1] - begin[0] < _FEW_BLOCKS * BLOCK * len(begin):
        window, starts = track.clean[begin[0] : after[-1]], begin - begin[0]
        return np.fmin.reduceat(window, starts), np.fmax.reduceat(window, starts)
    first, last = -(-begin // BLOCK), after // BLOCK
    # A stretch without a whole block, beside long ones, is its own head and has no tail.
    whole = last > first
    head_end = np.where(whole, first * BLOCK, after)
    tail = np.where(whole, last * BLOCK, after)
    lengths = (head_end - begin) + (after - tail)
    rows = _ranges(np.stack((begin, tail), axis=1).reshape(-1), np.stack((head_end, after), axis=1).reshape(-1))
    edge = track.clean[rows]
    owners = np.flatnonzero(lengths)
    starts = (lengths.cumsum() - lengths)[owners]
    cuts = np.stack((first[whole], last[whole]), axis=1).reshape(-1) - first[0]
    found = []
    for extreme, blocks in zip((np.fmin, np.fmax), track.blocks, strict=True):
        result = np.full(len(begin), np.nan)
        result[whole] = extreme.reduceat(np.append(blocks[first[0] : last[-1]], np.nan), cuts)[::2]
        if len(owners):
            result[owners] = extreme(result[owners], extreme.reduceat(edge, starts))
        found.append(result)
    return found[0], found[1]


def _ranges(begin: Rows, after: Rows) -> Rows:
    """All rows of these stretches, one stretch after another."""
    lengths = after - begin
    ends = lengths.cumsum()
    rows: Rows = np.arange(ends[-1] if len(ends) else 0) + (begin - ends + lengths).repeat(lengths)
    return rows


def joints(shown: Mask, rows: Rows, gaps: Rows) -> tuple[Rows, Rows]:
    """Which columns are joined by a line: pairs of neighbours among those shown, left and right.

    No line goes over rows that have nothing finite, nor over a gap.

    Args:
        shown: columns with something to draw, shape [columns].
        rows: as from `Lane.columns`.
        gaps: rows before which there is a gap.
    """
    there = np.flatnonzero(shown)
    left, right = there[:-1], there[1:]
    following = rows[left + 1] == rows[right]
    if len(gaps):
        at = np.searchsorted(gaps, rows[right])
        following &= (at == len(gaps)) | (gaps[np.minimum(at, len(gaps) - 1)] != rows[right])
    return left[following], right[following]


def stroke(
    top: Column, bottom: Column, first: Column, last: Column, pairs: tuple[Rows, Rows], height: int
) -> tuple[Column, Column]:
    """The dots of each column from its topmost to its lowest, joined to its neighbours without a hole.

    Args:
        top: where a column's highest value stands, in rows of dots from the top; NaN for nothing. Shape [columns].
        bottom: the same of its lowest value.
        first: of its first value.
        last: of its last value.
        pairs: as from `joints`.
        height: rows of dots; what is outside is drawn at the edge.

    Returns:
        Topmost and lowest row of dots, whole numbers from 0 to height - 1, NaN for nothing. Shape [columns] each.
    """
    top, bottom, first, last = (np.clip(np.floor(y), 0, height - 1) for y in (top, bottom, first, last))
    left, right = pairs
    start, end = last[left], first[right]
    wide = right - left > 1
    if wide.any():
        spans = right[wide] - left[wide]
        between = np.arange(len(top))
        after = np.searchsorted(left[wide], between, "left") - 1  # the last joint that begins before the column
        here = (after >= 0) & (between < right[wide][np.maximum(after, 0)])
        columns, joint = between[here], after[here]
        share = (columns - left[wide][joint]) / spans[joint]
        y = np.rint(start[wide][joint] * (1.0 - share) + end[wide][joint] * share)
        top[columns] = bottom[columns] = first[columns] = last[columns] = y
        steps = np.unique(np.concatenate((left, columns)))
        left, right = steps, steps + 1
        start, end = last[left], first[right]
    # Each side of a jump draws half of it: the dots meet in the middle.
    middle = np.floor((start + end) / 2)
    falls, rises = end > start + 1, end < start - 1
    bottom[left[falls]] = np.maximum(bottom[left[falls]], middle[falls])
    top[right[falls]] = np.minimum(top[right[falls]], middle[falls] + 1)
    top[left[rises]] = np.minimum(top[left[rises]], middle[rises] + 1)
    bottom[right[rises]] = np.maximum(bottom[right[rises]], middle[rises])
    return top, bottom
