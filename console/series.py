"""Columns of numbers that grow at the end and are shared with everyone who reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STEP_COLUMNS = ("step", "t", "loss", "ce", "kd", "lr", "grad_norm", "tokens", "seconds")
Column = NDArray[np.float64]
_FIRST_ROWS = 1_024


class StepSeries:
    """The steps of a run as columns, in the order of their numbers, each number once. Never changes.

    A reader's view of a `StepBuffer`, cut at the length it had then: nothing is copied, and what is appended later
    stands behind the cut.
    """

    __slots__ = ("_data",)

    def __init__(self, data: NDArray[np.float64]) -> None:
        self._data = data
        self._data.flags.writeable = False

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
        return StepSeries(self._data[:, : late[0]]) if len(late) else self


class StepBuffer:
    """Where steps are gathered; `series` is what was gathered so far."""

    def __init__(self) -> None:
        self._data = np.empty((len(STEP_COLUMNS), _FIRST_ROWS))
        self._length = 0
        self.series = StepSeries(self._data[:, :0])

    def extend(self, rows: Sequence[tuple[float, ...]]) -> None:
        """Appends rows of `STEP_COLUMNS` whose steps grow; steps that are here already are replaced from there on.

        Later attempts make steps again that an earlier one could not keep. Readers of the earlier ones keep them: the
        columns are then copied, and never written where somebody may look.
        """
        if not rows:
            return
        kept = int(np.searchsorted(self._data[0, : self._length], rows[0][0]))
        needed = kept + len(rows)
        if kept < self._length or needed > self._data.shape[1]:
            room = max(self._data.shape[1], _FIRST_ROWS)
            while room < needed:
                room *= 2
            grown = np.empty((len(STEP_COLUMNS), room))
            grown[:, :kept] = self._data[:, :kept]
            self._data = grown
        self._data[:, kept:needed] = np.array(rows).T
        self._length = needed
        self.series = StepSeries(self._data[:, :needed])
