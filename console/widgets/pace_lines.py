"""Lines of a pane that tell how fast steps are and where their time goes, or how far work without steps has come."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.cells import cell_len
from textual.content import Content

from console.efficiency import peak, per_token, seconds, shares, speed, step_seconds, utilisation
from console.forecast import end_text
from console.long_work import Work
from console.report import duration
from console.view import View
from console.widgets.layout import ELLIPSIS, MUTED, NOT_GIVEN, cut, fact
from engine.stream import Efficiency

Block = tuple[int, list[Content]]
"""Lines that stay or go together; where room is short a block with a low number goes."""
_SHORT = {"teacher": "teach", "student": "stud", "backward": "back", "optimizer": "optim"}
_LEAST_COLUMN = 4


def within(blocks: Sequence[Block], height: int) -> list[Content]:
    """The lines of the blocks that there is room for, the highest numbers first, in the blocks' own order."""
    chosen: list[int] = []
    for at in sorted(range(len(blocks)), key=lambda at: -blocks[at][0]):
        if not chosen or sum(len(blocks[each][1]) for each in (*chosen, at)) <= height:
            chosen.append(at)
    return [line for at in sorted(chosen) for line in blocks[at][1]]


def pace_blocks(view: View, width: int, *, over: bool) -> list[Block]:
    """Speed, utilisation with what it is held against, and the parts of a step; nothing for a run that tells none.

    Args:
        view: of the run.
        width: cells of a line.
        over: the run has ended: the mean of all its steps is told, and not the last ones' alone.
    """
    event = view.state.pace.mean if over else view.state.efficiency
    if event is None:
        return []
    first = fact("speed", [speed(event) or NOT_GIVEN, _each(step_seconds(event))], width)
    blocks: list[Block] = [(8, [first]), (7, [_utilisation(event, view, width)])]
    if parts := _parts(event, width):
        blocks.append((6, parts))
    counted = [event.formula, f"= {told}" if event.formula else told] if (told := per_token(event)) else [event.formula]
    if any(counted):
        blocks.append((2, [fact("counted", [text for text in counted if text], width)]))
    if utilisation(event) is not None and event.peak_source:
        blocks.append((1, [fact("peak", [event.peak_source], width)]))
    return blocks


def _each(step: float) -> str:
    """What a step takes, in few cells."""
    return f"{seconds(step)}/step" if math.isfinite(step) else ""


def _utilisation(event: Efficiency, view: View, width: int) -> Content:
    """`MFU  38.1 % of 989.5 TFLOP/s`, or that it cannot be told."""
    used, basis = utilisation(event), peak(event)
    if used is None or not basis:
        device = view.state.run.device_name if view.state.run else ""
        return fact("MFU", [NOT_GIVEN, f"no peak is known of {device}" if device else "no peak is known"], width)
    return fact("MFU", [f"{100 * used:.1f} %", f"of {basis}"], width)


def _parts(event: Efficiency, width: int) -> list[Content]:
    """Names of the parts of a step, and below each its share; short names where there is little room."""
    told = shares(event)
    for names in ([name for name, _ in told], [_SHORT.get(name, _in_few_cells(name)) for name, _ in told]):
        columns = [max(cell_len(name), _LEAST_COLUMN) for name in names]
        if sum(columns) + len(columns) - 1 <= width:
            head = " ".join(" " * (room - cell_len(name)) + name for name, room in zip(names, columns, strict=True))
            values = " ".join(f"{share:.0%}".rjust(room) for (_, share), room in zip(told, columns, strict=True))
            return [Content.styled(head, MUTED), Content(values)]
    largest = sorted(told, key=lambda part: part[1], reverse=True)
    return [cut(Content(", ".join(f"{name} {share:.0%}" for name, share in largest)), width)] if told else []


def _in_few_cells(name: str) -> str:
    """A part that no trainer of ours has, in few cells."""
    return name if len(name) <= 2 * _LEAST_COLUMN else name[: 2 * _LEAST_COLUMN - 1] + ELLIPSIS


def work_blocks(view: View, made: Work, width: int) -> list[Block]:
    """How far work without steps has come, how fast it goes, and when it will be done."""
    of = f"of {made.total:,} {made.unit}" if made.total > 0 else made.unit
    blocks: list[Block] = [(9, [fact("done", [f"{made.done:,}", of], width)])]
    if made.seconds_left is not None:
        name = "time left" if made.last else "phase left"
        blocks.append((10, [fact(name, [duration(made.seconds_left)], width)]))
        if made.last:
            blocks.append((8, [fact("ends", [end_text(view.now + made.seconds_left, view.now)], width)]))
    if made.rate is not None:
        rate = f"{made.rate:,.0f}" if made.rate >= 100 else f"{made.rate:.3g}"
        blocks.append((7, [fact("speed", [f"{rate} {made.unit}/s"], width)]))
    return blocks
