"""A pane with more lines than it has room for: it draws those in sight, however many there are."""

from __future__ import annotations

from typing import ClassVar

from textual.content import Content
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.visual import Visual

from console.view import View
from console.widgets.layout import framed, padded


class ScrollPane(ScrollView, can_focus=True):
    """Lines that scroll. Subclasses give `line`, `lines_in_all`, `refill` and `title`."""

    ALLOW_SELECT = False

    DEFAULT_CSS: ClassVar[str] = """
    ScrollPane {
        border: round $foreground 30%;
        border-title-color: $foreground;
        padding: 0 1;
        overflow-x: hidden;
        overflow-y: auto;
        scrollbar-gutter: stable;
        scrollbar-size-vertical: 1;
        &:focus {
            border: round $primary;
            border-title-style: bold;
        }
    }
    """

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.view = View()
        self._title = ""

    @property
    def room(self) -> Size:
        """Cells for text: what the frame and the scroll bar leave."""
        return self.scrollable_content_region.size

    def line(self, y: int) -> Content:
        """The line with this number, counted from 0."""
        raise NotImplementedError

    def lines_in_all(self) -> int:
        """How many lines there are."""
        raise NotImplementedError

    def refill(self) -> None:
        """The view or the room changed: brings the lines up to date and calls `redraw` where they differ."""
        raise NotImplementedError

    def title(self) -> Content:
        """What stands in the frame."""
        return Content("")

    def show(self, view: View) -> None:
        """Draws the view, if it differs from what is drawn."""
        if view is not self.view:
            self.view = view
            self.refill()
            self.retitle()

    def on_resize(self) -> None:
        """See Textual."""
        self.refill()
        self.retitle()

    def on_focus(self) -> None:
        """See Textual."""
        self.refill()
        self.retitle()

    def on_blur(self) -> None:
        """See Textual."""
        self.refill()
        self.retitle()

    def redraw(self) -> None:
        """Draws the lines in sight again, however many there are now."""
        self.virtual_size = Size(self.room.width, self.lines_in_all())
        self.refresh()

    def retitle(self) -> None:
        """Writes the title, if it differs."""
        title = framed(self.title(), self.has_focus)
        if title.plain != self._title:
            self._title = title.plain
            self.border_title = title  # a content, in which no markup is read

    def render_line(self, y: int) -> Strip:
        """See Textual."""
        width = self.room.width
        number = self.scroll_offset.y + y
        if number >= self.lines_in_all() or width < 1:
            return Strip.blank(self.size.width, self.visual_style.rich_style)
        content = padded(self.line(number), width)
        return Visual.to_strips(self, content, width, 1, self.visual_style, apply_selection=False)[0]

    def copy_text(self) -> str:
        """The lines, as plain text."""
        return "\n".join(self.line(y).plain.rstrip() for y in range(self.lines_in_all()))
