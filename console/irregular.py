"""Where losses are not as they should be: steps that stand out from those before them, values that are no numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from console.series import Column

SPIKE_FACTOR = 3.0
"""So many times the median of the steps before, a loss is a spike."""
BEFORE, BEFORE_LEAST = 50, 10
"""Steps whose median a loss is held against, and how many there must be."""

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Spikes:
    """The losses that stand out: their rows, how many times the median before them each is, and how many groups of
    neighbours they form. `worst` is the place of the highest in both arrays.
    """

    rows: Rows
    ratios: Column
    groups: int
    worst: int


def spikes(losses: Column) -> Spikes | None:
    """The losses, shape [steps], that are `SPIKE_FACTOR` times the median of the finite ones before; None for none."""
    kept = np.flatnonzero(np.isfinite(losses))
    finite = losses[kept]
    if len(finite) <= BEFORE_LEAST:
        return None
    # No median is less than the least of the losses, so that few of them need one.
    high = np.flatnonzero(finite >= SPIKE_FACTOR * max(float(finite.min()), 0.0))
    usual = np.full(len(finite), np.inf)
    for row in high[(high >= BEFORE_LEAST) & (high < BEFORE)]:
        usual[row] = np.median(finite[:row])
    late = high[high >= BEFORE]
    if len(late):
        usual[late] = np.median(sliding_window_view(finite, BEFORE)[late - BEFORE], axis=1)
    with np.errstate(over="ignore"):
        ratios = np.divide(finite, usual, out=np.zeros_like(finite), where=usual > 0)
    found = np.flatnonzero(ratios >= SPIKE_FACTOR)
    if not len(found):
        return None
    groups = 1 + int(np.count_nonzero(np.diff(found) > 1))
    return Spikes(kept[found], ratios[found], groups, int(np.argmax(ratios[found])))


def non_finite(values: Column) -> Rows:
    """The rows of what is NaN or infinite."""
    return np.flatnonzero(~np.isfinite(values))
