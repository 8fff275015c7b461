"""The curve of a report: the chart's own picture without the title that stands above it anyway."""

from __future__ import annotations

from console.chart.export import WIDTH, svg
from console.run_report.model import Curve

_TITLE = 30
"""Units at the top of the chart's picture that its title takes."""


def curve_of(curve: Curve, height: int) -> str:
    """The losses as an SVG document, `console.chart.export.WIDTH` by `height` units."""
    drawn = svg(curve.plot, curve.look, curve.title, height + _TITLE)
    whole = f'height="{height + _TITLE}" viewBox="0 0 {WIDTH} {height + _TITLE}"'
    return drawn.replace(whole, f'height="{height}" viewBox="0 {_TITLE} {WIDTH} {height}" role="img"', 1)
