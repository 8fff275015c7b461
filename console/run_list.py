"""The list of runs as text: columns, order, filter, and what is said of all of them and of one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from textual.content import Content

from console.palette import ORDER, run_mark, verdict_mark
from console.row import LIVE, UNREADABLE, Row
from console.row_filter import Query
from console.times import age
from console.widgets.layout import Part, cut, fit, marked, number
from engine.text import clean

UNKNOWN = "–"
FAILED = ("FAILED", "CRASHED", "DISPUTED", "TIMEOUT")
_URGENCY = (*LIVE, *FAILED, "STOPPED", "LOST", UNREADABLE, "COMPLETED")
_KINDS = {"predecessor": "the predecessor's", "log": "a log", "manifest": "a manifest"}
"""What is no run directory of ours, in words."""


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
        return UNKNOWN if row.done is None else f"{_done(row)} {row.counted}".rstrip()
    unit = "epoch " if row.unit == "epoch" else ""
    if not row.target:
        return f"{unit}{row.step:,}"
    return f"{unit}{row.step:,} / {row.target:,} {_percent(row)}"


def _done(row: Row) -> str:
    """How far work without steps has come."""
    if not row.total:
        return f"{row.done:,}"
    return f"{row.done:,} / {row.total:,} {math.floor(100 * (row.done or 0) / row.total):>4} %"


def _short_step(row: Row, now: float) -> str:
    if row.step is None and row.done is not None and row.total:
        return f"{row.done:,}{math.floor(100 * row.done / row.total):>4} %"
    unit = "ep " if row.unit == "epoch" else ""
    return UNKNOWN if row.step is None else f"{unit}{row.step:,}{_percent(row)}"


def _percent(row: Row) -> str:
    # Never rounded up to a hundred: what is not at its end must not look so.
    return f"{math.floor(100 * row.step / row.target):>4} %" if row.step is not None and row.target else ""


def model(row: Row) -> str:
    """Teacher and student, each by the last part of its path: `qwen-1.5b → qwen-0.5b`; empty where nobody said."""
    return " → ".join(each.rstrip("/").rpartition("/")[2] for each in (row.teacher, row.student) if each)


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
    Column("status", lambda row, now: " ".join(run_mark(row.status)[:2]), _status_key, keep=11),
    Column("run", lambda row, now: label(row), lambda row: label(row).casefold(), keep=10),
    Column("mode", lambda row, now: row.mode or UNKNOWN, lambda row: row.mode or None, keep=4),
    Column("phase", lambda row, now: row.phase or UNKNOWN, lambda row: row.phase.casefold() or None, keep=2),
    Column("step", _step, lambda row: row.step, keep=9, right=True, short=_short_step),
    Column("loss", lambda row, now: row.score or _loss(row.loss), lambda row: _loss_key(row.loss), keep=7, right=True),
    Column("held-out", lambda row, now: _loss(row.heldout), lambda row: _loss_key(row.heldout), keep=6, right=True),
    Column("verdicts", _verdicts, _verdict_key, keep=8),
    Column("last data", _since, lambda row: -row.last_t or None, keep=5, right=True),
    Column("host", lambda row, now: row.host or UNKNOWN, lambda row: row.host or None, keep=3),
    Column("model", lambda row, now: model(row) or UNKNOWN, lambda row: model(row).casefold() or None, keep=1),
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


def matches(row: Row, query: Query, now: float) -> bool:
    """Whether a row passes a filter, at a time in Unix seconds."""
    return query.passes(row, now, _shown)


def _shown(row: Row, now: float) -> str:
    shown = [column.text(row, now) for column in COLUMNS]
    more = (row.id, row.device, row.reason, row.teacher, row.student, row.ticket)
    return "\n".join([*shown, *more, *row.failing]).casefold()


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
        parts.append(Part(9, forms))
    facts = _facts(row)
    parts += [Part.of(len(facts) - n, Content.styled(text, "$foreground-muted")) for n, text in enumerate(facts)]
    path = place(row.path)
    forms = (Content(path), Content(f"…/{clean(row.path.name, 200)}"))
    return [first, fit(parts, [Part(8, forms)], width, 2)]


def _facts(row: Row) -> list[str]:
    """What there may be no column for, the most important first."""
    phase = f"phase {row.phase}" if row.phase and row.phase[0].isdigit() else row.phase
    return [each for each in (_KINDS.get(row.kind, ""), row.device, phase, row.ticket, model(row)) if each]


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
