"""The table of runs: a line a run, columns that go where there is no room, a cursor that stays on its run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.cells import cell_len, set_cell_size
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.visual import Visual

from console.palette import run_mark
from console.row import Row
from console.run_list import COLUMNS, UNKNOWN, Column, verdict_parts
from console.widgets.layout import cut, padded

CURSOR, MARKED = "▸", "●"
_LEAD = 3
"""Cells before the first column: cursor, mark, space."""
_GAPS = (2, 1)
_READABLE_RUN, _LEAST_RUN = 22, 15
_NEEDED = 8
"""Columns that keep less than this go before the name of a run is cut further."""
_LUXURY = 3
"""Columns that keep less than this are there only where nothing has to be cut or shortened for them."""
_LEAST_TAIL = 12
"""Of a directory's name: its mode and the characters that no other has."""
_CUT = "…"
_LESS = ("mode", "phase", "last data", "host", "model")
_SINCE = next(column for column in COLUMNS if column.name == "last data")


@dataclass(frozen=True)
class Placed:
    """A column as it is drawn: how wide, and whether in its short form."""

    column: Column
    width: int
    short: bool

    def text(self, row: Row, now: float) -> str:
        """What stands in it for a run."""
        form = self.column.short if self.short and self.column.short else self.column.text
        return form(row, now)


def placed(
    rows: Sequence[Row],
    now: float,
    width: int,
    sort: str = "",
    measure: Callable[[Row], tuple[int, ...]] | None = None,
) -> tuple[list[Placed], int]:
    """The columns that fit into a width, and the cells between two of them.

    The column of the run itself takes what the others leave and gives way to them down to a readable beginning; then
    steps take their short form, and then the least important column goes, until the rest fits. What is a luxury goes
    before any of that; what one sorts by is none.
    """
    widest, shorter = _widest(rows, now, measure or cells_needed)
    for widths in (widest, shorter):
        for name in widths:
            widths[name] = max(widths[name], cell_len(name) + (2 if name == sort else 0))
    shown = list(COLUMNS)
    keep = {column.name: _NEEDED if column.name == sort else column.keep for column in COLUMNS}
    while True:
        least = _LEAST_RUN if all(keep[column.name] >= _NEEDED for column in shown) else _READABLE_RUN
        luxury = any(keep[column.name] < _LUXURY for column in shown)
        for gap in _GAPS[:1] if luxury else _GAPS:
            for widths in (widest,) if luxury else (widest, widest | shorter):
                others = sum(widths[column.name] for column in shown if column.name != "run")
                left = width - _LEAD - others - gap * (len(shown) - 1)
                if left >= (widest["run"] if luxury else min(least, widest["run"])) or len(shown) <= 2:
                    run = max(1, min(left, widest["run"]))
                    short = widths is not widest
                    return [Placed(c, run if c.name == "run" else widths[c.name], short) for c in shown], gap
        shown.remove(min(shown, key=lambda column: keep[column.name]))


def _widest(
    rows: Sequence[Row], now: float, measure: Callable[[Row], tuple[int, ...]]
) -> tuple[dict[str, int], dict[str, int]]:
    """The cells that each column needs, in full, and of those that have one, in the short form."""
    needed = [max(column) for column in zip(*map(measure, rows), strict=True)] or [0] * 2 * len(COLUMNS)
    names = [column.name for column in COLUMNS]
    widest, shorter = (dict(zip(names, half, strict=True)) for half in (needed[: len(names)], needed[len(names) :]))
    # How old something is changes with every look, and is all that does.
    widest[_SINCE.name] = max((cell_len(_SINCE.text(row, now)) for row in rows), default=0)
    return widest, {column.name: shorter[column.name] for column in COLUMNS if column.short}


def cells_needed(row: Row) -> tuple[int, ...]:
    """The cells that a run needs in each column, in full and then in the short form; without its age."""
    full = [0 if column is _SINCE else cell_len(column.text(row, 0.0)) for column in COLUMNS]
    return (*full, *(cell_len(column.short(row, 0.0)) if column.short else 0 for column in COLUMNS))


