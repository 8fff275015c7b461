"""Moves through the past of a run, without a screen."""

from __future__ import annotations

import pytest

from console.replay import SCRUBS, SPEEDS, Replay, comfortable
from console.run_state import RunState
from tests.console.pane_views import reduced
from tests.streams import smoke_events, stamped

STATE = reduced(stamped(smoke_events(40)))
SPAN = STATE.last_t - STATE.first_t


def lasting(seconds: float) -> RunState:
    return RunState(first_t=1_000.0, last_t=1_000.0 + seconds, events=2)


@pytest.mark.parametrize(
    ("seconds", "speed"), [(0.0, 1), (60.0, 1), (61.0, 3), (3_600.0, 100), (90_000.0, 1_000), (float("inf"), 1)]
)
def test_a_replay_begins_at_a_speed_at_which_one_sees_all_of_it_within_a_minute(seconds: float, speed: int) -> None:
    assert comfortable(lasting(seconds)) == speed


def test_it_is_played_from_the_beginning_at_the_end_and_from_where_it_stands_else() -> None:
    played = Replay().toggled(STATE)
    assert (played.moment, played.playing) == (STATE.first_t, True)
    middle = Replay(moment=STATE.first_t + SPAN / 2).toggled(STATE)
    assert middle.moment == STATE.first_t + SPAN / 2
    assert not middle.toggled(STATE).playing
    assert middle.toggled(STATE).moment == middle.moment


def test_time_passes_as_fast_as_the_speed_says_and_ends_at_the_end() -> None:
    replay = Replay(speed=3).toggled(STATE).passed(2.0, STATE)
    assert replay.moment == STATE.first_t + 6.0
    over = replay.passed(SPAN, STATE)
    assert (over.moment, over.playing, over.speed) == (None, False, 3)
    assert over.passed(1.0, STATE) == over
    stopped = replay.toggled(STATE)
    assert stopped.passed(5.0, STATE) == stopped


def test_speeds_go_up_and_down_and_stay_within_what_there_is() -> None:
    replay = Replay(speed=1)
    seen = []
    for _ in range(len(SPEEDS)):
        seen.append(replay.speed)
        replay = replay.faster(1, STATE)
    assert tuple(seen) == SPEEDS
    assert replay.speed == SPEEDS[-1]
    assert Replay(speed=1).faster(-1, STATE).speed == 1


def test_scrubbing_goes_to_both_ends_and_no_further() -> None:
    replay = Replay().scrubbed(1, STATE)
    assert replay.moment is None
    for _ in range(SCRUBS + 5):
        replay = replay.scrubbed(-1, STATE)
    assert replay.moment == STATE.first_t
    for _ in range(SCRUBS + 5):
        replay = replay.scrubbed(1, STATE)
    assert replay.moment is None
    assert Replay().at_start(STATE).moment == STATE.first_t
    assert Replay(moment=5.0, playing=True).at_end() == Replay()


def test_of_nothing_there_is_no_past() -> None:
    nothing = RunState()
    for replay in (Replay().toggled(nothing), Replay().scrubbed(-1, nothing), Replay().at_start(nothing)):
        assert replay == Replay()


def test_a_clock_that_was_set_back_leads_nowhere_else() -> None:
    state = RunState(first_t=1_000.0, last_t=400.0, events=2)
    assert Replay().toggled(state).passed(1.0, state).moment is None
    assert Replay().scrubbed(-1, state).moment in (None, 1_000.0)
