"""The state of a run at one moment: an end that was heard of, the way to the host, and three clocks."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from console.conclusion import conclude
from console.outlook import (
    CHANGED_NOTE,
    EXIT_MEANINGS,
    ages,
    by_urgency,
    checkpoint_phrase,
    disagreements,
    fraction_done,
    host_now,
    longest_wait,
    outlook,
    verdict_counts,
    worst_verdict,
)
from console.palette import RUNS
from console.run_state import Reducer, RunState
from console.times import age, clock, date
from console.view import Link, View
from dispatch.liveness import FIRST_STEP_SECONDS
from dispatch.manifest import EndedStall, ExitRecord
from engine.errors import ExitCode
from engine.stream import End, Event, Phase, Verdict
from tests.console.pane_views import (
    checkpoint,
    ended,
    evaluation,
    failure,
    heartbeat,
    numbered,
    reduced,
    train_events,
    verdict,
    view_of,
)
from tests.streams import EPOCH, RUN, end_event, smoke_contract, smoke_events, step_event, with_verdicts


def going_on(steps: int = 30) -> list[Event]:
    """A run in the phase train whose last event is a step, with a heartbeat a moment before it."""
    events = train_events(steps)
    return numbered([*events, heartbeat(events[-1].t, step=steps)])


def after_heartbeats(events: list[Event], seconds: float) -> list[Event]:
    """The same, with nothing but heartbeats for so long."""
    last = events[-1].t
    beats = [heartbeat(last + apart) for apart in range(5, int(seconds) + 1, 5)]
    return numbered([*events, *beats])


def record(**changes: object) -> ExitRecord:
    whole = ExitRecord(v=1, run=RUN, exit_code=0, signal=None, started=EPOCH, ended=EPOCH + 9, seconds=9.0)
    return msgspec.structs.replace(whole, **changes)


def smoke_view(end: End | None, *, exit_record: ExitRecord | None = None, events: list[Event] | None = None) -> View:
    whole = events or with_verdicts(smoke_events(12), end=end)
    state = Reducer(smoke_contract()).feed(whole if end else whole[:-1])
    return View(state=state, link=Link(status="ended", exit=exit_record, live=False), now=state.last_t)


# Ended


@pytest.mark.parametrize(
    ("end", "status", "code"),
    [
        (end_event(), "COMPLETED", ExitCode.OK),
        (end_event(status="FAILED", exit_code=1), "FAILED", ExitCode.FAILED),
        (end_event(status="STOPPED", exit_code=130), "STOPPED", ExitCode.INTERRUPTED),
        (end_event(status="TIMEOUT", exit_code=4), "TIMEOUT", ExitCode.TIMEOUT),
        (end_event(status="CRASHED", exit_code=5), "CRASHED", ExitCode.UNDECIDED),
        (end_event(exit_code=1), "DISPUTED", ExitCode.UNDECIDED),
        (end_event(status="FAILED", exit_code=77), "FAILED", ExitCode.UNDECIDED),
    ],
)
def test_an_ended_run_is_what_the_headless_front_end_says_of_it(end: End, status: str, code: ExitCode) -> None:
    view = smoke_view(end, exit_record=record())
    seen, said = outlook(view), conclude(view.state, view.link.exit)
    assert (seen.status, seen.exit_code) == (status, code)
    assert (seen.status, seen.reason, seen.exit_code) == (said.status, said.reason, said.exit_code)
    assert seen.ended
    assert status in RUNS
    assert code in EXIT_MEANINGS


@pytest.mark.parametrize("end", [None, end_event(status="STOPPED", exit_code=130)])
def test_a_run_that_its_supervisor_ended_for_a_stall_timed_out(end: End | None) -> None:
    ended = record(exit_code=None, signal=9, stall=EndedStall(phase="train", seconds=900.0))
    seen = outlook(smoke_view(end, exit_record=ended))
    assert (seen.status, seen.exit_code) == ("TIMEOUT", ExitCode.TIMEOUT)
    assert seen.reason == "killed by SIGKILL, ended by its supervisor after 900 s without progress, in phase train"


def test_a_run_that_was_complete_before_it_hung_is_complete() -> None:
    ended = record(exit_code=None, signal=9, stall=EndedStall(phase="judge", seconds=900.0))
    assert outlook(smoke_view(end_event(), exit_record=ended)).status == "COMPLETED"


def test_a_run_that_a_reboot_took_along_is_lost_and_says_so() -> None:
    view = view_of(going_on())
    lost = replace(view, link=Link(status="lost", live=False, rebooted=True))
    assert outlook(lost).reason == "its host was started anew while it ran, last phase train; see launch.log"
    said = conclude(lost.state, None, rebooted=True)
    assert said.reason.startswith("its host was started anew while it ran, without an end event")
    assert said.exit_code == ExitCode.UNDECIDED


def test_an_end_counts_before_the_exit_was_seen() -> None:
    view = smoke_view(end_event())
    live = replace(view, link=Link(status="running", heard=view.now, live=True), now=view.now + 3600)
    assert outlook(live).status == "COMPLETED"


def test_an_exit_without_an_end_is_a_crash_that_tells_how() -> None:
    seen = outlook(smoke_view(None, exit_record=record(exit_code=None, signal=9)))
    assert seen.status == "CRASHED"
    assert "killed by SIGKILL" in seen.reason


def test_no_end_and_no_process_is_lost_and_not_failed() -> None:
    view = view_of(going_on(), 30, status="lost", live=False)
    assert outlook(view).status == "LOST"
    assert outlook(view).ended


def test_a_doctored_verdict_makes_an_ended_run_disputed() -> None:
    events = with_verdicts(smoke_events(12))
    lie = [msgspec.structs.replace(e, verdict="FAIL") if isinstance(e, Verdict) and e.step == 12 else e for e in events]
    assert outlook(smoke_view(end_event(), events=lie)).status == "DISPUTED"


def test_a_good_run_whose_files_were_changed_since_is_not_believed() -> None:
    view = replace(smoke_view(end_event()), notes=(f"{CHANGED_NOTE}events.jsonl: changed", "something else"))
    seen = outlook(view)
    assert (seen.status, seen.exit_code) == ("CHANGED", ExitCode.FAILED)
    assert seen.reason == "not as it was when the run ended: events.jsonl: changed"
    failed = smoke_view(end_event(status="FAILED", exit_code=1))
    assert outlook(replace(failed, notes=view.notes)).status == "FAILED"


# Going on


def test_a_run_starts_until_it_has_told_what_it_is() -> None:
    events = train_events(1)
    assert outlook(View()).status == "STARTING"
    assert outlook(view_of(events[:2])).status == "STARTING"
    assert outlook(view_of(events[:4])).status == "RUNNING"


def test_the_process_is_stalled_when_nothing_is_heard_for_longer_than_its_heartbeats_allow() -> None:
    assert outlook(view_of(going_on(), 19.9)).status == "RUNNING"
    seen = outlook(view_of(going_on(), 34.0))
    assert seen.status == "STALLED"
    assert seen.alarm == ("nothing heard for 34 s", "last step 34 s ago", "phase train")


def test_a_process_that_lives_is_stalled_when_it_makes_no_step() -> None:
    assert outlook(view_of(after_heartbeats(going_on(), 55), 2)).status == "RUNNING"
    seen = outlook(view_of(after_heartbeats(going_on(), 240), 2))
    assert seen.status == "STALLED"
    assert " · ".join(seen.alarm) == "no step for 4 min · heartbeat 2 s · phase train"


def test_slow_steps_may_take_twenty_times_their_mean() -> None:
    events = train_events(30, seconds=lambda step: 10.0)
    assert outlook(view_of(after_heartbeats(events, 190), 2)).status == "RUNNING"
    assert outlook(view_of(after_heartbeats(events, 210), 2)).status == "STALLED"


def test_an_evaluation_that_takes_minutes_by_habit_is_no_stall() -> None:
    events = going_on()
    slow = numbered([*events, evaluation(30, 2.0, events[-1].t, seconds=100.0), heartbeat(events[-1].t + 90)])
    assert longest_wait(reduced(slow)) == 200.0
    assert outlook(view_of(slow, 1)).status == "RUNNING"


def test_an_evaluation_ends_the_wait_for_a_step() -> None:
    events = after_heartbeats(going_on(), 55)
    last = events[-1].t
    events = numbered([*events, evaluation(30, 2.0, last), *(heartbeat(last + apart) for apart in (5, 10, 15))])
    assert outlook(view_of(events, 2)).status == "RUNNING"


def test_no_step_is_waited_for_outside_of_training() -> None:
    events = going_on()
    events = numbered([*events, Phase(name="export", t=events[-1].t)])
    assert outlook(view_of(after_heartbeats(events, 600), 2)).status == "RUNNING"


def test_the_first_step_of_every_attempt_may_take_longer_than_the_others() -> None:
    events = going_on(0)
    assert longest_wait(reduced(events)) == FIRST_STEP_SECONDS
    assert outlook(view_of(after_heartbeats(events, 240), 2)).status == "RUNNING"
    assert outlook(view_of(after_heartbeats(events, 310), 2)).status == "STALLED"
    begun = going_on()
    again = [msgspec.structs.replace(each, t=each.t + 1_000) for each in train_events(0)]
    second = numbered([*begun, *again])
    assert longest_wait(reduced(begun)) < longest_wait(reduced(second)) == FIRST_STEP_SECONDS


def test_the_link_has_a_clock_of_its_own() -> None:
    view = view_of(going_on(), 240, problem="connection refused")
    assert ages(view).link is None, "it never answered"
    view = replace(view, link=replace(view.link, answered=view.now - 33.0))
    assert ages(view).link == pytest.approx(33.0)
    assert ages(replace(view, scrubbed=True)).link is None


def test_a_phase_over_its_budget_is_a_stall() -> None:
    events = going_on()
    events = numbered([*events, Phase(name="export", budget_seconds=300.0, t=events[-1].t)])
    assert outlook(view_of(after_heartbeats(events, 290), 2)).status == "RUNNING"
    seen = outlook(view_of(after_heartbeats(events, 310), 2))
    assert seen.status == "STALLED"
    assert seen.alarm[0] == "phase export for 5 min of its 5 min"


def test_a_host_that_cannot_be_reached_is_not_a_run_that_failed() -> None:
    seen = outlook(view_of(going_on(), 240, problem="connection refused"))
    assert seen.status == "UNREACHABLE"
    assert not seen.ended
    assert seen.alarm == (
        "gx10 cannot be reached",
        "last heard 4 min ago",
        "the run may go on",
        "connection refused",
    )


def test_a_stream_that_is_broken_for_good_is_told_as_such() -> None:
    seen = outlook(view_of(going_on(), 1, problem="byte 7: not JSON", live=False))
    assert seen.status == "UNREACHABLE"
    assert seen.alarm[:2] == ("the stream cannot be read", "byte 7: not JSON")


# Clocks


def test_a_host_whose_clock_is_an_hour_ahead_or_behind_is_not_stalled() -> None:
    for skew in (-3600.0, 3600.0):
        view = view_of(going_on(), 3)
        ours = replace(view, link=replace(view.link, heard=view.link.heard + skew), now=view.now + skew)
        assert outlook(ours).status == "RUNNING"
        assert ages(ours).step == pytest.approx(3.0, abs=0.01)


def test_the_silence_before_we_listened_counts_where_both_clocks_are_one() -> None:
    view = view_of(going_on(), 300, host="localhost")
    listened = replace(view, link=replace(view.link, heard=view.now - 1))
    assert ages(listened).data == pytest.approx(300)
    assert outlook(listened).status == "STALLED"


def test_our_clock_set_back_makes_nothing_younger_than_now() -> None:
    view = view_of(going_on(), -3600)
    assert ages(view).data == 0.0
    assert outlook(view).status == "RUNNING"


def test_the_hosts_clock_set_back_is_no_stall_and_no_negative_age() -> None:
    events = going_on()
    back = numbered([*events, heartbeat(events[-1].t - 3600)])
    view = view_of(back, 2)
    assert ages(view).step is None
    assert ages(view).heartbeat == pytest.approx(2.0)
    assert outlook(view).status == "RUNNING"


def test_steps_made_after_a_clock_was_set_back_are_aged_again() -> None:
    events = going_on()
    t = events[-1].t - 3600
    back = numbered([*events, msgspec.structs.replace(step_event(31, 2.0), t=t), heartbeat(t + 240)])
    assert outlook(view_of(back, 2)).status == "STALLED"


# The past


def test_the_past_is_judged_by_what_was_known_then() -> None:
    events = after_heartbeats(going_on(), 240)
    step = max(e.t for e in events[:-48])
    view = ended(view_of([*events, msgspec.structs.replace(end_event(30), seq=len(events), t=events[-1].t, run=RUN)]))
    for after, status in ((30.0, "RUNNING"), (200.0, "STALLED")):
        past = replace(view, state=view.state.at(step + after), now=step + after, scrubbed=True)
        assert outlook(past).status == status


# Verdicts


def test_verdicts_are_counted_and_ordered_with_the_worst_first() -> None:
    judged = tuple(
        verdict(f"F-{i}", word, severity=severity)
        for i, (word, severity) in enumerate(
            [("PASS", "gate"), ("FAIL", "warn"), ("PENDING", "gate"), ("FAIL", "fatal"), ("UNKNOWN", "gate")]
        )
    )
    state = RunState(judged=judged)
    assert verdict_counts(state) == [("FAIL", 2), ("UNKNOWN", 1), ("PENDING", 1), ("PASS", 1)]
    assert [v.id for v in by_urgency(judged)] == ["F-1", "F-3", "F-4", "F-2", "F-0"]
    worst = worst_verdict(state)
    assert worst is not None
    assert worst.id == "F-3"
    assert worst_verdict(RunState()) is None


def test_a_batch_that_ended_before_a_verdict_was_stated_is_no_disagreement() -> None:
    events = with_verdicts(smoke_events(12))
    first = next(i for i, e in enumerate(events) if isinstance(e, Verdict))
    torn = Reducer(smoke_contract()).feed(events[:first])
    view = View(state=torn, link=Link(status="running", heard=torn.last_t), now=torn.last_t)
    assert torn.disagreements
    assert disagreements(view) == []
    later = Reducer(smoke_contract()).feed(
        [*events[:first], msgspec.structs.replace(heartbeat(EPOCH), seq=99, run=RUN)]
    )
    assert disagreements(replace(view, state=later)) == later.disagreements


def test_an_ended_run_tells_every_disagreement() -> None:
    events = [e for e in with_verdicts(smoke_events(12)) if not isinstance(e, Verdict)]
    view = smoke_view(end_event(), events=events)
    assert disagreements(view) == view.state.disagreements != []


# How far, how old


def test_a_training_is_done_by_its_steps() -> None:
    assert fraction_done(view_of(train_events(500))) == pytest.approx(0.1)
    assert fraction_done(View()) is None


def test_a_smoke_is_done_by_its_steps_or_its_time_whichever_is_further() -> None:
    events = smoke_events(12)
    state = Reducer(smoke_contract()).feed(events[:30])
    link = Link(status="running", heard=state.last_t, host="gx10")
    view = View(state=state, link=link, now=state.first_t + 45.0)
    assert fraction_done(view) == pytest.approx(0.75)
    few = Reducer(smoke_contract()).feed(smoke_events(12, max_steps=13))
    assert fraction_done(View(state=few, link=link, now=few.first_t + 1)) == pytest.approx(12 / 13)


def test_a_completed_run_is_done_whatever_its_steps() -> None:
    assert fraction_done(smoke_view(end_event())) == 1.0
    assert fraction_done(smoke_view(end_event(status="STOPPED", exit_code=130))) != 1.0


def test_the_last_checkpoint_in_a_phrase() -> None:
    events = train_events(30)
    run_started = events[:20]
    t = events[-1].t
    assert checkpoint_phrase(reduced(run_started)) == "no ckpt yet"
    assert checkpoint_phrase(reduced(run_started), ended=True) == "no ckpt"
    assert checkpoint_phrase(reduced([*run_started, checkpoint(12_000, t=t)])) == "ckpt 12,000 verified"
    assert checkpoint_phrase(reduced([*run_started, failure(8_000, t=t)])) == "ckpt 8,000 FAILED, none before it"
    both = [*run_started, checkpoint(6_000, t=t), failure(8_000, t=t)]
    assert checkpoint_phrase(reduced(both)) == "ckpt 8,000 FAILED, last good 6,000"
    assert checkpoint_phrase(reduced([*both, checkpoint(9_000, t=t)])) == "ckpt 9,000 verified"
    assert checkpoint_phrase(Reducer(smoke_contract()).feed(smoke_events(12))) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (0.93, "0.9 s"),
        (0.97, "1 s"),
        (34.4, "34 s"),
        (119.4, "119 s"),
        (119.6, "2 min"),
        (240.0, "4 min"),
        (11_400.0, "3 h 10 min"),
        (5 * 86_400 + 7_300, "5 d 2 h"),
        (math.inf, "?"),
    ],
)
def test_ages_take_few_figures(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_a_stamp_that_is_no_time_is_shown_as_unknown() -> None:
    assert clock(1e300) == date(math.nan) == clock(-math.inf) == "?"


numbers = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None)
@given(numbers, numbers, numbers, st.integers(-(2**63), 2**63 - 1), st.sampled_from(["train", "smoke"]))
def test_whatever_numbers_a_stream_holds_there_is_an_outlook(
    t: float, seconds: float, now: float, steps: int, mode: str
) -> None:
    events = train_events(3, mode=mode, target_steps=steps, budget_seconds=seconds)
    events.append(msgspec.structs.replace(step_event(steps, seconds, seconds), t=t, run=RUN, seq=99))
    state = reduced(events)
    for link in (Link(status="running", heard=t), Link(host="gx10", heard=now), Link(live=False)):
        view = View(state=state, link=link, now=now)
        assert outlook(view).status in RUNS
        done = fraction_done(view)
        assert done is None or 0 <= done <= 1
        assert all(each is None or each >= 0 for each in (ages(view).data, ages(view).heartbeat, ages(view).step))
        assert isinstance(host_now(view), float)
