"""Times as an operator reads them."""

from __future__ import annotations

import math
import time


def age(seconds: float) -> str:
    """How long ago, in as few figures as it takes: `0.9 s`, `34 s`, `4 min`, `3 h 10 min`, `5 d 2 h`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.95:
        return f"{max(0.0, seconds):.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 2_880:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1_440:,} d {minutes % 1_440 // 60} h"


def clock(t: float) -> str:
    """Unix seconds as the local time of day, `13:02:10`."""
    return _local(t, "%H:%M:%S")


def date(t: float) -> str:
    """Unix seconds as the local date and time, `2026-11-21 10:31`."""
    return _local(t, "%Y-%m-%d %H:%M")


def stamp(t: float, timed: bool) -> str:
    """Unix seconds as the local time of day; `line 1,024` where times are numbers of lines."""
    return clock(t) if timed else f"line {t:,.0f}"


def _local(t: float, form: str) -> str:
    try:
        return time.strftime(form, time.localtime(t))
    except (OverflowError, ValueError, OSError):  # a stream may hold any number
        return "?"
