"""The two themes: Okabe and Ito's colours on a dark and on a light ground.

Where a colour of theirs is too faint or too heavy to be read as text on one of the grounds, it is lightened or darkened
until it is not; the hue stays. Text has a contrast of at least 4.5 on every ground (WCAG 2.2, success criterion 1.4.3).
"""

from __future__ import annotations

from textual.theme import Theme

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

_GREEN_LIGHTER, _VERMILLION_LIGHTER = "#2BB78D", "#F2744A"
_BLUE_DARKER, _ORANGE_DARKER = "#00659E", "#855600"

DARK = Theme(
    name="kdconsole-dark",
    dark=True,
    primary=SKY,
    secondary=PURPLE,
    accent=YELLOW,
    success=_GREEN_LIGHTER,
    warning=ORANGE,
    error=_VERMILLION_LIGHTER,
    foreground="#DCE1E8",
    background="#10141A",
    surface="#161B22",
    panel="#1F262F",
    variables={
        "text": "#E6EAEF",
        "text-muted": "#9AA5B1",
        "text-disabled": "#8792A0",
        "foreground-muted": "#9AA5B1",
        "border": SKY,
        "border-blurred": "#333D49",
        "block-cursor-foreground": "#0B0F14",
        "block-cursor-background": SKY,
        "block-cursor-text-style": "none",
        "block-cursor-blurred-foreground": "#E6EAEF",
        "block-cursor-blurred-background": "#2A3542",
        "button-color-foreground": "#0B0F14",
        "footer-key-foreground": SKY,
        "input-selection-background": f"{BLUE} 60%",
        "scrollbar": "#3D4A59",
        "scrollbar-hover": "#56677A",
        "scrollbar-background": "#161B22",
    },
)

LIGHT = Theme(
    name="kdconsole-light",
    dark=False,
    primary=_BLUE_DARKER,
    secondary=PURPLE_DARKER,
    accent=PURPLE_DARKER,
    success=GREEN_DARKER,
    warning=_ORANGE_DARKER,
    error=VERMILLION_DARKER,
    foreground="#1B2129",
    background="#FFFFFF",
    surface="#F4F6F8",
    panel="#E4E8ED",
    variables={
        "text": "#12171D",
        "text-muted": "#525C68",
        "text-disabled": "#5E6874",
        "foreground-muted": "#525C68",
        "border": BLUE,
        "border-blurred": "#C3CAD2",
        "block-cursor-foreground": "#FFFFFF",
        "block-cursor-background": _BLUE_DARKER,
        "block-cursor-text-style": "none",
        "block-cursor-blurred-foreground": "#12171D",
        "block-cursor-blurred-background": "#D3DEE8",
        "button-color-foreground": "#FFFFFF",
        "footer-key-foreground": _BLUE_DARKER,
        "input-selection-background": f"{SKY} 60%",
        "scrollbar": "#AEB8C3",
        "scrollbar-hover": "#8E9AA7",
        "scrollbar-background": "#EDF0F3",
    },
)

THEMES = (DARK, LIGHT)
HUES = {
    GREEN: (_GREEN_LIGHTER, GREEN_DARKER),
    VERMILLION: (_VERMILLION_LIGHTER, VERMILLION_DARKER),
    ORANGE: (ORANGE, _ORANGE_DARKER),
    PURPLE: (PURPLE, PURPLE_DARKER),
    BLUE: (BLUE, _BLUE_DARKER),
}
"""Each of the published colours, and what stands for it on the dark and on the light ground."""
