"""Columns that grow at the end: what a reader holds never changes, and every step stands there once."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from console.series import MAX_ROWS, STEP_COLUMNS, StepBuffer


def row(step: int, loss: float = 1.0) -> tuple[float, ...]:
    return (step, 1_000.0 + step, loss, loss, loss, 1e-4, 1.0, 64, 0.5)


def test_columns_are_what_was_put_in() -> None:
    buffer = StepBuffer()
    buffer.extend([row(1, 5.0), row(2, 4.0)])
    assert buffer.series.column("loss").tolist() == [5.0, 4.0]
    assert buffer.series.column("step").tolist() == [1.0, 2.0]
    assert len(buffer.series) == 2


def test_a_view_stays_as_it_was_while_the_buffer_grows_past_its_room() -> None:
    buffer = StepBuffer()
    buffer.extend([row(step) for step in range(1, 11)])
    early = buffer.series
    kept = early.column("step").copy()
    for begin in range(11, 5_000, 100):
        buffer.extend([row(step) for step in range(begin, begin + 100)])
    assert len(early) == 10
    assert np.array_equal(early.column("step"), kept)
    assert buffer.series.column("step").tolist() == list(range(1, 5_011))


def test_growing_within_its_room_copies_nothing() -> None:
    buffer = StepBuffer()
    buffer.extend([row(1)])
    early = buffer.series
    buffer.extend([row(2)])
    assert np.shares_memory(early.column("loss"), buffer.series.column("loss"))


def test_a_column_cannot_be_written() -> None:
    buffer = StepBuffer()
    buffer.extend([row(1)])
    assert not buffer.series.column("loss").flags.writeable


@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6).map(lambda steps: sorted(set(steps))), max_size=8))
def test_steps_made_again_replace_what_stood_there_and_leave_readers_alone(batches: list[list[int]]) -> None:
    buffer = StepBuffer()
    expected: dict[int, float] = {}
    seen = []
    for number, batch in enumerate(batches):
        buffer.extend([row(step, float(number)) for step in batch])
        expected = {step: loss for step, loss in expected.items() if step < batch[0]}
        expected.update({step: float(number) for step in batch})
        seen.append((buffer.series, dict(expected)))
    for series, wanted in seen:
        assert dict(zip(series.column("step"), series.column("loss"), strict=True)) == wanted


def test_until_cuts_by_time() -> None:
    buffer = StepBuffer()
    buffer.extend([row(step) for step in range(1, 11)])
    assert len(buffer.series.until(1_003.5)) == 3
    assert buffer.series.until(2_000.0) == buffer.series
    assert len(buffer.series.until(0.0)) == 0
    assert STEP_COLUMNS[0] == "step"


def long_run(
    steps: int, most: int, odd: dict[int, float], piece: int = 37, buffer: StepBuffer | None = None, begin: int = 1
) -> StepBuffer:
    """So many steps with falling losses, but for the odd ones."""
    buffer = buffer or StepBuffer(most)
    for first in range(begin, steps + 1, piece):
        last = min(first + piece, steps + 1)
        buffer.extend([row(step, odd.get(step, 5.0 - step / steps)) for step in range(first, last)])
    return buffer


def losses(buffer: StepBuffer) -> dict[float, float]:
    series = buffer.series
    return dict(zip(series.column("step").tolist(), series.column("loss").tolist(), strict=True))


def test_up_to_as_many_steps_as_there_is_room_for_each_has_its_row() -> None:
    series = long_run(100, 100, {}).series
    assert (len(series), series.thinned) == (100, 1)


@pytest.mark.parametrize("steps", [513, 900, 2_000, 20_011])
@pytest.mark.parametrize("value", [9.0, 0.001, math.inf, -math.inf, math.nan])
def test_of_a_long_run_what_stands_out_stays(steps: int, value: float) -> None:
    odd = {7: value, 50: value, steps // 2 + 3: value}
    buffer = long_run(steps, 512, odd)
    kept, series = losses(buffer), buffer.series
    assert len(series) <= 512
    assert series.thinned > 1
    assert kept[steps] == 4.0  # the last one
    far = steps // 2 + 3  # from the others, even where a row stands for hundreds
    assert far in kept
    assert repr(kept[far]) == repr(value)
    assert np.all(np.diff(series.column("step")) > 0)
    assert np.array_equal(series.column("t"), 1_000 + series.column("step"))  # rows are rows of real steps


@pytest.mark.parametrize("steps", [513, 514, 700, 5_003, 20_000])
def test_the_newest_steps_are_all_there(steps: int) -> None:
    series = long_run(steps, 512, {}).series
    assert series.column("step")[-64:].tolist() == list(range(steps - 63, steps + 1))


def test_neighbours_of_what_is_no_number_stay_too() -> None:
    kept = losses(long_run(2_000, 512, {1_001: math.nan, 1_003: 0.001}))
    assert kept[1_003] == 0.001
    assert math.isnan(kept[1_001])


@pytest.mark.parametrize("value", [2.0, math.nan, math.inf])
def test_steps_that_are_all_the_same_stand_there_once_each(value: float) -> None:
    series = long_run(3_000, 256, dict.fromkeys(range(3_001), value)).series
    assert np.all(np.diff(series.column("step")) > 0)
    assert len(series) > 64
    assert series.column("step")[-1] == 3_000


def test_a_row_stands_for_as_many_steps_as_it_says() -> None:
    series = long_run(20_000, 512, {}).series
    steps = series.column("step")
    old = steps[steps < 10_000]
    assert 20_000 / 512 <= series.thinned <= 4 * 20_000 / 512
    assert np.diff(old).mean() == pytest.approx(series.thinned, rel=0.1)
    assert series.until(5_000.0).thinned == series.thinned


@given(st.lists(st.integers(1, 400), max_size=12), st.integers(16, 60))
def test_thinning_does_not_depend_on_how_steps_arrive(pieces: list[int], most: int) -> None:
    at_once, in_pieces = StepBuffer(most), StepBuffer(most)
    rows = [row(step, math.sin(step)) for step in range(1, sum(pieces) + 1)]
    at_once.extend(rows)
    for piece in pieces:
        in_pieces.extend(rows[:piece])
        del rows[:piece]
        assert len(in_pieces.series) <= most
    assert in_pieces.series == at_once.series
    assert in_pieces.series.thinned == at_once.series.thinned


@pytest.mark.parametrize("again", [1, 2, 49, 333, 900, 999])
def test_steps_made_again_replace_what_was_thinned(again: int) -> None:
    buffer = long_run(1_000, 256, {3: 9.0})
    early = buffer.series
    kept = early.column("loss").copy()
    long_run(2_000, 256, {again + 40: 8.0}, buffer=buffer, begin=again)
    steps = buffer.series.column("step")
    assert len(steps) <= 256
    assert np.all(np.diff(steps) > 0)
    assert steps[-1] == 2_000
    assert losses(buffer)[again + 40] == 8.0
    assert (3.0 in steps) == (again > 3)
    assert np.diff(steps[steps < 900]).mean() == pytest.approx(buffer.series.thinned, rel=0.25)
    assert np.array_equal(early.column("loss"), kept)


def test_memory_has_a_bound_that_a_real_run_does_not_reach() -> None:
    buffer, steps = StepBuffer(), np.arange(1.0, (1 << 17) + 1)
    assert MAX_ROWS >= 1_000_000
    tracemalloc.start()
    for piece in range(24):  # three million
        buffer.append(np.stack([steps + piece * len(steps)] * len(STEP_COLUMNS)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(buffer.series) <= MAX_ROWS
    assert peak < 4 * 72 * MAX_ROWS
