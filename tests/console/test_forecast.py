"""When a live run ends: near the truth where the truth is known, steady from second to second, honest in a stall."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from console import forecast as module
from console.forecast import Forecast, checkpoint_period, end_text, forecast, period
from console.run_state import Reducer
from console.view import Link, View
from engine.stream import Event, Phase
from tests.console.pane_views import checkpoint, ended, heartbeat, numbered, reduced, train_events, view_of
from tests.streams import EPOCH, RUN, end_event, run_event, smoke_contract, smoke_events, step_event

WHOLE = train_events(3_000, evaluate_every=500, checkpoint_every=400, target_steps=3_000)


@pytest.fixture(autouse=True)
def _in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def sure(view: View) -> Forecast:
    told = forecast(view)
    assert told is not None
    return told


def cut(events: list[Event], step: int) -> list[Event]:
    """The stream up to a step."""
    return events[: next(i for i, e in enumerate(events) if getattr(e, "lr", 0) and e.step == step) + 1]  # type: ignore[attr-defined]


@pytest.mark.parametrize("step", [600, 1_500, 2_500])
def test_the_end_is_where_it_then_is(step: int) -> None:
    truth = WHOLE[-1].t + 10 + 4.1  # the last evaluation and the last checkpoint
    told = sure(view_of(cut(WHOLE, step), 0.0))
    left = truth - cut(WHOLE, step)[-1].t
    assert told.ends[1] == pytest.approx(truth, abs=0.02 * left)
    assert told.seconds[0] <= told.seconds[1] <= told.seconds[2]


def test_evaluations_and_checkpoints_between_steps_are_paid_for() -> None:
    with_them = sure(view_of(cut(WHOLE, 1_500), 0.0))
    steps_alone = 1_500 * float(np.mean([1.0 + 0.1 * (step % 7) for step in range(1, 1_501)]))
    # Two evaluations and three checkpoints are still due before the last ones.
    assert with_them.seconds[1] == pytest.approx(steps_alone + 2 * 10 + 3 * 0.2 + 10 + 4.1, rel=0.01)


def test_noisy_steps_give_a_range() -> None:
    noise = np.random.default_rng(7).lognormal(0.0, 0.6, 601)
    told = sure(view_of(train_events(600, seconds=lambda step: float(noise[step]), target_steps=5_000), 0.0))
    assert told.seconds[0] < 0.98 * told.seconds[1]
    assert told.seconds[2] > 1.02 * told.seconds[1]


def test_there_is_none_before_ten_steps_and_after_the_last() -> None:
    assert forecast(View()) is None
    assert forecast(view_of(train_events(9))) is None
    assert forecast(view_of(train_events(10))) is not None
    assert forecast(view_of(WHOLE)) is None
    end = msgspec.structs.replace(end_event(30), run=RUN, seq=10**6, t=EPOCH + 9_000)
    assert forecast(ended(view_of([*train_events(30), end]))) is None


def test_the_first_steps_that_compile_do_not_count() -> None:
    compiled = train_events(200, seconds=lambda step: 60.0 if step <= 3 else 1.0, target_steps=5_000)
    assert sure(view_of(compiled)).step_seconds == pytest.approx(1.0, rel=0.01)


def test_only_the_last_two_thousand_steps_count() -> None:
    faster = train_events(4_300, seconds=lambda step: 4.0 if step <= 2_000 else 1.0, target_steps=9_000)
    assert sure(view_of(faster)).step_seconds == pytest.approx(1.0, rel=0.01)


def test_the_time_between_two_attempts_is_no_step() -> None:
    first = train_events(100, evaluate_every=10**6, checkpoint_every=10**6)
    again = run_event(attempt=2, mode="train", target_steps=5_000, budget_seconds=None)
    t = first[-1].t + 86_400
    second: list[Event] = [msgspec.structs.replace(again, t=t), Phase(name="train", t=t + 30)]
    second += [msgspec.structs.replace(step_event(s, 2.0, 1.3), t=t + 30 + 1.3 * (s - 100)) for s in range(101, 105)]
    told = sure(view_of(numbered([*first, *second])))
    assert told.seconds[1] == pytest.approx(1.3 * 4_896, rel=0.03)


def test_a_clock_that_jumped_between_two_steps_changes_nothing() -> None:
    events = train_events(300, evaluate_every=10**6, checkpoint_every=10**6)
    for jump in (86_400.0, -86_400.0):
        half = len(events) // 2
        moved = [*events[:half], *(msgspec.structs.replace(e, t=e.t + jump) for e in events[half:])]
        assert sure(view_of(moved)).seconds[1] == pytest.approx(sure(view_of(events)).seconds[1], rel=0.02)


def test_the_end_stays_while_seconds_pass_as_expected() -> None:
    events = cut(WHOLE, 1_500)
    ends = [sure(view_of(events, after)).ends[1] for after in (0.0, 0.4, 0.8, 1.2)]
    assert max(ends) - min(ends) < 0.01


def test_the_end_moves_by_no_more_than_the_steps_explain() -> None:
    view = view_of(WHOLE, 0.0)
    moments = np.arange(WHOLE[-1].t - 2_400, WHOLE[-1].t - 100, 4.0)
    ends = [sure(replace(view, state=view.state.at(t), now=t, scrubbed=True)).ends[1] for t in moments.tolist()]
    assert max(abs(later - earlier) for earlier, later in itertools.pairwise(ends)) < 15


def test_a_stall_moves_the_end_by_as_long_as_it_lasts() -> None:
    events = cut(WHOLE, 1_501)
    first, later = (sure(view_of(events, after)) for after in (10.0, 610.0))
    assert later.ends[1] - first.ends[1] == pytest.approx(600.0, abs=0.01)
    assert later.seconds == pytest.approx(first.seconds)


def test_an_evaluation_that_goes_on_is_expected_to_end() -> None:
    before = sure(view_of(cut(WHOLE, 1_500), 0.0)).ends[1]
    during = sure(view_of(cut(WHOLE, 1_500), 8.0)).ends[1]
    after = sure(view_of(cut(WHOLE, 1_501), 0.0)).ends[1]
    assert during == pytest.approx(before, abs=0.1)
    assert after == pytest.approx(before, abs=2.0)


def test_the_same_view_gives_the_same_forecast_whatever_was_asked_before() -> None:
    views = [view_of(cut(WHOLE, step), 0.5) for step in (700, 701, 1_234)]
    module._known.clear()
    forwards = [forecast(view) for view in views]
    module._known.clear()
    assert [forecast(view) for view in reversed(views)] == forwards[::-1]


def test_it_is_measured_again_only_after_a_hundredth_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    measure = module._measure
    monkeypatch.setattr(module, "_measure", lambda state, rows: measured.append(rows) or measure(state, rows))
    module._known.clear()
    view = view_of(WHOLE)
    for t in view.state.steps.column("t")[2_040:2_100].tolist():
        forecast(replace(view, state=view.state.at(t), now=t, scrubbed=True))
    assert len(measured) <= 4


# Smokes


def smoke(steps: int, after: float, **run: object) -> View:
    events = [e for e in smoke_events(steps, **run)]
    last = max(i for i, e in enumerate(events) if isinstance(e, Phase) and e.name == "train")
    state = Reducer(smoke_contract()).feed(events[: last + 1 + steps])
    return View(state=state, link=Link(status="running", heard=state.last_t, host="gx10"), now=state.first_t + after)


def test_a_smoke_ends_by_its_budget_which_is_known_from_the_beginning() -> None:
    assert sure(smoke(0, 20.0)).seconds == (40.0, 40.0, 40.0)
    assert sure(smoke(12, 50.0)).seconds == (10.0, 10.0, 10.0)
    assert sure(smoke(12, 70.0)).seconds == (0.0, 0.0, 0.0)


def test_a_smoke_of_a_few_steps_ends_by_them() -> None:
    told = sure(smoke(20, 17.0, max_steps=24, budget_seconds=600.0))
    assert told.seconds[1] < 10


# Periods


def test_a_period_is_what_comes_most_often() -> None:
    assert period([]) is None
    assert period([400]) == 400
    assert period([400, 800, 1_200]) == 400
    assert period([400, 800, 1_600, 2_000]) == 400
    assert period(list(range(100_400, 200_000, 400))) == 400
    assert period([-5, 0]) is None


def test_failed_checkpoints_were_due_as_well_and_best_ones_were_not() -> None:
    assert checkpoint_period(reduced(train_events(1_700, failed=[400, 800, 1_600]))) == 400
    assert checkpoint_period(reduced(train_events(300))) is None
    best = [checkpoint(step, kind="best", t=EPOCH + 10_000) for step in (150, 300)]
    assert checkpoint_period(reduced([*train_events(900), *best])) == 400


# Words


def test_an_end_is_told_by_the_operators_clock() -> None:
    noon = 1_763_894_400.0  # Sunday, 2025-11-23 10:40 UTC
    assert end_text(noon, noon - 3_600) == "Sun 11:40"
    assert end_text(noon, noon - 5 * 86_400) == "Sun 11:40"
    assert end_text(noon, noon - 7 * 86_400) == "Sun 23 Nov 11:40"
    assert end_text(noon, noon - 400 * 86_400) == "Sun 23 Nov 2025 11:40"
    assert end_text(math.inf, noon) == "?"


numbers = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=10, max_size=14), numbers, st.integers(-(2**63), 2**63 - 1))
def test_whatever_numbers_a_stream_holds_a_forecast_is_a_time_or_none(
    stamps: list[tuple[float, float]], now: float, target: int
) -> None:
    steps = [msgspec.structs.replace(step_event(i, 2.0, s), t=t) for i, (t, s) in enumerate(stamps, 1)]
    events = numbered([*train_events(0, target_steps=target), *steps, heartbeat(1.0)])
    for link in (Link(status="running", heard=now), Link(host="gx10", heard=1.0)):
        told = forecast(View(state=reduced(events), link=link, now=now))
        assert told is None or all(0 <= each < math.inf for each in told.seconds)
