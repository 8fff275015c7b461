"""The comparison of runs as a table for a terminal or a file: what differs, marked where it is not as in the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from console.differences import CONFIGURATION, VERDICTS
from console.side_by_side import Cell, Line, Section

DIFFERENT = "≠"
MOST_ACROSS = 3
"""Runs in one block of the table; each block begins with the first run, which the others are held against."""
_LABEL_SHARE = 0.3
_STYLES = {"$success": "green", "$error": "red", "$warning": "yellow", "$primary": "blue", "$foreground-muted": "dim"}
"""Colours of a terminal in place of the app's."""


def show(names: Sequence[str], sections: Sequence[Section], console: Console, *, every_line: bool = False) -> None:
    """Prints the table, in blocks where there are many runs.

    Args:
        names: of the runs, in their order.
        sections: from `console.differences.differences`.
        console: where to; its width decides where texts are broken.
        every_line: lines that are alike in all runs too.
    """
    for number, name in enumerate(names, 1):
        console.print(Text.assemble((f"{number} ", "bold"), name), soft_wrap=True)
    console.print(Text(f"{DIFFERENT} is not as in 1; changes in % of it; – is not known", style="dim"))
    others = list(range(1, len(names)))
    across = MOST_ACROSS - 1
    blocks = [[0, *others[at : at + across]] for at in range(0, len(others), across)] or [[0]]
    everywhere: set[tuple[str, str]] = set()
    for block in blocks:
        console.print()
        console.print(_block(names, sections, block, console.width, every_line, everywhere))
    hidden = sum((section.title, line.label) not in everywhere for section in sections for line in section.lines)
    if hidden:
        console.print(Text(f"\n{hidden:,} lines in which nothing is known to differ are left out; --all shows them"))


def _shown(line: Line, section: Section, every_line: bool) -> bool:
    """Whether a line has something to say: two runs have it otherwise, or one has a number or verdict and one none."""
    if every_line or line.always or line.conflicts or section.title == CONFIGURATION:
        return True
    return line.differs and (line.measured or section.title == VERDICTS)


def _block(
    names: Sequence[str],
    sections: Sequence[Section],
    block: Sequence[int],
    width: int,
    every_line: bool,
    shown: set[tuple[str, str]],
) -> RenderableType:
    """Some of the runs side by side; every section has the same columns. What is shown is added to `shown`."""
    label = max(16, int(width * _LABEL_SHARE))
    cell = max(12, (width - label - 1 - 3 * len(block)) // len(block))
    header = _grid(label, cell, len(block))
    header.add_row("", *(part for i in block for part in ("", Text(f"{i + 1} {names[i]}", style="bold"))))
    parts: list[RenderableType] = [header]
    for section in sections:
        lines = [replace(line, cells=tuple(line.cells[i] for i in block)) for line in section.lines]
        lines = [line for line in lines if _shown(line, section, every_line)]
        shown.update((section.title, line.label) for line in lines)
        if not lines and not section.note:
            continue
        parts.append(Text(f"\n{section.title}", style="bold cyan"))
        if section.note:
            parts.append(Text(section.note, style="yellow"))
        grid = _grid(label, cell, len(block))
        for line in lines:
            grid.add_row(Text(line.label), *(part for i in range(len(block)) for part in _cell(line, i)))
        if lines:
            parts.append(grid)
    return Group(*parts)


def _grid(label: int, cell: int, count: int) -> Table:
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column(width=label, overflow="fold")
    for _ in range(count):
        grid.add_column(width=1)
        grid.add_column(width=cell, overflow="fold")
    return grid


def _cell(line: Line, index: int) -> tuple[Text, Text]:
    """The mark and what a run has, with the change."""
    cell = line.cells[index]
    if not line.differs_at(index):
        return Text(""), Text(cell.text, style_of(cell))
    change = line.change(index)
    after = "" if change is None else f" {100 * change:+.1f}%"
    return Text(DIFFERENT, "bold"), Text.assemble((cell.text, style_of(cell)), (after, "dim"))


def style_of(cell: Cell) -> str:
    """The style of a cell on a terminal."""
    return " ".join(_STYLES.get(part, part) for part in cell.style.split())
