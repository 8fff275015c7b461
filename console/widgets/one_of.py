"""One of a few: smoke or train, this machine or a host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click
from textual.message import Message
from textual.reactive import var
from textual.widget import Widget

_GAP = 3
_NARROW = 2


class OneOf(Widget, can_focus=True):
    """Shows what there is to choose from and which is chosen; arrows and a click choose.

    Where there is no room for all of them, the chosen one stands there with its place among them.

    Args:
        options: each a word and what it means; plain texts, at least one.
        chosen: the index of the one that is chosen at first.
    """

    ALLOW_SELECT = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", show=False),
        Binding("right", "move(1)", show=False),
    ]
    DEFAULT_CSS = """
    OneOf {
        height: 1;
        width: 1fr;
    }
    OneOf:focus {
        background: $block-cursor-blurred-background;
    }
    """

    index: var[int] = var(0, init=False)

    @dataclass
    class Changed(Message):
        """Another one is chosen; handled by `on_one_of_changed`."""

        switch: OneOf
        index: int

    def __init__(self, options: Sequence[tuple[str, str]], *, chosen: int = 0, id: str | None = None) -> None:
        super().__init__(id=id)
        self._options = tuple(options)
        self.set_reactive(OneOf.index, chosen)

    @property
    def chosen(self) -> str:
        """The word of the chosen one."""
        return self._options[self.index][0]

    @property
    def count(self) -> int:
        """How many there are to choose from."""
        return len(self._options)

    def offer(self, options: Sequence[tuple[str, str]]) -> None:
        """Offers others; the chosen word stays chosen where it can, without a message."""
        before = self.chosen
        self._options = tuple(options)
        words = [word for word, _ in self._options]
        self.set_reactive(OneOf.index, words.index(before) if before in words else 0)
        self.refresh()

    def choose(self, word: str) -> None:
        """Chooses one that is offered."""
        self.index = next(i for i, (name, _) in enumerate(self._options) if name == word)

    def next(self) -> None:
        """The one after it; after the last the first."""
        self.index = (self.index + 1) % len(self._options)

    def render(self) -> Content:
        """See Textual."""
        words = Content(" " * (self._gap or _GAP)).join(self._word(i) for i in range(len(self._options)))
        if not self._gap:
            words = Content.assemble(
                self._word(self.index), (f"  {self.index + 1} of {len(self._options)}", "$foreground-muted")
            )
        told = Content.styled(" " * _GAP + self._options[self.index][1], "$foreground-muted")
        return words + told if words.cell_length + told.cell_length <= self.size.width else words

    @property
    def _gap(self) -> int:
        """Cells between two words: fewer where room is short; 0 where there is none for all words."""
        words = sum(self._word(i).cell_length for i in range(len(self._options)))
        gaps = (gap for gap in (_GAP, _NARROW) if words + gap * (len(self._options) - 1) <= self.size.width)
        return next(gaps, 0)

    def _word(self, index: int) -> Content:
        chosen = index == self.index
        text = f"{'◉' if chosen else '○'} {self._options[index][0]}"
        return Content.styled(text, "bold $primary" if chosen else "$foreground-muted")

    def watch_index(self, before: int, now: int) -> None:
        """See Textual."""
        self.refresh()
        if before != now:
            self.post_message(self.Changed(self, now))

    def action_move(self, by: int) -> None:
        """To the one beside it; stops at the ends."""
        self.index = min(max(self.index + by, 0), len(self._options) - 1)

    def on_click(self, event: Click) -> None:
        """Chooses what was clicked on; where only one stands there, the next."""
        if not self._gap:
            self.next()
            return
        widths = [self._word(i).cell_length + self._gap for i in range(len(self._options))]
        starts = [sum(widths[:i]) for i in range(len(widths))]
        self.index = max(i for i, start in enumerate(starts) if event.x >= start or i == 0)
