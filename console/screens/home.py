"""The list of all runs: what goes on, what failed, and the way to each of them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, Static
from textual.worker import get_current_worker

from console.actions import bindings
from console.row import Row
from console.row_filter import HINT, MAX_CHARACTERS, Query, parse_query
from console.run_list import SORTS, detail, matches, nothing_yet, ordered, summary
from console.screens.guarded import GuardedScreen
from console.widgets.key_bar import KeyBar
from console.widgets.layout import Part, fit
from console.widgets.runs_table import RunsTable
from engine.text import clean

if TYPE_CHECKING:
    from console.app import KdConsoleApp
    from console.run_index import RunIndex

REFRESH_SECONDS = 2.0
LOOKING_SHARE = 0.1
"""Of the time, where looking takes long: on slow disks the list is renewed less often."""
SHOW_SECONDS = 0.2
"""Between two pictures while many directories are read."""
BREATH_SECONDS = 0.002
"""Between two pieces of a stream, so that keys are answered at once while thousands of them are folded."""
MOST_COMPARED = 6


@dataclass
class RowsArrived(Message):
    """More is known of the runs; posted by the worker that looks after them."""

    rows: tuple[Row, ...]
    now: float
    to_fold: int
    looked: bool
    there: frozenset[Path] = field(default_factory=frozenset)

    def can_replace(self, message: Message) -> bool:
        """Later rows hold everything that earlier ones do."""
        return isinstance(message, RowsArrived)


class FilterInput(Input):
    """Where the filter is typed; Escape gives it up."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "give_up", "show all", show=False)]

    class GivenUp(Message):
        """All runs are wanted again."""

    def action_give_up(self) -> None:
        """Says that no filter is wanted."""
        self.post_message(self.GivenUp())


