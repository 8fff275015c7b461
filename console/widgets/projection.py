"""How long it was to take, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from textual.content import Content

from console.elapsed import wall_seconds
from console.forecast import Range, end_text, forecast
from console.outlook import host_now, outlook, steps_made
from console.report import duration
from console.view import View
from console.widgets.layout import MUTED, Part, fit, wrapped
from console.widgets.pane import Pane
from engine.stream import Projection

_NAME = 12
"""Cells for what a line is about."""


class ProjectionPane(Pane):
    """What the smoke said against what is really elapsing; for a smoke, what it projects."""

    def title(self) -> Content:
        """See `Pane`."""
        return Content("Projection")

    def picture(self, width: int, height: int) -> Sequence[Content]:
        """See `Pane`."""
        return projection_lines(self.view, width)


def projection_lines(view: View, width: int) -> list[Content]:
    """The pane's lines, none wider than `width` cells, the most important first."""
    run = view.state.run
    if run is None:
        ended = outlook(view).ended
        told = (
            "Nothing tells what it took." if ended else "Nothing can be projected yet: the run has not told what it is."
        )
        return _said(told, width)
    if run.mode == "smoke":
        return _of_smoke(view, width)
    if view.smoke_seconds is not None:
        return [_line("smoke said", view.smoke_seconds, width), *_now(view, width)]
    lines = _now(view, width)
    if not view.timed:
        return lines
    if outlook(view).ended or view.review is not None:
        return [*lines, *_said("No smoke of this configuration was found to hold it against.", width)]
    missing = _said("No smoke of this configuration was found. To know before a long run:", width)
    missing += [line.stylize("bold") for line in wrapped("kdconsole --headless smoke CONFIG", width)]
    return [*lines[:2], *missing, *lines[2:]]


def _now(view: View, width: int) -> list[Content]:
    """What a full run takes, all in all, as far as can be told now."""
    state, seen = view.state, outlook(view)
    steps = steps_made(state)
    if seen.ended:
        lines = [_took(view, _against(view, elapsed(view)) if _whole(view) else "", width)]
        if (asked := state.target_steps) and asked != steps:
            unit = f"{state.source.unit}s"
            over = f"{steps:,} {unit}; {asked:,} were asked for" if steps > asked else f"{steps:,} of {asked:,} {unit}"
            lines += _said(f"It ended after {over}.", width)
        return lines
    if not view.timed:
        return _said("The log has no times.", width)
    expected = forecast(view)
    spent = [_line("elapsed", (elapsed(view),) * 3, width)]
    if expected is None:
        return [*spent, *(_said("What it will take is told after 10 steps.", width) if not steps else [])]
    p10, p50, p90 = expected.seconds
    total = (elapsed(view) + p10, elapsed(view) + p50, elapsed(view) + p90)
    about = {"STALLED": "while it stands still", "UNREACHABLE": "if it goes on"}.get(seen.status, "")
    ends = [end_text(each, view.now) for each in expected.ends]
    spread = f"({ends[0]} to {ends[2]})" if ends[0] != ends[2] else ""
    return [
        _line("now", total, width, _against(view, total[1])),
        _fact("ends", [ends[1], spread, about], width),
        *spent,
        _fact("a step", [f"{expected.step_seconds:.4g} s"], width),
    ]


def _took(view: View, against: str, width: int) -> Content:
    taken = elapsed(view)
    return _line("took", (taken,) * 3, width, against) if math.isfinite(taken) else _fact("took", ["not said"], width)


def elapsed(view: View) -> float:
    """Wall seconds that the run took until now, without what passed between two attempts; NaN where nobody says."""
    taken = wall_seconds(view.state)
    if taken is None:
        return math.nan
    goes_on = view.timed and view.state.end is None and view.state.phases
    return taken + (max(0.0, host_now(view) - view.state.last_t) if goes_on else 0.0)


def _whole(view: View) -> bool:
    """Whether every step was made."""
    return steps_made(view.state) >= (view.state.target_steps or math.inf)


def _against(view: View, total: float) -> str:
    """How much longer than the smoke said, in per cent."""
    said = view.smoke_seconds[1] if view.smoke_seconds else 0.0
    return f"{100 * (total - said) / said:+.1f} %" if said > 0 and math.isfinite(total) else ""


def _of_smoke(view: View, width: int) -> list[Content]:
    state = view.state
    projection = state.projection
    if projection is not None:
        took = [_took(view, "", width)] if not view.timed and outlook(view).ended else []
        return [*_projected(projection, width), *took]
    if not view.timed:
        return [_took(view, "", width), *_said("The log projects nothing.", width)]
    if outlook(view).ended:
        return _said("It ended before it could project anything: that takes 10 steps.", width)
    expected = forecast(view)
    lines = _said("This smoke projects the real run when its steps are made.", width)
    if expected is not None:
        lines.append(_fact("it ends", [f"in {duration(expected.seconds[1])}"], width))
    return lines


def _projected(projection: Projection, width: int) -> list[Content]:
    said = (projection.p10_seconds, projection.p50_seconds, projection.p90_seconds)
    lines = [_fact("real run", [f"{projection.target_steps:,} steps"], width), _line("takes", said, width)]
    if math.isfinite(projection.step_seconds):
        median = f"median of {projection.samples:,}"
        lines.append(_fact("a step", [f"{projection.step_seconds:.4g} s", median], width))
    if math.isfinite(projection.fixed_seconds):
        lines.append(_fact("around them", [duration(projection.fixed_seconds)], width))
    return lines


def _line(name: str, seconds: Range, width: int, after: str = "") -> Content:
    """A time with its range where there is one, and what there is to say about it."""
    low, middle, high = (duration(each) for each in seconds)
    spread = f"({low} to {high})" if low != high and all(map(math.isfinite, seconds)) else ""
    return _fact(name, [middle, spread, after], width)


def _fact(name: str, texts: Sequence[str], width: int) -> Content:
    """A named value in bold, and what goes with it; what finds no room goes, from the middle."""
    first, *more = texts
    head = name.ljust(_NAME) if width >= 2 * _NAME else name
    parts = [Part.of(7, Content.styled(head, MUTED)), Part.of(9, Content.styled(first, "bold"), least=4)]
    parts += [Part.of(keep, text) for keep, text in enumerate(more, 3)]
    return fit(parts, [], width, 1)


def _said(text: str, width: int) -> list[Content]:
    return [line.stylize(MUTED) for line in wrapped(text, width)]
