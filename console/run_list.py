"""The list of runs as text: columns, order, filter, and what is said of all of them and of one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from textual.content import Content

from console.palette import ORDER, run_mark, verdict_mark
from console.row import LIVE, UNREADABLE, Row
from console.times import age
from console.widgets.layout import Part, cut, fit, marked, number
from engine.text import clean

UNKNOWN = "–"
FAILED = ("FAILED", "CRASHED", "DISPUTED", "TIMEOUT")
_URGENCY = (*LIVE, *FAILED, "STOPPED", "LOST", UNREADABLE, "COMPLETED")


@dataclass(frozen=True)
class Column:
    """A column of the list: `text` in full and, where room is short, in its `short` form.

    `key` orders the rows; None is not known and comes last either way. Columns with a low `keep` go first where there
    is no room.
    """

    name: str
    text: Callable[[Row, float], str]
    key: Callable[[Row], object]
    keep: int
    right: bool = False
    short: Callable[[Row, float], str] | None = None


def _step(row: Row, now: float) -> str:
    if row.step is None:
        return UNKNOWN
    if not row.target:
        return f"{row.step:,}"
    return f"{row.step:,} / {row.target:,} {_percent(row)}"


def _short_step(row: Row, now: float) -> str:
    return UNKNOWN if row.step is None else f"{row.step:,}{_percent(row)}"


def _percent(row: Row) -> str:
    # Never rounded up to a hundred: what is not at its end must not look so.
    return f"{math.floor(100 * row.step / row.target):>4} %" if row.step is not None and row.target else ""


def _loss(value: float | None) -> str:
    return UNKNOWN if value is None else number(value)


def _loss_key(value: float | None) -> object:
    return None if value is None else (not math.isfinite(value), value if math.isfinite(value) else 0.0)


def _verdicts(row: Row, now: float) -> str:
    return " ".join(text for text, _ in verdict_parts(row))


def _since(row: Row, now: float) -> str:
    return age(max(0.0, now - row.last_t)) if row.last_t else UNKNOWN


def _verdict_key(row: Row) -> object:
    return tuple(-row.verdicts.get(word, 0) for word in ORDER) if row.verdicts else None


def _status_key(row: Row) -> object:
    return _URGENCY.index(row.status) if row.status in _URGENCY else len(_URGENCY)


COLUMNS = (
    Column("status", lambda row, now: " ".join(run_mark(row.status)[:2]), _status_key, keep=9),
    Column("run", lambda row, now: label(row), lambda row: label(row).casefold(), keep=8),
    Column("mode", lambda row, now: row.mode or UNKNOWN, lambda row: row.mode or None, keep=2),
    Column("step", _step, lambda row: row.step, keep=7, right=True, short=_short_step),
    Column("loss", lambda row, now: _loss(row.loss), lambda row: _loss_key(row.loss), keep=5, right=True),
    Column("held-out", lambda row, now: _loss(row.heldout), lambda row: _loss_key(row.heldout), keep=4, right=True),
    Column("verdicts", _verdicts, _verdict_key, keep=6),
    Column("last data", _since, lambda row: -row.last_t or None, keep=3, right=True),
    Column("host", lambda row, now: row.host or UNKNOWN, lambda row: row.host or None, keep=1),
)
SORTS = ("", *(column.name for column in COLUMNS))
"""What `s` goes through; the first is what goes on, and then the newest."""


def label(row: Row) -> str:
    """A run's name, and the directory's after it."""
    return f"{row.name}  {row.id}" if row.name else row.id


def verdict_parts(row: Row) -> list[tuple[str, str]]:
    """How many verdicts there are of each kind, each with its style; an ellipsis while that is not known."""
    if not row.verdicts:
        return [(UNKNOWN if row.exact or row.problem else "…", "$foreground-muted")]
    marks = {word: verdict_mark(word) for word in ORDER}
    return [(f"{marks[word].glyph}{row.verdicts[word]}", marks[word].style) for word in ORDER if word in row.verdicts]


# Order and filter


def ordered(rows: Iterable[Row], by: str, *, reverse: bool) -> list[Row]:
    """Rows in the order of a column of `SORTS`; rows that are equal in it stand the newest first."""
    newest = sorted(rows, key=lambda row: (row.created, row.id), reverse=True)
    if not by:
        newest = newest[::-1] if reverse else newest
        return sorted(newest, key=lambda row: not row.live)
    key = next(column.key for column in COLUMNS if column.name == by)
    known = [row for row in newest if key(row) is not None]
    unknown = [row for row in newest if key(row) is None]
    return [*sorted(known, key=key, reverse=reverse), *unknown]  # type: ignore[arg-type]  # keys of one column compare


def matches(row: Row, query: str, now: float) -> bool:
    """Whether a row has every word of a query in what is shown of it; `status:`, `host:` and `mode:` ask one column."""
    words = query.casefold().split()
    if not words:
        return True
    fields: Mapping[str, str] = {"status": row.status, "host": row.host, "mode": row.mode}
    shown = [column.text(row, now) for column in COLUMNS]
    whole = "\n".join([*shown, row.device, row.reason, *row.failing]).casefold()
    for word in words:
        field, colon, value = word.partition(":")
        if not (value in fields[field].casefold() if colon and field in fields else word in whole):
            return False
    return True


# What is said above and below the list


def place(path: Path) -> str:
    """A path as an operator would type it from here."""
    bases: Sequence[tuple[Path, str]] = ()
    with contextlib.suppress(OSError, RuntimeError):  # the working directory is gone, or there is no home
        bases = ((Path.cwd(), "."), (Path.home(), "~"))
    for base, short in bases:
        if path == base:
            return short
        if path.is_relative_to(base):
            return clean(f"{short}/{path.relative_to(base)}", 300)
    return clean(str(path), 300)


def summary(rows: Sequence[Row], evidence: Sequence[Path]) -> Content:
    """How many runs are in which state, and where: `▶ 2 running · ✘ 1 failed · 12 runs in ./evidence`."""
    groups = (
        ("STALLED", "stalled", ("STALLED",)),
        ("RUNNING", "running", ("RUNNING",)),
        ("STARTING", "starting", ("STARTING",)),
        ("FAILED", "failed", FAILED),
        ("LOST", "lost", ("LOST",)),
        (UNREADABLE, "unreadable", (UNREADABLE,)),
    )
    parts: list[Content] = []
    for status, word, members in groups:
        count = sum(row.status in members for row in rows)
        if count:
            mark = run_mark(status)
            parts.append(Content.styled(f"{mark.glyph} {count:,} {word}", mark.style))
    where = ", ".join(map(place, evidence))
    parts.append(Content(f"{len(rows):,} run{'' if len(rows) == 1 else 's'} in {where}"))
    return Content(" · ").join(parts)


def detail(row: Row, width: int) -> list[Content]:
    """Two lines on one run: how it stands and why, what failed, on what it ran, and where it lies."""
    first = cut(Content.assemble(marked(run_mark(row.status)), "  ", row.reason), width)
    failing = ", ".join(row.failing)
    parts: list[Part] = []
    if failing:
        mark = verdict_mark("FAIL")
        some = f"{row.failing[0]}" + (f" and {len(row.failing) - 1} more" if len(row.failing) > 1 else "")
        forms = (marked(mark, f"{mark.word} {failing}"), marked(mark, f"{mark.word} {some}"))
        parts.append(Part(3, forms))
    if row.device:
        parts.append(Part(1, (Content.styled(row.device, "$foreground-muted"),)))
    path = place(row.path)
    forms = (Content(path), Content(f"…/{clean(row.path.name, 200)}"))
    return [first, fit(parts, [Part(2, forms)], width, 2)]


def nothing_yet(evidence: Sequence[Path], there: Collection[Path]) -> Content:
    """What to do where there is no run yet, and where was looked; `there` are the directories that exist."""
    lines = [Content.styled("No runs yet.", "bold"), Content("")]
    lines.append(
        Content.assemble(("n", "bold $primary"), " starts a smoke on the built-in models: 60 s, needs nothing.")
    )
    lines.append(Content(""))
    for directory in evidence:
        note = "no run in it" if directory in there else "not there yet; the first run makes it"
        lines.append(Content.assemble("Looked in ", (place(directory), "bold"), f" ({note})."))
    lines.append(Content.styled("Other directories: kdconsole --evidence DIR", "$foreground-muted"))
    return Content("\n").join(lines)
