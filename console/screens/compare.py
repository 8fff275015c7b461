"""Several runs over each other: their losses in one chart, and everything in which they differ in a table."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.content import Content
from textual.message import Message
from textual.widgets import Static
from textual.worker import get_current_worker

from console.actions import bindings
from console.differences import differences
from console.export_files import write_new
from console.run_reader import LoadedRun, RunReader
from console.screens.chart_actions import ChartActions
from console.screens.guarded import GuardedScreen
from console.side_by_side import Section, as_csv, labels, rows
from console.widgets.differences_table import DIFFERENT, DifferencesTable
from console.widgets.key_bar import KeyBar
from console.widgets.layout import Part, fit
from console.widgets.loss_chart import LossChart

if TYPE_CHECKING:
    from console.app import KdConsoleApp

REFRESH_SECONDS = 2.0
TALL = 28
"""Rows from which on chart and table are shown at once."""
_PANES = ("chart", "table")


@dataclass
class RunsRead(Message):
    """More of the runs was read; posted by the worker that reads them."""

    runs: tuple[LoadedRun, ...]
    sections: tuple[Section, ...]
    to_read: int

    def can_replace(self, message: Message) -> bool:
        """What was read later holds all that was read before."""
        return isinstance(message, RunsRead)


class CompareScreen(ChartActions, GuardedScreen[None]):
    """Lays runs over each other; those that go on are kept up to date.

    Args:
        paths: two to six run directories; the others are held against the first.
        clock: Unix seconds.
    """

    app: KdConsoleApp
    BINDINGS: ClassVar[list[BindingType]] = bindings("compare")
    where: ClassVar[str] = "compare"
    DEFAULT_CSS = """
    CompareScreen {
        layout: vertical;
        & > #compared { height: 1; padding: 0 1; background: $panel; }
        & > .pane { height: 1fr; border: round $foreground 30%; border-title-color: $foreground; padding: 0 1; }
        & > .pane:focus { border: round $primary; border-title-style: bold reverse; }
        & > #table { height: 1.3fr; }
    }
    """

    def __init__(self, paths: Sequence[Path], clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self.paths = tuple(dict.fromkeys(paths))
        self._clock = clock
        self._read = RunsRead((), (), len(self.paths))
        self._pane = "chart"
        self._stop = threading.Event()

    def compose(self) -> ComposeResult:
        """See Textual."""
        yield Static(id="compared")
        yield LossChart(id="chart", classes="pane", fps=self.app.settings.fps)
        yield DifferencesTable(id="table", classes="pane")
        yield KeyBar("compare")

    def on_mount(self) -> None:
        """Paints the frames and begins to read."""
        self.query_one("#table").border_title = Content(f"Differences, {DIFFERENT} not as in the first run")
        self._arrange()
        self._draw()
        self.chart.focus()
        self.read_runs()

    @property
    def chart(self) -> LossChart:
        """The losses."""
        return self.query_one(LossChart)

    @work(thread=True, exclusive=True, group="read", exit_on_error=False)
    def read_runs(self) -> None:
        """Reads the runs one after the other, and then what is appended to those that go on."""
        worker = get_current_worker()
        readers = [RunReader(path) for path in self.paths]
        known: dict[Path, LoadedRun] = {}

        def stopped() -> bool:
            return worker.is_cancelled or self._stop.is_set()

        while not stopped():
            for reader in readers:
                before = known.get(reader.path)
                if before is None or before.going_on:
                    known[reader.path] = reader.read(stopped)
                    if before is None and not stopped():
                        self._post(known)
            self._post(known)
            if not any(run.going_on for run in known.values()):
                return
            self._stop.wait(REFRESH_SECONDS)

    def _post(self, known: dict[Path, LoadedRun]) -> None:
        runs = tuple(known[path] for path in self.paths if path in known)
        sections = differences(runs, self._clock()) if runs else ()
        self.post_message(RunsRead(runs, sections, len(self.paths) - len(runs)))

    def on_unmount(self) -> None:
        """Ends the worker at once."""
        self._stop.set()

    @on(RunsRead)
    def absorb(self, message: RunsRead) -> None:
        """Shows what was read."""
        self._read = message
        self._draw()

    # Drawing

    def _draw(self) -> None:
        read = self._read
        names = labels(read.runs)
        self.chart.overlay([(name, run.state) for name, run in zip(names, read.runs, strict=True)])
        self.query_one(DifferencesTable).show(names, read.sections)
        waiting = f"reading, {read.to_read} to go …" if read.to_read else ""
        parts = [Part.of(1, Content.styled("kdconsole", "bold")), Part.of(3, f"comparing {len(self.paths)} runs")]
        right = [Part.of(2, Content.styled(waiting, "$foreground-muted"))]
        line = fit(
            [*parts, Part.of(0, Content.styled(" · ".join(names), "$foreground-muted"))],
            right,
            max(1, self.size.width - 2),
        )
        self.query_one("#compared", Static).update(line)

    def on_resize(self) -> None:
        """See Textual."""
        self._arrange()
        self._draw()

    def _arrange(self) -> None:
        """Chart and table where there is room for both, else one of them."""
        both = self.size.height >= TALL
        for name in _PANES:
            self.query_one(f"#{name}").display = both or name == self._pane

    # Actions

    def action_next_pane(self) -> None:
        """From the chart to the table, and back."""
        focused = self.focused.id if self.focused else self._pane
        self._pane = "table" if focused == "chart" else "chart"
        self._arrange()
        self.query_one(f"#{self._pane}").focus()

    def action_previous_pane(self) -> None:
        """There are two, so it is the same way back."""
        self.action_next_pane()

    def action_reset(self) -> None:
        """The chart as it was at first."""
        self.chart.reset()

    def action_copy(self) -> None:
        """Copies the table, its cells between tabs."""
        lines = ["\t".join(cells) for cells in rows(self._read.runs, self._read.sections)]
        self.app.copy_to_clipboard("\n".join(lines))
        self.app.say(f"copied {len(lines):,} lines of the table")

    def action_export(self) -> None:
        """Writes the table as CSV and the chart as a picture into the working directory, never over what is there."""
        read = self._read
        title = " · ".join(labels(read.runs))
        contents = {".csv": as_csv(read.runs, read.sections), **self.chart.pictures(title)}
        try:
            written = write_new(Path.cwd(), "compare", contents)
        except OSError as error:
            self.app.say(f"not written: {error.filename}: {error.strerror}", "error")
            return
        self.app.say("written: " + ", ".join(map(str, written)))

    def action_back(self) -> None:
        """Back to where one came from."""
        self.dismiss()
