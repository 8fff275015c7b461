"""A stream read in pieces: a thousand lines are decoded in one go, and what is found is what `decode_line` finds."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.errors import StreamError
from engine.stream import EVENT_DECODER, MAX_LINE_BYTES, Event, Step, cleaned, decode_line
from engine.text import clean

_BETWEEN = int.from_bytes(b'}\n{"even', "little")
"""What stands between two events, from the brace that closes the one on."""
_VERSION = int.from_bytes(b'","v":1,', "little")
_VERSION_AT = len('{"event":"step')
"""Where the version stands in a step's line."""
_SHORTEST = _VERSION_AT + 9
_FEW_BYTES = 4_096
Positions = NDArray[np.intp]


class Piece(NamedTuple):
    """What stood in some lines of a stream."""

    events: list[Event]
    size: int
    """Bytes of the lines that were read."""
    error: StreamError | None
    """What is wrong with the line after them; None where there is none after them."""


class StreamReader:
    """Decodes the lines of one run, in their order.

    Args:
        run: uuid that every event must carry; None takes the first event's.
    """

    def __init__(self, run: str | None = None) -> None:
        self.run = run
        self.seq = -1
        """Of the last event."""

    def read(self, lines: bytes) -> Piece:
        """The events of whole lines, each with its newline; reading ends before the first bad line.

        Bad is what `decode_line` refuses, a line over `MAX_LINE_BYTES` without its newline, an event of another run,
        and a `seq` that does not grow.
        """
        events = self._at_once(lines)
        if events is not None:
            return Piece(events, len(lines), None)
        half = lines.rfind(b"\n", 0, len(lines) // 2) + 1
        if half == 0 or len(lines) < _FEW_BYTES:
            return self._one_by_one(lines)
        # A number that is not finite, say, which one decoder leaves to another: the lines far from it are quick again.
        first = self.read(lines[:half])
        if first.error is not None:
            return first
        rest = self.read(lines[half:])
        return Piece(first.events + rest.events, first.size + rest.size, rest.error)

    def _one_by_one(self, lines: bytes) -> Piece:
        events: list[Event] = []
        size = 0
        for line in lines.split(b"\n")[:-1]:
            try:
                event = self._one(line)
            except StreamError as error:
                return Piece(events, size, error)
            size += len(line) + 1
            if event is not None:
                events.append(event)
        return Piece(events, size, None)

    def _one(self, line: bytes) -> Event | None:
        if len(line) > MAX_LINE_BYTES:
            raise StreamError(f"a line of {len(line):,} bytes", expected=f"at most {MAX_LINE_BYTES:,}")
        event = decode_line(line)
        if event is None:
            return None
        self.run = self.run or event.run
        if event.run != self.run:
            raise StreamError("an event of another run", expected=self.run)
        if event.seq <= self.seq:
            raise StreamError(f"seq {event.seq} after seq {self.seq}", expected="a growing seq")
        self.seq = event.seq
        return event

    def _at_once(self, lines: bytes) -> list[Event] | None:
        """The events of lines as our writer writes them; None where each must be looked at for itself."""
        bounds = _bounds(lines)
        if bounds is None:
            return None
        # JSON holds control characters only as escapes: what is printable ASCII without a backslash is clean.
        plain = b"\\" not in lines and np.frombuffer(lines, np.uint8).max() < 0x7F
        try:
            events: list[Event] = EVENT_DECODER.decode_lines(lines)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        run, seq = self.run or events[0].run, self.seq
        if len(events) != len(bounds) - 1 or not run or run != clean(run, MAX_LINE_BYTES):
            return None
        for event in events:
            before, seq = seq, event.seq
            if seq <= before or event.run != run:
                return None
        if not plain:
            for at, event in enumerate(events):
                if type(event) is not Step:  # whose only text is the run
                    line = lines[bounds[at] : bounds[at + 1]]
                    if b"\\" in line or b"\x7f" in line or not line.isascii():
                        events[at] = cleaned(event)
        self.run, self.seq = run, seq
        return events


def _bounds(lines: bytes) -> Positions | None:
    """Where each line begins, and the end; None where a line may be no whole event or not say its version.

    The decoder takes any white space between events and within them, and a `v` that is not there as its default. A
    newline between a brace that closes and one that opens stands within no event: where all are such, and there are as
    many events as lines, each line is one.
    """
    bounds = _line_bounds(lines)
    if bounds is None or len(lines) - bounds[-2] < _SHORTEST or np.diff(bounds).max() > MAX_LINE_BYTES + 1:
        return None
    words = np.ndarray((len(lines) - 7,), "<u8", lines, strides=(1,))
    if (words[bounds[1:-1] - 2] != _BETWEEN).any():
        return None
    others = np.flatnonzero(words[bounds[:-1] + _VERSION_AT] != _VERSION)
    # Such a line may be of another kind. Only where it is there at all tells a version from its default.
    if all(b'"v"' in lines[bounds[at] : bounds[at + 1]] for at in others.tolist()):
        return bounds
    return None


def _line_bounds(lines: bytes) -> Positions | None:
    """Where each line begins, and the end; None where the last is short or has no newline.

    Eight bytes are looked at in one go, which halves the time. Of two newlines among them the first is found, and then
    the line behind it does not begin as an event does.
    """
    last = len(lines) - 1
    whole = max(last, 0) & ~7
    if last < 0 or lines.find(b"\n", whole) != last:
        return None
    newlines = (np.frombuffer(lines, np.uint8, whole) == 0x0A).view("<u8")
    at = np.flatnonzero(newlines != 0)
    words = newlines[at]
    bounds = np.empty(len(at) + 2, np.intp)
    bounds[0], bounds[-1] = 0, len(lines)
    bounds[1:-1] = at * 8 + (np.bitwise_count(words - 1) >> 3) + 1
    return bounds
