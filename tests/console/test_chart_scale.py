"""Axes: every label true, no two alike, and an outlier that does not flatten everything else."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from console.chart.scale import fit, number
from console.chart.xticks import round_span, x_ticks

pytestmark = pytest.mark.filterwarnings("error")

VALUES = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 20), st.sampled_from([0.0, 5e-324, 1.7e308])
)


def told(label: str) -> float:
    """The number that a label of the time or step axis stands for."""
    if label[-1] in "kMG":
        return float(label[:-1]) * {"k": 1e3, "M": 1e6, "G": 1e9}[label[-1]]
    total, digits = 0.0, ""
    for character in label.replace(",", "").removeprefix("-"):
        if character in "dhms":
            total += float(digits) * {"d": 86_400, "h": 3_600, "m": 60, "s": 1}[character]
            digits = ""
        else:
            digits += character
    return math.copysign(total + float(digits or 0), -1 if label.startswith("-") else 1)


@settings(deadline=None)
@given(VALUES, VALUES, st.booleans(), st.integers(1, 20))
def test_labels_of_y_differ_rise_and_stand_where_their_number_is(one: float, two: float, log: bool, most: int) -> None:
    scale = fit(np.array([min(one, two)]), np.array([max(one, two)]), log)
    assert scale.low < scale.high
    ticks = scale.ticks(most)
    assert len(ticks) <= most + 1
    assert len({tick.label for tick in ticks}) == len(ticks)
    assert [tick.at for tick in ticks] == sorted({tick.at for tick in ticks})
    for tick in ticks:
        assert len(tick.label) <= 24
        at = float(scale.measure(np.array([float(tick.label)]))[0])
        assert at == pytest.approx(tick.at, abs=max(2e-3 * (scale.high - scale.low), 0.5 * (tick.at < -320)))


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 20), min_size=1, max_size=30), st.booleans())
def test_all_usual_values_are_between_the_edges(values: list[float], log: bool) -> None:
    column = np.array(values)
    position = fit(column, column, log).position(column)
    assert (position >= 0).all()
    assert (position <= 1).all()


def test_one_outlier_among_many_columns_ends_beyond_the_edge_and_a_spike_of_five_times_does_not() -> None:
    column = np.linspace(2, 4, 200)
    column[77] = 20.0
    assert fit(column, column, True).value(0) >= 20
    assert fit(column, column, False).high < 20
    column[77] = 1e12
    assert fit(column, column, True).value(0) < 20
    column[77] = 5.0
    assert fit(column, column, False).high >= 5


def test_identical_values_stand_in_the_middle() -> None:
    for value in (4.25, 0.0, -3.0, 1e300, 1e-300, 5e-324):
        assert 0.2 < float(fit(np.full(30, value), np.full(30, value), False).position(np.array([value]))[0]) < 0.8


def test_what_is_not_above_zero_lies_below_a_logarithmic_axis() -> None:
    scale = fit(np.array([0.0, 2.0, -1.0]), np.array([8.0, 8.0, 8.0]), True)
    assert scale.position(np.array([0.0, -5.0])).tolist() == [math.inf, math.inf]
    assert np.isnan(scale.position(np.array([math.nan]))[0])


@settings(deadline=None)
@example(-5_000.0, 10_000.0, 80, "time")
@given(st.floats(-1e6, 1e9), st.floats(1e-2, 1e9), st.integers(4, 240), st.sampled_from(["step", "time"]))
def test_labels_of_x_differ_do_not_touch_and_say_what_stands_there(
    low: float, span: float, width: int, axis: str
) -> None:
    assume(low + span > low + span / 1_000)
    ticks = x_ticks("step" if axis == "step" else "time", low, low + span, width)
    assert len({tick.label for tick in ticks}) == len(ticks)
    for left, right in itertools.pairwise(ticks):
        assert (right.at - left.at) / span * width > len(right.label)
    for tick in ticks:
        assert told(tick.label) == pytest.approx(tick.at, rel=1e-6, abs=1e-6)


@settings(deadline=None)
@given(st.floats(1e-3, 1e12))
def test_the_window_of_a_growing_run_is_never_much_larger_than_the_run(span: float) -> None:
    assert span * (1 - 1e-12) <= round_span(span) <= span * 1.26


def test_numbers_have_four_digits() -> None:
    assert [number(v) for v in (3.81, 15.6, 1234.4, 0.00123, 1e308)] == [
        "3.810",
        "15.60",
        "1234",
        "0.001230",
        "1.000e+308",
    ]
    assert [number(v) for v in (math.nan, math.inf, -math.inf, 0.0)] == ["NaN", "Infinity", "-Infinity", "0.000"]
