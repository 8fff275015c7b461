"""One of two: smoke or train."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click
from textual.message import Message
from textual.reactive import var
from textual.widget import Widget

from console.prepare import Mode

MODES: dict[Mode, str] = {"smoke": "a rehearsal, judged", "train": "the long run"}


class ModeSwitch(Widget, can_focus=True):
    """Shows both modes and which one is chosen; arrows and a click choose."""

    ALLOW_SELECT = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "choose('smoke')", show=False),
        Binding("right", "choose('train')", show=False),
    ]
    DEFAULT_CSS = """
    ModeSwitch {
        height: 1;
        width: 1fr;
    }
    ModeSwitch:focus {
        background: $block-cursor-blurred-background;
    }
    """

    mode: var[Mode] = var[Mode]("smoke")

    class Changed(Message):
        """Another mode is chosen; handled by `on_mode_switch_changed`."""

        def __init__(self, mode: Mode) -> None:
            super().__init__()
            self.mode = mode

    def render(self) -> Content:
        """See Textual."""
        return Content.assemble(*self._words())

    def _words(self) -> list[Content]:
        def word(mode: Mode) -> Content:
            chosen = mode == self.mode
            return Content.styled(
                f"{'◉' if chosen else '○'} {mode}", "bold $primary" if chosen else "$foreground-muted"
            )

        words = [word("smoke"), Content("   "), word("train")]
        told = Content.styled(f"   {MODES[self.mode]}", "$foreground-muted")
        return [*words, told] if sum(w.cell_length for w in (*words, told)) <= self.size.width else words

    def watch_mode(self, before: Mode, now: Mode) -> None:
        """See Textual."""
        self.refresh()
        if before != now:
            self.post_message(self.Changed(now))

    def toggle(self) -> None:
        """The other one."""
        self.mode = "train" if self.mode == "smoke" else "smoke"

    def action_choose(self, mode: Mode) -> None:
        """Chooses one."""
        self.mode = mode

    def on_click(self, event: Click) -> None:
        """Chooses what was clicked on."""
        self.mode = "smoke" if event.x < len("◉ smoke") + 2 else "train"
