"""The line under the chart: what each curve is, its last value, and what should not be overlooked."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

from console.chart.canvas import Canvas
from console.chart.lane import Axis
from console.chart.marks import ABOVE, BELOW, NON_FINITE, Beyond, Gap
from console.chart.model import Curve, Plot, slot
from console.chart.scale import number

_APART = "  "
_SHORTEST_NAME = 4
_ALARM = 1
"""Rank of what is left out of a narrow legend last, after having been shortened."""


def legend(canvas: Canvas, row: int, column: int, plot: Plot, axis: Axis, gaps: Sequence[Gap], beyond: Beyond) -> None:
    """Writes the legend into a row; where it is too narrow, the least important parts are left out."""
    room = canvas.width - column
    curves = [c for c in reversed(plot.curves) if c.lane.rows]
    count = sum(len(lane.bad) for lane in {id(c.lane): c.lane for c in plot.curves}.values())
    alarm = cell_len(f"{NON_FINITE} {count:,}{_APART}") if count else 0
    names = shortened([c.label for c in curves], _share(curves, room - alarm))
    named = [(_part(c, name), c.slot, _rank(c)) for c, name in zip(curves, names, strict=True)]
    if count:
        named.append((f"{NON_FINITE} {count:,} non-finite", slot("bad"), _ALARM))
    if beyond.high is not None:
        named.append((f"{ABOVE} {number(beyond.high)}", slot("beyond"), 2))
    if beyond.low is not None:
        named.append((f"{BELOW} {number(beyond.low)}", slot("beyond"), 2))
    many = len(plot.curves[-1].lane.gaps(axis)) if axis == "step" and gaps else len(gaps)
    if many:
        named.append((f"┊ {many:,} gap{'s' * (many > 1)}", slot("gap"), 4))
    while len(named) > 1 and sum(cell_len(text) + len(_APART) for text, _, _ in named) - len(_APART) > room:
        least = max(range(len(named)), key=lambda i: (named[i][2], i))
        if named[least][2] == _ALARM and " non-finite" in named[least][0]:
            named[least] = named[least][0].removesuffix(" non-finite"), *named[least][1:]
        else:
            del named[least]
    for text, color, _ in named:
        column = canvas.put(row, column, text, color) + len(_APART)


def _rank(curve: Curve) -> int:
    """How early a curve leaves a legend that is too narrow: the later the more important it is."""
    return {"main": 0, "points": 3, "line": 5}[curve.kind] + curve.dashed * (curve.kind == "line")


def _part(curve: Curve, name: str) -> str:
    value = curve.last()
    shown = f"{value:.1%}" if curve.column == "agreement" else number(value)
    return f"{curve.key} {name} {shown}"


def _share(curves: Sequence[Curve], room: int) -> int:
    """Cells for the name of each run laid over others."""
    runs = sum(c.marked for c in curves)
    return max(_SHORTEST_NAME, room // runs - 10) if runs else room


def shortened(names: Sequence[str], cells: int) -> list[str]:
    """Names in so many cells each, told apart by their ends where they all begin alike."""
    found = [cut(name, cells) for name in names]
    if len(set(found)) == len(set(names)):
        return found
    letters = zip(*names, strict=False)
    alike = next((place for place, each in enumerate(letters) if len(set(each)) > 1), min(map(len, names)))
    return [cut("…" + name[alike:], cells) for name in names]


def cut(name: str, cells: int) -> str:
    """A name in so many cells, its end left out where it is longer."""
    if cell_len(name) <= cells:
        return name
    kept = ""
    for character in name:
        if cell_len(kept + character) >= cells:
            break
        kept += character
    return kept + "…"
