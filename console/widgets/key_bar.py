"""The last line of every screen: what can be done here, the most needed first, and never half a word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from textual.app import RenderResult
from textual.content import Content
from textual.style import Style
from textual.widget import Widget

from console.actions import Action, Where, actions_of, keys_of
from console.keys import shown
from console.settings import Settings

FIRST = ("help", "leave")
"""What must be found on the narrowest screen."""
NEXT: dict[Where, tuple[str, ...]] = {
    "review": ("back", "play", "slower", "faster", "scrub_back", "scrub_forward"),
}
"""What a screen is there for, where the order of the registry puts it late."""
_GAP = "  "


class KeyBar(Widget):
    """Keys and what they do, as many as there is room for; the mouse can press them too.

    Args:
        where: the screen whose actions are shown.
    """

    DEFAULT_CSS = """
    KeyBar {
        height: 1;
        background: $panel;
        color: $foreground;
        link-style: none;
        link-color: $foreground;
        link-background: transparent;
    }
    """

    def __init__(self, where: Where) -> None:
        super().__init__()
        self._where: Where = where

    def render(self) -> RenderResult:
        """See Textual."""
        settings: Settings = getattr(self.app, "settings", None) or Settings()
        readonly = bool(getattr(self.app, "readonly", False))
        offered = [
            a for a in _ordered(actions_of(self._where), self._where) if a.footer and not (readonly and a.changes)
        ]
        return fitting([(_first_key(a, self._where, settings), a) for a in offered], self.size.width)


def fitting(offered: Sequence[tuple[str, Action]], width: int) -> Content:
    """The line: each key with its label, in this order, up to the last one that has room.

    Args:
        offered: keys as they are shown, with their actions.
        width: columns.
    """
    line = Content(" ")
    for key, action in offered:
        press = Style.from_meta({"@click": f"{'app' if 'app' in action.where else 'screen'}.{action.name}"})
        part = Content.assemble((key, "bold $accent"), " ", action.label).stylize(press)
        gap = _GAP if line.cell_length > 1 else ""
        if line.cell_length + len(gap) + part.cell_length > width:
            continue
        line = Content.assemble(line, gap, part)
    return line


def _ordered(actions: Iterable[Action], where: Where) -> list[Action]:
    first = (*FIRST, *NEXT.get(where, ()))
    return sorted(actions, key=lambda a: first.index(a.name) if a.name in first else len(first))


def _first_key(action: Action, where: Where, settings: Settings) -> str:
    return shown(keys_of(action, where, settings.keymap())[:1])
