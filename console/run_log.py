"""The operator's lines of a run: the last of them, put into words when somebody looks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import overload

from engine.falsifiers import FAIL
from engine.human import human_lines
from engine.stream import CheckpointFailed, Control, End, Event, Log, Verdict

MAX_LOG_LINES = 5_000
MAX_LOG_CHARACTERS = 8 << 20
"""Of all kept lines together: what a stream of the longest messages may make us keep."""


@dataclass(frozen=True)
class LogLine:
    """A line for the operator; `level` is info, warning or error, `t` in Unix seconds."""

    t: float
    level: str
    text: str


class LogPart:
    """Some lines of a log, in order: messages wait as the events they are until somebody looks.

    Args:
        items: lines, and messages that become one line each.
        verbatim: a message is shown as it stands.
    """

    __slots__ = ("_made", "characters", "items", "verbatim")

    def __init__(self, items: list[Log | LogLine], verbatim: bool) -> None:
        self.items, self.verbatim = items, verbatim
        self.characters = sum(len(item.text if isinstance(item, LogLine) else item.message) for item in items)
        self._made: list[LogLine] | None = None

    def lines(self) -> list[LogLine]:
        """The lines, always the same objects: by them a pane knows what it has."""
        if self._made is None:
            self._made = [item if isinstance(item, LogLine) else self._line(item) for item in self.items]
        return self._made

    def _line(self, event: Log) -> LogLine:
        return LogLine(event.t, event.level, event.message if self.verbatim else human_lines(event, None)[0])


class RunLog(Sequence[LogLine]):
    """The last `MAX_LOG_LINES` lines of a log as it was at one moment, fewer where they are very long. Never changes.

    A log of millions of messages is read much sooner when only those that remain become lines.
    """

    __slots__ = ("_base", "_made", "_parts", "_waiting")

    def __init__(
        self, base: Sequence[LogLine] = (), parts: tuple[LogPart, ...] = (), waiting: tuple[int, int] = (0, 0)
    ) -> None:
        self._base = base
        self._parts = parts
        self._waiting = waiting
        """Lines and characters of all parts."""
        self._made: tuple[LogLine, ...] | None = None if parts else tuple(base)

    def then(self, part: LogPart) -> RunLog:
        """This log with further lines behind it."""
        if not part.items:
            return self
        made = self._made
        base, parts = (self._base, (*self._parts, part)) if made is None else (made, (part,))
        lines, characters = self._waiting if made is None else (0, 0)
        lines, characters = lines + len(part.items), characters + part.characters
        gone = 0
        for first in parts:
            rest = lines - len(first.items), characters - first.characters
            if rest[0] < MAX_LOG_LINES and rest[1] < MAX_LOG_CHARACTERS:
                break
            (lines, characters), gone = rest, gone + 1
        enough = lines >= MAX_LOG_LINES or characters >= MAX_LOG_CHARACTERS
        return RunLog(() if enough else base, parts[gone:], (lines, characters))

    def _lines(self) -> tuple[LogLine, ...]:
        made = self._made
        if made is None:
            made = tuple(chain(self._base, *(part.lines() for part in self._parts)))[-MAX_LOG_LINES:]
            totals = list(accumulate(len(line.text) for line in reversed(made)))
            made = made[len(made) - bisect_right(totals, MAX_LOG_CHARACTERS) :]
            self._made = made
        return made

    def __len__(self) -> int:
        return len(self._lines())

    @overload
    def __getitem__(self, at: int) -> LogLine: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[LogLine, ...]: ...

    def __getitem__(self, at: int | slice) -> LogLine | tuple[LogLine, ...]:
        return self._lines()[at]

    def __iter__(self) -> Iterator[LogLine]:
        return iter(self._lines())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunLog | tuple) and self._lines() == tuple(other)

    def __hash__(self) -> int:
        return id(self)


def level_of(event: Event) -> str:
    """How grave an event's lines are: info, warning or error."""
    if isinstance(event, Log):
        return event.level
    if isinstance(event, CheckpointFailed) or (isinstance(event, Verdict) and event.verdict == FAIL):
        return "error"
    if isinstance(event, Control) and event.observed != event.expected:
        return "error"
    if isinstance(event, End) and event.status != "COMPLETED":
        return "error"
    return "info"
