"""The dashboard of a run of ours: followed while it goes on, drawn by the same panes when it is over."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.content import Content
from textual.widgets import Static

from console.actions import bindings
from console.screens.run_control import RunControl
from console.widgets.key_bar import KeyBar


class RunScreen(RunControl):
    """Shows one run.

    Args:
        run_dir: the run.
    """

    BINDINGS = bindings("run")
    where: ClassVar[str] = "run"

    def compose(self) -> ComposeResult:
        """See Textual."""
        yield from self.panes()
        yield Static(id="doing")
        yield KeyBar("run")

    def on_mount(self) -> None:
        """Begins to follow."""
        self.query_one("#doing").display = False
        self.set_interval(1.0, self._tick)
        self.follow_run()

    def do(self, text: str) -> None:
        """See `RunControl`."""
        line = self.query_one("#doing", Static)
        line.display = bool(text)
        line.update(Content.styled(f"◔ {text}", "$primary"))

    def _tick(self) -> None:
        if self.latest.link.live:
            self.known()
