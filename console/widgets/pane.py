"""What the panes of lines have in common: they draw a view, and only what changed of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget

from console.view import View
from console.widgets.layout import framed


class Pane(Widget, can_focus=True):
    """Lines of text that are a function of a view and a size. Subclasses give `picture` and `title`."""

    DEFAULT_CSS: ClassVar[str] = """
    Pane {
        border: round $foreground 30%;
        border-title-color: $foreground;
        padding: 0 1;
        text-wrap: nowrap;
        text-overflow: clip;
        &:focus {
            border: round $primary;
            border-title-style: bold;
        }
    }
    """

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.view = View()
        self._lines: list[Content] = []
        self._drawn_at = Size(0, 0)
        self._title = ""

    def picture(self, width: int, height: int) -> Sequence[Content]:
        """The lines that show `self.view` in so many cells; longer and further ones are cut off."""
        raise NotImplementedError

    def title(self) -> Content:
        """What stands in the frame."""
        return Content("")

    def show(self, view: View) -> None:
        """Draws the view, if it differs from what is drawn."""
        if view is not self.view:
            self.view = view
            self.redraw()

    def redraw(self) -> None:
        """Draws what has changed since the last time."""
        width, height = self._drawn_at = self.content_size
        lines = list(self.picture(width, height))[:height] if width > 0 and height > 0 else []
        if len(lines) != len(self._lines) or not all(map(Content.is_same, lines, self._lines)):
            self._lines = lines
            self.refresh()
        title = framed(self.title(), self.has_focus)
        if title.plain != self._title:
            self._title = title.plain
            self.border_title = title  # a content, in which no markup is read

    def on_focus(self) -> None:
        """See Textual."""
        self.redraw()

    def on_blur(self) -> None:
        """See Textual."""
        self.redraw()

    def render(self) -> Content:
        """See Textual."""
        if self.content_size != self._drawn_at:
            self.redraw()
        return Content("\n").join(self._lines)

    def on_resize(self) -> None:
        """See Textual."""
        self.redraw()

    def copy_text(self) -> str:
        """What the pane shows, as plain text."""
        return "\n".join(line.plain.rstrip() for line in self._lines)
