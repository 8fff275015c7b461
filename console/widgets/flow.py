"""A text that is laid out anew for every width."""

from __future__ import annotations

from collections.abc import Callable

from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget

Layout = Callable[[int], Content]
"""A text for a width in cells."""


class Flow(Widget):
    """Shows what a layout makes of the width that it has; as high as that is.

    Args:
        layout: what to show.
    """

    DEFAULT_CSS = """
    Flow {
        width: 1fr;
        height: auto;
    }
    """

    def __init__(self, layout: Layout, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._layout = layout
        self._drawn: tuple[int, Content] | None = None

    def show(self, layout: Layout) -> None:
        """Shows another text."""
        self._layout, self._drawn = layout, None
        self.refresh(layout=True)

    def _text(self, width: int) -> Content:
        if self._drawn is None or self._drawn[0] != width:
            self._drawn = width, self._layout(max(1, width))
        return self._drawn[1]

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """See Textual."""
        return self._text(width).plain.count("\n") + 1

    def render(self) -> Content:
        """See Textual."""
        return self._text(self.content_size.width)
