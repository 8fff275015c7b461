"""The dashboard of one run: panes that are all drawn from one view, the moment that it shows, and what it can copy."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.events import DescendantFocus, Resize
from textual.style import Style
from textual.widget import Widget
from textual.widgets import Input, Static

from console.export_files import write_new
from console.screens.chart_actions import ChartActions
from console.screens.time_actions import TimeActions
from console.stored import prepares
from console.view import View
from console.widgets.checkpoints import Checkpoints
from console.widgets.headline import HeadLine
from console.widgets.log import LogPane
from console.widgets.loss_chart import LossChart
from console.widgets.projection import ProjectionPane
from console.widgets.score import ScorePane
from console.widgets.verdicts import Verdicts
from console.widgets.vitals import VitalsPane
from engine.text import clean

if TYPE_CHECKING:
    from console.app import KdConsoleApp

WIDE = (100, 28)
"""Columns and rows from which on all panes are shown at once."""
TALL = 36
"""Rows from which on the speed of steps has lines of its own."""
TITLES = {
    "chart": "loss",
    "verdicts": "falsifiers",
    "checkpoints": "checkpoints",
    "projection": "projection",
    "vitals": "host",
    "log": "log",
}

SCORE = "score"
"""The pane that stands where the chart does, of a run that evaluates or publishes."""
SHORT_TITLES = TITLES | {"verdicts": "verdicts", "checkpoints": "ckpts", "projection": "proj"}
_ASKED = {
    "filter": "show only lines with this text; empty shows all",
    "search": "look for this text; n goes to the next line with it",
}
GROUPS = {
    "left": ("chart", "checkpoints"),
    "right": ("verdicts", "projection", "vitals"),
    "upper": ("chart", "checkpoints", "verdicts", "projection", "vitals"),
}
"""Containers, and the panes in each."""


class Pane(Protocol):
    """What the screen needs of each of its panes."""

    display: bool

    @property
    def has_focus(self) -> bool:
        """See Textual."""
        ...

    def focus(self) -> object:
        """See Textual."""
        ...

    def show(self, view: View) -> None:
        """Draws the view, if it differs from what is drawn."""
        ...

    def copy_text(self) -> str:
        """What it shows, as plain text."""
        ...


class Dashboard(ChartActions, TimeActions):
    """Draws a run, followed or read; subclasses keep `latest` up to date and call `known` when it changed.

    Args:
        path: its directory, or its log.
    """

    app: KdConsoleApp
    ALLOW_IN_MAXIMIZED_VIEW = "#ask, #doing, KeyBar"
    PANES: ClassVar[tuple[str, ...]] = ("chart", "verdicts", "checkpoints", "projection", "vitals", "log")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.latest = View()
        """All that is known."""
        self.view = self.latest
        """What is shown of it."""
        self.loaded = asyncio.Event()
        """Everything was read that stood there when the screen was opened, or it cannot be read."""
        self._pane, self._asked = "chart", "filter"
        self._scores = False
        """It has no losses to draw, and shows what it came to."""

    def panes(self) -> ComposeResult:
        """The head, the panes and the line for questions; the subclass's own lines come below."""
        yield HeadLine(id="headline")
        yield Static(id="tabs")
        with Horizontal(id="upper"):
            with Vertical(id="left"):
                yield LossChart(id="chart", classes="pane", fps=self.app.settings.fps)
                yield ScorePane(self.path, id=SCORE, classes="pane")
                yield Checkpoints(id="checkpoints", classes="pane")
            with Vertical(id="right"):
                yield Verdicts(id="verdicts", classes="pane")
                yield ProjectionPane(id="projection", classes="pane")
                yield VitalsPane(id="vitals", classes="pane")
        yield LogPane(id="log", classes="pane")
        yield Input(id="ask", select_on_focus=True)

    def on_mount(self) -> None:
        """Paints what is known, which is little."""
        self.query_one("#ask").display = False
        self._arrange()
        self.known()
        self.query_one("#chart").focus()

    @property
    def chart(self) -> LossChart:
        """The loss chart."""
        return self.query_one(LossChart)

    @property
    def named_run(self) -> str:
        """What the run is called in the title of a picture."""
        return clean(self.path.name, 200)

    def known(self) -> None:
        """Draws what is known now, or what was known at the moment that the operator looks at."""
        state, moment = self.latest.state, self.replay.moment
        now = time.time() if self.latest.link.live else state.last_t
        view = replace(self.latest, now=now, replay=self.replay)
        if moment is not None:
            view = replace(view, state=state.at(moment), now=moment, last_t=state.last_t, scrubbed=True)
        self.view = view
        self._choose_first(view)
        self.set_class(state.efficiency is not None and self.size.height >= TALL, "pace")
        self.query_one(HeadLine).show(view)
        for pane in self._panes():
            if pane.display:
                pane.show(view)

    def _choose_first(self, view: View) -> None:
        """The chart of a run that makes steps, the score of one that does not."""
        state = self.latest.state
        scores = not state.makes_steps and not prepares(state)
        if scores == self._scores:
            return
        focused = self._named("chart").has_focus
        self._scores = scores
        self._arrange()
        if focused:
            self._named("chart").focus()

    def _panes(self) -> list[Pane]:
        return [self._named(name) for name in self.PANES]

    def _named(self, name: str) -> Pane:
        return cast("Pane", self.query_one(f"#{SCORE if name == 'chart' and self._scores else name}"))

    def _titles(self, titles: dict[str, str]) -> dict[str, str]:
        return titles | {"chart": SCORE} if self._scores else titles

    def _arrange(self) -> None:
        """All panes side by side where there is room for them, else the one that was chosen."""
        wide = self.size.width >= WIDE[0] and self.size.height >= WIDE[1]
        self.set_class(not wide, "one")
        tabs = self.query_one("#tabs", Static)
        tabs.display = not wide
        for name in ("chart", SCORE):
            self.query_one(f"#{name}").display = False
        for name in self.PANES:
            self._named(name).display = wide or name == self._pane
        for group, names in GROUPS.items():
            self.query_one(f"#{group}").display = wide or self._pane in names
        tabs.update(self._tabs())

    def _tabs(self) -> Content:
        """The names of all panes with their keys, shortened where the line is too narrow for them."""
        for titles in map(self._titles, (TITLES, SHORT_TITLES)):
            parts: list[Content] = []
            for number, name in enumerate(self.PANES, 1):
                press = Style.from_meta({"@click": f"screen.pane_{number}"})
                style = "reverse bold" if name == self._pane else "$foreground-muted"
                parts.append(Content.styled(f" {number} {titles[name]} ", style).stylize(press))
            line = Content("").join(parts)
            if line.cell_length <= self.size.width:
                break
        return line

    def on_resize(self, event: Resize) -> None:
        """See Textual."""
        self._arrange()
        self.known()

    def on_descendant_focus(self, event: DescendantFocus) -> None:
        """The pane with the focus is the one that stays when there is room for one."""
        if (name := "chart" if event.widget.id == SCORE else event.widget.id) in self.PANES:
            self._pane = name

    # Actions: panes

    def _go_to(self, name: str) -> None:
        self._pane = name
        self._arrange()
        self.known()
        if self.maximized is not None:  # the whole screen goes to the pane that the operator went to
            self.maximize(cast("Widget", self._named(name)))
        self._named(name).focus()

    def action_next_pane(self) -> None:
        """To the next pane."""
        self._go_to(self.PANES[(self.PANES.index(self._pane) + 1) % len(self.PANES)])

    def action_previous_pane(self) -> None:
        """To the pane before."""
        self._go_to(self.PANES[self.PANES.index(self._pane) - 1])

    def action_pane_1(self) -> None:
        """To the loss chart, or what stands in its place; from the chart to its other page."""
        if self._pane == "chart" and self.chart.has_focus:
            self.action_page()
        self._go_to("chart")

    def action_pane_2(self) -> None:
        """To the falsifiers."""
        self._go_to("verdicts")

    def action_pane_3(self) -> None:
        """To the checkpoints."""
        self._go_to("checkpoints")

    def action_pane_4(self) -> None:
        """To the projection."""
        self._go_to("projection")

    def action_pane_5(self) -> None:
        """To the host's vitals."""
        self._go_to("vitals")

    def action_pane_6(self) -> None:
        """To the log."""
        self._go_to("log")

    def action_full_screen(self) -> None:
        """The whole screen for the pane with the focus, and back."""
        if self.maximized is not None:
            self.minimize()
        else:
            self.maximize(cast("Widget", self._named(self._pane)))

    def action_back(self) -> None:
        """Back to where the operator came from."""
        if self.query_one("#ask").display:
            self._close_input()
        elif self.maximized is not None:
            self.minimize()
        else:
            self.dismiss()

    def action_reset(self) -> None:
        """The latest again, and the chart as it was at first."""
        self.chart.reset()
        self.go_to_end()

    # Actions: log

    def action_follow(self) -> None:
        """Follow what arrives, or stay where one is."""
        if self._pane == "chart":
            self.chart.toggle_follow()
        else:
            self.query_one(LogPane).toggle_follow()

    def action_filter(self) -> None:
        """Asks for the text that log lines must have."""
        self._open_input("filter", self.query_one(LogPane).filter_text)

    def action_search(self) -> None:
        """Asks for the text to look for in the log."""
        self._open_input("search", self.query_one(LogPane).search_text)

    def _open_input(self, purpose: str, text: str) -> None:
        self._go_to("log")
        box = self.query_one("#ask", Input)
        box.display, box.value, box.border_title = True, text, purpose
        box.placeholder = _ASKED[purpose]
        self._asked = purpose
        box.focus()

    def _close_input(self) -> None:
        self.query_one("#ask").display = False
        self._named(self._pane).focus()

    @on(Input.Changed, "#ask")
    def narrow(self, message: Input.Changed) -> None:
        """Applies the text while it is typed."""
        log, text = self.query_one(LogPane), clean(message.value, 200)
        if not self.query_one("#ask").display:
            return
        if self._asked == "filter":
            log.set_filter(text)
        else:
            log.set_search(text)

    @on(Input.Submitted, "#ask")
    def narrowed(self) -> None:
        """Keeps the text, and gives the focus back."""
        self._close_input()

    def action_next_match(self) -> None:
        """The next line with the text searched for."""
        self.query_one(LogPane).next_match(1)

    def action_previous_match(self) -> None:
        """The line with it before."""
        self.query_one(LogPane).next_match(-1)

    # Actions: out of here

    def action_copy(self) -> None:
        """Copies what the pane shows, through the terminal (OSC 52)."""
        text = self._named(self._pane).copy_text()
        self.app.copy_to_clipboard(text)
        self.app.say(f"copied {len(text.splitlines()):,} lines of {self._titles(TITLES)[self._pane]}")

    def action_export(self) -> None:
        """Writes the pane's data or picture to files in the working directory; never over one that is there."""
        if self._pane == "chart" and self._scores:
            pane = self.query_one(ScorePane)
            contents: dict[str, str | bytes] = {".csv": pane.csv(), ".txt": pane.copy_text() + "\n"}
        elif self._pane == "chart":
            title = f"{self.named_run} {self.latest.state.phase}"
            contents = {".csv": self.chart.csv(), **self.chart.pictures(title)}
        elif self._pane == "log":
            contents = {".txt": self.query_one(LogPane).all_text() + "\n"}
        else:
            contents = {".txt": self._named(self._pane).copy_text() + "\n"}
        try:
            # Not what its manifest calls it, which may be a path to anywhere.
            stem = clean(self.path.name, 200)
            name = SCORE if self._pane == "chart" and self._scores else self._pane
            written = write_new(Path.cwd(), f"{stem}-{name}", contents)
        except OSError as error:
            self.app.say(f"not written: {error.filename}: {error.strerror}", "error")
            return
        self.app.say("written: " + ", ".join(map(str, written)))
