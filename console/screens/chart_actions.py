"""The keys of the loss chart, the same on every screen that has one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from console.widgets.loss_chart import LossChart

if TYPE_CHECKING:
    from console.app import KdConsoleApp


class ChartActions:
    """Gives a screen the chart's actions; the screen has a `chart`."""

    if TYPE_CHECKING:

        @property
        def app(self) -> KdConsoleApp:
            """The app that it is a screen of."""
            ...

    @property
    def chart(self) -> LossChart:
        """The loss chart."""
        raise NotImplementedError

    def action_log_y(self) -> None:
        """Logarithmic or linear y."""
        self.chart.toggle_log()

    def action_axis(self) -> None:
        """Steps or wall time on x."""
        if not self.chart.timed:
            self.app.say("x stays as it is: a log here has no times", "warning")
        self.chart.toggle_axis()

    def action_smooth_more(self) -> None:
        """More smoothing."""
        self.chart.smooth(1)

    def action_smooth_less(self) -> None:
        """Less smoothing."""
        self.chart.smooth(-1)

    def action_zoom_in(self) -> None:
        """Closer, at the cursor."""
        self.chart.zoom(1)

    def action_zoom_out(self) -> None:
        """From further away."""
        self.chart.zoom(-1)

    def action_page(self) -> None:
        """Losses, or agreement with the teacher."""
        self.chart.next_page()
