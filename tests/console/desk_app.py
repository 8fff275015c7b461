"""The least app that the screens of many runs can be shown in; it writes down what they ask of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from textual.app import App
from textual.pilot import Pilot
from textual.screen import Screen

from console.settings import Settings

SECONDS = 60.0


class DeskApp(App[None]):
    """Shows one screen.

    Args:
        screen: which.
        readonly: as the command's option says.
    """

    def __init__(self, screen: Screen[None], *, readonly: bool = False) -> None:
        super().__init__()
        self.readonly, self.settings = readonly, Settings()
        self.opened: list[Path] = []
        self.compared: list[list[Path]] = []
        self.said: list[str] = []
        self.new_runs = 0
        self._first = screen

    def on_mount(self) -> None:
        self.push_screen(self._first)

    def open_run(self, path: Path) -> None:
        self.opened.append(path)

    def compare_runs(self, paths: Sequence[Path]) -> None:
        self.compared.append(list(paths))

    def action_new_run(self) -> None:
        self.new_runs += 1

    def say(self, text: str, severity: str = "information") -> None:
        self.said.append(text)


async def until(pilot: Pilot[Any], condition: Callable[[], object], what: str = "", seconds: float = SECONDS) -> None:
    """Lets the app work until something holds; fails after a while."""
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, f"waited in vain: {what}\n{shown(pilot.app)}"
        await pilot.pause(0.01)
    await pilot.pause()


def shown(app: App[Any]) -> str:
    """What stands on the screen, as text."""
    return "\n".join(strip.text.rstrip() for strip in app.screen._compositor.render_strips())


def line_with(app: App[Any], text: str) -> str:
    """The one line of the screen that has a text in it."""
    found = [line for line in shown(app).splitlines() if text in line]
    assert len(found) == 1, f"{text!r} stands in {len(found)} lines of\n{shown(app)}"
    return found[0]
