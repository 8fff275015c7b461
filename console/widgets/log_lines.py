"""The lines of a log as they come and go: filtered, searched, folded into rows. Pure; the widget only draws them."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from rich.cells import chop_cells

from console.run_state import LogLine

MAX_ROWS = 60
"""Rows that one line may take; what is longer is cut there, and whole in a saved file."""
_PLAIN = re.compile("[ -~\u00a1-\u00ac\u00ae-\u02ff\u2010-\u2027\u2190-\u21ff\u2500-\u259f\u2713\u2714\u2717\u2718]*")
"""Text whose characters take one cell each."""


@dataclass(frozen=True)
class Change:
    """What an update did to what is shown: so many rows went from the beginning, so many lines came at the end."""

    gone: int = 0
    new: int = 0
    replaced: bool = False
    """Nothing of what was shown remains."""

    @property
    def nothing(self) -> bool:
        """What is shown is as it was."""
        return not (self.gone or self.new or self.replaced)


class LogLines:
    """Lines with a number each that they keep, those of them that pass the filter, and the rows that these take."""

    def __init__(self) -> None:
        self.filter = ""
        self.width = 0
        """Cells of text in a row; 0 leaves every line in one row."""
        self._lines: list[LogLine] = []
        self._first = 0
        self._shown: list[int] = []
        self._ends: list[int] = []
        """Of each shown line, the row after its last one; `_above` more stood there before the oldest ones went."""
        self._above = 0

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def shown(self) -> Sequence[int]:
        """Numbers of the lines that pass the filter."""
        return self._shown

    @property
    def rows(self) -> int:
        """Rows that the shown lines take."""
        return self._ends[-1] - self._above if self._ends else 0

    def __getitem__(self, number: int) -> LogLine:
        return self._lines[number - self._first]

    def __contains__(self, number: int) -> bool:
        return 0 <= number - self._first < len(self._lines)

    def update(self, log: Sequence[LogLine]) -> Change:
        """Takes over a newer state's log, of which the oldest lines may have gone, or any other log."""
        old = self._lines
        if not old or not log:
            return self._replace(log) if old or log else Change()
        if log[-1] is old[-1] and log[0] is old[0] and len(log) == len(old):
            return Change()
        last = _last_index(log, old[-1])
        kept = None if last is None else _tail(old, log, last)
        if last is None or kept is None:
            return self._replace(log)
        gone = len(old) - kept
        self._lines = [*old[gone:], *log[last + 1 :]]
        self._first += gone
        hidden = bisect_left(self._shown, self._first)
        rows = 0
        if hidden:
            rows = self._ends[hidden - 1] - self._above
            self._above = self._ends[hidden - 1]
            del self._shown[:hidden], self._ends[:hidden]
        before = len(self._shown)
        self._take(range(self._first + kept, self._first + len(self._lines)))
        return Change(gone=rows, new=len(self._shown) - before)

    def _replace(self, log: Sequence[LogLine]) -> Change:
        self._first += len(self._lines)
        self._lines = list(log)
        self.refill()
        return Change(replaced=True)

    def refill(self) -> None:
        """Filters and folds everything again: the filter or the width is another."""
        self._shown, self._ends, self._above = [], [], 0
        self._take(range(self._first, self._first + len(self._lines)))

    def _take(self, numbers: Iterable[int]) -> None:
        matches = pattern_of(self.filter)
        fresh = [number for number in numbers if matches is None or matches.search(self[number].text)]
        self._shown += fresh
        heights = (rows_of(self[number].text, self.width) for number in fresh)
        self._ends += list(accumulate(heights, initial=self._ends[-1] if self._ends else self._above))[1:]

    def at(self, row: int) -> tuple[int, int]:
        """The line that a row belongs to, and which of its rows it is."""
        index = bisect_right(self._ends, row + self._above)
        start = self._ends[index - 1] if index else self._above
        return self._shown[index], row + self._above - start

    def row_of(self, number: int) -> int:
        """The first row of a shown line; of the next one that is shown, where the filter hides it."""
        index = bisect_left(self._shown, number)
        return (self._ends[index - 1] if index else self._above) - self._above

    def matches(self, text: str) -> list[int]:
        """Numbers of the shown lines that have the text in them."""
        found = pattern_of(text)
        return [] if found is None else [number for number in self._shown if found.search(self[number].text)]


def _last_index(log: Sequence[LogLine], line: LogLine) -> int | None:
    """Where a line stands, looked for from the end: few lines come at once."""
    return next((index for index in range(len(log) - 1, -1, -1) if log[index] is line), None)


def _tail(old: Sequence[LogLine], log: Sequence[LogLine], last: int) -> int | None:
    """How many of the old lines the log still has, if it has the last of them at `last`; None if it is another log."""
    kept = last + 1
    return kept if kept <= len(old) and log[0] is old[len(old) - kept] else None


def pattern_of(text: str) -> re.Pattern[str] | None:
    """What finds a text in a line whatever its case; None for an empty one. Special characters mean themselves."""
    return re.compile(re.escape(text), re.IGNORECASE) if text else None


def rows_of(text: str, width: int) -> int:
    """Rows that a line takes at a width in cells."""
    if width <= 0:
        return 1
    if _PLAIN.fullmatch(text):
        return min(MAX_ROWS, max(1, -(-len(text) // width)))
    return min(MAX_ROWS, len(pieces(text, width)))


def pieces(text: str, width: int) -> list[tuple[int, int]]:
    """Where to cut a line into rows of at most `width` cells: beginning and end of each, in characters.

    Of a line that takes more than `MAX_ROWS` at least so many are told.
    """
    if width <= 0:
        return [(0, len(text))]
    if _PLAIN.fullmatch(text):
        return [(start, min(start + width, len(text))) for start in range(0, max(1, len(text)), width)]
    # What has wide or joined characters is measured; no more of it than can be shown, for that is slow.
    text = text[: 2 * MAX_ROWS * width]
    ends = list(accumulate(map(len, chop_cells(text, max(2, width))))) or [0]
    ends[-1] = len(text)  # what takes no cell at all belongs to the last row
    return list(zip([0, *ends[:-1]], ends, strict=True))
