"""The log: follows what arrives, keeps still when one reads, filters and finds.

A line takes one row, so that many are in sight, and is cut there. Enter unfolds all of them; while one filters or
searches they are unfolded as well, for what was found must be seen.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content

from console.palette import Mark
from console.run_state import MAX_LOG_LINES, LogLine
from console.times import clock, stamp
from console.widgets.layout import ELLIPSIS, MUTED, cut
from console.widgets.log_lines import MAX_ROWS, Change, LogLines, pattern_of, pieces
from console.widgets.scroll_pane import ScrollPane
from engine.text import clean

LEVELS = {
    "info": Mark("·", "", MUTED),
    "warning": Mark("⚠", "warning", "bold $warning"),
    "error": Mark("✘", "error", "bold $error"),
}
MAX_COPY = 64 * 1024
"""Characters that a copy has at most: many terminals take no more."""
_WIDE = 50
"""Cells from which on a line begins with its time."""
_MAX_TEXT = 200


class LogPane(ScrollPane):
    """Lines for the operator, the newest last. Scrolling up stops following; `toggle_follow` or End resumes it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "unfold", "whole lines", show=False)]

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._lines = LogLines()
        self._search = ""
        self._found: int | None = None
        """Number of the line that the search stands at."""
        self._unfolded = False
        self._following = True
        self._unseen = 0
        self._placing = False
        """We are scrolling, and not the operator."""

    @property
    def filter_text(self) -> str:
        """What the lines shown must have in them; empty shows all."""
        return self._lines.filter

    @property
    def search_text(self) -> str:
        """What is looked for and highlighted."""
        return self._search

    @property
    def following(self) -> bool:
        """Whether the newest line is kept in sight."""
        return self._following

    # What is drawn

    def lines_in_all(self) -> int:
        """See `ScrollPane`."""
        return self._lines.rows

    def line(self, y: int) -> Content:
        """See `ScrollPane`."""
        number, part = self._lines.at(y)
        line = self._lines[number]
        width = self._text_width
        if not self._lines.width:  # one row: no more of a line than can be seen
            return self._drawn(number, cut(self._shown(line.text[: 8 * width], line.text, 0, line.level), width), True)
        cuts = pieces(line.text, width)
        start, end = cuts[part]
        text = self._shown(line.text[start:end], line.text, start, line.level)
        if part + 1 == MAX_ROWS and len(cuts) > MAX_ROWS:
            text = Content.assemble(text[: max(0, width - 1)], ELLIPSIS)
        return self._drawn(number, text, part == 0)

    @property
    def _text_width(self) -> int:
        """Cells for the text of a line."""
        return max(0, self.room.width - _indent(self.room.width))

    def _shown(self, text: str, whole: str, start: int, level: str) -> Content:
        """A part of a line that begins at `start`, with what was found in it marked."""
        shown = Content(text)
        for pattern, style in ((self.filter_text, "underline"), (self._search, "reverse")):
            shown = _highlighted(shown, whole, start, pattern_of(pattern), style)
        if level in ("warning", "error"):
            shown = shown.stylize_before(LEVELS[level].style.removeprefix("bold "))
        return shown

    def _drawn(self, number: int, text: Content, first: bool) -> Content:
        """A row: of the first one of a line with its time and level."""
        line, timed = self._lines[number], self.view.timed
        head = _head(line, self.room.width, number == self._found, timed) if first else Content("")
        return Content.assemble(head, " " * (_indent(self.room.width) - head.cell_length), text)

    def title(self) -> Content:
        """See `ScrollPane`."""
        parts = [Content("Log")]
        lines = self._lines
        if lines.filter:
            told = f'filter "{lines.filter}" {len(lines.shown):,} of {len(lines):,}'
            parts.append(Content.styled(told, "reverse"))
        if self._following:
            parts += [Content.styled("following", MUTED)] if self.view.link.live else []
        else:
            new = f" · {self._unseen:,} new" if self._unseen else ""
            parts.append(Content.styled(f"paused{new}", "bold $warning" if new else MUTED))
        if self.view.scrubbed and not len(lines):
            parts.append(Content.styled(f"only the last {MAX_LOG_LINES:,} lines are kept", MUTED))
        if self.has_focus and not (lines.filter or self._search):
            parts.append(Content.styled(f"enter: {'one row each' if self._unfolded else 'whole lines'}", MUTED))
        if self._search:
            matches = lines.matches(self._search)
            place = f"{matches.index(self._found) + 1:,} of " if self._found in matches else ""
            parts.append(Content(f'search "{self._search}" {place}{len(matches):,}'))
        return Content(" · ").join(parts)

    def refill(self) -> None:
        """See `ScrollPane`."""
        self._fold()
        self._arrange(self._lines.update(self.view.state.log))

    def _fold(self) -> None:
        """Lays the lines out in rows of the width that there is: one row each, or as many as they take."""
        unfolded = self._unfolded or self._search or self._lines.filter
        width = self._text_width if unfolded else 0
        if width == self._lines.width:
            return
        top = self._top()
        self._lines.width = width
        self._lines.refill()
        self.redraw()
        self._place(self.lines_in_all() if self._following else self._lines.row_of(top))

    def _top(self) -> int:
        """The number of the first line in sight."""
        return self._lines.at(self.scroll_offset.y)[0] if self.lines_in_all() > self.scroll_offset.y else 0

    def _arrange(self, change: Change) -> None:
        """Draws the rows that there are now, the newest in sight or what was in sight where it was."""
        if change.nothing:
            return
        if not self._following:
            self._unseen = 0 if change.replaced else self._unseen + change.new
        top = self.scroll_offset.y
        self.redraw()
        if self._following:
            self._place(self.lines_in_all())
        elif change.gone:  # rows went above the ones in sight
            self._place(max(0, top - change.gone))

    def redraw(self) -> None:
        """See `ScrollPane`."""
        self._placing = True
        try:
            super().redraw()
        finally:
            self._placing = False

    def _place(self, y: int) -> None:
        self._placing = True
        try:
            self.scroll_to(y=y, animate=False, force=True, immediate=True)
            # Textual moves the bar only where one is shown already, and the first lines make it be shown.
            self.vertical_scrollbar.position = self.scroll_offset.y
        finally:
            self._placing = False

    # What the operator does

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """See Textual. Scrolling up stops following, scrolling to the end resumes it."""
        super().watch_scroll_y(old_value, new_value)
        if self._placing:
            return
        if round(new_value) >= self.max_scroll_y:
            self._follow(True)
        elif new_value < old_value:
            self._follow(False)

    def _follow(self, following: bool) -> None:
        if following:
            self._unseen = 0
        self._following = following
        self.retitle()

    def toggle_follow(self) -> None:
        """Keeps the newest line in sight, or what is in sight now."""
        self._follow(not self._following)
        if self._following:
            self._place(self.lines_in_all())

    def action_scroll_end(self) -> None:
        """See Textual."""
        self._follow(True)
        self._place(self.lines_in_all())

    def action_unfold(self) -> None:
        """Shows lines whole, or one row of each again."""
        self._unfolded = not self._unfolded
        self._fold()
        self.retitle()

    def set_filter(self, text: str) -> None:
        """Shows only lines with this text in them, whatever its case; empty shows all."""
        text = clean(text, _MAX_TEXT)
        if text == self._lines.filter:
            return
        # What stood at the top stays there as far as it may, so that the reader's place is not lost.
        top = self._top()
        self._lines.filter = text
        self._fold()
        self._lines.refill()
        self.redraw()
        self._place(self.lines_in_all() if self._following else self._lines.row_of(top))
        self.retitle()

    def set_search(self, text: str) -> None:
        """Highlights this text; `next_match` goes from one line with it to the next."""
        self._search, self._found = clean(text, _MAX_TEXT), None
        self._fold()
        self.refresh()
        self.retitle()

    def next_match(self, direction: int) -> None:
        """Goes to the next line with the text searched for, or filtered by; -1 to the one before; round at the end."""
        matches = self._lines.matches(self._search or self.filter_text)
        if not matches:
            return
        self._found = _beside(matches, self._found, direction, self._in_sight())
        self._follow(False)
        row = self._lines.row_of(self._found)
        top, height = self.scroll_offset.y, self.room.height
        if not top <= row < top + height:
            self._place(row - height // 2)
        self.refresh()
        self.retitle()

    def _in_sight(self) -> int:
        """The number of the line that a search begins at: the first in sight, of a followed log the last."""
        rows = self.lines_in_all()
        row = rows - 1 if self._following else min(self.scroll_offset.y, rows - 1)
        return self._lines.at(row)[0]

    def on_resize(self) -> None:
        """See Textual."""
        super().on_resize()
        self.redraw()
        if self._following:
            self._place(self.lines_in_all())

    # Out of here

    def copy_text(self) -> str:
        """The filtered lines; without a filter those in sight. The oldest are left out where it is too much."""
        numbers = list(self._lines.shown)
        if not self.filter_text and numbers:
            rows = range(self.scroll_offset.y, min(self.lines_in_all(), self.scroll_offset.y + self.room.height))
            numbers = sorted({self._lines.at(row)[0] for row in rows})
        texts: list[str] = []
        count = 0
        for number in reversed(numbers):
            text = _plain(self._lines[number], self.view.timed)
            count += len(text) + 1
            if count > MAX_COPY:
                texts.append(f"{ELLIPSIS} {len(numbers) - len(texts):,} earlier lines are left out")
                break
            texts.append(text)
        return "\n".join(reversed(texts))

    def all_text(self) -> str:
        """Every line that passes the filter."""
        return "".join(f"{_plain(self._lines[number], self.view.timed)}\n" for number in self._lines.shown)

    def save(self, path: Path) -> int:
        """Writes the filtered lines, or all, to a new file, and returns their number.

        Raises:
            OSError: the file is there already, or cannot be written.
        """
        with path.open("x", encoding="utf-8") as file:
            file.write(self.all_text())
        return len(self._lines.shown)


def _beside(matches: list[int], found: int | None, direction: int, start: int) -> int:
    """The match after the one found last, or at the place where one looks; before it for a negative direction."""
    after = [number for number in matches if number > start] if found is None else []
    if found is None:
        here = [number for number in matches if number <= start]
        if direction > 0:
            return next((number for number in matches if number >= start), matches[0])
        return here[-1] if here else after[-1]
    if direction > 0:
        return next((number for number in matches if number > found), matches[0])
    return next((number for number in reversed(matches) if number < found), matches[-1])


def _highlighted(part: Content, whole: str, start: int, pattern: re.Pattern[str] | None, style: str) -> Content:
    """A part of a line with every hit in the line marked that reaches into it."""
    if pattern is None:
        return part
    for hit in pattern.finditer(whole):
        begin, end = max(0, hit.start() - start), min(len(part), hit.end() - start)
        if begin < end:
            part = part.stylize(style, begin, end)
    return part


def _indent(width: int) -> int:
    """Cells before the text: time and level, or in a narrow pane the level alone."""
    return 12 if width >= _WIDE else 2


def _head(line: LogLine, width: int, found: bool, timed: bool) -> Content:
    mark = LEVELS.get(line.level, Mark("?", line.level, "$warning"))
    pointer = ("▸", "bold $primary") if found else (mark.glyph, mark.style)
    if width < _WIDE:
        return Content.assemble(pointer, " ")
    begun = clock(line.t) if timed else f"{line.t:>8,.0f}"[:8]
    return Content.assemble((begun, MUTED), "  ", pointer, " ")


def _plain(line: LogLine, timed: bool) -> str:
    return f"{stamp(line.t, timed)}  {line.level:<7}  {line.text}"
