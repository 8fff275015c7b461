"""A grid of characters, each with a colour slot: what a chart is before it is text on a screen."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len, get_character_cell_size

from console.chart.braille import BLANK, Cells
from console.chart.grown import Rows

CURSOR = 0x80
"""Bit of a slot: the cell stands in the cursor's column."""
_SECOND_HALF = 0
"""Code point that stands right of a character two cells wide."""

Slots = NDArray[np.uint8]


class Canvas:
    """Characters (code points) and slots, shape [height, width] each.

    Args:
        width: cells in a row.
        height: rows.
    """

    def __init__(self, width: int, height: int) -> None:
        self.codes: Cells = np.full((height, width), BLANK, np.uint32)
        self.slots: Slots = np.zeros((height, width), np.uint8)

    @property
    def width(self) -> int:
        """Cells in a row."""
        return int(self.codes.shape[1])

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.codes.shape[0])

    def put(self, row: int, column: int, text: str, slot: int) -> int:
        """Writes a text; what does not fit is left out. Returns the column after it."""
        height, width = self.codes.shape
        if not (0 <= row < height and column >= 0):
            return column
        if len(text) <= width - column and ((text.isascii() and text.isprintable()) or cell_len(text) == len(text)):
            self.codes[row, column : column + len(text)] = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            self.slots[row, column : column + len(text)] = slot
            return column + len(text)
        for character in text:
            cells = get_character_cell_size(character)
            if not 0 < cells <= width - column:
                continue
            self.codes[row, column] = ord(character)
            self.codes[row, column + 1 : column + cells] = _SECOND_HALF
            self.slots[row, column : column + cells] = slot
            column += cells
        return column

    def free(self, row: int, begin: int, end: int) -> bool:
        """Nothing stands in these cells yet."""
        inside = 0 <= row < self.height and 0 <= begin < end <= self.width
        return inside and bool((self.codes[row, begin:end] == BLANK).all())

    def line(self, row: int) -> list[tuple[str, int]]:
        """A row as pieces of one slot each; a blank takes on the slot of what stands left of it."""
        slots = self.slots[row]
        inked = np.where((self.codes[row] != BLANK) | (slots >= CURSOR), np.arange(self.width), 0)
        slots = slots[np.maximum.accumulate(inked)]
        slots = np.where(self.slots[row] & CURSOR, slots | CURSOR, slots & ~np.uint8(CURSOR))
        cuts = [0, *(np.flatnonzero(np.diff(slots)) + 1).tolist(), self.width]
        text = self.codes[row].tobytes().decode("utf-32-le")
        return [(text[a:b].replace("\0", ""), int(slots[a])) for a, b in pairwise(cuts) if b > a]

    def text(self) -> str:
        """All rows as plain text, without blanks at their ends."""
        return "\n".join("".join(piece for piece, _ in self.line(row)).rstrip() for row in range(self.height))

    def changed(self, other: Canvas) -> list[tuple[int, int, int]]:
        """The rows that differ from another canvas of the same size: row, first column, column after the last."""
        different = (self.codes != other.codes) | (self.slots != other.slots)
        found = []
        for row in np.flatnonzero(different.any(axis=1)).tolist():
            columns = np.flatnonzero(different[row])
            found.append((row, int(columns[0]), int(columns[-1]) + 1))
        return found


def groups(cells: Rows) -> Iterable[tuple[int, int]]:
    """Unbroken stretches of ascending cells: positions in `cells` of each stretch's first, and after its last."""
    if not len(cells):
        return ()
    cuts = [0, *(np.flatnonzero(np.diff(cells) > 1) + 1).tolist(), len(cells)]
    return pairwise(cuts)
