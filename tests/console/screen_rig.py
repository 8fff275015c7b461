"""An app that has what New run, Help and Confirm need of theirs, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from textual.app import App
from textual.pilot import Pilot
from textual.widget import Widget
from textual.widgets import Static

from console.actions import bindings
from console.launch import Job
from console.palette_commands import ActionCommands
from console.screens.help import HelpScreen
from console.screens.new_run import NewRunScreen
from console.settings import Settings
from console.themes import THEMES
from console.widgets.flow import Flow
from dispatch.places import Reach

SIZES = ((60, 20), (80, 24), (120, 40))


class Rig(App[None]):
    """Writes down the jobs that it is given."""

    BINDINGS = bindings("app")
    COMMANDS = {ActionCommands}

    def __init__(
        self,
        evidence: Path,
        *,
        readonly: bool = False,
        settings: Settings | None = None,
        start: Callable[[Rig, Job], object] | None = None,
    ) -> None:
        super().__init__()
        self.evidence, self.readonly, self.settings = (evidence,), readonly, settings or Settings()
        self.jobs: list[Job] = []
        self._start = start
        for theme in THEMES:
            self.register_theme(theme)
        self.theme = self.settings.theme
        self.set_keymap(self.settings.keymap())

    @cached_property
    def reach(self) -> Reach:
        return Reach()

    def say(self, text: str, severity: str = "information") -> None:
        self.notify(text, severity=severity, markup=False)  # type: ignore[arg-type]

    def start_run(self, job: Job) -> object:
        self.jobs.append(job)
        return None if self._start is None else self._start(self, job)

    def action_help(self) -> None:
        self.push_screen(HelpScreen(getattr(self.screen, "where", "app")))

    def action_new_run(self) -> None:
        self.push_screen(NewRunScreen())

    def action_leave(self) -> None:
        self.exit()


async def until(pilot: Pilot[None], condition: Callable[[], object], what: str) -> None:
    """Lets the app work until something is so."""
    try:
        async with asyncio.timeout(20):
            while not condition():
                await pilot.pause(0.005)
    except TimeoutError:
        raise AssertionError(f"waited in vain: {what}") from None


def told(root: Widget | App[None]) -> str:
    """All the text that stands on a screen, whether or not it is scrolled out of sight."""
    parts = []
    for widget in root.query(Static):
        parts.append(str(widget.content))
    for flow in root.query(Flow):
        parts.append(flow.render().plain)
    return "\n".join(parts)
