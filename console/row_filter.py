"""What the list of runs is narrowed by: `status:failed model:1.5b date:7d` and any text."""

from __future__ import annotations

import calendar
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches

from console.command import MODES
from console.palette import ORDER, RUNS
from console.row import UNREADABLE, Row
from engine.text import clean

MAX_CHARACTERS = 200
HINT = "text, or status:failed host:gx10 model:1.5b verdict:fail date:7d phase:3b mode:train"
Test = Callable[[Row, float], bool]
"""Whether a row passes, at a time in Unix seconds."""

_KEYED = re.compile(r"([a-z]+):(.*)", re.DOTALL)
_DATE = re.compile(r"(>=|<=|>|<|)(\d{4})(?:-(\d{1,2}))?(?:-(\d{1,2}))?")
_AGO = re.compile(r"(\d{1,5})([hdw])")
_SECONDS = {"h": 3_600.0, "d": 86_400.0, "w": 604_800.0}
_DATES = "a day or month in UTC such as 2026-11-21, 2026-11, >2026-11-01 or <=2026-11, or 7d for the last 7 days"
_VERDICTS = "fail, unknown, pending, pass (all of them), or a falsifier such as F-SMOKE-001 or F-SMOKE-001=fail"


class _Wrong(Exception):
    """What is wrong with a word, and what was expected."""


@dataclass(frozen=True)
class Query:
    """A parsed filter. `problems` names each word that cannot be understood; such a word passes no row."""

    text: str = ""
    tests: tuple[Test, ...] = ()
    words: tuple[str, ...] = ()
    """That a row must have in what is shown of it; in lower case."""
    problems: tuple[str, ...] = ()

    def passes(self, row: Row, now: float, shown: Callable[[Row, float], str]) -> bool:
        """Whether a row has all that is asked for.

        Args:
            row: any.
            now: Unix seconds that "the last 7 days" are counted back from.
            shown: everything that is shown of a row, in lower case; asked for only where a word needs it.
        """
        if self.problems or not all(test(row, now) for test in self.tests):
            return False
        if not self.words:
            return True
        whole = shown(row, now)
        return all(word in whole for word in self.words)


def parse_query(text: str) -> Query:
    """The words of a filter: `key:value` for the keys of `KEYS`, and anything else as text that a row must show."""
    tests: list[Test] = []
    words: list[str] = []
    problems: list[str] = []
    for word in text[:MAX_CHARACTERS].casefold().split():
        keyed = _KEYED.fullmatch(word)
        if keyed is None:
            words.append(word)
            continue
        try:
            tests.append(_test(keyed[1], keyed[2]))
        except _Wrong as wrong:
            problems.append(clean(f"{word}: {wrong}", 300))
    return Query(text, tuple(tests), tuple(words), tuple(problems))


def _test(key: str, value: str) -> Test:
    if key not in KEYS:
        near = get_close_matches(key, KEYS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}:?" if near else f"expected one of {', '.join(f'{each}:' for each in KEYS)}"
        raise _Wrong(f"unknown key; {hint}")
    make, expected = KEYS[key]
    if not value:
        raise _Wrong(f"expected {expected}")
    return make(value)


def _one_of(known: tuple[str, ...], field: Callable[[Row], str]) -> Callable[[str], Test]:
    def make(value: str) -> Test:
        if not any(value in each for each in known):
            raise _Wrong(_nearest(value, known))
        return lambda row, now: value in field(row).casefold()

    return make


def _nearest(value: str, known: tuple[str, ...]) -> str:
    near = get_close_matches(value, known, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"


def _host(value: str) -> Test:
    return lambda row, now: value in row.host.casefold()


def _model(value: str) -> Test:
    return lambda row, now: value in row.teacher.casefold() or value in row.student.casefold()


def _phase(value: str) -> Test:
    # Exactly: 3 is not 3b. The predecessor's manifests say "3b" as well as "phase-3b".
    return lambda row, now: value == row.phase.casefold() or value in re.split(r"[^0-9a-z]+", row.phase.casefold())


def _verdict(value: str) -> Test:
    words = tuple(word.casefold() for word in ORDER)
    identifier, equals, word = value.partition("=")
    if equals:
        if word not in words:
            raise _Wrong(_nearest(word, words))
        return lambda row, now: any(
            identifier in each.casefold() and said.casefold() == word for each, said in row.judged.items()
        )
    if value == "pass":
        return lambda row, now: bool(row.verdicts) and row.verdicts.keys() == {"PASS"}
    if value in words:
        return lambda row, now: row.verdicts.get(value.upper(), 0) > 0
    if "-" not in value:
        near = get_close_matches(value, words, n=1)
        raise _Wrong(f"did you mean {near[0]}?" if near else f"expected {_VERDICTS}")
    return lambda row, now: any(value in each.casefold() for each in row.judged)


def _date(value: str) -> Test:
    ago = _AGO.fullmatch(value)
    if ago:
        seconds = int(ago[1]) * _SECONDS[ago[2]]
        return lambda row, now: row.created > 0 and row.created >= now - seconds
    found = _DATE.fullmatch(value)
    if found is None:
        raise _Wrong(f"expected {_DATES}")
    first, last = _span(int(found[2]), *(int(each) if each else None for each in found.groups()[2:]))
    before, after = {
        "": (first, last), ">": (last, None), ">=": (first, None), "<": (None, first), "<=": (None, last)
    }[found[1]]  # fmt: skip
    return lambda row, now: (
        row.created > 0 and (before is None or row.created >= before) and (after is None or row.created < after)
    )


def _span(year: int, month: int | None, day: int | None) -> tuple[float, float]:
    """Where a year, month or day begins and where the next one does; Unix seconds."""
    try:
        first = datetime(year, month or 1, day or 1, tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        raise _Wrong(f"no such date; expected {_DATES}") from None
    if day is not None:
        return first, first + 86_400.0
    months = range(month or 1, (month or 12) + 1)
    return first, first + 86_400.0 * sum(calendar.monthrange(year, each)[1] for each in months)


_MODES = tuple(dict.fromkeys((*MODES, "evaluate", "publish")))
_STATUSES = tuple(each.casefold() for each in (*RUNS, UNREADABLE))
KEYS: dict[str, tuple[Callable[[str], Test], str]] = {
    "status": (_one_of(_STATUSES, lambda row: row.status), f"one of {', '.join(_STATUSES)}, or a part of it"),
    "host": (_host, "a part of a host's name"),
    "mode": (_one_of(_MODES, lambda row: row.mode), f"{', '.join(_MODES[:-1])} or {_MODES[-1]}"),
    "model": (_model, "a part of the teacher's or the student's name"),
    "verdict": (_verdict, _VERDICTS),
    "date": (_date, _DATES),
    "phase": (_phase, "a phase of the campaign: 1, 2, 3 (smoke), 3b (check of scale), 4 (production run), 5 or 6"),
}
"""What a word can ask for, and what is expected after the colon."""