class HomeScreen(GuardedScreen[None]):
    """Lists the runs of some directories.

    Args:
        evidence: the directories.
        clock: Unix seconds.
    """

    app: KdConsoleApp
    BINDINGS: ClassVar[list[BindingType]] = bindings("home")
    where: ClassVar[str] = "home"
    DEFAULT_CSS = """
    HomeScreen {
        layout: vertical;
        & > #summary { height: 1; padding: 0 1; background: $panel; }
        & > #runs { border: round $foreground 30%; border-title-color: $foreground; }
        & > #runs { border-subtitle-color: $foreground-muted; }
        & > #runs:focus { border: round $primary; }
        & > #none { height: 1fr; padding: 1 2; }
        & > #detail { height: 2; padding: 0 1; text-wrap: nowrap; text-overflow: clip; }
        & > #filter { height: 3; border-subtitle-color: $error; border-subtitle-style: bold; }
    }
    """

    def __init__(self, evidence: Sequence[Path], clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self.evidence = tuple(dict.fromkeys(Path(os.path.abspath(each)) for each in evidence))
        self._clock = clock
        self._known = RowsArrived((), 0.0, 0, looked=False)
        self._marked: list[Path] = []
        self._filter, self._sort, self._reverse = Query(), SORTS[0], False
        self._whole = False
        """Every directory was looked at; the worker's own."""
        self._wake, self._again, self._hidden = threading.Event(), threading.Event(), threading.Event()

    @cached_property
    def _index(self) -> RunIndex:
        """What reads the runs; imported by the worker that needs it, for the list is painted before that."""
        from console.row_cache import RowCache, cache_path
        from console.run_index import RunIndex

        return RunIndex(self.evidence, self._clock, RowCache(cache_path(), readonly=self.app.readonly))

    def compose(self) -> ComposeResult:
        """See Textual."""
        yield Static(id="summary")
        yield RunsTable(id="runs")
        with VerticalScroll(id="none"):
            yield Static(id="nothing")
        yield Static(id="detail")
        yield FilterInput(id="filter", placeholder=HINT, select_on_focus=True)
        yield KeyBar("home")

    def on_mount(self) -> None:
        """Paints an empty list and begins to look."""
        self.query_one("#filter").display = False
        self._draw()
        self.table.focus()
        self.look_after_runs()

    @property
    def table(self) -> RunsTable:
        """The list."""
        return self.query_one(RunsTable)

    # Looking: a worker's thread owns the index, the screen only its rows

    @work(thread=True, exclusive=True, group="index", exit_on_error=False)
    def look_after_runs(self) -> None:
        """Looks at the directories every two seconds, and reads the streams one after the other in between."""
        worker = get_current_worker()
        index = self._index
        while not worker.is_cancelled:
            self._wake.clear()
            if self._again.is_set():
                self._again.clear()
                self._whole = False
                index.forget()
            if not self._hidden.is_set():
                due = self._look_once(lambda: worker.is_cancelled or self._wake.is_set())
                self._wake.wait(max(0.0, due - time.monotonic()))
            else:
                self._wake.wait(REFRESH_SECONDS)
        index.keep()

    def _look_once(self, stopped: Callable[[], bool]) -> float:
        """Looks once, and folds until it is time to look again; returns when that is, by the monotonic clock."""
        shown = began = time.monotonic()
        due = began + REFRESH_SECONDS
        for _ in self._index.look():
            if stopped():
                return due
            if time.monotonic() - shown > SHOW_SECONDS:
                shown = self._post()
        if self._whole:  # the first look reads as well, and tells nothing of how long the next one takes
            due = max(due, began + (time.monotonic() - began) / LOOKING_SHARE)
        self._whole = True
        shown = self._post()
        folded = False
        while time.monotonic() < due and not stopped() and self._index.fold_next():
            folded = True
            if time.monotonic() - shown > SHOW_SECONDS:
                shown = self._post()
            self._wake.wait(BREATH_SECONDS)
        if folded:
            self._post()
        if not self._index.to_fold:
            self._index.keep()
        return due

    def _post(self) -> float:
        index = self._index
        there = frozenset(path for path in self.evidence if path.is_dir())
        self.post_message(RowsArrived(index.rows(), self._clock(), index.to_fold, self._whole, there))
        return time.monotonic()

    def on_unmount(self) -> None:
        """Ends the worker at once."""
        self.workers.cancel_group(self, "index")
        self._wake.set()

    def on_screen_suspend(self) -> None:
        """Another screen lies over this one: nothing is read for a list that nobody sees."""
        self._hidden.set()

    def on_screen_resume(self) -> None:
        """The list is seen again, and so it is renewed."""
        self._hidden.clear()
        self._wake.set()

    @on(RowsArrived)
    def absorb(self, message: RowsArrived) -> None:
        """Shows what is known now."""
        self._known = message
        present = {row.path for row in message.rows}
        self._marked = [path for path in self._marked if path in present or not message.looked]
        self._draw()

    # Drawing

    def _draw(self) -> None:
        known = self._known
        shown = [row for row in known.rows if matches(row, self._filter, known.now)]
        table = self.table
        table.show(
            ordered(shown, self._sort, reverse=self._reverse),
            known.now,
            sort=self._sort,
            reverse=self._reverse,
            marked=frozenset(self._marked),
        )
        none = not shown
        table.display = not none
        if not none and self.focused is None:
            table.focus()
        self.query_one("#none").display = none
        if none:
            self.query_one("#nothing", Static).update(self._nothing())
        self._draw_titles(len(shown))
        self._draw_summary()
        self._draw_detail()

    def _nothing(self) -> Content:
        if not self._known.looked and not self._known.rows:
            return Content.styled("Looking for runs …", "$foreground-muted")
        if self._known.rows:
            wrong = [Content.styled(each, "bold $error") for each in self._filter.problems]
            none = Content.assemble("No run passes ", (self._filter.text, "bold"), ".  / and esc show all.")
            return Content("\n").join([*wrong, none])
        return nothing_yet(self.evidence, self._known.there)

    def _draw_titles(self, shown: int) -> None:
        order = f"by {self._sort}" if self._sort else "running first, then newest"
        if self._reverse:
            order += ", reversed"
        title = Content.assemble("Runs")
        if self._filter.text:
            title = Content.assemble("Runs · ", (f"filter: {self._filter.text}", "bold"), f" · {shown:,} of ")
            title = Content.assemble(title, f"{len(self._known.rows):,}")
        marks = f"{len(self._marked)} marked · " if self._marked else ""
        self.table.border_title = title
        self.table.border_subtitle = Content(f"{marks}{order}")

    def _draw_summary(self) -> None:
        known, width = self._known, max(1, self.size.width - 2)
        name = Part(1, (Content.styled("kdconsole", "bold"),))
        if not known.looked:
            left = Part(3, (Content(f"looking … {len(known.rows):,} runs so far"),))
            line = fit([name, left], [], width)
        else:
            reading = f"reading {known.to_fold:,} of {len(known.rows):,} …" if known.to_fold else ""
            right = Part.of(2, Content.styled(reading, "$foreground-muted"))
            line = fit([name, Part(3, (summary(known.rows, self.evidence),))], [right], width)
        self.query_one("#summary", Static).update(line)

    @on(RunsTable.Moved)
    def _draw_detail(self) -> None:
        row = self.table.cursor_row
        lines = detail(row, max(1, self.size.width - 2)) if row else []
        self.query_one("#detail", Static).update(Content("\n").join(lines))

    def on_resize(self) -> None:
        """See Textual."""
        self._draw_summary()
        self._draw_detail()

    # Actions

    @on(RunsTable.Opened)
    def action_open(self) -> None:
        """Opens the run under the cursor."""
        row = self.table.cursor_row
        if row is not None and self.table.display:
            self.app.open_run(row.path)

    def action_new_run(self) -> None:
        """Goes to the screen where a run is started."""
        self.app.action_new_run()

    def action_hosts(self) -> None:
        """Goes to the list of hosts."""
        self.app.action_hosts()

    def action_mark(self) -> None:
        """Marks the run under the cursor, or takes its mark away."""
        row = self.table.cursor_row
        if row is None:
            return
        if row.path in self._marked:
            self._marked.remove(row.path)
        elif len(self._marked) == MOST_COMPARED:
            self.app.say(f"{MOST_COMPARED} runs are marked; no more fit into a comparison", "warning")
        else:
            self._marked.append(row.path)
        self._draw()

    def action_compare(self) -> None:
        """Lays the marked runs over each other; with one marked, that and the one under the cursor."""
        chosen, row = list(self._marked), self.table.cursor_row
        if len(chosen) == 1 and row is not None and row.path not in chosen:
            chosen.append(row.path)
        if len(chosen) < 2:
            self.app.say("mark two runs or more with space, then compare them", "warning")
            return
        self.app.compare_runs(chosen)

    def action_sort(self) -> None:
        """Sorts by the next column."""
        self._sort = SORTS[(SORTS.index(self._sort) + 1) % len(SORTS)]
        self._draw()

    @on(RunsTable.HeaderClicked)
    def _sort_by(self, message: RunsTable.HeaderClicked) -> None:
        if message.column == self._sort:
            self.action_reverse()
        else:
            self._sort, self._reverse = message.column, False
            self._draw()

    def action_reverse(self) -> None:
        """Turns the order round."""
        self._reverse = not self._reverse
        self._draw()

    def action_refresh(self) -> None:
        """Reads everything again."""
        self._again.set()
        self._wake.set()

    def action_filter(self) -> None:
        """Asks for the text that runs must have."""
        box = self.query_one(FilterInput)
        box.display, box.value = True, self._filter.text
        box.focus()

    @on(Input.Changed, "#filter")
    def _narrow(self, message: Input.Changed) -> None:
        if self.query_one(FilterInput).display:
            self._narrow_to(clean(message.value, MAX_CHARACTERS).strip())

    def _narrow_to(self, text: str) -> None:
        self._filter = parse_query(text)
        self.query_one(FilterInput).border_subtitle = Content("; ".join(self._filter.problems))
        self._draw()

    @on(Input.Submitted, "#filter")
    def _narrowed(self) -> None:
        self.query_one(FilterInput).display = False
        self.table.focus()

    @on(FilterInput.GivenUp)
    def _widen(self) -> None:
        self._narrow_to("")
        self._narrowed()
