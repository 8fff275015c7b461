"""The falsifiers: what was claimed, what was seen, and how much it matters; the worst first."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click

from console.outlook import by_urgency, disagreements, verdict_counts
from console.palette import run_mark, verdict_mark
from console.run_state import DERIVED, STATED, RunState
from console.times import stamp
from console.view import View
from console.widgets.layout import MUTED, Part, fit, padded, wrapped
from console.widgets.scroll_pane import ScrollPane
from engine.stream import Verdict

SEVERITIES = {
    "fatal": "fatal: a FAIL stops the run",
    "gate": "gate: a FAIL forbids promotion",
    "warn": "warn: a FAIL is only told",
}
BASES = {
    DERIVED: "derived: judged here, from the numbers",
    STATED: "stated: the log says so, and nothing here can judge it",
    f"{STATED}, {DERIVED}": "stated, and derived from the numbers as well",
}
_HISTORY = 20
"""Changes of one verdict that are listed, the newest ones."""
_INDENT = "    "
_WIDE = 70
"""Cells from which on there is room for columns and the claims."""

Row = tuple[Content, str | None]
"""A line, and the id of the verdict that it belongs to."""


class Verdicts(ScrollPane):
    """The list of falsifiers. The cursor's one shows what was expected and observed; Enter or a click opens it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "cursor(-1)", "up", show=False),
        Binding("down", "cursor(1)", "down", show=False),
        Binding("pageup", "cursor(-10)", "page up", show=False),
        Binding("pagedown", "cursor(10)", "page down", show=False),
        Binding("home", "cursor(-100000)", "first", show=False),
        Binding("end", "cursor(100000)", "last", show=False),
        Binding("enter", "open", "details", show=False),
    ]

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self._rows: list[Row] = []
        self._cursor: str | None = None
        self._opened: str | None = None

    def lines_in_all(self) -> int:
        """See `ScrollPane`."""
        return len(self._rows)

    def line(self, y: int) -> Content:
        """See `ScrollPane`."""
        return self._rows[y][0]

    def title(self) -> Content:
        """See `ScrollPane`."""
        counts = verdict_counts(self.view.state)
        for named in range(max(1, len(counts)), 0, -1):  # the worst ones keep their words where not all find room
            parts = [Content("Falsifiers")]
            for number, (word, count) in enumerate(counts):
                mark = verdict_mark(word)
                word = f" {word}" if number < named else ""
                parts.append(Content.styled(f"{mark.glyph} {count}{word}", mark.style))
            title = Content("  ").join(parts)
            if title.cell_length <= self.room.width - 3:
                break
        return title

    def refill(self) -> None:
        """See `ScrollPane`."""
        pointed = self._pointed() if self.has_focus else None
        rows = verdict_rows(self.view, self.room.width, pointed, self._opened) if self.room.width > 0 else []
        if len(rows) != len(self._rows) or not all(
            a[0].is_same(b[0]) and a[1] == b[1] for a, b in zip(rows, self._rows, strict=True)
        ):
            self._rows = rows
            self.redraw()

    def _order(self) -> list[str]:
        return [v.id for v in by_urgency(self.view.state.judged)]

    def _pointed(self) -> str | None:
        """The id under the cursor: the one that was chosen, else the first."""
        order = self._order()
        return self._cursor if self._cursor in order else next(iter(order), None)

    def action_cursor(self, by: int) -> None:
        """Moves the cursor by so many verdicts, and scrolls it into sight."""
        order, pointed = self._order(), self._pointed()
        if pointed is None:
            return
        self._cursor = order[min(len(order) - 1, max(0, order.index(pointed) + by))]
        self.refill()
        self._reveal()

    def action_open(self) -> None:
        """Opens or closes the details of the verdict under the cursor."""
        pointed = self._pointed()
        self._opened = None if self._opened == pointed else pointed
        self.refill()
        self._reveal()

    def _reveal(self) -> None:
        lines = [y for y, row in enumerate(self._rows) if row[1] == self._pointed()]
        if lines:
            # From the top where all of it fits, so that its first line is never above the edge.
            lowest = min(lines[-1], lines[0] + self.room.height - 1)
            top = min(max(self.scroll_offset.y, lowest - self.room.height + 1), lines[0])
            top = 0 if self._pointed() == next(iter(self._order())) else top
            self.scroll_to(y=top, animate=False)

    def on_click(self, event: Click) -> None:
        """Moves the cursor to what was clicked; a click on the one under the cursor opens it."""
        offset = event.get_content_offset(self)
        y = -1 if offset is None else offset.y + self.scroll_offset.y
        if 0 <= y < len(self._rows) and (clicked := self._rows[y][1]) is not None:
            if clicked == self._pointed() and self._cursor is not None:
                self.action_open()
            self._cursor = clicked
            self.refill()


