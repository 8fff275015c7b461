"""What a run saved and evaluated, along its steps: as a picture and as a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from console.chart.export import COLOURS, WIDTH
from console.chart.xticks import x_ticks
from console.palette import BLUE, CHECKPOINTS, GREEN_DARKER, VERMILLION_DARKER
from console.run_report.markup import escaped
from console.run_report.model import Moment, Timeline

HEIGHT = 132
_LEFT, _RIGHT = 76, 40
_LANE, _BAR, _AXIS, _KEY = 34, 58, 78, 122
"""Heights of the marks, the bar of steps, its axis and the key, in the picture's units."""
_APART = 18
"""Units that two marks must be apart to be drawn as two."""
_ORDER = ("failed", "final", "best", "interrupt", "periodic", "evaluation")
"""Where several fall together, the first of these is drawn."""
_SHAPES = {
    "periodic": ("m-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0", BLUE),
    "best": ("m0 -8l2.4 5 5.5 .7 -4 3.8 1 5.5 -4.9 -2.7 -4.9 2.7 1 -5.5 -4 -3.8 5.5 -.7z", GREEN_DARKER),
    "interrupt": ("m0 -7l7 7 -7 7 -7 -7z", "#7A4E00"),
    "final": ("m-7 -7h14v14h-14z", GREEN_DARKER),
    "failed": ("m-6 -8l6 6 6 -6 2 2 -6 6 6 6 -2 2 -6 -6 -6 6 -2 -2 6 -6 -6 -6z", VERMILLION_DARKER),
}
_EVALUATION = "#8A6D00"


def picture(timeline: Timeline, font: str) -> str:
    """The timeline as an SVG document, `WIDTH` by `height_of` units."""
    width, last = WIDTH - _LEFT - _RIGHT, timeline.last
    height = height_of(timeline)

    def x(step: float) -> float:
        return _LEFT + min(max(step / last, 0.0), 1.0) * width

    unit = escaped(timeline.unit)
    asked = f" of {timeline.asked:,} asked" if timeline.asked else ""
    title = f"{timeline.made:,} {unit}s made{asked}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 {HEIGHT - height} {WIDTH} {height}" font-family="{font}" font-size="12" role="img">\n'
        f"<title>Checkpoints and evaluations: {title}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{COLOURS.ground}"/>',
        f'<path d="M{_LEFT} {_BAR}h{width}v8h{-width}z" fill="{COLOURS.grid}"/>',
    ]
    if timeline.made > 0:
        parts.append(f'<path d="M{_LEFT} {_BAR}H{x(timeline.made):.1f}v8H{_LEFT}z" fill="{BLUE}"/>')
    for tick in x_ticks("step", 0.0, float(last), width // 8):
        parts.append(f'<path d="M{x(tick.at):.1f} {_AXIS}v5" stroke="{COLOURS.axis}"/>')
        parts.append(_text(x(tick.at), _AXIS + 18, tick.label, "middle"))
    parts.append(f'<path d="M{_LEFT} {_AXIS}h{width}" stroke="{COLOURS.axis}"/>')
    parts.append(_text(_LEFT - 10, _AXIS + 18, timeline.unit, "end", COLOURS.faint))
    evaluations = [m for m in timeline.moments if m.kind == "evaluation"]
    for group in clusters(evaluations, last, width, 3):
        told = group[-1].text if len(group) == 1 else f"{len(group):,} evaluations, the last: {group[-1].text}"
        place = f"M{x(group[-1].step):.1f} {_BAR + 9}v9"
        parts.append(f'<path d="{place}" stroke="{_EVALUATION}" stroke-width="2"><title>{escaped(told)}</title></path>')
    saved = [m for m in timeline.moments if m.kind != "evaluation"]
    for group in clusters(saved, last, width, _APART):
        mark = min(group, key=lambda m: _rank(m.kind))
        shape, colour = _SHAPES.get(mark.kind, _SHAPES["periodic"])
        at = x(mark.step)
        told = "; ".join(m.text for m in group[:5]) + ("; …" if len(group) > 5 else "")
        parts.append(f'<path d="M{at:.1f} {_LANE + 10}v12" stroke="{COLOURS.axis}"/>')
        parts.append(f'<path d="M{at:.1f} {_LANE}{shape}" fill="{colour}"><title>{escaped(told)}</title></path>')
        if len(group) > 1:
            parts.append(_text(at, _LANE - 14, f"×{len(group):,}", "middle", COLOURS.faint))
    parts += _key(timeline)
    return "\n".join((*parts, "</svg>\n"))


def height_of(timeline: Timeline) -> int:
    """Units that the picture is high: less where nothing was saved."""
    return HEIGHT if any(moment.kind != "evaluation" for moment in timeline.moments) else HEIGHT - _BAR + 16


def clusters(moments: Sequence[Moment], last: int, width: int, apart: float) -> list[list[Moment]]:
    """Moments in the order of their steps, those together that lie nearer than `apart` to the one before."""
    ordered = sorted(moments, key=lambda moment: moment.step)
    groups = [[ordered[0]]] if ordered else []
    for before, after in pairwise(ordered):
        if (after.step - before.step) / last * width < apart and len(groups[-1]) < len(ordered):
            groups[-1].append(after)
        else:
            groups.append([after])
    return groups


def _rank(kind: str) -> int:
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def _key(timeline: Timeline) -> list[str]:
    """What the marks mean, and how many there are of each."""
    parts, x = [], float(_LEFT)
    for kind in _ORDER:
        count = sum(moment.kind == kind for moment in timeline.moments)
        if not count:
            continue
        if kind == "evaluation":
            parts.append(f'<path d="M{x + 4:.1f} {_KEY - 9}v10" stroke="{_EVALUATION}" stroke-width="2"/>')
        else:
            shape, colour = _SHAPES[kind]
            parts.append(f'<path d="M{x + 4:.1f} {_KEY - 4}{shape}" fill="{colour}"/>')
        word = "held-out evaluation" if kind == "evaluation" else f"{CHECKPOINTS[kind].word} checkpoint"
        text = f"{count:,} {word}{'s' if count > 1 else ''}"
        parts.append(_text(x + 16, _KEY, text, "start", COLOURS.faint))
        x += 16 + 7.4 * len(text) + 22
    return parts


def _text(x: float, y: float, text: str, anchor: str, colour: str = COLOURS.ink) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escaped(text)}</text>'


def line_of_text(timeline: Timeline, width: int = 72) -> list[str]:
    """The timeline in characters: a row of marks over a bar of steps, and what the marks mean."""
    last = timeline.last
    marks, bar = [" "] * width, []
    for index in range(width):
        done = timeline.made / last * width
        bar.append("━" if index < done else "╌")
    for kind in reversed(_ORDER):
        for moment in timeline.moments:
            if moment.kind == kind:
                glyph = "╷" if kind == "evaluation" else CHECKPOINTS[kind].glyph
                marks[min(width - 1, max(0, round(moment.step / last * (width - 1))))] = glyph
    asked = f", {timeline.asked:,} asked" if timeline.asked else ""
    key = []
    for kind in _ORDER:
        count = sum(moment.kind == kind for moment in timeline.moments)
        if count:
            glyph = "╷" if kind == "evaluation" else CHECKPOINTS[kind].glyph
            key.append(f"{glyph} {count:,} {'held-out evaluations' if kind == 'evaluation' else kind}")
    ends = f"0{f'{last:,}':>{width - 1}}"
    return [
        "".join(marks).rstrip(),
        "".join(bar),
        ends,
        f"{timeline.made:,} {timeline.unit}s made{asked}",
        ", ".join(key),
    ]
