"""Which part of x is looked at: zooming, panning, and going along with a run."""

from __future__ import annotations

import math

Window = tuple[float, float]
FACTOR = 2.0
"""How much closer one zoom goes."""
_FOLLOW_JUMPS = 8
"""A window that follows moves by this fraction of itself, so that it stands still in between."""


def zoomed(window: Window, whole: Window, at: float, times: int, smallest: float) -> Window | None:
    """A window closer to (`times` > 0) or further from an x, which stays where it is on the screen.

    Args:
        window: first and last x now.
        whole: first and last x of all there is.
        at: the x to zoom at.
        times: how many zooms; negative to go away.
        smallest: least width.

    Returns:
        The new window inside the whole, None for the whole.
    """
    low, high = window
    width = max((high - low) / FACTOR**times, smallest)
    if width >= whole[1] - whole[0]:
        return None
    share = (min(max(at, low), high) - low) / (high - low)
    return inside((at - share * width, at + (1 - share) * width), whole)


def inside(window: Window, whole: Window) -> Window:
    """The window moved so that it does not reach beyond the whole."""
    low, high = window
    if high > whole[1]:
        low, high = low - (high - whole[1]), whole[1]
    if low < whole[0]:
        low, high = whole[0], whole[0] + (high - low)
    return low, high


def panned(window: Window, whole: Window, share: float) -> Window:
    """The window moved by a share of its width, right if positive, no further than there is something."""
    by = share * (window[1] - window[0])
    return inside((window[0] + by, window[1] + by), whole)


def followed(window: Window, last: float) -> Window:
    """The window moved on by whole jumps until the last x is in it."""
    low, high = window
    if last <= high:
        return window
    jump = (high - low) / _FOLLOW_JUMPS
    by = math.ceil((last - high) / jump) * jump
    return low + by, high + by


def reaching(window: Window, last: float) -> Window:
    """The window, moved back where all there is lies before it."""
    low, high = window
    return window if low < last else (last - (high - low), last)
