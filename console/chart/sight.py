"""What the operator looks at, and how each of his moves changes it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from console.chart import viewport
from console.chart.frame import Frame, Look, nearest, window_of
from console.chart.lane import Axis
from console.chart.model import PAGES, Curve, Page, Plot
from console.chart.readout import worst_in
from console.chart.viewport import Window

SMOOTHINGS = (0.0, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
_FEWEST_STEPS = 4
"""How many of the usual distances between steps the closest look is wide."""


@dataclass(frozen=True)
class Sight:
    """A page, how it is drawn, and whether its window goes along with what arrives. Moves make new ones."""

    look: Look = field(default_factory=Look)
    page: Page = "loss"
    following: bool = True

    def with_log(self) -> Sight:
        """Logarithmic y, or linear."""
        return replace(self, look=replace(self.look, log=not self.look.log))

    def smoothed(self, steps: int) -> Sight:
        """So many smoothings up or down; the lowest is none."""
        at = min(max(0, SMOOTHINGS.index(self.look.smoothing) + steps), len(SMOOTHINGS) - 1)
        return replace(self, look=replace(self.look, smoothing=SMOOTHINGS[at]))

    def turned(self) -> Sight:
        """The next page, all of it."""
        page = PAGES[(PAGES.index(self.page) + 1) % len(PAGES)]
        return replace(self, page=page, look=replace(self.look, window=None, cursor=None), following=True)

    def settled(self, plot: Plot) -> Sight:
        """The window that is drawn: gone along with the run, and never one that lies wholly behind its end."""
        window, span = self.look.window, plot.span(self.look.axis)
        if window is None or span is None:
            return self
        if self.following and plot.growing:
            window = viewport.followed(window, span[1])
        return replace(self, look=replace(self.look, window=viewport.reaching(window, span[1])))

    def with_axis(self, plot: Plot) -> Sight:
        """Steps or wall time on x; the same steps are looked at."""
        look, main = self.look, main_curve(plot)
        axis: Axis = "time" if look.axis == "step" else "step"
        window, cursor = self.settled(plot).look.window, look.cursor
        if main is None:
            return replace(self, look=replace(look, axis=axis, window=None, cursor=None))

        def other(x: float) -> float:
            row = nearest(main.lane, look.axis, x + main.zero(look.axis))
            return float(main.lane.x(axis)[row]) - main.zero(axis)

        if window is not None:
            low, high = other(window[0]), other(window[1])
            window = (low, high) if high > low else None
        cursor = None if cursor is None else other(cursor)
        return replace(self, look=replace(look, axis=axis, window=window, cursor=cursor))

    def zoomed(self, plot: Plot, times: int, at: float | None = None) -> Sight:
        """Closer (positive) or further away, around an x; None: the cursor, else the newest, else the middle."""
        whole, end = whole_of(plot, self.look), plot.span(self.look.axis)
        window = self.settled(plot).look.window or whole
        if at is None:
            at, cursor = sum(window) / 2, self.look.cursor
            if cursor is not None and window[0] <= cursor <= window[1]:
                at = cursor
            elif end is not None and self.following:
                at = end[1]
        main = main_curve(plot)
        smallest = max(_FEWEST_STEPS * main.lane.usual(self.look.axis) if main else 0.0, 1e-3)
        return self._at(plot, viewport.zoomed(window, whole, at, times, smallest))

    def panned(self, plot: Plot, share: float, begin: Window | None = None) -> Sight:
        """Further right (positive) or left by a share of the window, or of where the drag began."""
        window = self.settled(plot).look.window
        if window is None:
            return self
        return self._at(plot, viewport.panned(begin or window, whole_of(plot, self.look), share))

    def with_follow(self, plot: Plot) -> Sight:
        """Along with what arrives, or staying at what is seen now."""
        window, end = self.settled(plot).look.window, plot.span(self.look.axis)
        whole = whole_of(plot, self.look)
        if self.following:
            return replace(self, following=False, look=replace(self.look, window=window or whole))
        if window is not None and end is not None:
            window = viewport.inside((end[1] - (window[1] - window[0]), end[1]), whole)
        return replace(self, following=True, look=replace(self.look, window=window))

    def _at(self, plot: Plot, window: Window | None) -> Sight:
        end = plot.span(self.look.axis)
        following = window is None or (end is not None and window[1] >= end[1])
        return replace(self, following=following, look=replace(self.look, window=window))

    def pointed(self, plot: Plot, x: float) -> Sight:
        """The cursor at an x; the window goes there if it lies outside."""
        sight, window = replace(self, look=replace(self.look, cursor=x)), self.settled(plot).look.window
        if window is not None and not window[0] <= x <= window[1]:
            by = x - sum(window) / 2
            sight = sight._at(plot, viewport.inside((window[0] + by, window[1] + by), whole_of(plot, self.look)))
        return sight

    def stepped(self, plot: Plot, frame: Frame, cells: int) -> Sight:
        """The cursor so many columns further, at the step there to look at first; at first at the last step."""
        main, axis, cursor = main_curve(plot), self.look.axis, self.look.cursor
        if main is None:
            return self
        x, zero = main.lane.x(axis), main.zero(axis)
        if cursor is None or frame.cell_of(cursor) < 0:
            row = max(0, int(x.searchsorted(frame.window[1] + zero, "right")) - 1)
        else:
            here, cell = nearest(main.lane, axis, cursor + zero), frame.cell_of(cursor) + cells
            found = worst_in(frame, main, axis, cell) if 0 <= cell < frame.box.width else None
            if found is None:  # no step in that column: the next one that there is
                after = int(x.searchsorted(frame.x_at(cell) + zero))
                found = min(after - 1, here - 1) if cells < 0 else max(after, here + 1)
            row = min(max(0, found), len(x) - 1)
        return self.pointed(plot, float(x[row]) - zero)

    def hovered(self, plot: Plot, frame: Frame, cell: int) -> Sight:
        """The cursor at the step to look at first in a column of the box; itself where there is none in sight."""
        main, axis = main_curve(plot), self.look.axis
        if main is None or not 0 <= cell < frame.box.width:
            return self
        row = worst_in(frame, main, axis, cell)
        row = nearest(main.lane, axis, frame.x_at(cell) + main.zero(axis)) if row is None else row
        x = float(main.lane.x(axis)[row]) - main.zero(axis)
        return self.pointed(plot, x) if frame.window[0] <= x <= frame.window[1] else self


def main_curve(plot: Plot) -> Curve | None:
    """The curve that the cursor goes along: the uppermost that has something."""
    return next((c for c in reversed(plot.curves) if c.lane.rows), None)


def whole_of(plot: Plot, look: Look) -> Window:
    """The window of all there is."""
    return window_of(plot, replace(look, window=None))
