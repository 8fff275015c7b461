"""Where a value stands between the edges of the chart, and the numbers written at its edge."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from console.chart.grown import Column

LARGEST = 8e307
"""Beyond it a linear axis would not have a finite length; what is larger is drawn there."""
_OUTLIER_SPANS, _OUTLIER_DECADES = 8.0, 1.0
"""What lies this many times the range of nearly all columns away is cut off, and marked; on a logarithmic axis it must
also be ten times as large or small as they are."""
_ROOM = 0.12
"""Of the range, left free at an end that was cut off: for the marks there."""
_NEARLY_ALL = 0.025
_POWERS = (-323.0, 308.25)
"""Ten to these powers are numbers still."""
_ENOUGH_COLUMNS = 20
_MANTISSAS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0))


def number(value: float, digits: int = 4) -> str:
    """A value with so many significant digits, zeros at the end included: `3.810`, `15.60`, `1.2e-07`, `NaN`."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    text = f"{value:#.{digits}g}"
    mantissa, e, exponent = text.partition("e")
    mantissa = mantissa.rstrip(".")
    return mantissa + e + exponent if e else mantissa


@dataclass(frozen=True)
class Tick:
    """A place on an axis and what is written there; `at` is in the unit of the axis (log10 of it on a log axis)."""

    at: float
    label: str


@dataclass(frozen=True)
class Scale:
    """A vertical axis from `low` to `high`; both are log10 of the values if `log`."""

    low: float
    high: float
    log: bool

    def measure(self, values: Column) -> Column:
        """Values in the unit of the axis; on a log axis what is not above 0 becomes minus infinity."""
        return measure(values, self.log)

    def position(self, values: Column) -> Column:
        """0 at the top, 1 at the bottom, outside what lies beyond; NaN stays NaN."""
        with np.errstate(over="ignore"):  # a value far beyond an edge
            share: Column = (self.high - self.measure(values)) / (self.high - self.low)
        return share

    def value(self, position: float) -> float:
        """The opposite of `position`."""
        at = self.high - position * (self.high - self.low)
        return 10.0 ** min(at, 308.0) if self.log else at

    def ticks(self, most: int) -> list[Tick]:
        """At most so many round values between the edges, their labels all different."""
        found = _log_ticks(self.low, self.high, most) if self.log else _linear_ticks(self.low, self.high, most)
        return [tick for tick in found if self.low <= tick.at <= self.high and abs(tick.at) <= LARGEST]


def measure(values: Column, log: bool) -> Column:
    """Values in the unit of a linear axis, or of a logarithmic one (log10; minus infinity for 0 and below)."""
    if not log:
        return np.clip(values, -LARGEST, LARGEST)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(values < 0, -np.inf, np.log10(values))


def fit(low: Column, high: Column, log: bool, within: tuple[float, float] | None = None) -> Scale:
    """The scale that shows the columns of all series.

    A few columns far above or below all others do not flatten the rest: the range then ends nearer, and the chart
    marks what lies beyond.

    Args:
        low: lowest value of each column of each series, NaN for none.
        high: highest.
        log: logarithmic.
        within: show at least this range, if linear.
    """
    bottom, top = measure(low, log), measure(high, log)
    bottom, top = bottom[np.isfinite(bottom)], top[np.isfinite(top)]
    if not len(bottom):
        bottom = top
    if not len(top):
        return Scale(*(within or (-1.0, 1.0) if not log else (-1.0, 1.0)), log)
    bottom, top = np.sort(bottom), np.sort(top)
    least, most = float(bottom[0]), float(top[-1])
    if len(top) >= _ENOUGH_COLUMNS:
        usual_least = float(bottom[int(_NEARLY_ALL * (len(bottom) - 1))])
        usual_most = float(top[math.ceil((1 - _NEARLY_ALL) * (len(top) - 1))])
        span = usual_most - usual_least
        reach = max(_OUTLIER_SPANS * span, _OUTLIER_DECADES if log else 0.0)
        if span > 0:
            cut_most, cut_least = top[top <= usual_most + reach][-1], bottom[bottom >= usual_least - reach][0]
            room = _ROOM * float(cut_most - cut_least)
            most, least = (
                most if most == cut_most else float(cut_most) + room,
                least if least == cut_least else float(cut_least) - room,
            )
    if within is not None and not log:
        least, most = min(least, within[0]), max(most, within[1])
    smallest = max(abs(least), abs(most)) * 1e-9 + (1e-9 if log else 1e-300)
    if most - least < smallest:
        around = abs(most) * 0.05 or 0.5
        least, most = (least - 0.05, most + 0.05) if log else (least - around, most + around)
    # Edges on a grid: while a run goes on they move seldom.
    grid = nice((most - least) / 20)
    snapped = Scale(math.floor(least / grid) * grid, math.ceil(most / grid) * grid, log)
    return snapped if snapped.low < snapped.high else Scale(least, most, log)


def nice(atleast: float) -> float:
    """The smallest of 1, 2, 5, 10, 20 … 0.1, 0.2 … that is at least so large; the value itself where none can be."""
    exponent = math.floor(math.log10(atleast)) if atleast > 0 else -300
    exponent = max(exponent, -307)
    base = 10.0**exponent
    return next((base * m for m in (1.0, 2.0, 5.0, 10.0) if base * m >= atleast * (1 - 1e-12)), atleast)


def multiples(step: float, low: float, high: float) -> Column:
    """All multiples of a step between two values, these included; zero is never negative."""
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    whole = np.arange(first, last + 1, dtype=np.float64)
    return whole * step + 0.0


def decimals(step: float) -> int:
    """Digits after the point that tell multiples of a step of `nice` apart."""
    return max(0, -math.floor(math.log10(step) + 1e-9))


def fixed(value: float, step: float) -> str:
    """A multiple of a step, with no more digits than all of them need to be told apart."""
    size = abs(value)
    if value == 0:
        return "0"
    if step >= 1e6 or decimals(step) > 5 or size >= 1e7:
        exponent = math.floor(math.log10(size) + 1e-12)
        digits = max(0, exponent - math.floor(math.log10(step) + 1e-9))
        mantissa, _, power = f"{value:.{min(digits, 17)}e}".partition("e")
        return f"{mantissa}e{int(power)}"
    return f"{value:.{decimals(step)}f}"


def _linear_ticks(low: float, high: float, most: int) -> list[Tick]:
    step = nice((high - low) / max(1, most))
    found = multiples(step, low, high)
    while len(found) > max(1, most):
        step = nice(step * 1.5)
        found = multiples(step, low, high)
    return [Tick(value, fixed(value, step)) for value in found.tolist()]


def _log_ticks(low: float, high: float, most: int) -> list[Tick]:
    """Whole decades where there are many, else round numbers, denser the fewer decades there are."""
    low, high = max(low, _POWERS[0]), min(high, _POWERS[1])
    if high - low > 1.0 and (decades := multiples(1.0, low, high)).size > most:
        stride = math.ceil(len(decades) / max(1, most))
        return [_power(int(d)) for d in decades.tolist() if d % stride == 0]
    best: list[Tick] = []
    for mantissas in _MANTISSAS:
        ticks = [
            Tick(exponent + math.log10(m), _round(m, exponent))
            for exponent in range(math.floor(low), math.floor(high) + 1)
            for m in mantissas
            if low <= exponent + math.log10(m) <= high
        ]
        if len(ticks) <= most and len(ticks) > len(best):
            best = ticks
    if len(best) >= min(3, most) or not -300 < low < high < 300:
        return best
    linear = [t for t in _linear_ticks(10.0**low, 10.0**high, most) if t.at > 0]
    return [Tick(math.log10(t.at), t.label) for t in linear] if len(linear) > len(best) else best


def _power(exponent: int) -> Tick:
    return Tick(float(exponent), _round(1.0, exponent))


def _round(mantissa: float, exponent: int) -> str:
    """A round number; as a power of ten where it is far from 1."""
    if -4 <= exponent <= 5:
        value = mantissa * 10.0**exponent
        return f"{value:.{max(0, -exponent) + (mantissa == 1.5 and exponent < 1)}f}"
    return f"{mantissa:g}e{exponent}"
