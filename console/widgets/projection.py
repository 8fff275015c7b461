"""How long it was to take, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from textual.content import Content

from console.elapsed import wall_seconds
from console.forecast import Range, end_text, forecast
from console.long_work import Work, work
from console.outlook import host_now, outlook, steps_made
from console.report import duration
from console.view import View
from console.widgets.layout import MUTED, fact, wrapped
from console.widgets.pace_lines import Block, pace_blocks, within, work_blocks
from console.widgets.pane import Pane
from engine.stream import Projection


class ProjectionPane(Pane):
    """What the smoke said against what is really elapsing; for a smoke, what it projects."""

    def title(self) -> Content:
        """See `Pane`."""
        return Content("Projection")

    def picture(self, width: int, height: int) -> Sequence[Content]:
        """See `Pane`."""
        return projection_lines(self.view, width, height)


def projection_lines(view: View, width: int, height: int = 100) -> list[Content]:
    """The pane's lines, none wider than `width` cells; where they are more than `height`, the least important go."""
    return within(_blocks(view, width), height)


def _blocks(view: View, width: int) -> list[Block]:
    run, over = view.state.run, outlook(view).ended
    if run is None:
        told = (
            "Nothing tells what it took." if over else "Nothing can be projected yet: the run has not told what it is."
        )
        return [(1, _said(told, width))]
    made = work(view, host_now(view))
    if not view.state.makes_steps:
        return _of_work(view, made, width)
    if run.mode == "smoke":
        return [*_of_smoke(view, width), *pace_blocks(view, width, over=over)]
    if view.smoke_seconds is not None:
        return [(9, [_line("smoke said", view.smoke_seconds, width)]), *_now(view, width)]
    blocks = _now(view, width)
    if not view.timed:
        return blocks
    if over or view.review is not None:
        return [*blocks, (2, _said("No smoke of this configuration was found to hold it against.", width))]
    missing = _said("No smoke of this configuration was found. To know before a long run:", width)
    missing += [line.stylize("bold") for line in wrapped("kdconsole --headless smoke CONFIG", width)]
    return [*blocks[:2], (5, missing), *blocks[2:]]


def _of_work(view: View, made: Work | None, width: int) -> list[Block]:
    """Of a run that makes no steps."""
    if outlook(view).ended:
        took: list[Block] = [(10, [_took(view, "", width)])]
        return [*took, *work_blocks(view, made, width)] if made else took
    spent: Block = (4, [_line("elapsed", (elapsed(view),) * 3, width)])
    return [*work_blocks(view, made, width), spent] if made else [spent]


def _now(view: View, width: int) -> list[Block]:
    """What a full run takes, all in all, as far as can be told now."""
    state, seen = view.state, outlook(view)
    steps = steps_made(state)
    if seen.ended:
        blocks: list[Block] = [(10, [_took(view, _against(view, elapsed(view)) if _whole(view) else "", width)])]
        if (asked := state.target_steps) and asked != steps:
            unit = f"{state.source.unit}s"
            over = f"{steps:,} {unit}; {asked:,} were asked for" if steps > asked else f"{steps:,} of {asked:,} {unit}"
            blocks.append((8, _said(f"It ended after {over}.", width)))
        return [*blocks, *pace_blocks(view, width, over=True)]
    if not view.timed:
        return [(1, _said("The log has no times.", width))]
    expected, pace = forecast(view), pace_blocks(view, width, over=False)
    spent: Block = (4, [_line("elapsed", (elapsed(view),) * 3, width)])
    if expected is None:
        untold = [] if steps else [(3, _said("What it will take is told after 10 steps.", width))]
        return [spent, *untold, *pace]
    p10, p50, p90 = expected.seconds
    total = (elapsed(view) + p10, elapsed(view) + p50, elapsed(view) + p90)
    about = {"STALLED": "while it stands still", "UNREACHABLE": "if it goes on"}.get(seen.status, "")
    ends = [end_text(each, view.now) for each in expected.ends]
    spread = f"({ends[0]} to {ends[2]})" if ends[0] != ends[2] else ""
    each: list[Block] = [(3, [fact("a step", [f"{expected.step_seconds:.4g} s"], width)])]
    return [
        (10, [_line("now", total, width, _against(view, total[1]))]),
        (9, [fact("ends", [ends[1], spread, about], width)]),
        *pace,
        spent,
        *([] if pace else each),
    ]


def _took(view: View, against: str, width: int) -> Content:
    taken = elapsed(view)
    return _line("took", (taken,) * 3, width, against) if math.isfinite(taken) else fact("took", ["not said"], width)


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


def _of_smoke(view: View, width: int) -> list[Block]:
    state = view.state
    projection = state.projection
    if projection is not None:
        took = [_took(view, "", width)] if not view.timed and outlook(view).ended else []
        return [(10, _projected(projection, width)), *([(9, took)] if took else [])]
    if not view.timed:
        return [(10, [_took(view, "", width)]), (9, _said("The log projects nothing.", width))]
    if outlook(view).ended:
        return [(10, _said("It ended before it could project anything: that takes 10 steps.", width))]
    expected = forecast(view)
    blocks: list[Block] = [(9, _said("This smoke projects the real run when its steps are made.", width))]
    if expected is not None:
        blocks.append((10, [fact("it ends", [f"in {duration(expected.seconds[1])}"], width)]))
    return blocks


def _projected(projection: Projection, width: int) -> list[Content]:
    said = (projection.p10_seconds, projection.p50_seconds, projection.p90_seconds)
    lines = [fact("real run", [f"{projection.target_steps:,} steps"], width), _line("takes", said, width)]
    if math.isfinite(projection.step_seconds):
        median = f"median of {projection.samples:,}"
        lines.append(fact("a step", [f"{projection.step_seconds:.4g} s", median], width))
    if math.isfinite(projection.fixed_seconds):
        lines.append(fact("around them", [duration(projection.fixed_seconds)], width))
    return lines


def _line(name: str, seconds: Range, width: int, after: str = "") -> Content:
    """A time with its range where there is one, and what there is to say about it."""
    low, middle, high = (duration(each) for each in seconds)
    spread = f"({low} to {high})" if low != high and all(map(math.isfinite, seconds)) else ""
    return fact(name, [middle, spread, after], width)


def _said(text: str, width: int) -> list[Content]:
    return [line.stylize(MUTED) for line in wrapped(text, width)]
