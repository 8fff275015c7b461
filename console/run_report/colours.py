"""Colours of reports on a light and on a dark ground, chosen by the reader's own setting and by no script."""

from __future__ import annotations

from console.chart.export import COLOURS
from console.palette import (
    BLUE,
    GREEN,
    GREEN_DARKER,
    ORANGE,
    PURPLE,
    PURPLE_DARKER,
    SKY,
    VERMILLION,
    VERMILLION_DARKER,
    YELLOW,
)

LIGHT = {
    "ground": "#FFFFFF",
    "raised": "#F4F6F8",
    "line": "#D3D9E0",
    "ink": "#12171D",
    "muted": "#525C68",
    "link": "#00659E",
    "good": GREEN_DARKER,
    "bad": VERMILLION_DARKER,
    "warn": "#7A4E00",
}
DARK = {
    "ground": "#10141A",
    "raised": "#1A2029",
    "line": "#333D49",
    "ink": "#E6EAEF",
    "muted": "#9AA5B1",
    "link": SKY,
    "good": "#2BB78D",
    "bad": "#F2744A",
    "warn": ORANGE,
}
_PICTURE_DARK = {
    COLOURS.ground: DARK["ground"],
    COLOURS.ink: DARK["ink"],
    COLOURS.faint: DARK["muted"],
    COLOURS.grid: "#28303A",
    COLOURS.axis: "#7C8895",
    COLOURS.bad: "#FF7B8A",
    COLOURS.beyond: ORANGE,
    COLOURS.gap: YELLOW,
    BLUE: SKY,
    VERMILLION: "#F2744A",
    PURPLE: "#DE9CC4",
    GREEN: "#2BB78D",
    **{LIGHT[name]: DARK[name] for name in ("raised", "line", "ink", "muted", "good", "bad", "warn")},
}
"""What stands on a dark ground for each colour that our pictures are drawn in."""
_TEXT_LIGHT = {PURPLE: PURPLE_DARKER, VERMILLION: VERMILLION_DARKER, GREEN: GREEN_DARKER}
"""Curves are seen in these colours on white; letters are not."""


def variables(colours: dict[str, str]) -> str:
    """Colours as CSS variables."""
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())


def picture_css(where: str, *, dark: bool) -> str:
    """Rules for pictures below a selector: they win over the colours that the pictures were drawn in."""
    if not dark:
        return "".join(f'{where} text[fill="{old}"]{{fill:{new}}}' for old, new in _TEXT_LIGHT.items())
    rules = [f'{where} [fill="{old}"]{{fill:{new}}}' for old, new in _PICTURE_DARK.items()]
    rules += [f'{where} text[fill="{old}"]{{fill:{new}}}' for old, new in _PICTURE_DARK.items() if old in _TEXT_LIGHT]
    return "".join(rules + [f'{where} [stroke="{old}"]{{stroke:{new}}}' for old, new in _PICTURE_DARK.items()])
