"""What a report says, before any format: sections of facts, tables and pictures, every text plain and cleaned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from console.chart.frame import Look
from console.chart.model import Plot
from console.palette import Mark
from engine.text import clean

Tone = Literal["", "good", "bad", "warn", "muted"]
"""How a text is coloured; what it means stands in the text itself."""
NOT_SAID = "not said"
"""What stands where the evidence does not tell."""
MOST_CHARACTERS = 2_000
_TONES: dict[str, Tone] = {"$success": "good", "$error": "bad", "$warning": "warn", "$foreground-muted": "muted"}


@dataclass(frozen=True)
class Said:
    """A text; `code` for what is copied or compared character by character, such as a path or a digest."""

    text: str
    tone: Tone = ""
    code: bool = False


@dataclass(frozen=True)
class Paragraph:
    """A sentence or two."""

    said: Said


@dataclass(frozen=True)
class Facts:
    """Names and what is known of each."""

    rows: tuple[tuple[str, Said], ...]


@dataclass(frozen=True)
class Table:
    """Rows under a header; `right` are the columns of numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[Said, ...], ...]
    right: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Verbatim:
    """Lines that stand as they are."""

    lines: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Curve:
    """The losses as a picture."""

    plot: Plot
    look: Look
    title: str


@dataclass(frozen=True)
class Moment:
    """Something at a step: `kind` is one of `console.palette.CHECKPOINTS`, or `evaluation`."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class Timeline:
    """What was saved and evaluated along the steps, from 0 to `last`; `asked` is None where nobody said."""

    made: int
    asked: int | None
    moments: tuple[Moment, ...]
    unit: str = "step"

    @property
    def last(self) -> int:
        """Where it ends."""
        return max(1, self.made, self.asked or 0, *(moment.step for moment in self.moments))


Block = Paragraph | Facts | Table | Verbatim | Curve | Timeline


@dataclass(frozen=True)
class Section:
    """Blocks under a title; `key` names it for good, `folded` ones are opened by whoever wants them."""

    key: str
    title: str
    blocks: tuple[Block, ...]
    folded: bool = False


@dataclass(frozen=True)
class Report:
    """Everything that a report says.

    `name` is what the run is called, `title` says of what the report is; `mark` is its status as glyph, word and
    style. `summary` is what a reader wants first, `warnings` what must be known before anything is believed.
    """

    name: str
    directory: str
    title: str
    mark: Mark
    reason: str
    summary: tuple[tuple[str, Said], ...]
    warnings: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()
    footer: str = ""
    verdicts: str = ""
    """How many there are of each, the worst first: `1 FAIL (warn), 14 PASS`; empty where nothing was judged."""

    def section(self, key: str) -> Section | None:
        """A section by its key; None where it has nothing to say."""
        return next((section for section in self.sections if section.key == key), None)

    def blocks(self, kind: type[Block]) -> list[Block]:
        """All blocks of a kind, in their order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, kind)]


def said(text: object, tone: Tone = "", *, code: bool = False) -> Said:
    """A cleaned text; what is empty or None was not said."""
    if text is None or text == "":
        return Said(NOT_SAID, "muted")
    return Said(clean(str(text), MOST_CHARACTERS), tone, code)


def tone_of(style: str) -> Tone:
    """The tone of a style of the app's palette."""
    return next((_TONES[part] for part in style.split() if part in _TONES), "")


def marked(mark: Mark, more: str = "") -> Said:
    """A state as glyph and word."""
    return Said(clean(f"{mark.glyph} {mark.word}{more}", MOST_CHARACTERS), tone_of(mark.style))


def known(rows: Iterable[tuple[str, Said]]) -> tuple[tuple[str, Said], ...]:
    """Without the rows that nobody said anything of."""
    return tuple(row for row in rows if row[1].text != NOT_SAID)
