"""What the dashboard costs the machine it runs on.

    python bench/console.py [chart] [live] [--points 1000,10000,50000,500000] [--repeats 7] [--json]

chart: one redraw after one more step, in 120 x 30 cells: the new data is given to the widget, it draws, and all its
lines are rendered to Textual strips, as they are before the terminal sees them. CPU time of the process, median of the
repeats; the widgets take turns, one repeat each. All run in the same headless app.
- kdconsole draws three curves (total with its envelope and moving average, ce, kd), axes and legend. `zoom` is the same
  after the window changed, so that no column is the one before; `open` is the first picture of a run, with everything
  that is kept for later ones.
- textual-plotext (plotext) and textual-plot draw one curve, the total, in braille, with axes: less than ours, so the
  ratios, to `kdconsole`, are on the low side. They are given whole columns, as lists or arrays as they like it best.
  Beyond `--most` points they are left out: a redraw takes them seconds.

live: four charts of 50,000 steps side by side in 200 x 60 cells, one more step each ten times a second, for some
seconds: CPU time of the whole headless app, Textual's own work and the terminal's bytes included, as percent of one
core. `idle` is the same app when nothing arrives.

Losses are made up, the same in every run: a falling curve with noise and one spike.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from textual.app import App, ComposeResult
from textual.containers import Grid
from textual.geometry import Region
from textual.widget import Widget

from console.chart.sight import Sight
from console.run_state import RunState
from console.series import StepBuffer
from console.view import View
from console.widgets.loss_chart import LossChart

SIZE, WALL = (120, 30), (200, 60)
LIVE_POINTS, LIVE_HERTZ = 50_000, 10
Row = dict[str, Any]
Made = tuple[Widget, dict[str, Callable[[View], None]]]
"""A widget, and what is measured of it when it is given a run that made one more step."""


class Steps:
    """A made-up run that makes one more step when asked.

    Args:
        points: steps that it has made.
        seed: of its noise.
    """

    def __init__(self, points: int, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._buffer = StepBuffer()
        self._scale = points / 100
        self.made = 0
        self.make(points)

    def make(self, count: int) -> View:
        """Makes steps; returns the run as a screen sees it."""
        step = np.arange(self.made + 1.0, self.made + 1.0 + count)
        ce = 2 + 12 * (1 + step / self._scale) ** -0.6 * np.exp(self._random.normal(0, 0.05, count))
        kd = 2.5 + 13 * (1 + step / self._scale) ** -0.5 * np.exp(self._random.normal(0, 0.07, count))
        ce[step == self._scale * 30] = 60.0
        rate, norm, tokens, seconds = (np.full(count, value) for value in (1e-4, 1.0, 8_192.0, 1.3))
        columns = step, 1.76e9 + 1.3 * step, 0.3 * ce + 0.7 * kd, ce, kd, rate, norm, tokens, seconds
        self._buffer.extend(list(zip(*(column.tolist() for column in columns), strict=True)))
        self.made += count
        return View(state=RunState(steps=self._buffer.series), now=1.76e9 + 1.3 * self.made)


class Bench(App[None]):
    """Shows some widgets, and nothing else.

    Args:
        widgets: one to fill the screen, or four to share it.
    """

    CSS = "Grid { grid-size: 2 2; } Widget { width: 1fr; height: 1fr; }"

    def __init__(self, *widgets: Widget) -> None:
        super().__init__()
        self._shown = widgets

    def compose(self) -> ComposeResult:
        """See Textual."""
        if len(self._shown) == 1:
            yield from self._shown
        else:
            yield Grid(*self._shown)


def rendered(widget: Widget) -> None:
    """Renders all lines of a widget and of those in it."""
    for each in (widget, *widget.query("*").results()):
        each.render_lines(Region(0, 0, *each.outer_size))


def ours() -> Made:
    """Our chart, and what is measured of it."""
    chart = LossChart()

    def more(view: View) -> None:
        chart.show(view)
        chart.redraw()
        rendered(chart)

    def zoom(view: View) -> None:
        chart.zoom(1 if chart.sight == Sight() else -1)
        rendered(chart)

    def first(view: View) -> None:
        chart.overlay([])
        more(view)

    return chart, {"kdconsole": more, "kdconsole zoom": zoom, "kdconsole open": first}


def plotext() -> Made:
    """The chart of textual-plotext."""
    from textual_plotext import PlotextPlot

    chart = PlotextPlot()

    def more(view: View) -> None:
        series = view.state.steps
        chart.plt.clear_data()
        chart.plt.plot(series.column("step").tolist(), series.column("loss").tolist(), marker="braille")
        chart.refresh()
        rendered(chart)

    return chart, {"textual-plotext": more}


def textual_plot() -> Made:
    """The chart of textual-plot."""
    from textual_plot import HiResMode, PlotWidget

    chart = PlotWidget()

    def more(view: View) -> None:
        series = view.state.steps
        chart.clear()
        chart.plot(series.column("step"), series.column("loss"), hires_mode=HiResMode.BRAILLE)
        chart.refresh()
        rendered(chart)

    return chart, {"textual-plot": more}


async def chart_rows(options: argparse.Namespace) -> list[Row]:
    """Redraws, widget by widget and size by size."""
    rows: list[Row] = []
    for points in options.points:
        makers = [ours] if points > options.most else [ours, plotext, textual_plot]
        made, steps = [make() for make in makers], Steps(points)
        apps = [Bench(widget) for widget, _ in made]
        contexts = [app.run_test(size=SIZE) for app in apps]
        pilots = [await context.__aenter__() for context in contexts]
        seen: dict[str, list[float]] = {}
        for repeat in range(-1, options.repeats):
            for (_, work), app, pilot in zip(made, apps, pilots, strict=True):
                for name, once in work.items():
                    view = steps.make(1)
                    gc.collect()  # nobody pays for what another left behind
                    with app._context():
                        began = time.process_time()
                        once(view)
                        took = time.process_time() - began
                    await pilot.pause()
                    if repeat >= 0:  # the first is a warm-up
                        seen.setdefault(name, []).append(took)
        for context in contexts:
            await context.__aexit__(None, None, None)
        base = statistics.median(seen["kdconsole"])
        for name, times in seen.items():
            median = statistics.median(times)
            rows.append({"points": points, "chart": name, "cpu_seconds": median, "ratio": median / base})
    return rows


async def live_rows(options: argparse.Namespace) -> list[Row]:
    """Four charts while their runs go on, and while they do not."""
    runs = [Steps(LIVE_POINTS, seed) for seed in range(4)]
    charts = [LossChart(fps=LIVE_HERTZ) for _ in runs]
    app = Bench(*charts)
    rows: list[Row] = []
    async with app.run_test(size=WALL) as pilot:
        for chart, run in zip(charts, runs, strict=True):
            chart.show(run.make(1))
        await pilot.pause()
        for name, arrives in (("live", 1), ("idle", 0)):
            await asyncio.sleep(0.5)
            cpu, begin = time.process_time(), time.perf_counter()
            for tick in range(options.seconds * LIVE_HERTZ):
                for chart, run in zip(charts, runs, strict=True):
                    if arrives:
                        chart.show(run.make(1))
                await asyncio.sleep(max(0.0, begin + (tick + 1) / LIVE_HERTZ - time.perf_counter()))
            share = (time.process_time() - cpu) / (time.perf_counter() - begin)
            rows.append({"charts": name, "core_percent": 100 * share})
    return rows


PARTS = {"chart": chart_rows, "live": live_rows}
COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "chart": (("points", "points", ",d"), ("chart", "redraw", ""), ("ms", "CPU ms", ".2f"), ("ratio", "ratio", ",.1f")),
    "live": (("charts", "four charts", ""), ("core_percent", "% of a core", ".1f")),
}
"""Of each part's table: key of a row, heading, format."""


