"""Pictures of screens as text files: what is shown, and where it matters in which style."""

from __future__ import annotations

import difflib
import os
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.style import Style
from textual.app import App
from textual.color import Color

DIRECTORY = Path(__file__).with_name("snapshots")
VARIABLE = "KDCONSOLE_UPDATE_SNAPSHOTS"
UPDATING = bool(os.environ.pop(VARIABLE, ""))
"""Taken out of the environment, for kdconsole takes it for a misspelt one of its own."""
COMMAND = f"{VARIABLE}=1 python -m pytest tests/console/test_snapshots.py"
_TOKENS = (
    *("text-muted", "text-disabled", "foreground", "primary", "secondary", "success", "warning", "error", "accent"),
    *("text", "background", "surface", "panel", "border-blurred", "scrollbar", "scrollbar-background"),
    *("block-cursor-background", "block-cursor-foreground", "block-cursor-blurred-background"),
)
"""Names of colours, by which a style is told where it has one of them."""
_FLAGS = ("bold", "dim", "italic", "underline", "reverse", "strike")


def picture(app: App[Any], *, styles: bool = False) -> str:
    """The screen as text, its rows without the blanks at their ends; with `styles`, each row's runs of cells follow."""
    strips = app.screen._compositor.render_strips()
    rows = [f"{strip.text.rstrip()}\n" for strip in strips]
    if not styles:
        return "".join(rows)
    names = _names(app)
    told = []
    for number, strip in enumerate(strips):
        runs = []
        for style, pieces in groupby(strip, key=lambda piece: _told(piece.style, names)):
            runs.append(f"{sum(piece.cell_length for piece in pieces)} {style}")
        told.append(f"{number:>3}: {', '.join(runs)}\n")
    return "".join([*rows, "\n", *told])


def _names(app: App[Any]) -> dict[tuple[int, int, int], str]:
    """What the theme calls its colours; the first name where there are several."""
    names: dict[tuple[int, int, int], str] = {}
    for token in _TOKENS:
        value = app.theme_variables.get(token)
        if value is not None and not value.startswith("auto") and "ansi" not in value:
            colour = Color.parse(value)
            names.setdefault((colour.monochrome if app.no_color else colour).rgb, token)
    return names


def _told(style: Style | None, names: dict[tuple[int, int, int], str]) -> str:
    if style is None:
        return "none"
    parts = [_colour(style.color, names), *(flag for flag in _FLAGS if getattr(style, flag))]
    ground = _colour(style.bgcolor, names)
    return " ".join([*parts, *([] if ground in ("background", "default") else [f"on {ground}"])])


def _colour(colour: Any, names: dict[tuple[int, int, int], str]) -> str:
    if colour is None or colour.is_default:
        return "default"
    if colour.triplet is None:
        return str(colour.name)
    return names.get(tuple(colour.triplet), str(colour.triplet.hex))


def same(name: str, drawn: str) -> None:
    """Holds a picture against its file; with the environment's `KDCONSOLE_UPDATE_SNAPSHOTS` it becomes the file."""
    path = DIRECTORY / f"{name}.txt"
    if UPDATING:
        DIRECTORY.mkdir(exist_ok=True)
        path.write_text(drawn, encoding="utf-8")
    there = path.read_text(encoding="utf-8") if path.exists() else ""
    if drawn != there:
        lines = difflib.unified_diff(there.splitlines(), drawn.splitlines(), str(path), "drawn now", lineterm="", n=1)
        shown = "\n".join(lines)
        raise AssertionError(f"{name} looks different. If it is meant: {COMMAND}\n{shown}")
