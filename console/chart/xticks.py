"""Round steps and round times for the horizontal axis."""

from __future__ import annotations

import math

from console.chart.lane import Axis
from console.chart.scale import Tick, decimals, multiples, nice

_SECONDS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1_800, 3_600, 7_200, 10_800, 21_600, 43_200, 86_400)
_DAY = 86_400
_ROOM = 3
"""Cells between two labels, at least."""


def x_ticks(axis: Axis, low: float, high: float, width: int) -> list[Tick]:
    """Ticks for a window of steps or seconds that is so many cells wide; their labels all differ and do not touch."""
    step = _next(axis, (high - low) / max(1, width // 7))
    while True:
        ticks = [Tick(x, _label(axis, x, step)) for x in multiples(step, low, high).tolist()]
        widest = max((len(tick.label) for tick in ticks), default=0)
        if len(ticks) <= 1 or step / (high - low) * width >= widest + _ROOM:
            return ticks
        step = _next(axis, step * 1.01)


def _next(axis: Axis, atleast: float) -> float:
    if axis == "step":
        return max(1.0, nice(atleast))
    if atleast <= 1:
        return nice(atleast)
    return next((float(s) for s in _SECONDS if s >= atleast), _DAY * nice(atleast / _DAY))


def _label(axis: Axis, x: float, step: float) -> str:
    return _steps(x, step) if axis == "step" else _time(x, step)


def _steps(x: float, step: float) -> str:
    """`2,500`, `12.5k`, `1.25M`: short where every multiple of the step can be told so."""
    if step >= 1e12 or abs(x) >= 1e15:
        return f"{x:.6g}"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if step >= unit / 100 and abs(x) >= unit and (unit > 1e3 or step >= 1_000):
            return f"{x / unit:.{decimals(step / unit)}f}{letter}"
    return f"{x:,.0f}"


def _time(x: float, step: float) -> str:
    """`0`, `45s`, `1m30s`, `2h`, `36h15m`, `3d`; `duration` of the same size reads alike."""
    if not x:
        return "0"
    if abs(x) >= 1e12:
        return f"{x:.3g}s"
    sign, x = ("-", -x) if x < 0 else ("", x)
    if step < 1:
        minutes, seconds = divmod(x, 60)
        text = f"{seconds:.{decimals(step)}f}s"
        return sign + (f"{int(minutes)}m{text}" if minutes else text)
    if step >= _DAY:
        return f"{sign}{round(x / _DAY)}d"
    minutes, seconds = divmod(round(x), 60)
    hours, minutes = divmod(minutes, 60)
    parts = (hours, "h"), (minutes, "m"), (seconds, "s")
    text = "".join(f"{n}{unit}" for n, unit in parts if n)
    return sign + text


def round_span(span: float) -> float:
    """The next of some sizes a sixth apart at most; a window of such a size is not rescaled at every step."""
    if span <= 0:
        return 1.0
    base = 10.0 ** math.floor(math.log10(span))
    return next(
        (
            base * m
            for m in (1.0, 1.1, 1.25, 1.4, 1.6, 1.8, 2, 2.3, 2.6, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9)
            if base * m >= span
        ),
        base * 10,
    )
