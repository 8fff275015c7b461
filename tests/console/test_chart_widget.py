"""The chart on a screen: what it says, when it draws, and what keys and mouse do."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest
from textual.app import App, ComposeResult
from textual.events import MouseScrollDown, MouseScrollUp
from textual.pilot import Pilot
from textual.strip import Strip
from textual.widgets import Static

from console.run_state import RunState
from console.view import View
from console.widgets.loss_chart import LossChart
from tests.console.chart_runs import Floats, evaluation, state, view
from tests.streams import EPOCH, end_event

SIZES = [(60, 20), (80, 24), (200, 60)]
FRAMED = "LossChart { border: round $panel; padding: 0 1; }"


class Counting(LossChart):
    """Counts the lines that it was asked for."""

    lines = 0

    def render_line(self, y: int) -> Strip:
        self.lines += 1
        return super().render_line(y)


class Shown(App[None]):
    CSS = FRAMED

    def __init__(self, chart: LossChart, theme: str = "textual-dark") -> None:
        super().__init__()
        self.chart = chart
        self.theme = theme

    def compose(self) -> ComposeResult:
        yield self.chart


Act = Callable[[LossChart, Pilot[None]], Awaitable[None]]


def on_screen(act: Act, size: tuple[int, int] = (80, 24), theme: str = "textual-dark", fps: float = 1 / 3_600) -> None:
    """Runs something on a chart that has a screen for itself. So few frames a second: nothing is drawn by itself."""

    async def go() -> None:
        chart = Counting(fps=fps)
        app = Shown(chart, theme)
        async with app.run_test(size=size) as pilot:
            chart.focus()
            await pilot.pause()
            await act(chart, pilot)

    asyncio.run(go())


async def turn(
    pilot: Pilot[None], chart: LossChart, wheel: type[MouseScrollUp | MouseScrollDown], at: tuple[int, int]
) -> None:
    """Turns the wheel over a place of the chart."""
    x, y = at[0] + chart.region.x, at[1] + chart.region.y
    chart.post_message(wheel(chart, *at, 0, 0, 0, False, False, False, screen_x=x, screen_y=y))
    await pilot.pause()


def falling(count: int) -> Floats:
    return np.linspace(8, 2, count)


def ended(run: RunState) -> RunState:
    return replace(run, end=end_event())


@pytest.mark.parametrize("size", SIZES)
def test_a_run_is_drawn_with_axes_legend_and_title(size: tuple[int, int]) -> None:
    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        loss = falling(2_000)
        loss[500] = math.nan
        chart.show(view(state(loss, evals=[evaluation(0, 9.0), evaluation(2_000, 3.95)])))
        chart.redraw()
        text = chart.copy_text()
        assert text.splitlines()[0] == "Loss  log y · EMA 0.90 · x: step"
        for wanted in ("━ total 2.000", "▲ 1 non-finite", "┤", "└", "2,000", "•"):
            assert wanted in text, wanted
        assert len(text.splitlines()) == size[1] - 2 + 1

    on_screen(act, size)


@pytest.mark.parametrize("size", [(30, 4), (30, 6), (8, 3), (3, 3), (240, 70)])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_it_works_from_very_small_to_very_large(size: tuple[int, int], count: int) -> None:
    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        chart.show(view(state(falling(count))))
        await pilot.press("left", "right", "shift+left")
        chart.zoom(1)
        await pilot.pause()
        if size == (30, 4) and count:
            assert "total" in chart.copy_text()

    on_screen(act, size)


def test_before_the_first_step_it_says_what_is_waited_for() -> None:
    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        chart.show(view(state()))
        chart.redraw()
        assert "no step yet · phase starting" in chart.copy_text()
        chart.show(view(ended(state())))
        chart.redraw()
        assert "no step yet · COMPLETED" in chart.copy_text()

    on_screen(act)


def test_nothing_is_drawn_again_when_nothing_changed() -> None:
    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        assert isinstance(chart, Counting)
        shown = view(state(falling(100)), live=True, now=EPOCH + 101)
        chart.show(shown)
        chart.redraw()
        await pilot.pause()
        frame, chart.lines = chart._frame, 0
        for second in range(5):
            chart.show(View(state=shown.state, link=shown.link, now=shown.now + second))
            chart.redraw()
            await pilot.pause()
        assert chart.lines == 0
        assert chart._frame is frame

    on_screen(act)


def test_one_more_step_repaints_only_the_lines_that_changed() -> None:
    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        assert isinstance(chart, Counting)
        loss = falling(2_000)
        chart.show(view(state(loss[:1_200]), live=True))
        chart.redraw()
        await pilot.pause()
        chart.lines = 0
        chart.show(view(state(loss[:1_204]), live=True))
        chart.redraw()
        await pilot.pause()
        assert 0 < chart.lines < 8

    on_screen(act)


def test_what_arrives_is_drawn_at_most_so_often_and_what_the_operator_does_at_once() -> None:
    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        loss = falling(100)
        chart.show(view(state(loss[:50])))
        chart.redraw()
        before = chart.copy_text()
        chart.show(view(state(loss[:90])))
        await pilot.pause()
        assert chart.copy_text() == before
        chart.toggle_log()
        assert f"total {loss[89]:.3f}" in chart.copy_text()
        assert "linear y" in chart.copy_text()

    on_screen(act)


def test_what_was_held_back_is_drawn_when_its_time_has_come() -> None:
    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        chart.show(view(state([5.0, 4.0])))
        chart.show(view(state([5.0, 4.0, 3.5])))
        async with asyncio.timeout(10):
            while "total 3.500" not in chart.copy_text():
                await pilot.pause()

    on_screen(act, fps=50)


@pytest.mark.parametrize("fps", [None, 1_000.0])
def test_four_pictures_a_second_are_drawn_unless_more_are_asked_for(fps: float | None) -> None:
    async def go() -> tuple[int, float]:
        chart = LossChart() if fps is None else LossChart(fps=fps)
        frames: list[object] = []
        count = 0
        async with Shown(chart).run_test(size=(80, 24)) as pilot:
            begin = time.monotonic()
            while (seconds := time.monotonic() - begin) < 0.9:
                count += 1
                chart.show(view(state(falling(count))))
                await pilot.pause()
                if not frames or frames[-1] is not chart._frame:
                    frames.append(chart._frame)
        return len(frames), seconds

    drawn, seconds = asyncio.run(go())
    if fps is None:
        assert 2 <= drawn <= 4 * seconds + 2
    else:
        assert drawn > 4 * seconds + 2


def test_the_envelope_is_the_same_colour_as_its_curve_but_weaker() -> None:
    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        chart.overlay([("one", state(falling(5))), ("two", state(falling(5)))])
        for theme in ("textual-dark", "textual-light"):
            chart.app.theme = theme
            await pilot.pause()
            ground = chart.background_colors[1]
            for line, band in (("total", "band"), ("run-0", "band-0"), ("run-1", "band-1")):
                strong, weak = (chart.get_component_styles(f"loss-chart--{name}").color for name in (line, band))
                assert weak.rgb == strong.rgb
                assert weak.a < 0.6
                assert abs((ground + weak).brightness - ground.brightness) > 0.1
            assert chart.get_component_styles("loss-chart--run-0").color != (
                chart.get_component_styles("loss-chart--run-1").color
            )

    on_screen(act)


def test_it_takes_the_whole_screen_and_gives_it_back() -> None:
    async def go() -> None:
        class Two(Shown):
            CSS = FRAMED + "Static { height: 10; }"

            def compose(self) -> ComposeResult:
                yield self.chart
                yield Static("beside it")

        chart = LossChart()
        app = Two(chart)
        async with app.run_test(size=(80, 30)) as pilot:
            chart.show(view(state(falling(100))))
            await pilot.pause()
            before = len(chart.copy_text().splitlines())
            app.screen.maximize(chart)
            await pilot.pause()
            assert chart.outer_size == (80, 30)
            assert len(chart.copy_text().splitlines()) == 28 + 1
            app.screen.minimize()
            await pilot.pause()
            assert len(chart.copy_text().splitlines()) == before < 28

    asyncio.run(go())


def test_its_first_picture_waits_for_nothing_that_only_files_need() -> None:
    program = "import sys, console.widgets.loss_chart; print('console.chart.export' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"


def test_a_new_theme_is_drawn_in_its_own_colours() -> None:
    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        chart.show(view(state(falling(100))))
        await pilot.pause()
        colours = []
        for theme in ("textual-dark", "textual-light", "ansi-dark"):
            chart.app.theme = theme
            await pilot.pause()
            legend = chart.render_line(chart.size.height - 1)
            colours.append({str(piece.style.color) for piece in legend if piece.style and piece.text.strip()})
        assert len({frozenset(each) for each in colours}) == 3
        assert all("#" not in colour for colour in colours[2])

    on_screen(act)


def test_without_colours_the_cursor_is_reversed_and_every_curve_keeps_its_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        chart.show(view(state(falling(100), evals=[evaluation(5, 7.0)])))
        await pilot.press("left")
        assert any(piece.style and piece.style.reverse for piece in chart.render_line(3))
        assert [sign in chart.copy_text() for sign in "━─┄•"] == [True] * 4

        told = ("bad", "beyond", "gap", "total", "kd", "run-0", "run-2")
        colours = {chart.get_component_styles(f"loss-chart--{name}").color for name in told}
        assert len(colours) == 1
        assert abs(colours.pop().brightness - chart.background_colors[1].brightness) > 0.7

    on_screen(act, (120, 24))


def test_keys_move_the_cursor_and_the_frame_tells_the_step() -> None:
    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        chart.show(view(state(falling(10))))
        await pilot.press("left")
        assert chart.readout.startswith("step 10 · total 2.0000 (EMA ")
        await pilot.press("left", "left", "right")
        assert chart.readout.startswith("step 9 · total 2.6667")
        assert str(chart.border_subtitle) == chart.readout
        chart.reset()
        assert chart.readout == ""

    on_screen(act)


def test_the_mouse_points_zooms_and_drags() -> None:
    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        chart.show(view(state(falling(1_000))))
        await pilot.pause()
        frame = chart._frame
        assert frame is not None
        middle = chart.content_offset.x + frame.box.left + frame.box.width // 2
        await pilot.hover(chart, offset=(middle, 8))
        assert chart.readout.startswith("step 5")
        await turn(pilot, chart, MouseScrollUp, (middle, 8))
        window = chart.sight.look.window
        assert window is not None
        assert 250 < window[0] < 500 < window[1] < 760
        await pilot.mouse_down(chart, offset=(middle, 8))
        await pilot.hover(chart, offset=(middle - 10, 8))
        await pilot.mouse_up(chart, offset=(middle - 10, 8))
        moved = chart.sight.look.window
        assert moved is not None
        assert moved[0] > window[0]
        assert moved[1] - moved[0] == pytest.approx(window[1] - window[0])
        await turn(pilot, chart, MouseScrollDown, (middle, 8))
        assert chart.sight.look.window is None

    on_screen(act)


def test_every_mode_is_told_in_the_title() -> None:
    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        chart.show(view(state(falling(1_000)), live=True))
        chart.toggle_log()
        chart.toggle_axis()
        chart.smooth(2)
        chart.zoom(1)
        assert chart.copy_text().startswith("Loss  linear y · EMA 0.98 · x: wall time · zoomed, following")
        chart.pan(-1)
        chart.smooth(-9)
        assert chart.copy_text().startswith("Loss  linear y · no EMA · x: wall time · zoomed\n")
        chart.next_page()
        assert chart.copy_text().startswith("Agreement with the teacher  linear y, 0 to 1 · x: wall time")
        chart.reset()
        assert chart.copy_text().startswith("Loss  log y · EMA 0.90 · x: step\n")

    on_screen(act)


def test_a_look_into_the_past_shows_the_past_and_the_present_comes_back() -> None:
    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        run = state(falling(400))
        chart.show(view(run))
        chart.redraw()
        now = chart.copy_text()
        chart.show(view(run.at(EPOCH + 100)))
        chart.redraw()
        assert f"total {falling(400)[99]:.3f}" in chart.copy_text()
        chart.show(view(run))
        chart.redraw()
        assert chart.copy_text() == now

    on_screen(act)


def test_runs_keep_their_colour_and_key_while_others_come_and_go() -> None:
    def colours(chart: LossChart) -> dict[str, str]:
        legend = chart.render_line(chart.size.height - 1)
        return {piece.text.split()[1]: str(piece.style.color) for piece in legend if piece.style and piece.text.strip()}

    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        one, two, three = ((name, state(falling(50) + i)) for i, name in enumerate(("one", "two", "three")))
        chart.overlay([one, two])
        chart.redraw()
        assert "1 one 2.000  2 two 3.000" in chart.copy_text()
        before = colours(chart)
        chart.overlay([two, three])
        chart.redraw()
        assert "2 two 3.000  1 three 4.000" in chart.copy_text()
        assert colours(chart) == {"two": before["two"], "three": before["one"]}
        assert before["one"] != before["two"]
        await pilot.press("left")
        assert chart.readout == "step 50 · 2 3.0000 · 1 4.0000"
        chart.overlay([])
        chart.redraw()
        assert "no steps in these runs" in chart.copy_text()

    on_screen(act)


def test_a_name_is_never_read_as_markup() -> None:
    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        chart.overlay([("[bold red]x[/] [/nothing]", state(falling(5)))])
        chart.redraw()
        await pilot.press("left")
        assert "[bold red]x[/] [/nothing]" in chart.copy_text()
        await pilot.pause()

    on_screen(act)


def test_it_gives_its_data_and_its_picture_for_files() -> None:
    async def act(chart: LossChart, pilot: Pilot[None]) -> None:
        chart.show(view(state(falling(5))))
        assert chart.csv().splitlines()[1].startswith(",total,1,")
        assert "<title>my run</title>" in chart.svg("my run")
        assert chart.pictures("my run")[".svg"] == chart.svg("my run")

    on_screen(act)
