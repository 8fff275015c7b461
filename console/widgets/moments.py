"""What the head says of a moment of the past: that it is one, which one, and how fast it is played."""

from __future__ import annotations

from textual.content import Content

from console.report import duration
from console.times import clock
from console.view import View
from console.widgets.layout import Part

_STYLE = "bold reverse $accent"


def moment_part(view: View) -> Part:
    """The block that stands before everything else while an earlier moment is shown."""
    replay, state = view.replay, view.state
    begin, end, now = state.first_t, max(view.last_t, view.now), view.now
    step = f" · {state.source.unit} {state.last_step.step:,}" if state.last_step else ""
    if view.timed:
        place, of, at = duration(max(0.0, now - begin)), f" of {duration(max(0.0, end - begin))}", f" · {clock(now)}"
        speed = f"{replay.speed or 1:,}x"
    else:
        place, of, at = f"line {now:,.0f}", f" of {end:,.0f}", ""
        speed = f"{replay.speed or 1:,} lines/s"
    if replay.playing:
        texts = [
            f" ▶ replay {speed} · {place}{of}{step}{at} ",
            f" ▶ replay {speed} · {place}{of}{step} ",
            f" ▶ replay {speed} · {place}{of} ",
            f" ▶ {speed} · {place}{of} ",
        ]
    else:
        back = "now" if view.link.live else "the end"
        told = f" · {speed}" if replay.speed else ""
        texts = [
            f" ⏪ as of {place}{of}{step}{at}{told} · 0: {back} ",
            f" ⏪ as of {place}{of}{step}{at} · 0: {back} ",
            f" ⏪ as of {place}{of}{step} · 0: {back} ",
            f" ⏪ as of {place}{of} · 0: {back} ",
        ]
    return Part.of(8, *(Content.styled(text, _STYLE) for text in texts), least=24)
