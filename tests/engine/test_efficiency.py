"""The meter: means of the steps since the last event, told in time, and a split that adds up."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.efficiency import EVERY_SECONDS, OTHER, Meter
from engine.flops import Flops, Peak

FLOPS = Flops(6.05e9, "6 x 0.494 B + 2 x 1.544 B")
PEAK = Peak(989.5e12, "a data sheet")


def fed(meter: Meter, steps: int, seconds: float, first: int = 1, tokens: int = 8_192) -> list[int]:
    """Adds steps of one length; those at which an event was due, after which one was taken."""
    due = []
    for step in range(first, first + steps):
        if meter.add(step, tokens, seconds):
            due.append(step)
            meter.event(meter.pending, {})
    return due


def test_the_first_event_comes_at_step_10_and_then_one_every_ten_seconds() -> None:
    assert fed(Meter(FLOPS, PEAK), 100, 0.5) == [10, 30, 50, 70, 90]
    assert EVERY_SECONDS == 10.0


def test_slow_steps_are_told_before_there_are_ten() -> None:
    assert fed(Meter(FLOPS, PEAK), 5, 6.0) == [3, 5]
    assert fed(Meter(FLOPS, PEAK), 4, 60.0) == [2, 3, 4]


def test_the_first_step_of_an_attempt_is_left_out() -> None:
    meter = Meter(FLOPS, PEAK)
    assert not meter.add(5_001, 100, 300.0)
    assert (meter.warming, meter.pending) == (True, 0)
    for step in range(5_002, 5_011):
        due = meter.add(step, 100, 0.1)
        assert not meter.warming
    assert due
    event = meter.event(9, {})
    assert (event.step, event.steps) == (5_010, 9)
    assert event.tokens_per_second == pytest.approx(1_000)


def test_utilisation_is_tokens_a_second_times_flop_a_token_over_the_peak_of_all_devices() -> None:
    for devices in (1, 8):
        meter = Meter(FLOPS, PEAK, devices)
        for step in range(1, 4):
            meter.add(step, 64_000, 1.0)
        event = meter.event(2, {})
        assert event.tokens_per_second == 64_000
        assert event.mfu == pytest.approx(64_000 * 6.05e9 / (devices * 989.5e12))
        assert event.peak_flops == devices * 989.5e12
        assert event.peak_source == ("a data sheet" if devices == 1 else "8 x a data sheet")
        assert (event.flops_per_token, event.formula) == (6.05e9, FLOPS.formula)


def test_without_a_peak_there_is_no_utilisation() -> None:
    meter = Meter(FLOPS, None)
    meter.add(1, 10, 1.0)
    meter.add(2, 10, 1.0)
    event = meter.event(1, {})
    assert (event.mfu, event.peak_flops, event.peak_source) == (None, None, "")
    assert event.tokens_per_second == 10


def test_every_window_begins_anew() -> None:
    meter = Meter(FLOPS, PEAK)
    for step, seconds in enumerate((9.0, 1.0, 1.0), 1):
        meter.add(step, 100, seconds)
    assert meter.event(2, {"data": 0.5}).tokens_per_second == 100
    assert meter.pending == 0
    with pytest.raises(ValueError, match="no step"):
        meter.event(0, {})
    meter.add(4, 100, 4.0)
    event = meter.event(1, {"data": 1.0})
    assert (event.steps, event.tokens_per_second, event.split) == (1, 25, {"data": 1.0, OTHER: 3.0})


def test_a_split_of_another_number_of_steps_is_of_a_mean_step() -> None:
    meter = Meter(FLOPS, PEAK)
    for step in range(1, 6):
        meter.add(step, 100, 2.0)
    event = meter.event(5, {"teacher": 5.0, "student": 2.5})
    assert event.split == {"teacher": 1.0, "student": 0.5, OTHER: 0.5}


parts = st.dictionaries(st.sampled_from(["data", "teacher", "loss"]), st.floats(-1, 1e4), max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20), st.integers(0, 30), parts)
def test_the_parts_add_up_to_the_mean_step_whatever_the_clocks_say(
    seconds: list[float], steps: int, split: dict[str, float]
) -> None:
    meter = Meter(FLOPS, PEAK)
    meter.add(1, 1, 1.0)
    for step, each in enumerate(seconds, 2):
        meter.add(step, 1, each)
    event = meter.event(steps, split)
    assert all(each >= 0 for each in event.split.values())
    assert math.fsum(event.split.values()) == pytest.approx(math.fsum(seconds) / len(seconds))
    assert list(event.split)[-1] == OTHER
