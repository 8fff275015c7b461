"""What --readonly forbids is forbidden on every screen in the same way."""

from __future__ import annotations

from typing import TypeVar

from textual.screen import Screen

from console.actions import ACTIONS

Result = TypeVar("Result")
CHANGING = frozenset(a.name for a in ACTIONS if a.changes)


class GuardedScreen(Screen[Result]):
    """A screen whose actions that start, stop or write something do nothing under --readonly."""

    @property
    def goes_on(self) -> str:
        """The id of the run that goes on when the screen is left; empty where there is none."""
        return ""

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """See Textual."""
        if action in CHANGING and getattr(self.app, "readonly", False):
            return False
        return super().check_action(action, parameters)
