"""The picture: nothing that happened in a single step may be missing from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from console.chart.envelope import edges
from console.chart.frame import Look, draw
from console.chart.model import Plot, RunLanes, many_runs, slot
from tests.console.chart_runs import Floats, cell, evaluation, lit, plot, rows, state
from tests.streams import EPOCH

pytestmark = pytest.mark.filterwarnings("error")

SIZE = 80, 20
RAW = Look(smoothing=0.0)


def noisy(count: int) -> Floats:
    found: Floats = 4 + 0.1 * np.sin(np.arange(count) * 7.0)
    return found


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 20_000),
    where=st.floats(0, 1),
    spike=st.one_of(st.floats(-1e3, 1e3), st.floats(allow_nan=False, allow_infinity=False)),
    log=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.9, 0.995]),
)
def test_a_spike_of_one_step_is_always_seen(
    count: int, where: float, spike: float, log: bool, smoothing: float
) -> None:
    loss = noisy(count)
    row = min(count - 1, int(where * count))
    loss[row] = spike
    # ce and kd lie elsewhere; nothing stands over the total.
    shown = state(loss, ce=np.full(count, math.nan), kd=np.zeros(count))
    frame = draw(plot(shown), Look(log=log, smoothing=smoothing), *SIZE)
    column = int(np.searchsorted(edges(*frame.window, 2 * frame.box.width)[:-1], row + 1.0, "right")) - 1
    position = float(frame.scale.position(np.array([spike]))[0])
    if position < 0 or position > 1:
        edge = 0 if position < 0 else frame.box.height - 1
        assert cell(frame, edge, column // 2) in "↑↓▲"
        return
    dot = min(4 * frame.box.height - 1, math.floor(position * 4 * frame.box.height))
    mark = cell(frame, dot // 4, column // 2)
    assert mark != " "
    if not smoothing and 0x2800 <= ord(mark) < 0x2900:
        assert lit(frame, dot, column)


def test_a_spike_that_would_flatten_the_rest_is_cut_off_and_told() -> None:
    loss = noisy(10_000)
    loss[5_000] = 9.1e12
    frame = draw(plot(state(loss, kd=np.zeros(10_000), ce=np.ones(10_000))), RAW, *SIZE)
    assert "↑" in rows(frame)[0]
    assert "9.100e+12" in rows(frame)[0]
    assert "↑ 9.100e+12" in rows(frame)[-1]
    assert frame.scale.value(0) < 10


def test_a_spike_of_five_times_is_drawn_to_its_height() -> None:
    loss = noisy(10_000)
    loss[5_000] = 20.0
    frame = draw(plot(state(loss, kd=np.zeros(10_000))), RAW, *SIZE)
    assert frame.scale.value(0) >= 20
    assert "↑" not in "".join(rows(frame))


@settings(deadline=None)
@given(st.lists(st.sampled_from([4.0, math.nan, math.inf, -math.inf]), min_size=1, max_size=300))
def test_values_that_are_not_finite_are_counted_exactly(loss: list[float]) -> None:
    frame = draw(plot(state(loss, ce=np.ones(len(loss)))), RAW, 120, 20)
    bad = sum(not math.isfinite(value) for value in loss)
    assert (f"▲ {bad} non-finite" in rows(frame)[-1]) == bool(bad)
    assert ("▲" in "".join(rows(frame)[:-1])) == bool(bad)


def test_a_stretch_without_a_number_is_marked_at_the_last_one_and_nothing_is_drawn_through_it() -> None:
    loss = np.array([8.0] * 10 + [2.0] * 10 + [math.nan] * 10 + [8.0] * 10)
    frame = draw(plot(state(loss, kd=np.zeros(40), ce=np.full(40, 4.0))), RAW, *SIZE)
    row = int(float(frame.scale.position(np.array([2.0]))[0]) * frame.box.height)
    marked = [c for c in range(frame.box.width) if cell(frame, row, c) == "▲"]
    columns = [frame.cell_of(step) for step in (21.0, 30.0)]
    assert [marked[0], marked[-1]] == columns
    assert "▲ 10 non-finite" in rows(frame)[-1]
    assert "10 non-finite" in "".join(rows(frame)[:-1])
    eights = int(float(frame.scale.position(np.array([8.0]))[0]) * frame.box.height)
    assert all(cell(frame, eights, column) == " " for column in range(columns[0] + 1, columns[1]))


def test_a_run_that_never_had_a_number_is_drawn_all_the_same() -> None:
    nothing = np.full(50, math.nan)
    frame = draw(plot(state(nothing, ce=nothing, kd=nothing)), Look(), *SIZE)
    assert "▲ 50 non-finite" in rows(frame)[-1]
    assert "total NaN" in rows(frame)[-1]


def test_zero_and_below_on_a_logarithmic_axis_are_marked_at_the_bottom() -> None:
    loss = noisy(400)
    loss[100:120], loss[300] = 0.0, -3.0
    frame = draw(plot(state(loss, kd=np.zeros(400), ce=np.ones(400) * 4)), RAW, *SIZE)
    assert rows(frame)[frame.box.height - 1].count("↓") >= 4
    assert "↓ -3.000" in rows(frame)[-1]


@pytest.mark.parametrize(
    "loss",
    [
        [1e308, -1e308, 1e308], [5e-324, 1e-310, 0.0], [1e308] * 9, [math.inf] * 3, [-math.inf, 3.0], [0.0],
        [4.25] * 500,
        [math.nan] * 500 + [1.7e308], np.linspace(-1.7e307, 1.7e307, 999) * 10,
    ],
)  # fmt: skip
@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.9])
def test_numbers_at_the_end_of_the_range_are_drawn(loss: list[float], log: bool, smoothing: float) -> None:
    column = np.array(loss)
    frame = draw(plot(state(column, ce=column, kd=column)), Look(log=log, smoothing=smoothing), *SIZE)
    assert frame.scale.low < frame.scale.high
    assert any(c not in " │┤" for line in rows(frame)[: frame.box.height] for c in line[frame.box.left :])


@given(
    st.integers(0, 500), st.integers(0, 100), st.booleans(), st.integers(0, 40), st.sampled_from(["loss", "agreement"])
)
@settings(deadline=None)
def test_it_is_drawn_in_every_size(width: int, height: int, log: bool, count: int, page: str) -> None:
    shown = state(noisy(count), evals=[evaluation(0, 5.0), evaluation(20, 4.5)] if count % 3 else [])
    look = Look(log=log, cursor=float(count))
    frame = draw(plot(shown, "loss" if page == "loss" else "agreement"), look, width, height)
    assert len(rows(frame)) == height
    assert all(len(line) == width for line in rows(frame))


def test_a_smoothed_curve_stands_over_its_own_envelope() -> None:
    frame = draw(plot(state(4 + 2 * np.sin(np.arange(9_000.0)))), Look(smoothing=0.99), *SIZE)
    slots = set(frame.canvas.slots[: frame.box.height, frame.box.left :].flat)
    assert {slot("band"), slot("total")} <= slots
    raw = draw(plot(state(4 + 2 * np.sin(np.arange(9_000.0)))), RAW, *SIZE)
    assert slot("band") not in set(raw.canvas.slots.flat)


def test_points_that_are_far_apart_are_joined_without_a_hole() -> None:
    frame = draw(plot(state([8.0, 2.0], kd=[0.0, 0.0], ce=[math.nan, math.nan])), RAW, *SIZE)
    cells = [[c not in " │┤" for c in line[frame.box.left :]] for line in rows(frame)[: frame.box.height]]
    assert all(map(any, zip(*cells, strict=True)))
    assert all(map(any, cells[1:]))


def test_missing_steps_leave_a_gap_that_is_marked_and_counted() -> None:
    count = 200
    steps = np.arange(1.0, count + 1)
    steps[100:] += 150
    frame = draw(plot(state(noisy(count), step=steps)), RAW, *SIZE)
    axis = rows(frame)[frame.box.height]
    assert axis.count("╌") > 20
    assert "150 missing" in rows(frame)[frame.box.height - 1]
    assert "┊ 1 gap" in rows(frame)[-1]
    middle = frame.box.left + frame.cell_of(175.0)
    assert all(line[middle] == " " for line in rows(frame)[: frame.box.height - 1])


def test_one_missing_step_among_many_is_marked_too() -> None:
    steps = np.arange(1.0, 5_001.0)
    steps[2_500:] += 1
    frame = draw(plot(state(noisy(5_000), step=steps)), RAW, *SIZE)
    assert rows(frame)[frame.box.height].count("┊") == 1


def test_a_long_pause_leaves_a_gap_on_the_time_axis_only() -> None:
    t = EPOCH + np.arange(300.0)
    t[200:] += 400
    shown = plot(state(noisy(300), t=t))
    assert "gap" in rows(draw(shown, Look(axis="time"), *SIZE))[-1]
    assert "gap" not in rows(draw(shown, Look(), *SIZE))[-1]


def test_a_run_that_stands_still_shows_it_on_the_time_axis() -> None:
    shown = state(noisy(300))
    moving = draw(plot(shown, live=True, now=EPOCH + 302), Look(axis="time"), *SIZE)
    still = draw(plot(shown, live=True, now=EPOCH + 900), Look(axis="time"), *SIZE)
    assert "╌" not in "".join(rows(moving))
    assert rows(still)[still.box.height].count("╌") > 20
    assert "10.0m without a step" in "".join(rows(still))


def test_the_past_stands_still_while_a_run_goes_on() -> None:
    lanes = []
    for count in (1_020, 1_021, 1_090):
        frame = draw(plot(state(noisy(20_000)[:count]), live=True), RAW, *SIZE)
        lanes.append((frame.window, frame.box, frame.scale))
    assert lanes[0] == lanes[1] == lanes[2]


def test_the_window_of_a_run_that_goes_on_never_reaches_beyond_its_target() -> None:
    assert draw(plot(state(noisy(990), target=1_000), live=True), RAW, *SIZE).window == (1.0, 1_000.0)
    assert draw(plot(state(noisy(990), target=1_000)), RAW, *SIZE).window == (1.0, 990.0)


def test_the_legend_tells_each_curve_its_last_value_and_none_that_is_not_there() -> None:
    held = [evaluation(0, 5.0), evaluation(90, 3.95)]
    legend = rows(draw(plot(state(noisy(99), ce=np.full(99, 2.9), kd=np.full(99, 4.2), evals=held)), RAW, *SIZE))[-1]
    assert [part in legend for part in ("━ total 4.", "─ ce 2.900", "┄ kd 4.200", "• held-out 3.950")] == [True] * 4
    alone = rows(draw(plot(state(noisy(99), teacher=None, kd=np.zeros(99))), RAW, *SIZE))[-1]
    assert "kd" not in alone
    assert "held-out" not in alone


def test_a_narrow_legend_keeps_the_total_and_the_alarm() -> None:
    loss = noisy(99)
    loss[50] = math.nan
    legend = rows(draw(plot(state(loss, evals=[evaluation(0, 5.0)])), RAW, 26, 5))[-1]
    assert "total" in legend
    assert "▲ 1" in legend


def test_held_out_losses_are_marked_and_joined() -> None:
    held = [evaluation(0, 5.0), evaluation(50, 6.0), evaluation(99, 5.5)]
    frame = draw(plot(state(noisy(99), evals=held)), RAW, *SIZE)
    for event in held:
        row = int(float(frame.scale.position(np.array([event.loss]))[0]) * frame.box.height)
        assert cell(frame, row, frame.cell_of(event.step)) == "•"
    between = frame.canvas.slots[: frame.box.height, frame.box.left + frame.cell_of(25)]
    assert slot("held-out") in between


def test_the_second_page_shows_agreement_between_zero_and_one() -> None:
    held = [evaluation(0, 5.0, agreement=0.1), evaluation(99, 4.0, agreement=0.4)]
    frame = draw(plot(state(noisy(99), evals=held), "agreement"), Look(), *SIZE)
    assert (frame.scale.low, frame.scale.high, frame.scale.log) == (0.0, 1.0, False)
    assert "• agreement 40.0%" in rows(frame)[-1]
    assert "◆ cosine 0.8000" in rows(frame)[-1]


@pytest.mark.parametrize(
    ("shown", "page", "said"),
    [
        (state(), "loss", "no step yet · phase starting"),
        (state(noisy(9)), "agreement", "no evaluation with the teacher yet"),
        (state(noisy(9), teacher=None), "agreement", "this run has no teacher"),
    ],
)
def test_an_empty_page_says_what_it_waits_for(shown: object, page: str, said: str) -> None:
    frame = draw(plot(shown, page), Look(), *SIZE)  # type: ignore[arg-type]
    assert said in "".join(rows(frame))


def test_runs_laid_over_each_other_carry_their_key_at_their_end() -> None:
    runs = []
    for number, count in enumerate((100, 200)):
        lanes = RunLanes()
        lanes.update(state(noisy(count) + number))
        runs.append((f"run-{'ab'[number]}", number, lanes))
    frame = draw(many_runs(runs, "loss"), RAW, *SIZE)
    assert "1 run-a" in rows(frame)[-1]
    assert "2 run-b" in rows(frame)[-1]
    places = [
        (c, r) for r, line in enumerate(rows(frame)[: frame.box.height]) for c in "12" if c in line[frame.box.left :]
    ]
    assert {key for key, _ in places} == {"1", "2"}
    assert {slot("run-0"), slot("run-1")} <= set(frame.canvas.slots.flat)


def test_names_wider_than_their_letters_do_not_push_the_legend_out_of_line() -> None:
    lanes = RunLanes()
    lanes.update(state(noisy(10)))
    frame = draw(many_runs([("数据蒸馏", 0, lanes), ("a\u0301b", 1, lanes)], "loss"), RAW, 60, 10)
    from rich.cells import cell_len

    assert cell_len(rows(frame)[-1]) == 60
    assert "数据蒸馏" in rows(frame)[-1]


def test_a_narrow_legend_of_many_runs_tells_them_apart_and_keeps_the_alarm() -> None:
    runs = []
    for number, end in enumerate(("alpha-0.3", "alpha-0.5", "t-2")):
        lanes, loss = RunLanes(), noisy(99)
        loss[50] = math.nan
        lanes.update(state(loss))
        runs.append((f"coder-1.5b-to-0.5b-{end}", number, lanes))
    legend = rows(draw(many_runs(runs, "loss"), RAW, 60, 10))[-1]
    assert [part in legend for part in ("1 …alpha-", "2 …alpha-", "3 …t-2 ", "▲ 3")] == [True] * 4
    wide = rows(draw(many_runs(runs, "loss"), RAW, 140, 10))[-1]
    assert "coder-1.5b-to-0.5b-alpha-0.3" in wide
    runs = [(f"{name}-and-a-long-one", number, lanes) for name, (_, number, lanes) in zip("abc", runs, strict=True)]
    assert "▲ 3" in rows(draw(many_runs(runs, "loss"), RAW, 60, 10))[-1]


@pytest.mark.parametrize("row", range(5_000, 5_800, 70))
def test_a_spike_of_a_dashed_curve_is_seen_between_two_dashes_too(row: int) -> None:
    kd = noisy(10_000)
    kd[row] = 20.0
    frame = draw(plot(state(np.full(10_000, 3.0), ce=np.full(10_000, 3.0), kd=kd)), RAW, *SIZE)
    column = int(np.searchsorted(edges(*frame.window, 2 * frame.box.width)[:-1], row + 1.0, "right")) - 1
    dot = math.floor(float(frame.scale.position(np.array([20.0]))[0]) * 4 * frame.box.height)
    assert lit(frame, dot, column)


def test_a_character_that_steers_a_terminal_never_gets_into_a_picture() -> None:
    lanes = RunLanes()
    lanes.update(state(noisy(10)))
    frame = draw(many_runs([("a\x1b[31m\x07b", 0, lanes)], "loss"), RAW, 60, 10)
    assert all(line.isprintable() for line in rows(frame))


def test_the_cursor_stands_at_its_step_and_on_its_value() -> None:
    frame = draw(plot(state(noisy(99))), Look(smoothing=0.0, cursor=40.0), *SIZE)
    column = frame.cell_of(40.0)
    cells = [cell(frame, row, column) for row in range(frame.box.height)]
    assert cells.count("○") == 1
    assert cells.count("│") > 5


def test_what_was_drawn_does_not_depend_on_what_was_drawn_before() -> None:
    loss = np.concatenate((noisy(5_000), [math.nan, 9.0], noisy(300)))
    lanes = RunLanes()
    for count in (10, 4_000, 5_001, 5_100, 2_000, len(loss)):
        shown = state(loss[:count])
        lanes.update(shown)
        from console.chart.model import one_run

        kept: Plot = one_run(lanes, "loss", live=True, now=0.0)
        assert rows(draw(kept, Look(), *SIZE)) == rows(draw(plot(shown, live=True), Look(), *SIZE))
