"""Columns that grow at their end without being copied at every growth."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]
Rows = NDArray[np.intp]

_T = TypeVar("_T", np.float64, np.intp)
_FIRST_ROWS = 1_024


class Grown(Generic[_T]):
    """Values appended to a buffer that doubles when it is full.

    Args:
        dtype: what it holds.
    """

    __slots__ = ("_data", "_length")

    def __init__(self, dtype: type[_T]) -> None:
        self._data: NDArray[_T] = np.empty(_FIRST_ROWS, dtype)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def values(self) -> NDArray[_T]:
        """What is held, shape [length]; a view that the next `cut` or `append` may write over."""
        return self._data[: self._length]

    def append(self, new: NDArray[_T]) -> None:
        """Adds values at the end."""
        needed = self._length + len(new)
        if needed > len(self._data):
            grown: NDArray[_T] = np.empty(max(needed + needed // 4, 2 * len(self._data)), self._data.dtype)
            grown[: self._length] = self.values
            self._data = grown
        self._data[self._length : needed] = new
        self._length = needed

    def cut(self, length: int) -> None:
        """Keeps the first `length` values."""
        self._length = min(self._length, length)


def same_until(old: NDArray[np.float64], new: NDArray[np.float64]) -> int:
    """How many values at the beginning of two columns are the same, bit for bit.

    Two views that begin at the same place of one buffer are not compared: such a buffer only grows at its end.
    """
    common = min(len(old), len(new))
    if old.base is not None and old.base is new.base and old.ctypes.data == new.ctypes.data:
        return common
    different = old[:common].view(np.int64) != new[:common].view(np.int64)
    return int(different.argmax()) if different.any() else common
