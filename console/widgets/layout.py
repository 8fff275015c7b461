"""Text that fits: parts of a line that give way to each other, cuts by cells, bars, numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from textual.content import Content

from console.palette import Mark

ELLIPSIS = "…"
MUTED = "$foreground-muted"
"""The style of what is less important. Not `$text-muted`: where a theme chooses that by contrast, it is not muted."""
NOT_GIVEN = "n/a"
_NAME = 12
"""Cells for what the line of a fact is about."""
_EIGHTHS = " ▏▎▍▌▋▊▉"
_FULL, _REST = "█", "─"


@dataclass(frozen=True, eq=False)
class Part:
    """A piece of a line in one or more forms, the longest first; the part with the lowest `keep` gives way first.

    One with `least` stays to the end: its last form is cut, down to so many cells, where others would go.
    """

    keep: int
    forms: tuple[Content, ...]
    least: int = 0

    @classmethod
    def of(cls, keep: int, *forms: Content | str, least: int = 0) -> Part:
        """A part from contents or plain texts; empty forms are left out."""
        contents = (Content(form) if isinstance(form, str) else form for form in forms)
        return cls(keep, tuple(form for form in contents if form.plain), least)


def marked(mark: Mark, text: str | None = None) -> Content:
    """A state's glyph and word (or `text` in its place) in its style."""
    return Content.styled(f"{mark.glyph} {mark.word if text is None else text}", mark.style)


def fit(left: Sequence[Part], right: Sequence[Part], width: int, gap: int = 3) -> Content:
    """One line of exactly `width` cells: `left` at its beginning, `right` at its end, `gap` cells between parts.

    While it is too long, the part with the lowest `keep` takes its next shorter form, and then goes; the last one that
    remains is cut.
    """
    left, right = ([part for part in side if part.forms] for side in (left, right))
    shown = {part: part.forms[0] for part in (*left, *right)}
    shorter = {part: list(part.forms[1:]) for part in shown}
    waiting = sorted(shown, key=lambda part: part.keep)
    while (excess := _cells(shown.values(), gap) - width) > 0 and waiting:
        if gap > 2:
            gap = 2
            continue
        weakest = waiting[0]
        if shorter[weakest]:
            shown[weakest] = shorter[weakest].pop(0)
            continue
        del waiting[0]
        if weakest.least:
            shown[weakest] = cut(shown[weakest], max(weakest.least, shown[weakest].cell_length - excess))
        elif len(shown) > 1:
            del shown[weakest]
    slack = width - _cells(shown.values(), gap)
    for part in shown:
        if part.least and slack > 0:  # what others left when they went, after this one had been cut
            whole, now = part.forms[-1].cell_length, shown[part].cell_length
            if now < whole:
                shown[part], slack = cut(part.forms[-1], now + slack), 0
    space = Content(" " * gap)
    begin, end = (space.join([shown[part] for part in side if part in shown]) for side in (left, right))
    return padded(Content.assemble(begin, " " * (width - begin.cell_length - end.cell_length), end), width)


def fact(name: str, texts: Sequence[str], width: int) -> Content:
    """A named value in bold, and what goes with it; what finds no room goes, from the middle."""
    first, *more = texts
    head = name.ljust(_NAME) if width >= 2 * _NAME else name
    parts = [Part.of(7, Content.styled(head, MUTED)), Part.of(9, Content.styled(first, "bold"), least=4)]
    parts += [Part.of(keep, text) for keep, text in enumerate(more, 3)]
    return fit(parts, [], width, 1)


def _cells(contents: Iterable[Content], gap: int) -> int:
    lengths = [content.cell_length for content in contents]
    return sum(lengths) + gap * (len(lengths) - 1)


def padded(content: Content, width: int) -> Content:
    """The content as a line of exactly `width` cells, cut with an ellipsis or filled with spaces."""
    line = cut(content, width)
    return Content.assemble(line, " " * (width - line.cell_length))


def cut(content: Content, width: int) -> Content:
    """The content with at most `width` cells; one that is longer ends in an ellipsis."""
    if content.cell_length <= width:
        return content
    if width <= 0:
        return Content("")
    text = content.plain
    # Cells never shrink as characters are added, so the longest beginning that fits is found by halving.
    low, high = 0, min(len(text), max(width - 1, 0) * 8)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cell_len(text[:middle]) < width else (low, middle - 1)
    # The ellipsis stands where the next character stood, and in its style.
    return Content(text[:low] + ELLIPSIS, list(content[: low + 1].spans))


def wrapped(text: str | Content, width: int, indent: str = "") -> list[Content]:
    """The text in lines of at most `width` cells, broken between words where it can be."""
    content = Content(text) if isinstance(text, str) else text
    room = width - cell_len(indent)
    if room < 1:
        return [cut(content, width)]
    return [cut(Content.assemble(indent, line), width) for line in content.wrap(room)] or [Content(indent)]


def flowed(parts: Sequence[Content], width: int, between: str = " · ") -> list[Content]:
    """The parts in lines of at most `width` cells, broken between parts; one that is too long is wrapped by itself."""
    lines: list[Content] = []
    for part in parts:
        if lines and lines[-1].cell_length + cell_len(between) + part.cell_length <= width:
            lines[-1] = Content.assemble(lines[-1], between, part)
        else:
            lines += [part] if part.cell_length <= width else wrapped(part, width)
    return lines


def framed(title: Content, focused: bool) -> Content:
    """A title for a frame; the pane that keys act on is told by a shape, too."""
    return Content.assemble("▸ " if focused else "", title) if title.plain else title


def bar(fraction: float, width: int) -> tuple[str, str]:
    """A bar of `width` cells as its full part, to an eighth of a cell, and the line that stands for the rest."""
    if width < 1 or not math.isfinite(fraction):
        return "", _REST * max(0, width)
    eighths = round(min(1.0, max(0.0, fraction)) * width * 8)
    full = _FULL * (eighths // 8)
    if eighths % 8:
        full += _EIGHTHS[eighths % 8]
    return full, _REST * (width - len(full))


def drawn_bar(fraction: float, width: int, style: str = "$primary") -> Content:
    """A bar, its full part in a style."""
    full, rest = bar(fraction, width)
    return Content.assemble((full, style), (rest, "$foreground 30%"))


def number(value: float) -> str:
    """A loss with four significant digits: `10.95`, `3.950`, `0.01230`."""
    if not math.isfinite(value):
        return {True: "NaN"}.get(math.isnan(value), "inf" if value > 0 else "-inf")
    return f"{value:#.4g}".rstrip(".") if 1e-4 <= abs(value) < 1e6 or value == 0 else f"{value:.3e}"


def size(count: float) -> str:
    """Bytes in decimal units: `988 MB`, `61.2 GB`, `1.95 TB`."""
    if not math.isfinite(count):
        return NOT_GIVEN
    value = abs(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            places = 1 if unit == "GB" and value < 199.95 else 0
            return f"{'-' if count < 0 else ''}{value:.{places}f} {unit}"
        value /= 1000
    return f"{'-' if count < 0 else ''}{value:,.2f} TB"


def short_step(step: int) -> str:
    """A step number in few cells: `400`, `12k`, `12.5k`, `1.25M`."""
    for unit, scale in (("M", 1_000_000), ("k", 1_000)):
        if abs(step) >= scale:
            return f"{step / scale:,.4g}{unit}" if abs(step) < 1e12 else f"{step:.3g}"
    return str(step)
