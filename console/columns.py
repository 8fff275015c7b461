"""Text in columns, wrapped within each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from textual.content import Content

GAP = 2
"""Blank cells between columns."""


def columns(cells: Sequence[Content | str], widths: Sequence[int]) -> list[Content]:
    """One row of a table; a cell that is longer than its column goes on in the lines below.

    Args:
        cells: one for each column, without line breaks; plain texts are plain.
        widths: of the columns, in cells; a negative one aligns to the right.
    """
    wrapped = [_wrap(cell, abs(width)) for cell, width in zip(cells, widths, strict=True)]
    lines = []
    for parts in zip_longest(*wrapped, fillvalue=Content("")):
        padded = [
            part.pad_left(max(0, -width - part.cell_length)) if width < 0 else part.pad_right(width - part.cell_length)
            for part, width in zip(parts, widths, strict=True)
        ]
        lines.append(Content(" " * GAP).join(padded))
    return lines


def stacked(lines: Iterable[Content]) -> Content:
    """Lines under each other."""
    return Content("\n").join(lines)


def indented(text: Content | str, by: int, width: int) -> list[Content]:
    """A text wrapped to a width, every line of it indented."""
    return [Content(" " * by) + line for line in _wrap(text, width - by)]


def _wrap(text: Content | str, width: int) -> list[Content]:
    content = Content(text) if isinstance(text, str) else text
    return [line.rstrip() for line in content.wrap(max(2, width))] if content else [content]
