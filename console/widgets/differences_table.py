"""The table of differences between runs: a column a run, and what is not as in the first run marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.cells import cell_len
from textual.content import Content
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.visual import Visual

from console.palette import RUN_COLOURS_DARK, RUN_COLOURS_LIGHT
from console.side_by_side import Line, Section
from console.widgets.layout import cut, padded, wrapped

DIFFERENT = "≠"
_GAP = 2
_LEAST_CELL, _MOST_CELL = 15, 40
_LABEL_SHARE = 0.34

_COLOURS = {
    "DifferencesTable": RUN_COLOURS_DARK,
    "DifferencesTable:light": RUN_COLOURS_LIGHT,
    "DifferencesTable:ansi": ("ansi_blue", "ansi_yellow", "ansi_green", "ansi_magenta", "ansi_cyan", "ansi_red"),
}
"""The names of the runs have the colours of their curves in the chart above, and their numbers."""


class DifferencesTable(ScrollView, can_focus=True):
    """Shows sections of differences. What a line is about stays at the left, the names of the runs at the top."""

    DEFAULT_CSS = "\n".join(
        f"{selector} .differences--run-{number} {{ color: {colour}; text-style: bold; }}"
        for selector, colours in _COLOURS.items()
        for number, colour in enumerate(colours)
    )
    COMPONENT_CLASSES: ClassVar[set[str]] = {f"differences--run-{number}" for number in range(len(RUN_COLOURS_DARK))}

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._names: Sequence[str] = ()
        self._sections: Sequence[Section] = ()
        self._label_width = self._cell_width = 0
        self._lines: list[tuple[Content, Content]] = []
        """What stands at the left and what scrolls; a title or a note reaches over both."""

    def show(self, names: Sequence[str], sections: Sequence[Section]) -> None:
        """Shows other differences; the names are those of the runs, the first being the one held against."""
        if (names, sections) != (self._names, self._sections):
            self._names, self._sections = names, sections
            self._lay_out()

    def notify_style_update(self) -> None:
        """See Textual: the theme changed."""
        super().notify_style_update()
        self._lay_out()

    def on_resize(self) -> None:
        """See Textual."""
        self._lay_out()

    def _lay_out(self) -> None:
        width, count = self.scrollable_content_region.width, max(1, len(self._names))
        lines = [line for section in self._sections for line in section.lines]
        labels = max((cell_len(line.label) for line in lines), default=0)
        self._label_width = min(labels, max(10, int(width * _LABEL_SHARE)))
        widest = max((_value(line, i).cell_length for line in lines for i in range(len(line.cells))), default=0)
        share = (width - self._label_width) // count - _GAP
        self._cell_width = min(max(widest, _LEAST_CELL), max(share, _LEAST_CELL), _MOST_CELL)
        self._lines = [self._header()]
        for number, section in enumerate(self._sections):
            if number:
                self._lines.append((Content(""), Content("")))
            self._lines.append((Content.styled(section.title, "bold $primary"), Content("")))
            for note in wrapped(Content.styled(section.note, "$warning"), max(1, width)) if section.note else []:
                self._lines.append((note, Content("")))
            self._lines += [self._drawn(line) for line in section.lines]
        across = self._label_width + count * (self._cell_width + _GAP)
        size = Size(max(across, 1), len(self._lines))
        if self.virtual_size != size:
            self.virtual_size = size
        self.refresh()

    def _header(self) -> tuple[Content, Content]:
        styles = [
            self.get_visual_style(f"differences--run-{i % len(RUN_COLOURS_DARK)}") for i in range(len(self._names))
        ]
        numbered = [f"{number} {name}" for number, name in enumerate(self._names, 1)]
        cells = [self._cell(Content.styled(name, style)) for name, style in zip(numbered, styles, strict=True)]
        return Content(" " * self._label_width), Content.assemble(*cells)

    def _drawn(self, line: Line) -> tuple[Content, Content]:
        label = padded(Content.styled(line.label, "bold" if line.differs else "$foreground-muted"), self._label_width)
        return label, Content.assemble(*(self._cell(_value(line, index)) for index in range(len(line.cells))))

    def _cell(self, content: Content) -> Content:
        return Content.assemble(" " * _GAP, padded(content, self._cell_width))

    def render_line(self, y: int) -> Strip:
        """See Textual: the header stays, the rest scrolls; sideways only the runs do."""
        width = self.size.width
        index = y if y == 0 else y + self.scroll_offset.y
        left, right = self._lines[index] if index < len(self._lines) else (Content(""), Content(""))
        if right:
            room = max(0, width - self._label_width)
            moved = self._strip(right, max(right.cell_length, room)).crop(
                self.scroll_offset.x, self.scroll_offset.x + room
            )
            return Strip.join([self._strip(left, self._label_width), moved])
        return self._strip(cut(left, width), width)

    def _strip(self, content: Content, width: int) -> Strip:
        strips = Visual.to_strips(self, padded(content, width), width, 1, self.visual_style)
        return strips[0] if strips else Strip.blank(width)


def _value(line: Line, index: int) -> Content:
    """What a run has; where it is not what the first has, with a mark, in bold, and with the change."""
    cell = line.cells[index]
    if not line.differs_at(index):
        return Content.assemble("  ", (cell.text, cell.style))
    change = line.change(index)
    after = "" if change is None else f"  {100 * change:+.1f} %"
    return Content.assemble(
        (f"{DIFFERENT} ", "bold"), (cell.text, f"bold {cell.style}".strip()), (after, "$foreground-muted")
    )