def verdict_rows(view: View, width: int, pointed: str | None = None, opened: str | None = None) -> list[Row]:
    """The pane's lines, none wider than `width` cells.

    Args:
        view: what to show.
        width: cells in a line.
        pointed: id of the verdict under the cursor.
        opened: id of the one whose details are shown.
    """
    rows: list[Row] = []
    mark = run_mark("DISPUTED")
    for differing in disagreements(view):
        who = "WHAT IS STATED IS NOT WHAT IS DERIVED" if view.state.bases else "ENGINE AND CONSOLE DISAGREE"
        told = Content.styled(f"{mark.glyph} {who}: {differing}", f"reverse {mark.style}")
        rows += [(padded(line, width), None) for line in wrapped(told, width)]
    verdicts = by_urgency(view.state.judged)
    if not verdicts:
        text = "Nothing is judged yet: the run has not told what it is."
        if not view.timed:
            text = "No verdict is stated here, and nothing that one could be derived from."
        return [*rows, *((line.stylize(MUTED), None) for line in wrapped(text, width))]
    column = min(max(len(v.id) for v in verdicts), width // 2) if width >= _WIDE else 0
    for verdict in verdicts:
        basis = view.state.bases.get(verdict.id, "")
        rows.append((_headline(verdict, width, column, verdict.id == pointed, basis), verdict.id))
        if verdict.id == opened:
            rows += [(line, verdict.id) for line in _details(verdict, view.state, width)]
        elif verdict.verdict == "FAIL" or verdict.id == pointed:
            rows += [(line, verdict.id) for line in _seen(verdict, width)]
    return rows


def _headline(verdict: Verdict, width: int, column: int, pointed: bool, basis: str) -> Content:
    mark = verdict_mark(verdict.verdict)
    word = f"{mark.glyph} {mark.word:<7}" if len(mark.word) <= 7 else f"{mark.glyph} {mark.word}"
    parts = [
        Part.of(9, Content.styled(word, mark.style), Content.styled(word.rstrip(), mark.style)),
        Part.of(8, Content.styled(verdict.id.ljust(column), "bold"), least=8),
    ]
    severity = Part.of(3, Content.styled(f"{verdict.severity:<5}", "bold" if verdict.verdict == "FAIL" else MUTED))
    claim = Part.of(1, Content.styled(verdict.claim, MUTED), least=1)
    # Without room for claims the severity stands at the edge, in a column as well.
    behind = Part.of(
        5, Content.styled(basis, MUTED), Content.styled(basis.replace(f"{STATED}, {DERIVED}", "both"), MUTED)
    )
    left, right = ([*parts, severity, behind, claim], []) if column else (parts, [behind, severity])
    line = fit(left, right, max(0, width - 2), 2)
    if not pointed:
        return padded(Content.assemble("  ", line), width)
    return padded(Content.assemble("▸ ", line), width).stylize("on $block-cursor-blurred-background")


def _seen(verdict: Verdict, width: int) -> list[Content]:
    """What was expected and observed, where."""
    at = f" at step {verdict.step:,}" if verdict.step and f"step {verdict.step}" not in verdict.observed else ""
    style = "" if verdict.verdict != "FAIL" else "bold"
    return [
        *(_named("expected", verdict.expected, width) if verdict.expected else []),
        *_named("observed", Content.assemble((verdict.observed, style), at), width),
    ]


def _named(name: str, text: str | Content, width: int) -> list[Content]:
    """A value after its name, wrapped under itself."""
    head = f"{_INDENT}{name}  "
    if width < 2 * len(head):  # too narrow for two columns
        return wrapped(Content.assemble((f"{name} ", MUTED), text), width, "  ")
    lines = wrapped(text, width - len(head))
    first = Content.assemble((head, MUTED), lines[0])
    return [first, *(Content.assemble(" " * len(head), line) for line in lines[1:])]


def _details(verdict: Verdict, state: RunState, width: int) -> list[Content]:
    """Everything that is known of one verdict, with its changes over time."""
    basis = state.bases.get(verdict.id, "")
    lines = [
        *(_named("claim   ", verdict.claim, width) if verdict.claim else []),
        *_seen(verdict, width),
        *_named("severity", SEVERITIES.get(verdict.severity, verdict.severity), width),
        *(_named("basis   ", BASES.get(basis, basis), width) if basis else []),
    ]
    stated = state.stated.get(verdict.id)
    if stated is not None and stated.verdict != verdict.verdict:
        name = "engine  " if state.source.timed else "the log "
        lines += _named(name, f"{stated.verdict}: observed {stated.observed}", width)
    changes = [v for v in state.history if v.id == verdict.id]
    if len(changes) > _HISTORY:
        lines += wrapped(f"{len(changes) - _HISTORY:,} earlier changes", width, _INDENT)
    for change in changes[-_HISTORY:]:
        mark = verdict_mark(change.verdict)
        told = Content.assemble(
            (f"{stamp(change.t, state.source.timed)}  ", MUTED),
            f"step {change.step:,}  became ",
            (f"{mark.glyph} {mark.word}", mark.style),
            f": {change.observed}",
        )
        lines += wrapped(told, width, _INDENT)
    return lines
