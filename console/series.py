"""Columns of numbers that grow at the end and are shared with everyone who reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STEP_COLUMNS = ("step", "t", "loss", "ce", "kd", "lr", "grad_norm", "tokens", "seconds")
Column = NDArray[np.float64]
MAX_ROWS = 1 << 20
"""Of steps in memory, 72 bytes each; of a longer run the older ones are thinned."""
_LOSS = STEP_COLUMNS.index("loss")
_FIRST_ROWS = 1_024
_RECENT_PART = 8
"""Of the newest steps, an eighth of the rows, each has its row: what is said of the present is said of all of them."""


class StepSeries:
    """The steps of a run as columns, in the order of their numbers, each number once. Never changes.

    A reader's view of a `StepBuffer`, cut at the length it had then: nothing is copied, and what is appended later
    stands behind the cut.

    Args:
        data: shape [columns, rows].
        thinned: how many steps one of the older rows stands for; 1 where every step has its row. The rows that were
            left out had neither the lowest nor the highest loss among their neighbours, nor one that is no number. Of
            the newest steps, an eighth of `MAX_ROWS`, none was left out.
    """

    __slots__ = ("_data", "thinned")

    def __init__(self, data: NDArray[np.float64], thinned: int = 1) -> None:
        self._data = data
        self._data.flags.writeable = False
        self.thinned = thinned

    def __len__(self) -> int:
        return int(self._data.shape[1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepSeries) and np.array_equal(self._data, other._data, equal_nan=True)

    def __hash__(self) -> int:
        return id(self)

    def column(self, name: str) -> Column:
        """One of `STEP_COLUMNS`, shape [steps]: losses in nats per token, `t` in Unix seconds, `seconds` a step."""
        column: Column = self._data[STEP_COLUMNS.index(name)]
        return column

    def until(self, t: float) -> StepSeries:
        """The steps made no later than `t`, in Unix seconds."""
        late = np.flatnonzero(self.column("t") > t)
        return StepSeries(self._data[:, : late[0]], self.thinned) if len(late) else self


class StepBuffer:
    """Where steps are gathered; `series` is what was gathered so far.

    Args:
        most: rows that are kept at most, 16 or more. When they are full, older ones make room: of neighbours the two
            with the lowest and the highest loss stay, evenly up to a tenth of `most` squared steps: 10^11.
    """

    def __init__(self, most: int = MAX_ROWS) -> None:
        self._most = most
        self._data = np.empty((len(STEP_COLUMNS), min(most, _FIRST_ROWS)))
        self._length = 0
        self._thinned = 1
        self._front = 0
        """Rows at the beginning that stand for `_thinned` steps each."""
        self.series = StepSeries(self._data[:, :0])

    def extend(self, rows: Sequence[tuple[float, ...]]) -> None:
        """Appends rows of `STEP_COLUMNS`; see `append`."""
        if rows:
            self.append(np.array(rows, dtype=np.float64).T)

    def append(self, columns: NDArray[np.float64]) -> None:
        """Appends rows of `STEP_COLUMNS`, shape [columns, rows], of which there is one at least, and whose steps grow.

        Steps that are here already are replaced from there on: later attempts make steps again that an earlier one
        could not keep. Readers of the earlier ones keep them: the columns are then copied, and never written where
        somebody may look.
        """
        kept = int(np.searchsorted(self._data[0, : self._length], columns[0, 0]))
        if kept < self._length:
            self._length, self._front = kept, min(self._front, kept)
            self._data = self._data[:, :kept]  # full: whatever comes next is written into a copy
        at, rows = 0, columns.shape[1]
        while at < rows:
            if self._length == self._most:
                self._thin()
            count = min(rows - at, self._most - self._length)
            self._make_room(self._length + count)
            self._data[:, self._length : self._length + count] = columns[:, at : at + count]
            self._length += count
            at += count
        self.series = StepSeries(self._data[:, : self._length], self._thinned)

    def _make_room(self, needed: int) -> None:
        room = max(self._data.shape[1], _FIRST_ROWS)
        while room < needed:
            room *= 2
        if needed > self._data.shape[1]:
            grown = np.empty((len(STEP_COLUMNS), min(room, self._most)))
            grown[:, : self._length] = self._data[:, : self._length]
            self._data = grown

    def _thin(self) -> None:
        loss = self._data[_LOSS, : self._length]
        front = np.arange(self._front)
        if self._thinned == 1 or self._front > self._most // 2:
            self._thinned *= 2
            front = _extremes(loss[: self._front], 4)
        recent = self._length - self._most // _RECENT_PART
        bucket = min(2 * self._thinned, recent - self._front)
        older = self._front + _extremes(loss[self._front : recent], bucket)
        kept = np.concatenate((front, older, np.arange(recent, self._length)))
        data = np.empty((len(STEP_COLUMNS), self._most))
        for column, thinner in zip(self._data, data, strict=True):
            thinner[: len(kept)] = column[kept]
        whole = len(front) + len(older) - (recent - self._front) % bucket  # what is too little for a bucket waits
        self._data, self._front, self._length = data, whole, len(kept)


def _extremes(loss: Column, bucket: int) -> NDArray[np.intp]:
    """Of each `bucket` neighbours the two rows with the lowest and the highest loss; no number at all is the highest.

    What is left over at the end stays whole.
    """
    whole = len(loss) // bucket * bucket
    buckets = loss[:whole].reshape(-1, bucket)
    high = buckets.argmax(axis=1)
    low = np.where(np.isnan(buckets), np.inf, buckets).argmin(axis=1)
    low = np.where(low == high, np.where(high == 0, bucket - 1, 0), low)
    pairs = np.stack((np.minimum(low, high), np.maximum(low, high)), axis=1)
    chosen = (pairs + np.arange(0, whole, bucket)[:, None]).ravel()
    return np.concatenate((chosen, np.arange(whole, len(loss))))
