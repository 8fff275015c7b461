"""What is kept of a run between two redraws: envelopes, averages, gaps and values that are not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from console.chart.envelope import averaged, edges, envelope
from console.chart.lane import Lane
from console.chart.smooth import Ema
from tests.console.chart_runs import Floats

pytestmark = pytest.mark.filterwarnings("error")

FINITE = st.floats(-1e6, 1e6)
ANY = st.one_of(FINITE, st.sampled_from([math.nan, math.inf, -math.inf]))
BETAS = st.sampled_from([0.6, 0.9, 0.99, 0.995])


def lane(values: Floats, cuts: list[int] | None = None, steps: Floats | None = None, t: Floats | None = None) -> Lane:
    """A lane that was given the values bit by bit."""
    found = Lane(("loss",))
    steps = np.arange(1.0, len(values) + 1.0) if steps is None else steps
    t = 1e9 + steps if t is None else t
    for cut in [*sorted(cuts or []), len(values)]:
        found.update(steps[:cut], t[:cut], {"loss": values[:cut]})
    return found


def naive_average(values: Floats, beta: float) -> list[float]:
    mean, found = 0.0, []
    for n, value in enumerate(values.tolist(), 1):
        mean = beta * mean + (1 - beta) * value
        found.append(mean / (1 - beta**n))
    return found


@settings(deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=400), BETAS)
def test_the_average_is_that_of_the_plain_loop(values: list[float], beta: float) -> None:
    ema = Ema(beta)
    ema.extend(np.array(values))
    assert ema.values == pytest.approx(naive_average(np.array(values), beta), rel=1e-9, abs=1e-6)


@settings(deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=400), BETAS, st.lists(st.integers(0, 400), max_size=5))
def test_an_average_that_grew_bit_by_bit_is_the_whole_one(values: list[float], beta: float, cuts: list[int]) -> None:
    column = np.array(values)
    whole, grown = Ema(beta), Ema(beta)
    whole.extend(column)
    for part in np.split(column, sorted(min(cut, len(column)) for cut in cuts)):
        grown.extend(part)
    assert grown.values == pytest.approx(whole.values, rel=1e-9, abs=1e-6)


def test_an_average_starts_at_the_first_value_and_survives_the_largest_numbers() -> None:
    ema = Ema(0.9)
    ema.extend(np.array([1.7e308, -1.7e308, 5e-324, 3.0]))
    ema.extend(np.full(20_000, 3.0))
    assert np.isfinite(ema.values).all()
    assert ema.values[0] == pytest.approx(1e308)
    assert ema.values[-1] == pytest.approx(3.0)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_envelope_is_the_one_found_by_looking_at_every_row(data: st.DataObject) -> None:
    values = np.array(data.draw(st.lists(ANY, max_size=60)) * data.draw(st.integers(1, 60)))
    found = lane(values, data.draw(st.lists(st.integers(0, len(values)), max_size=3)))
    low = data.draw(st.floats(-10, len(values)))
    columns = data.draw(st.integers(1, 40))
    rows = found.columns("step", edges(low, low + data.draw(st.floats(0.1, len(values) + 20)), columns))
    drawn = envelope(found.tracks["loss"], rows)
    line = averaged(found.tracks["loss"], 0.9, rows)
    finite = values[np.isfinite(values)]
    means = naive_average(finite, 0.9)
    for column in range(columns):
        part = values[rows[column] : rows[column + 1]]
        part = part[np.isfinite(part)]
        if not len(part):
            assert np.isnan([drawn.low[column], drawn.high[column], drawn.first[column], line[column]]).all()
            continue
        exact = drawn.low[column], drawn.high[column], drawn.first[column], drawn.last[column]
        assert exact == (part.min(), part.max(), part[0], part[-1])
        until = int(np.isfinite(values[: rows[column + 1]]).sum())
        assert line[column] == pytest.approx(means[until - 1], rel=1e-9, abs=1e-6)


@settings(deadline=None)
@given(st.data())
def test_every_row_is_in_one_column(data: st.DataObject) -> None:
    steps = np.cumsum(np.array(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=99)), np.float64))
    at = edges(steps[0], steps[-1] + (len(steps) == 1), data.draw(st.integers(1, 50)))
    rows = lane(steps, steps=steps).columns("step", at)
    assert (rows[0], rows[-1]) == (0, len(steps))
    assert (np.diff(rows) >= 0).all()


@settings(deadline=None)
@given(st.lists(ANY, max_size=80), st.lists(st.integers(0, 80), max_size=4))
def test_rows_that_are_not_finite_are_counted_exactly_and_know_where_their_stretch_began(
    values: list[float], cuts: list[int]
) -> None:
    found = lane(np.array(values, np.float64), cuts)
    bad = [row for row, value in enumerate(values) if not math.isfinite(value)]
    since: list[int] = []
    for row in bad:
        since.append(since[-1] if row - 1 in bad else row)
    assert found.bad.tolist() == bad
    assert found.bad_since.tolist() == since


def test_a_step_counts_once_however_many_of_its_losses_are_not_finite() -> None:
    both = Lane(("loss", "ce"))
    columns = {"loss": np.array([1, math.nan, 2, 3]), "ce": np.array([1, math.inf, math.nan, 3])}
    both.update(np.arange(4.0), np.arange(4.0), columns)
    assert both.bad.tolist() == [1, 2]


@settings(deadline=None)
@given(st.data())
def test_steps_that_were_made_again_replace_the_earlier_ones(data: st.DataObject) -> None:
    old = np.array(data.draw(st.lists(ANY, min_size=1, max_size=200)))
    kept = data.draw(st.integers(0, len(old)))
    new = np.concatenate((old[:kept], np.array(data.draw(st.lists(ANY, max_size=200)), np.float64)))
    found, fresh = lane(old), lane(new)
    found.tracks["loss"].average(0.9)
    t = 1e9 + np.arange(1.0, len(new) + 1.0)
    found.update(t - 1e9, t, {"loss": new})
    rows = fresh.columns("step", edges(0, len(new) + 1, 7))
    for now, then in zip(
        (*vars(envelope(found.tracks["loss"], rows)).values(), averaged(found.tracks["loss"], 0.9, rows)),
        (*vars(envelope(fresh.tracks["loss"], rows)).values(), averaged(fresh.tracks["loss"], 0.9, rows)),
        strict=True,
    ):
        assert now == pytest.approx(then, nan_ok=True, rel=1e-9, abs=1e-6)
    assert found.bad.tolist() == fresh.bad.tolist()
    assert found.gaps("time").tolist() == fresh.gaps("time").tolist()


@settings(deadline=None)
@given(st.data())
def test_a_picture_kept_while_a_run_grows_shrinks_or_is_made_again_is_the_one_made_anew(data: st.DataObject) -> None:
    values = np.array(data.draw(st.lists(ANY, min_size=1, max_size=150)))
    at = edges(data.draw(st.floats(-5, 50)), data.draw(st.floats(60, 200)), data.draw(st.integers(1, 12)))
    kept = lane(values[:1])
    for _ in range(4):
        if data.draw(st.booleans()):
            values = np.where(np.arange(len(values)) < data.draw(st.integers(0, 150)), values, values + 1)
        n = data.draw(st.integers(1, len(values)))
        steps = np.arange(1.0, n + 1.0)
        kept.update(steps, 1e9 + steps, {"loss": values[:n]})
        fresh = lane(values[:n])
        rows = kept.columns("step", at)
        assert rows.tolist() == fresh.columns("step", at).tolist()
        assert rows.tolist() == [*np.searchsorted(steps, at[:-1]).tolist(), np.searchsorted(steps, at[-1], "right")]
        now, then = (envelope(each.tracks["loss"], rows) for each in (kept, fresh))
        for one, other in zip(vars(now).values(), vars(then).values(), strict=True):
            assert one.tolist() == pytest.approx(other.tolist(), nan_ok=True, rel=0, abs=0)
        lines = [averaged(each.tracks["loss"], 0.9, rows) for each in (kept, fresh)]
        assert lines[0] == pytest.approx(lines[1], nan_ok=True, rel=1e-9, abs=1e-6)


def test_a_look_into_the_past_and_back_changes_nothing() -> None:
    values = np.array([3.0, math.nan, 2.0, math.inf, 1.0])
    found = lane(values)
    steps = np.arange(1.0, 6.0)
    assert found.update(steps[:2], 1e9 + steps[:2], {"loss": values[:2]})
    assert (found.rows, found.bad.tolist(), len(found.x("time"))) == (2, [1], 2)
    assert found.update(steps, 1e9 + steps, {"loss": values})
    assert (found.rows, found.bad.tolist()) == (5, [1, 3])
    assert not found.update(steps, 1e9 + steps, {"loss": values})


def test_missing_steps_and_long_pauses_are_gaps() -> None:
    steps = np.array([1.0, 2, 3, 7, 8, 9, 10, 11])
    t = 1e9 + np.array([1.0, 2, 3, 4, 5, 60, 61, 62])
    found = lane(np.ones(8), [4, 6], steps, t)
    assert found.gaps("step").tolist() == [3]
    assert found.gaps("time").tolist() == [5]


def test_a_stream_that_tells_of_every_tenth_step_has_no_gaps() -> None:
    steps = np.arange(10.0, 500.0, 10.0)
    assert lane(np.ones(len(steps)), [5, 20], steps).gaps("step").tolist() == []


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.floats(0, 1e9), st.floats(), st.just(math.nan)), min_size=1, max_size=50),
    st.lists(st.integers(0, 50), max_size=3),
)
def test_a_clock_that_was_set_back_or_stopped_never_turns_the_time_axis_round(
    times: list[float], cuts: list[int]
) -> None:
    t = np.array(times)
    found = lane(np.ones(len(t)), cuts, t=t)
    x = found.x("time")
    assert np.isfinite(x).all()
    assert (np.diff(x) >= 0).all()
    first = next((row for row, value in enumerate(times) if math.isfinite(value)), len(times))
    if not any(cut <= first for cut in cuts):  # before the first time there is none to stand in for it
        whole = lane(np.ones(len(t)), t=t).x("time")
        assert x.tolist() == pytest.approx(whole.tolist(), rel=1e-9, abs=1.0)


def test_a_clock_that_is_right_is_not_touched_and_one_set_back_goes_on_at_its_pace() -> None:
    steps = np.arange(1.0, 7.0)
    right = np.array([1.7e9 + 0.1, 1.7e9 + 0.3, 1.7e9 + 0.3, 1.7e9 + 7, 1.7e9 + 7.7, 1.7e9 + 9])
    assert lane(np.ones(6), [2], steps, right).x("time").tolist() == right.tolist()
    back = np.array([100.0, 110, 50, 60, math.nan, 75])
    found = lane(np.ones(6), [3], steps, back)
    assert found.x("time").tolist() == [100, 110, 110, 120, 120, 135]
    again = np.array([100.0, 90, 91, 95, 96])
    found.update(steps[:5], again, {"loss": np.ones(5)})
    assert found.x("time").tolist() == [100, 100, 101, 105, 106]
