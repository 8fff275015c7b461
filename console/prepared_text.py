"""A prepared run as text: its checks, its memory and disk, its values."""

from __future__ import annotations

from collections.abc import Iterable

from textual.content import Content

from console.columns import columns, indented, stacked
from console.palette import Mark, verdict_mark
from console.prepare import Check, Prepared, Value
from console.report import duration
from console.room import POOLS, Room, gib, pool_of, pools
from console.stored import stored_what
from engine.text import clean

_WIDE = 84
"""Columns from which on a table has room for how its rows were computed."""
_MEDIUM = 44
"""Columns from which on it has room for which memory each takes."""


def prepared_text(prepared: Prepared | None, width: int) -> Content:
    """Everything that is known of a prepared run, for a width in cells; None is not known yet."""
    if prepared is None:
        return Content.styled("◔ looking…", "$foreground-muted")
    lines = [_title("Checks"), *_checks(prepared, width)]
    room = prepared.room
    if room is not None:
        lines += [Content(""), _title("Memory and disk"), *_totals(room, width)]
    elif prepared.config is not None and prepared.draft.host is None:  # of a host the checks say it
        later = _marked(verdict_mark("PENDING"), "estimated once the models can be read", width)
        lines += [Content(""), _title("Memory and disk"), *later]
    if prepared.values:
        differing = [each for each in prepared.values if each.differs]
        lines += [Content(""), _title("Values not at their default"), *_values(differing, width)]
    if room is not None:
        lines += [Content(""), _title("Memory and disk by use, GiB"), *_rows(room, width)]
    if prepared.values:
        others = [each for each in prepared.values if not each.differs]
        lines += [Content(""), _title("Values at their default"), *_values(others, width)]
    return stacked(lines)


def what(prepared: Prepared) -> str:
    """The run in one line: what is distilled into what, and for how long."""
    config = prepared.config
    if config is None:
        return ""
    teacher = "no teacher" if config.teacher is None else _name(config.teacher.path)
    student = _name(config.student.source)
    if config.mode == "prepare":
        return f"{config.mode} {teacher}, {stored_what(config)}"
    steps = f"{config.train.steps:,} steps"
    if config.mode == "smoke":
        steps = f"at most {duration(config.smoke.budget_seconds)}"
        steps += f" or {config.smoke.max_steps:,} steps" if config.smoke.max_steps else ""
    return f"{config.mode} {teacher} > {student}, {steps}"


def _totals(room: Room, width: int) -> list[Content]:
    """What is needed in all beside what is free."""
    short = {each.where for each in room.shortages}
    lines: list[Content] = []
    for pool, bytes_, free in pools(room):
        known = "free is not known" if free is None else f"{gib(free)} GiB free"
        mark = verdict_mark("FAIL" if pool in short else "UNKNOWN" if free is None else "PASS")
        end = ": too little" if pool in short else ""
        lines += _marked(mark, f"{POOLS[pool]}: {gib(bytes_)} GiB needed, {known}{end}", width)
    for each in room.estimate.settled:
        lines += _marked(verdict_mark("PASS"), clean(each, 500), width)
    for note in room.estimate.notes:
        lines += _marked(verdict_mark("UNKNOWN"), clean(note, 500), width)
    return lines


def _rows(room: Room, width: int) -> list[Content]:
    """Each thing that takes room, and how that was computed."""
    needed = room.estimate
    inline, pool = width >= _WIDE, width >= _MEDIUM
    lines = indented(Content.styled(f"on {needed.device} in {needed.precision}", "$foreground-muted"), 2, width)
    for row in (*needed.memory, *needed.disk):
        where = pool_of(needed, row)
        how = Content.styled(clean(row.how, 500), "$foreground-muted")
        cells = [
            Content(row.name),
            *([Content.styled(where, "$foreground-muted")] if pool else []),
            Content(gib(row.bytes)),
        ]
        widths = [max(4, min(24, width - (23 if pool else 11))), *([10] if pool else []), -7]
        if inline:
            lines += _shift(columns([*cells, how], [*widths, width - sum(map(abs, widths)) - 8]))
        else:
            lines += [*_shift(columns(cells, widths)), *indented(how, 4, width)]
    return lines


def _checks(prepared: Prepared, width: int) -> list[Content]:
    lines: list[Content] = []
    for problem in prepared.problems:
        lines += _marked(verdict_mark("FAIL"), problem, width)
    for check in prepared.checks:
        lines += _marked(verdict_mark(check.outcome), _sentence(check), width)
    return lines


def _sentence(check: Check) -> str:
    """A message that begins with its subject says it once."""
    return check.text if check.text.startswith(check.name) else f"{check.name}: {check.text}"


def _values(values: Iterable[Value], width: int) -> list[Content]:
    left = max(12, min(24, width // 3))
    rows = list(values)
    if not rows:
        return [Content("  none")]
    lines: list[Content] = []
    for value in rows:
        shown = Content(value.text)
        if value.differs and value.default is not None:
            shown = Content.assemble(
                value.text, ("   default ", "$foreground-muted"), (value.default, "$foreground-muted")
            )
        style = "bold $foreground" if value.differs else "$foreground-muted"
        lines += _shift(columns([Content.styled(value.key, style), shown], [left, max(8, width - left - 4)]))
    return lines


def _marked(mark: Mark, text: str, width: int) -> list[Content]:
    return _shift(columns([Content.styled(mark.glyph, mark.style), text], [1, max(8, width - 5)]))


def _shift(lines: Iterable[Content]) -> list[Content]:
    return [Content("  ") + line for line in lines]


def _title(text: str) -> Content:
    return Content.styled(text, "bold $primary")


def _name(path: str) -> str:
    """The last part of a model's path, or its built-in name."""
    return clean(path if path.startswith("builtin:") else path.rstrip("/").rpartition("/")[2], 60)
