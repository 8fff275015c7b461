"""Colours, shapes and words of every state; no state is told by colour alone.

Okabe and Ito's colours, which people with any common colour blindness tell apart. Source: Okabe, Ito (2008), "Color
Universal Design".
"""

from __future__ import annotations

from typing import NamedTuple

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
VERMILLION_DARKER, GREEN_DARKER, PURPLE_DARKER = "#B03A00", "#006B4E", "#964572"
"""What stands for three of them on a light ground, where they are too faint to be read as text."""

RUN_COLOURS_DARK = (SKY, ORANGE, GREEN, PURPLE, YELLOW, VERMILLION)
RUN_COLOURS_LIGHT = (BLUE, VERMILLION_DARKER, GREEN_DARKER, PURPLE_DARKER, "#8A6D00", "#5A5A5A")
"""One for each run that is laid over another; light backgrounds need darker ones."""


class Mark(NamedTuple):
    """A state as one character, one word and a style; `$` names are variables of the theme."""

    glyph: str
    word: str
    style: str


VERDICTS = {
    "PASS": Mark("✔", "PASS", "$success"),
    "FAIL": Mark("✘", "FAIL", "bold $error"),
    "PENDING": Mark("◌", "PENDING", "$foreground-muted"),
    "UNKNOWN": Mark("?", "UNKNOWN", "$warning"),
}
RUNS = {
    "READING": Mark("◔", "READING", "$primary"),
    "STARTING": Mark("◔", "STARTING", "$primary"),
    "RUNNING": Mark("▶", "RUNNING", "bold $primary"),
    "STALLED": Mark("⚠", "STALLED", "bold $warning"),
    "UNREACHABLE": Mark("⌁", "UNREACHABLE", "bold $warning"),
    "UNASKED": Mark("◇", "UNASKED", "$foreground-muted"),
    "COMPLETED": Mark("■", "COMPLETED", "$success"),
    "FAILED": Mark("✘", "FAILED", "bold $error"),
    "STOPPED": Mark("◼", "STOPPED", "$warning"),
    "TIMEOUT": Mark("◷", "TIMEOUT", "bold $warning"),
    "CRASHED": Mark("✖", "CRASHED", "bold $error"),
    "LOST": Mark("?", "LOST", "bold $warning"),
    "CHANGED": Mark("≠", "CHANGED", "bold $error"),
    "DISPUTED": Mark("≠", "DISPUTED", "bold $error"),
}
CHECKPOINTS = {
    "periodic": Mark("●", "periodic", "$primary"),
    "best": Mark("★", "best", "$success"),
    "interrupt": Mark("◆", "interrupt", "$warning"),
    "final": Mark("◉", "final", "$success"),
    "failed": Mark("✘", "failed", "bold $error"),
}


ORDER = ("FAIL", "UNKNOWN", "PENDING", "PASS")
"""Verdicts, the worst first."""


def verdict_mark(verdict: str) -> Mark:
    """How a verdict looks; a word that we do not know looks undecided."""
    return VERDICTS.get(verdict, Mark("?", verdict, "$warning"))


def run_mark(status: str) -> Mark:
    """How a run's status looks; a word that we do not know looks undecided."""
    return RUNS.get(status, Mark("?", status, "$warning"))
