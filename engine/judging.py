"""What a judge keeps of a run, and how it says a number: clock, extremes, means."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple


class Waits(NamedTuple):
    """Seconds waited for steps: the longest wait at any stamp, the longest that a step ended, and the last one."""

    longest: float
    longest_ended: float
    waited: float
    in_phase: float


class Clock:
    """Time by the events' own stamps; a wall clock that is set back neither undoes a wait nor makes one."""

    def __init__(self) -> None:
        self.last: float | None = None
        """The stamp before, in Unix seconds."""
        self.waited = self.in_phase = 0.0

    def advance(self, t: float) -> None:
        """The next stamp."""
        passed = 0.0 if self.last is None else max(0.0, t - self.last)
        self.last = t
        self.waited += passed
        self.in_phase += passed

    def begin_wait(self) -> None:
        """Waiting for the next step begins now."""
        self.waited = 0.0

    def begin_phase(self) -> None:
        """A phase begins now, and a wait with it."""
        self.waited = self.in_phase = 0.0

    def ahead(self, stamps: Iterable[tuple[float, bool]]) -> Waits:
        """What further stamps would bring, each with whether a step came then; the clock stays as it is."""
        last, waited, in_phase = self.last, self.waited, self.in_phase
        longest = ended = 0.0
        for t, step in stamps:
            passed = 0.0 if last is None else t - last
            last = t
            if passed > 0:
                waited += passed
                in_phase += passed
            if waited > longest:
                longest = waited
            if step:
                ended, waited = waited if waited > ended else ended, 0.0
        return Waits(longest, ended, waited, in_phase)


def mean_of(values: list[float]) -> float:
    """The mean; NaN or infinite where a value is, and as good as exact however large finite values are."""
    if not all(map(math.isfinite, values)):
        return sum(values)
    try:
        return math.fsum(values) / len(values)
    except OverflowError:  # the sum is no float any more; the mean is
        return float(sum(map(Fraction, values)) / len(values))


def keep_extreme(values: list[float], value: float, over: str) -> None:
    """Keeps the value that counts; NaN stays once it was seen, whatever comes before or after it."""
    if values and over != "last" and not math.isnan(value):
        held = values[0]
        if math.isnan(held) or (held <= value if over == "min" else held >= value):
            return
    values[:] = [value]


def counted(count: int, unit: str, of: str = "") -> str:
    """A number of something, in words."""
    return f"{count:,}{of} {unit}{'' if count == 1 and not of else 's'}"


def short_name(metric: str) -> str:
    """A metric's name as one of several in a line: what they all begin with says nothing."""
    return metric.removeprefix("measure.")


def as_text(value: float) -> str:
    """A value as verdicts show it."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.4f}".rstrip("0").rstrip(".") if 1e-2 <= abs(value) < 1e6 else f"{value:.3g}"
