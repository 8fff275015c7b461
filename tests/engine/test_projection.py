"""From the step times of a smoke to the wall time of the real run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.projection import MIN_STEPS, FixedCosts, project, warm_up_steps
from engine.stream import Projection

FREE = FixedCosts(0.0, 0.0, 0, 0.0, 0)


def projected(seconds: list[float], target: int = 50_000, fixed: FixedCosts = FREE) -> Projection:
    projection = project(seconds, target, fixed)
    assert projection is not None
    return projection


@given(st.integers(MIN_STEPS, 400), st.floats(1e-3, 60.0), st.integers(1, 100_000))
def test_steps_of_one_length_are_projected_exactly(count: int, seconds: float, target: int) -> None:
    told = projected([seconds] * count, target)
    assert (told.p10_seconds, told.p50_seconds, told.p90_seconds) == pytest.approx([seconds * target] * 3)
    assert told.step_seconds == pytest.approx(seconds)
    assert told.target_steps == target
    assert 0 < told.samples < count


def test_fewer_steps_than_ten_are_projected_to_nothing() -> None:
    assert all(project([1.0] * count, 100, FREE) is None for count in range(MIN_STEPS))
    assert projected([1.0] * MIN_STEPS, 100).p50_seconds == 100


@pytest.mark.parametrize("slow", [[90.0], [90.0, 30.0], [90.0, 40.0, 20.0, 4.0]])
def test_compilation_at_the_beginning_is_left_out(slow: list[float]) -> None:
    assert projected(slow + [0.5] * 20).p50_seconds == pytest.approx(25_000)


def test_the_first_tenth_is_left_out_as_warm_up() -> None:
    assert warm_up_steps([1.0] * 200) == 20
    assert projected([1.4] * 20 + [1.0] * 180).p90_seconds == pytest.approx(50_000)


def test_at_most_half_of_the_steps_are_left_out() -> None:
    assert warm_up_steps([50.0] * 9 + [1.0] * 11) == 9
    assert warm_up_steps([50.0] * 10 + [1.0] * 10) == 10
    assert warm_up_steps([50.0] * 15 + [1.0] * 5) == 2  # then the slow ones are what is usual


def test_a_slow_spell_later_on_counts() -> None:
    told = projected([0.5] * 50 + [1.5] * 50)
    assert told.p10_seconds < told.p50_seconds < told.p90_seconds
    assert told.p50_seconds == pytest.approx(50_000 * (40 * 0.5 + 50 * 1.5) / 90, rel=0.05)


def test_fixed_costs_are_added_as_often_as_they_occur() -> None:
    fixed = FixedCosts(
        start_seconds=30.0, evaluation_seconds=2.0, evaluations=12, checkpoint_seconds=5.0, checkpoints=10
    )
    told = projected([1.0] * 20, 1_000, fixed)
    assert fixed.total_seconds == told.fixed_seconds == 104.0
    assert (told.p10_seconds, told.p50_seconds, told.p90_seconds) == pytest.approx([1_104.0] * 3)


def test_the_same_steps_give_the_same_projection() -> None:
    seconds = list(np.random.default_rng(0).lognormal(0, 0.3, 80))
    assert projected(seconds) == projected(seconds)
    assert project(seconds, 50_000, FREE, seed=1) != projected(seconds)


def test_the_range_holds_the_truth_about_as_often_as_it_says() -> None:
    target, held, errors = 50_000, 0, []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        # Noise that lasts for a few steps, as another job's load on the machine does.
        load = np.repeat(generator.lognormal(0, 0.2, 60), 5)
        told = projected(list(0.5 * load * generator.lognormal(0, 0.05, 300)), target)
        truth = 0.5 * target * np.exp(0.2**2 / 2 + 0.05**2 / 2)
        held += told.p10_seconds <= truth <= told.p90_seconds
        errors.append(abs(told.p50_seconds / truth - 1))
        assert told.p10_seconds <= told.p50_seconds <= told.p90_seconds
    assert held >= 36  # an 80% range, from a resampling that knows only one sample
    assert np.median(errors) < 0.05


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-6, 1e4), min_size=MIN_STEPS, max_size=60))
def test_any_steps_give_a_range_in_order_within_the_longest_and_shortest(seconds: list[float]) -> None:
    told = projected(seconds, 100)
    assert told.p10_seconds <= told.p50_seconds <= told.p90_seconds
    assert min(seconds) * 100 * (1 - 1e-9) - 1e-6 <= told.p10_seconds
    assert told.p90_seconds <= max(seconds) * 100 * (1 + 1e-9) + 1e-6
