"""What the dashboard costs the machine it runs on.

    python bench/console.py [chart] [live] [start] [open] [ingest] [memory] [--repeats 7] [--json]

Needs the `bench` and `test` extras, a checkout, and Linux. Without a part named, all are measured, each in a process of
its own. What is compared takes turns, one repeat each, so that a busy machine weighs on all of it alike. First the
machine and the versions are printed, then a table for each part.

chart: one redraw after one more step, in 120 x 30 cells: the new data is given to the widget, it draws, and all its
lines are rendered to Textual strips, as they are before the terminal sees them. CPU time of the process; the ratio is
that of the medians. All run in the same headless app.
- kdconsole draws three curves (total with its envelope and moving average, ce, kd), axes and legend. `zoom` is the same
  after the window changed, so that no column is the one before; `open` is the first picture of a run, with everything
  that is kept for later ones.
- textual-plotext (plotext) and textual-plot draw one curve, the total, in braille, with axes: less than ours, so the
  ratios, to `kdconsole`, are on the low side. They are given whole columns, as lists or arrays as they like it best.
  Beyond `--most` points they are left out: a redraw takes them seconds.

live: four charts of 50,000 steps side by side in 200 x 60 cells, one more step each ten times a second, for some
seconds: CPU time of the whole headless app, Textual's own work and the terminal's bytes included, as percent of one
core. `idle` is the same app when nothing arrives.

start: from the start of the process to the first picture on a pseudo-terminal of 120 x 40 cells, in an empty directory;
and to the end of `--version`. Beside it the least that Python and Textual take, and Harlequin where it is installed.

open: an ended run of 50,000 steps, from Enter in the list of runs, or from the start of `kdconsole attach`, to the
picture with its last step on a pseudo-terminal; and the reading of its directory alone.

ingest: events a second, in CPU time, from a stream's file to the state that panes are drawn from.

memory: growth of resident memory while the events of a run of `--hours` hours at ten a second are folded, a second's
events at a time.

Losses are made up, the same in every run: a falling curve with noise and one spike.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import console_runs
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


async def _chart_rows(options: argparse.Namespace) -> list[Row]:
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
            best, median = min(times), statistics.median(times)
            rows.append({"points": points, "chart": name, "best_seconds": best, "median_seconds": median,
                         "ratio": median / base})  # fmt: skip
    return rows


def chart_rows(options: argparse.Namespace) -> list[Row]:
    """Redraws, widget by widget and size by size."""
    return asyncio.run(_chart_rows(options))


async def _live_rows(options: argparse.Namespace) -> list[Row]:
    runs = [Steps(LIVE_POINTS, seed) for seed in range(4)]
    charts = [LossChart(fps=LIVE_HERTZ) for _ in runs]
    app = Bench(*charts)
    shares: dict[str, list[float]] = {"live": [], "idle": []}
    async with app.run_test(size=WALL) as pilot:
        for chart, run in zip(charts, runs, strict=True):
            chart.show(run.make(1))
        await pilot.pause()
        for name in ["live", "idle"] * options.rounds:
            await asyncio.sleep(0.5)
            cpu, begin = time.process_time(), time.perf_counter()
            for tick in range(options.seconds * LIVE_HERTZ):
                for chart, run in zip(charts, runs, strict=True):
                    if name == "live":
                        chart.show(run.make(1))
                await asyncio.sleep(max(0.0, begin + (tick + 1) / LIVE_HERTZ - time.perf_counter()))
            shares[name].append(100 * (time.process_time() - cpu) / (time.perf_counter() - begin))
    return [{"charts": name, "best": min(seen), "median": statistics.median(seen)} for name, seen in shares.items()]


def live_rows(options: argparse.Namespace) -> list[Row]:
    """Four charts while their runs go on, and while they do not."""
    return asyncio.run(_live_rows(options))


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "chart": chart_rows,
    "live": live_rows,
    "start": console_runs.start_rows,
    "open": console_runs.open_rows,
    "ingest": console_runs.ingest_rows,
    "memory": console_runs.memory_rows,
}
_TIMES = ("best_seconds", "best ms", ".1f"), ("median_seconds", "median ms", ".1f")
COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "chart": (("points", "points", ",d"), ("chart", "redraw", ""), ("best_seconds", "best CPU ms", ".2f"),
              ("median_seconds", "median CPU ms", ".2f"), ("ratio", "ratio", ",.1f")),
    "live": (("charts", "four charts", ""), ("best", "best % of a core", ".1f"),
             ("median", "median % of a core", ".1f")),
    "start": (("what", "", ""), ("program", "program", ""), *_TIMES, ("ratio", "ratio", ".2f")),
    "open": (("opened", "50,000 steps", ""), *_TIMES),
    "ingest": (("events", "events", ""), ("best", "best a second", ",.0f"), ("median", "median a second", ",.0f"),
               ("ratio", "ratio", ".2f")),
    "memory": (("stream", "stream", ""), ("events", "events", ",d"), ("steps", "steps", ",d"),
               ("growth_mib", "growth MiB", ",.1f"), ("second_half_mib", "of it in the second half", ",.1f"),
               ("bytes_per_event", "bytes an event", ",.1f"), ("peak_mib", "peak MiB", ",.0f")),
}  # fmt: skip
"""Of each part's table: key of a row, heading, format; seconds are shown as milliseconds."""


def table(part: str, rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    columns = COLUMNS[part]
    lines = [f"| {' | '.join(heading for _, heading, _ in columns)} |"]
    lines.append(f"|{'|'.join(' --- ' if not form else ' ---: ' for _, _, form in columns)}|")
    for row in rows:
        shown = {key: value * 1_000 if key.endswith("_seconds") else value for key, value in row.items()}
        lines.append(f"| {' | '.join(format(shown[key], form) for key, _, form in columns)} |")
    return "\n".join(lines)


def machine() -> Row:
    """What it was measured on, and with which versions."""
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())  # fmt: skip
    found: Row = {"cpu": model, "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}
    for name in ("textual", "numpy", "msgspec", "textual-plotext", "plotext", "textual-plot", "harlequin"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"python": platform.python_version(), "system": platform.system()}


def main() -> None:
    """Prints the tables, or one JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s [PART ...] [options]"
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--points", default="1000,10000,50000,500000", help="chart: steps of a run (%(default)s)")
    parser.add_argument("--most", type=int, default=500_000, help="chart: most points for the others (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement (%(default)s)")
    parser.add_argument("--seconds", type=int, default=10, help="live: length of a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="live: rounds (%(default)s)")
    parser.add_argument("--steps", type=int, default=50_000, help="open: steps of the run (%(default)s)")
    parser.add_argument("--events", type=int, default=200_000, help="ingest: steps in the stream (%(default)s)")
    parser.add_argument("--hours", type=float, default=50.0, help="memory: length of the run (%(default)s)")
    parser.add_argument("--harlequin", default="harlequin", help="start: its command (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    parser.add_argument("--serve", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(PARTS)}")
    if options.serve:
        options.points = [int(points) for points in options.points.split(",")]
        print(json.dumps(PARTS[options.serve](options)))
        return
    results: Row = {"machine": machine()}
    if not options.json:
        print("; ".join(f"{name} {value}" for name, value in results["machine"].items()), end="\n\n", flush=True)
    given = [each for each in sys.argv[1:] if each not in PARTS and each != "--json"]
    for part in options.parts or PARTS:
        # A process each: what one part imports must not weigh on another.
        command = [sys.executable, __file__, f"--serve={part}", *given]
        results[part] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        if not options.json:
            print(f"{part}\n\n{table(part, results[part])}\n", flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
