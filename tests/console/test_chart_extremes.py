"""The chart at its limits: every step is in the picture, whatever the numbers, the clock, and the size."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from console.chart.envelope import edges
from console.chart.export import csv_lines, svg
from console.chart.frame import Frame, Look, draw
from console.chart.lane import Axis
from console.chart.readout import readout
from console.chart.sight import Sight
from console.run_state import RunState
from console.series import StepBuffer
from tests.console.chart_runs import Floats, cell, lit, plot, rows, state
from tests.streams import EPOCH

pytestmark = pytest.mark.filterwarnings("error")

LOSSES: dict[str, list[float]] = {
    "one point": [4.0],
    "two points": [4.0, 2.0],
    "nothing finite": [math.nan, math.inf, -math.inf] * 40,
    "one finite": [math.nan] * 60 + [3.0] + [math.inf] * 60,
    "a range of 1e300": list(np.geomspace(1e-150, 1e150, 300)),
    "both ends of the range": [1.7e308, -1.7e308] * 50,
    "the smallest numbers": [5e-324, 1e-320, 0.0] * 50,
    "constant": [4.25] * 400,
    "constant zero": [0.0] * 400,
    "zero and below": [4.0, 0.0, -3.0] * 100,
    "all below zero": [-5.0, -4.0] * 100,
    "never twice the same": list(4 + np.sin(np.arange(3_000) ** 2)),
}
AXES: list[Axis] = ["step", "time"]


def everything(loss: Floats, look: Look, width: int, height: int) -> Frame:
    """Draws, reads out and exports; returns the picture."""
    run = state(loss, ce=loss, kd=loss)
    shown = plot(run)
    frame = draw(shown, look, width, height)
    readout(frame, shown, look, run)
    assert len(rows(frame)) == height
    assert all(len(line) == width for line in rows(frame))
    return frame


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("axis", AXES)
def test_any_numbers_are_drawn_read_out_and_exported_in_any_width(name: str, log: bool, axis: Axis) -> None:
    loss = np.array(LOSSES[name])
    for smoothing in (0.0, 0.9):
        for width in (1, 2, 3, 4, 7, 8, 23, 24, 43, 44, 60, 120, 299, 500):
            look = Look(log=log, axis=axis, smoothing=smoothing, cursor=len(loss) / 2)
            everything(loss, look, width, 20)
    document = svg(plot(state(loss)), Look(log=log, axis=axis), "x")
    assert "nan" not in document
    assert "inf" not in document
    assert len("".join(csv_lines(plot(state(loss)))).splitlines()) == 1 + 3 * len(loss)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.floats(0.01, 100), st.floats(), st.just(math.nan)), min_size=1, max_size=400),
    st.integers(12, 300),
    st.booleans(),
    st.sampled_from(AXES),
)
def test_every_finite_step_is_a_dot_or_lies_beyond_an_edge_that_says_so(
    values: list[float], width: int, log: bool, axis: Axis
) -> None:
    loss = np.array(values)
    nothing = np.full(len(loss), math.nan)
    # ce and kd have nothing finite: nothing but marks stands over the total.
    shown = plot(state(loss, ce=nothing, kd=np.zeros(len(loss))))
    frame = draw(shown, Look(log=log, axis=axis, smoothing=0.0), width, 16)
    lane = shown.curves[-1].lane
    x = lane.x(axis) - shown.curves[-1].zero(axis)
    columns = np.searchsorted(edges(*frame.window, 2 * frame.box.width)[:-1], x, "right") - 1
    positions = frame.scale.position(loss)
    for value, column, position in zip(values, columns.tolist(), positions.tolist(), strict=True):
        if not math.isfinite(value):
            continue
        if not 0 <= position <= 1:
            assert cell(frame, 0 if position < 0 else frame.box.height - 1, column // 2) in "↑↓▲"
            continue
        dot = min(4 * frame.box.height - 1, math.floor(position * 4 * frame.box.height))
        mark = cell(frame, dot // 4, column // 2)
        assert mark != " "
        assert lit(frame, dot, column) or not 0x2800 <= ord(mark) < 0x2900


def attempts(*parts: tuple[int, int, float]) -> RunState:
    """A run made in attempts: first step, last step and Unix seconds of the first of each."""
    buffer = StepBuffer()
    for first, last, t in parts:
        rows = [(s, t + s - first, 4.0 + 0.01 * s, 3.0, 5.0, 1e-4, 1.0, 10.0, 1.0) for s in range(first, last + 1)]
        buffer.extend([tuple(map(float, row)) for row in rows])
    return replace(state(), steps=buffer.series)


def test_an_attempt_on_a_clock_that_was_set_back_goes_on_where_the_one_before_ended() -> None:
    run = attempts((1, 100, EPOCH), (91, 200, EPOCH - 5_000))
    shown = plot(run)
    x = shown.curves[-1].lane.x("time") - shown.curves[-1].origin
    # The step after the jump shares the moment of the one before it; then seconds count as ever.
    assert x.tolist() == [*range(90), *range(89, 199)]
    for axis in AXES:
        frame = draw(shown, Look(axis=axis, smoothing=0.0), 100, 20)
        assert "total 6.000" in rows(frame)[-1]
        assert "gap" not in rows(frame)[-1]
    sight = Sight().pointed(shown, 150.0)
    said = readout(draw(shown, sight.look, 100, 20), shown, sight.look, run)
    assert said[:2] == ["step 150 (highest of 2)", "total 5.5000 (EMA 5.410)"]
    assert time.strftime("%H:%M:%S", time.localtime(EPOCH - 5_000 + 59)) in said, "the host's own time of that step"


def test_steps_that_were_made_again_are_drawn_once_and_the_wait_between_attempts_is_a_gap_in_time_only() -> None:
    shown = plot(attempts((1, 100, EPOCH), (91, 200, EPOCH + 40_000)))
    assert shown.curves[-1].lane.rows == 200
    steps = rows(draw(shown, Look(smoothing=0.0), 100, 20))
    assert "gap" not in steps[-1]
    times = rows(draw(shown, Look(smoothing=0.0, axis="time"), 100, 20))
    assert "┊ 1 gap" in times[-1]
    assert "11.1h without a step" in "".join(times)
