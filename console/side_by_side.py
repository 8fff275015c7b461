"""Several runs side by side: lines of one value a run, in sections; as texts, as a file, for a program."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from console.run_reader import LoadedRun

SCHEMA = "kdconsole.compare/1"
NOT_KNOWN = "–"

_TIME = re.compile(r"^\d{8}-\d{6}-(?=.)")
"""How the name of a run directory begins."""

Value = str | float | None


@dataclass(frozen=True)
class Cell:
    """What one run has: as shown, and as a program wants it. `style` is that of a state, or empty."""

    text: str = NOT_KNOWN
    value: Value = None
    style: str = ""


@dataclass(frozen=True)
class Line:
    """One thing of every run, in the order of the runs; the first run is what the others are held against."""

    label: str
    cells: tuple[Cell, ...]
    measured: bool = False
    """Numbers whose change in percent says something."""
    always: bool = False
    """Good to see where all runs agree, too."""

    def differs_at(self, index: int) -> bool:
        """Whether a run has it otherwise than the first."""
        return not _same(self.cells[index].value, self.cells[0].value)

    @property
    def differs(self) -> bool:
        """Whether any run has it otherwise than the first."""
        return any(map(self.differs_at, range(1, len(self.cells))))

    @property
    def conflicts(self) -> bool:
        """Whether two of the runs that are known to have it have it otherwise."""
        there = [cell.value for cell in self.cells if cell.value is not None]
        return any(not _same(value, there[0]) for value in there)

    def change(self, index: int) -> float | None:
        """By what fraction of the first run's number a run's number is larger; None where that says nothing."""
        first, value = self.cells[0].value, self.cells[index].value
        if not self.measured or isinstance(first, str) or isinstance(value, str) or not first or value is None:
            return None
        change = (value - first) / abs(first)
        return change if math.isfinite(change) else None


@dataclass(frozen=True)
class Section:
    """Lines that belong together; `note` is what must be known before one compares them."""

    title: str
    lines: tuple[Line, ...]
    note: str = ""


def _same(one: Value, other: Value) -> bool:
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return both_nan or one == other


def line_of(
    label: str, runs: Iterable[LoadedRun], cell: Callable[[LoadedRun], Cell], *, measured: bool = False
) -> Line:
    """A line with what `cell` says of each run."""
    return Line(label, tuple(map(cell, runs)), measured)


def known(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Without the lines that no run has anything in."""
    return tuple(line for line in lines if any(cell.value is not None for cell in line.cells))


def text_cell(value: object) -> Cell:
    """A cell with a text, not known where that is empty."""
    return Cell() if value is None or value == "" else Cell(str(value), str(value))


# Out of here


def labels(runs: Sequence[LoadedRun]) -> list[str]:
    """What to call each run in few characters: its name, or its directory's without the time; no two are the same."""
    told: list[str] = []
    for run in runs:
        name = short = _TIME.sub("", run.label)
        number = 2
        while name in told:
            name, number = f"{short} ({number})", number + 1
        told.append(name)
    return told


def rows(runs: Sequence[LoadedRun], sections: Sequence[Section]) -> list[list[str]]:
    """The table as texts, a header first."""
    table = [["section", "what", *labels(runs)]]
    for section in sections:
        table += [[section.title, line.label, *(cell.text for cell in line.cells)] for line in section.lines]
    return table


def as_csv(runs: Sequence[LoadedRun], sections: Sequence[Section]) -> str:
    """The table with every number in full."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["section", "what", *labels(runs)])
    for section in sections:
        for line in section.lines:
            values = ("" if cell.value is None else cell.value for cell in line.cells)
            writer.writerow([section.title, line.label, *values])
    return out.getvalue()


def document(runs: Sequence[LoadedRun], sections: Sequence[Section]) -> dict[str, Any]:
    """The table for a program; non-finite numbers as the strings that the stream uses."""
    return {
        "schema": SCHEMA,
        "runs": [
            {"id": run.path.name, "name": name, "path": str(run.path), "kind": run.kind.value}
            for name, run in zip(labels(runs), runs, strict=True)
        ],
        "sections": [
            {
                "title": section.title,
                "note": section.note,
                "lines": [
                    {"label": line.label, "values": [_json(c.value) for c in line.cells], "differs": line.differs}
                    for line in section.lines
                ],
            }
            for section in sections
        ],
    }


def _json(value: Value) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
