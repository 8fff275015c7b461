"""Columns that grow at the end: what a reader holds never changes, and every step stands there once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from console.series import STEP_COLUMNS, StepBuffer


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
    buffer, expected = StepBuffer(), {}
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