def table(part: str, rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    columns = COLUMNS[part]
    lines = [f"| {' | '.join(heading for _, heading, _ in columns)} |"]
    lines.append(f"|{'|'.join(' --- ' if not form else ' ---: ' for _, _, form in columns)}|")
    for row in rows:
        shown = row | {"ms": 1_000 * row.get("cpu_seconds", 0.0)}
        lines.append(f"| {' | '.join(format(shown[key], form) for key, _, form in columns)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables, or one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--points", default="1000,10000,50000,500000", help="steps of a run (%(default)s)")
    parser.add_argument("--most", type=int, default=500_000, help="most points given to other charts (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="measured redraws of each (%(default)s)")
    parser.add_argument("--seconds", type=int, default=10, help="how long the live charts are watched (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    parser.add_argument("--serve", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(PARTS)}")
    if options.serve:
        options.points = [int(points) for points in options.points.split(",")]
        print(json.dumps(asyncio.run(PARTS[options.serve](options))))
        return
    results: dict[str, list[Row]] = {}
    for part in options.parts or PARTS:
        # A process each: what one part imports must not weigh on another.
        command = [sys.executable, __file__, f"--serve={part}", f"--points={options.points}", f"--most={options.most}"]
        command += [f"--repeats={options.repeats}", f"--seconds={options.seconds}"]
        results[part] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if not options.json:
            print(f"{table(part, results[part])}\n", flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
