"""Where one looks: zoom, pan and cursor never leave what there is, and the read-out tells raw numbers."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from console.chart import viewport
from console.chart.frame import Frame, draw
from console.chart.model import Plot
from console.chart.readout import readout
from console.chart.sight import SMOOTHINGS, Sight, whole_of
from console.run_state import RunState
from tests.console.chart_runs import evaluation, plot, state
from tests.streams import EPOCH

pytestmark = pytest.mark.filterwarnings("error")


def falling(count: int) -> RunState:
    return state(np.linspace(8, 2, count))


def picture(sight: Sight, shown: Plot) -> Frame:
    return draw(shown, sight.settled(shown).look, 80, 20)


def said(sight: Sight, shown: Plot, of: RunState | None = None) -> list[str]:
    look = sight.settled(shown).look
    return readout(draw(shown, look, 80, 20), shown, look, of)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["in", "out", "left", "right", "follow", "axis", "cursor"]), st.integers(1, 9)))
)
def test_no_move_leaves_what_there_is(moves: list[tuple[str, int]]) -> None:
    shown, sight = plot(falling(500)), Sight()
    for move, size in moves:
        if move in ("in", "out"):
            sight = sight.zoomed(shown, 1 if move == "in" else -1)
        elif move in ("left", "right"):
            sight = sight.panned(shown, size / (4 if move == "right" else -4))
        elif move == "follow":
            sight = sight.with_follow(shown)
        elif move == "axis":
            sight = sight.with_axis(shown)
        else:
            sight = sight.stepped(shown, picture(sight, shown), size - 5)
        low, high = whole_of(shown, sight.look)
        window, cursor = sight.settled(shown).look.window, sight.look.cursor
        slack = 1e-9 * (high - low)
        assert window is None or low - slack <= window[0] < window[1] <= high + slack
        assert cursor is None or low - slack <= cursor <= high + slack


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 100), st.floats(1, 100), st.floats(0, 1), st.sampled_from([1, -1]))
def test_a_zoom_keeps_what_is_under_the_pointer_there(
    share: float, low: float, width: float, begin: float, times: int
) -> None:
    whole = (-500.0, 1_000.0)
    window = (low, low + width)
    at = low + share * width
    new = viewport.zoomed(window, whole, at, times, 0.1)
    assert new is not None
    assert new[1] - new[0] == pytest.approx(width / 2**times)
    assert (at - new[0]) / (new[1] - new[0]) == pytest.approx(share, abs=1e-9)


def test_zooming_out_ends_at_the_whole_and_zooming_in_at_a_few_steps() -> None:
    shown, sight = plot(falling(1_000)), Sight()
    for _ in range(30):
        sight = sight.zoomed(shown, 1)
    window = sight.look.window
    assert window is not None
    assert window[1] - window[0] == 4
    for _ in range(30):
        sight = sight.zoomed(shown, -1)
    assert sight.look.window is None


def test_a_zoom_goes_to_the_cursor_and_else_to_the_newest_step() -> None:
    shown = plot(falling(1_000))
    assert Sight().zoomed(shown, 1).look.window == (500.5, 1_000.0)
    early = Sight().pointed(shown, 100.0).zoomed(shown, 2).look.window
    assert early is not None
    assert early[0] < 100 < early[1] < 400


def test_a_window_at_the_end_goes_along_with_the_run_in_jumps_and_one_in_the_past_does_not() -> None:
    before, after = plot(falling(1_000), live=True), plot(falling(1_200), live=True)
    newest = Sight().zoomed(before, 3, at=1_000.0)
    assert newest.following
    window = newest.settled(after).look.window
    assert window is not None
    assert window[0] < 1_200 <= window[1]
    assert newest.settled(plot(falling(1_201), live=True)).look.window == window
    past = newest.panned(before, -3.0)
    assert not past.following
    assert past.settled(after).look.window == past.look.window
    assert past.with_follow(after).settled(after).look.window[1] >= 1_200  # type: ignore[index]


def test_a_look_at_the_beginning_of_a_run_moves_a_window_that_lies_behind_it() -> None:
    sight = Sight().zoomed(plot(falling(1_000)), 3)
    early = sight.settled(plot(falling(100))).look.window
    assert early is not None
    assert early[0] < 100 <= early[1]
    assert sight.settled(plot(falling(1_000))).look.window == sight.look.window


def test_the_same_steps_are_looked_at_on_the_other_axis_and_back() -> None:
    shown = plot(falling(1_000))
    sight = Sight().pointed(shown, 300.0).zoomed(shown, 2)
    there = sight.with_axis(shown)
    assert there.look.cursor == 299.0
    back = there.with_axis(shown)
    assert back.look.cursor == 300.0
    assert back.look.window == pytest.approx(sight.look.window, abs=1)


def test_smoothing_stops_at_both_ends() -> None:
    assert Sight().smoothed(-99).look.smoothing == SMOOTHINGS[0] == 0
    assert Sight().smoothed(99).look.smoothing == SMOOTHINGS[-1]


def test_the_cursor_finds_the_worst_step_of_its_column() -> None:
    loss = np.linspace(8, 2, 10_000)
    loss[6_543] = 7.77777
    shown = plot(state(loss))
    frame = picture(Sight(), shown)
    sight = Sight().hovered(shown, frame, frame.cell_of(6_544.0))
    assert sight.look.cursor == 6_544.0
    assert said(sight, shown)[0].startswith("step 6,544 (highest of 1")
    assert said(sight, shown)[1].startswith("total 7.7778")
    loss[6_550] = math.nan
    shown = plot(state(loss))
    sight = Sight().hovered(shown, frame, frame.cell_of(6_544.0))
    assert said(sight, shown)[:1] == [f"step 6,551 (one of {said(sight, shown)[0].split()[-1]}"]
    assert said(sight, shown)[1].startswith("total NaN")


def test_the_read_out_tells_every_raw_number_of_the_step() -> None:
    run = state([5.0, 4.0, 3.0], ce=[2.5, 2.25, 2.0], kd=[6.0, 5.0, 4.125], lr=[1e-4, 2e-4, 3e-4],
                evals=[evaluation(2, 4.5)])  # fmt: skip
    shown = plot(run)
    parts = said(Sight().pointed(shown, 2.0), shown, run)
    assert parts[:6] == ["step 2", "total 4.0000 (EMA 4.474)", "ce 2.2500", "kd 5.0000", "held-out 4.5000", "lr 0.0002"]
    assert time.strftime("%H:%M:%S", time.localtime(EPOCH + 2)) in parts
    assert "after 1.0 s" in parts


def test_arrows_go_from_step_to_step_where_there_are_few() -> None:
    shown, sight = plot(falling(5)), Sight()
    seen = []
    for _ in range(6):
        sight = sight.stepped(shown, picture(sight, shown), -1)
        seen.append(sight.look.cursor)
    assert seen == [5.0, 4.0, 3.0, 2.0, 1.0, 1.0]
    assert sight.stepped(shown, picture(sight, shown), 1).look.cursor == 2.0


def test_an_arrow_at_the_edge_of_the_window_moves_the_window() -> None:
    shown = plot(falling(1_000))
    sight = Sight().zoomed(shown, 4)
    for _ in range(200):
        sight = sight.stepped(shown, picture(sight, shown), -1)
    assert sight.look.cursor is not None
    assert sight.look.window is not None
    assert sight.look.window[0] <= sight.look.cursor <= sight.look.window[1] < 1_000


def test_a_cursor_without_steps_stays_away() -> None:
    shown = plot(state())
    sight = Sight().stepped(shown, picture(Sight(), shown), 1).zoomed(shown, 1).panned(shown, 1).with_axis(shown)
    assert sight.look.cursor is None
    assert said(sight, shown) == []