class RunsTable(ScrollView, can_focus=True):
    """Shows rows in the order given. The cursor stays on its run, wherever that moves."""

    DEFAULT_CSS = """
    RunsTable {
        height: 1fr;
        overflow-x: hidden;
        & > .runs--header { text-style: bold; color: $foreground-muted; background: $panel; }
        & > .runs--cursor { color: $block-cursor-blurred-foreground; background: $block-cursor-blurred-background; }
        &:focus > .runs--cursor { color: $block-cursor-foreground; background: $block-cursor-background; }
    }
    """
    COMPONENT_CLASSES: ClassVar[set[str]] = {"runs--header", "runs--cursor"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "cursor(-1)", "up", show=False),
        Binding("down,j", "cursor(1)", "down", show=False),
        Binding("pageup", "page(-1)", "page up", show=False),
        Binding("pagedown", "page(1)", "page down", show=False),
        Binding("home,g", "edge(-1)", "first", show=False),
        Binding("end,G", "edge(1)", "last", show=False),
    ]

    class Moved(Message):
        """The cursor stands on another run, or what is known of its run changed; `on_runs_table_moved`."""

    class Opened(Message):
        """A run was clicked twice; `on_runs_table_opened`."""

    @dataclass
    class HeaderClicked(Message):
        """The name of a column was clicked; `on_runs_table_header_clicked`."""

        column: str

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._rows: Sequence[Row] = ()
        self._now = 0.0
        self._sorted, self._arrow = "", ""
        self._marked: Collection[Path] = ()
        self._cursor = 0
        self._columns: list[Placed] = []
        self._gap = 2
        self._drawn: object = None
        self._measured: dict[Path, tuple[Row, tuple[int, ...]]] = {}

    @property
    def cursor_row(self) -> Row | None:
        """The run that the cursor is on."""
        return self._rows[self._cursor] if self._rows else None

    def show(
        self, rows: Sequence[Row], now: float, *, sort: str = "", reverse: bool = False, marked: Collection[Path] = ()
    ) -> None:
        """Draws other rows.

        Args:
            rows: in the order to show them.
            now: Unix seconds that ages are counted to.
            sort: name of the column that they are sorted by, to mark it; empty marks none.
            reverse: they are in the opposite order.
            marked: paths of runs that are marked.
        """
        current = self.cursor_row
        self._rows, self._now, self._sorted, self._marked = rows, now, sort, marked
        self._arrow = "▲" if reverse else "▼"
        if current is not None:
            paths = [row.path for row in rows]
            self._cursor = paths.index(current.path) if current.path in paths else self._cursor
        self._cursor = max(0, min(self._cursor, len(rows) - 1))
        self._lay_out()
        if self.cursor_row != current:
            self.post_message(self.Moved())

    def _lay_out(self) -> None:
        width = self.scrollable_content_region.width
        self._columns, self._gap = placed(self._rows, self._now, width, self._sorted, self._measure)
        size = Size(width, len(self._rows) + 1)
        if self.virtual_size != size:
            self.virtual_size = size
        self._keep_visible()
        self._redraw()

    def _measure(self, row: Row) -> tuple[int, ...]:
        """As `cells_needed`; a thousand rows are measured once, and not for every picture."""
        known = self._measured.get(row.path)
        if known is None or known[0] is not row:
            known = self._measured[row.path] = row, cells_needed(row)
        return known[1]

    def _redraw(self) -> None:
        """Draws again if what can be seen differs from what is drawn."""
        top = self.scroll_offset.y
        lines = [self._line(index).plain for index in range(top, top + self.size.height)]
        drawn = (self._header().plain, lines, self._cursor, self.size)
        if drawn != self._drawn:
            self._drawn = drawn
            self.refresh()

    def on_resize(self) -> None:
        """See Textual."""
        self._lay_out()

    # Drawing

    def render_line(self, y: int) -> Strip:
        """See Textual: the header stays, the runs scroll under it."""
        width = self.size.width
        if y == 0:
            style = self.get_visual_style("runs--header")
            return self._strip(self._header(), width, style)
        index = y - 1 + self.scroll_offset.y
        if index == self._cursor and self._rows:
            # Without the colours of the states, which nobody could read on the cursor's: words and glyphs stay.
            return self._strip(Content(self._line(index).plain), width, self.get_visual_style("runs--cursor"))
        return self._strip(self._line(index), width, self.visual_style)

    def _strip(self, content: Content, width: int, style: object) -> Strip:
        strips = Visual.to_strips(self, padded(content, width), width, 1, style)  # type: ignore[arg-type]
        return strips[0] if strips else Strip.blank(width)

    def _header(self) -> Content:
        cells = []
        for each in self._columns:
            name = f"{each.column.name} {self._arrow}" if each.column.name == self._sorted else each.column.name
            cells.append(_cell(Content(name), each))
        return Content.assemble(" " * _LEAD, Content(" " * self._gap).join(cells))

    def _line(self, index: int) -> Content:
        if not 0 <= index < len(self._rows):
            return Content("")
        row = self._rows[index]
        cells = [_cell(self._content(row, each), each) for each in self._columns]
        cursor = CURSOR if index == self._cursor else " "
        mark = (MARKED, "bold $accent") if row.path in self._marked else " "
        return Content.assemble(cursor, mark, " ", Content(" " * self._gap).join(cells))

    def _content(self, row: Row, each: Placed) -> Content:
        name, text = each.column.name, each.text(row, self._now)
        if name == "status":
            return Content.styled(text, run_mark(row.status).style)
        if name == "verdicts":
            return Content(" ").join(Content.styled(part, style) for part, style in verdict_parts(row))
        if name == "run":
            return _name(row, each.width)
        if text == UNKNOWN:
            return Content.styled(text, "$foreground-muted")
        if name in ("loss", "held-out") and not text[-1].isdigit():
            return Content.styled(text, "bold $error")
        return Content.styled(text, "$foreground-muted") if name in _LESS else Content(text)

    # Moving

    def action_cursor(self, by: int) -> None:
        """One run up or down."""
        self._go(self._cursor + by)

    def action_page(self, by: int) -> None:
        """As many runs as can be seen."""
        self._go(self._cursor + by * max(1, self.size.height - 2))

    def action_edge(self, by: int) -> None:
        """The first run or the last."""
        self._go(0 if by < 0 else len(self._rows) - 1)

    def _go(self, index: int) -> None:
        index = max(0, min(index, len(self._rows) - 1))
        if index != self._cursor:
            self._cursor = index
            self._keep_visible()
            self._redraw()
            self.post_message(self.Moved())

    def _keep_visible(self) -> None:
        room = max(1, self.size.height - 1)
        top = self.scroll_offset.y
        wanted = min(max(top, self._cursor - room + 1), self._cursor)
        if wanted != top:
            self.scroll_to(y=wanted, animate=False, force=True)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """See Textual: the header is part of every picture, so that all of it is drawn."""
        super().watch_scroll_y(old_value, new_value)
        self._drawn = None

    def on_click(self, event: Click) -> None:
        """A run is chosen with the mouse; twice opens it, the name of a column sorts by it."""
        offset = event.get_content_offset(self)
        if offset is None:
            return
        if offset.y == 0:
            x = _LEAD
            for each in self._columns:
                if x <= offset.x < x + each.width:
                    self.post_message(self.HeaderClicked(each.column.name))
                x += each.width + self._gap
            return
        index = offset.y - 1 + self.scroll_offset.y
        if index < len(self._rows):
            again = index == self._cursor and event.chain == 2
            self._go(index)
            if again:
                self.post_message(self.Opened())


def _cell(content: Content, each: Placed) -> Content:
    fitted = cut(content, each.width)
    spaces = " " * (each.width - fitted.cell_length)
    return Content.assemble(spaces, fitted) if each.column.right else Content.assemble(fitted, spaces)


def _name(row: Row, width: int) -> Content:
    """A run's name with its directory's after it, where there is room; of that the end is kept, which is unique."""
    if row.name:
        room = width - cell_len(row.name) - 2
        after = f"  {_middle(row.id, room)}" if room >= 8 else ""
        return Content.assemble(row.name, (after, "$foreground-muted"))
    return Content(_middle(row.id, width))


def _middle(text: str, width: int) -> str:
    """The text with its middle left out, where it is too long."""
    if cell_len(text) <= width:
        return text
    tail = max(0, min(width - 2, max(_LEAST_TAIL, (width - 1) * 2 // 3)))
    head = max(0, width - 1 - tail)
    return f"{set_cell_size(text, head)}{_CUT}{set_cell_size(text[::-1], tail)[::-1]}"[: max(0, width)]
