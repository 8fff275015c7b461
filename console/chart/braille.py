"""Dots to characters: a braille character holds two columns of four dots."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from console.chart.envelope import Mask
from console.chart.grown import Column

ACROSS, DOWN = 2, 4
"""Dots in a cell."""
BLANK = 0x20
FIRST = 0x2800
"""The character without dots; the eight lowest bits of those after it are its dots."""

Cells = NDArray[np.uint32]
_BITS = tuple(
    (row, column, np.uint8(bit))
    for column, bits in enumerate(((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80)))
    for row, bit in enumerate(bits)
)


def dots(top: Column, bottom: Column, height: int) -> Mask:
    """Vertical strokes as a picture, shape [height, columns].

    Args:
        top: topmost row of each column's stroke, NaN for none.
        bottom: its lowest row.
        height: rows of dots.
    """
    rows = np.arange(height, dtype=np.int16)[:, None]
    begin = np.where(np.isnan(top), height, top).astype(np.int16)
    end = np.where(np.isnan(bottom), -1, bottom).astype(np.int16)
    return (rows >= begin) & (rows <= end)


def characters(picture: Mask) -> Cells:
    """The picture as code points, shape [height / 4, columns / 2]; a space where there is no dot."""
    bits = picture.view(np.uint8)
    codes = np.zeros((len(picture) // DOWN, picture.shape[1] // ACROSS), np.uint8)
    for row, column, bit in _BITS:
        codes |= bits[row::DOWN, column::ACROSS] * bit
    return np.where(codes, codes.astype(np.uint32) + FIRST, BLANK).astype(np.uint32)
