"""The reducer: one fold for a live run and a past one, judging for itself what the engine states."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from console.run_state import MAX_LOG_LINES, MAX_MARKS, Reducer, RunState
from engine.stream import End, Event, Heartbeat, Log, Phase, Verdict, decode_line, encode
from tests.streams import (
    EPOCH,
    RUN,
    end_event,
    eval_event,
    run_event,
    smoke_contract,
    smoke_events,
    stamped,
    step_event,
    with_verdicts,
)


def reduced(events: list[Event]) -> RunState:
    return Reducer(smoke_contract()).feed(events)


def doctored(events: list[Event], identifier: str, **changes: object) -> list[Event]:
    return [
        msgspec.structs.replace(e, **changes) if isinstance(e, Verdict) and e.id == identifier else e for e in events
    ]


def test_nothing_is_known_before_the_first_event() -> None:
    state = RunState()
    assert (state.phase, state.target_steps, state.disagreements) == ("starting", None, [])


@pytest.mark.parametrize("steps", [1, 9, 10, 30])
def test_what_is_judged_is_what_the_engine_stated(steps: int) -> None:
    state = reduced(with_verdicts(smoke_events(steps)))
    assert state.disagreements == []
    assert len(state.judged) == len(smoke_contract().falsifiers) - 1  # max_steps was not given
    assert {v.id: v.verdict for v in state.judged} == {key: v.verdict for key, v in state.stated.items()}


def test_a_run_that_broke_off_agrees_with_itself() -> None:
    whole = with_verdicts(smoke_events(10))
    middle = next(i for i, e in enumerate(whole) if isinstance(e, Phase) and e.name == "final-evaluation")
    assert reduced(whole[:middle]).disagreements == []


def test_a_doctored_verdict_is_a_disagreement() -> None:
    lie = doctored(with_verdicts(smoke_events(10, loss=lambda step: 5.0 + step)), "F-DISTILL-SMOKE-001", verdict="PASS")
    assert reduced(lie).disagreements == ["F-DISTILL-SMOKE-001: the engine says PASS, the stream says FAIL"]


def test_a_verdict_that_was_left_out_is_a_disagreement() -> None:
    kept = [e for e in with_verdicts(smoke_events(10)) if not (isinstance(e, Verdict) and e.id == "F-FINITE-001")]
    assert reduced(kept).disagreements == ["F-FINITE-001: the engine says PENDING, the stream says PASS"]


def test_a_verdict_on_what_the_contract_does_not_have_is_a_disagreement() -> None:
    events = doctored(with_verdicts(smoke_events(10)), "F-FINITE-001", id="F-MADE-UP-1")
    assert "F-MADE-UP-1: the engine says PASS, the stream says not in the contract" in reduced(events).disagreements


def test_another_severity_is_a_disagreement() -> None:
    events = doctored(with_verdicts(smoke_events(10)), "F-FINITE-001", severity="warn")
    assert reduced(events).disagreements == ["F-FINITE-001: the engine says warn, the contract says fatal"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 80), max_size=8).map(sorted))
def test_the_state_does_not_depend_on_how_events_arrive(cuts: list[int]) -> None:
    events = with_verdicts(smoke_events(12))
    reducer = Reducer(smoke_contract())
    for begin, end in itertools.pairwise([0, *cuts, len(events)]):
        reducer.feed(events[begin:end])
    assert reducer.state == reduced(events)


def test_a_stream_read_back_gives_the_same_state() -> None:
    events = with_verdicts(smoke_events(12, loss=lambda step: float("inf") if step == 7 else 5.0 / step))
    read = [event for event in (decode_line(encode(event)) for event in events) if event is not None]
    assert reduced(read) == reduced(events)


def test_a_state_never_changes_once_it_was_given() -> None:
    reducer = Reducer(smoke_contract())
    events = with_verdicts(smoke_events(10))
    early = reducer.feed(events[:20])
    kept = (early.judged, dict(early.stated), early.phases, tuple(early.log))
    reducer.feed(events[20:])
    assert (early.judged, early.stated, early.phases, tuple(early.log)) == kept


def test_phases_take_the_seconds_between_their_beginnings() -> None:
    events = [Phase(name="import", t=EPOCH), run_event(t=EPOCH + 2), Phase(name="train", t=EPOCH + 5)]
    events += [step_event(1, 1.0), Phase(name="judge", t=EPOCH + 9), end_event()]
    times = [0.0, 2.0, 5.0, 7.5, 9.0, 9.5]
    timed = [msgspec.structs.replace(e, t=EPOCH + t) for e, t in zip(events, times, strict=True)]
    state = reduced(timed)
    assert [(p.name, p.seconds) for p in state.phases] == [("import", 5.0), ("train", 4.0), ("judge", 0.5)]
    assert (state.first_t, state.last_t) == (EPOCH, EPOCH + 9.5)
    assert reduced(timed[:4]).phases[-1].seconds == 2.5


def test_a_clock_set_back_makes_no_phase_shorter() -> None:
    events: list[Event] = [
        Phase(name="train", run=RUN, seq=0, t=EPOCH),
        Heartbeat(phase="train", step=0, rss_bytes=0, run=RUN, seq=1, t=EPOCH + 8),
        Heartbeat(phase="train", step=0, rss_bytes=0, run=RUN, seq=2, t=EPOCH - 3_600),
    ]
    assert reduced(events).phases[0].seconds == 8


def test_the_first_and_last_of_everything_are_kept() -> None:
    state = reduced(with_verdicts(smoke_events(12)))
    assert state.first_step is not None
    assert state.last_step is not None
    assert (state.first_step.step, state.last_step.step) == (1, 12)
    assert [e.step for e in state.evals] == [0, 12]
    assert state.projection is not None
    assert state.heartbeat is not None
    assert isinstance(state.end, End)
    assert state.phase == "judge"


@pytest.mark.parametrize(("max_steps", "target"), [(None, 500), (7, 7), (900, 500)])
def test_a_run_makes_as_many_steps_as_it_may(max_steps: int | None, target: int) -> None:
    assert reduced([run_event(max_steps=max_steps, target_steps=500)]).target_steps == target


def test_only_the_last_lines_of_a_long_log_are_kept() -> None:
    lines = stamped([Log(level="info", message=str(i)) for i in range(MAX_LOG_LINES + 5)])
    kept = reduced(lines).log
    assert len(kept) == MAX_LOG_LINES
    assert kept[-1].text == f"info: {MAX_LOG_LINES + 4}"


def resumed_events() -> list[Event]:
    """Six steps with an evaluation at each second one; the second attempt begins again after step 3."""
    first: list[Event] = [run_event(mode="train"), Phase(name="train")]
    for step in range(1, 7):
        first.append(step_event(step, 10.0 - step))
        if step % 2 == 0:
            first.append(eval_event(step, 10.0 - step))
    second: list[Event] = [run_event(mode="train", attempt=2), Phase(name="train")]
    second += [msgspec.structs.replace(step_event(step, 20.0 - step), again=step <= 6) for step in range(4, 9)]
    return stamped([*first, *second])


def test_steps_that_are_run_again_are_shown_once_and_as_they_were_at_last() -> None:
    state = reduced(resumed_events())
    assert state.steps.column("step").tolist() == list(range(1, 9))
    assert state.steps.column("loss").tolist() == [9, 8, 7, 16, 15, 14, 13, 12]
    assert [e.step for e in state.evals] == [2]
    assert state.last_step is not None
    assert state.last_step.step == 8


def test_what_a_reader_holds_survives_a_later_attempt() -> None:
    events, reducer = resumed_events(), Reducer(smoke_contract())
    early = reducer.feed(events[:11])
    losses = early.steps.column("loss").tolist()
    reducer.feed(events[11:])
    assert early.steps.column("loss").tolist() == losses == [9, 8, 7, 6, 5, 4]


def test_the_present_is_the_state_itself() -> None:
    state = reduced(with_verdicts(smoke_events(12)))
    assert state.at(state.last_t) is state


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 70))
def test_an_earlier_moment_is_what_was_known_then(cut: int) -> None:
    events = with_verdicts(smoke_events(12))
    whole, then = reduced(events), reduced(events[: cut + 1])
    past = whole.at(events[min(cut, len(events) - 1)].t)
    # Events of the same moment belong together; the state then has them all.
    last = max(i for i, e in enumerate(events) if e.t <= past.last_t)
    then = reduced(events[: last + 1])
    assert past.steps == then.steps
    assert past.evals == then.evals
    assert past.last_step is None or (then.last_step is not None and past.last_step.loss == then.last_step.loss)
    assert {v.id: v.verdict for v in past.judged} == {
        v.id: v.verdict for v in then.judged
    } or not then.judged  # before the run's first event nothing is known to be judged
    assert past.stated == then.stated
    assert [(p.name, p.started) for p in past.phases] == [(p.name, p.started) for p in then.phases]
    assert past.log == then.log
    assert past.end == then.end


def test_every_change_of_a_verdict_is_kept_with_its_time() -> None:
    state = reduced(with_verdicts(smoke_events(12)))
    assert state.history
    assert all(EPOCH <= v.t <= state.last_t for v in state.history)
    assert {v.id: v.verdict for v in state.history} == {v.id: v.verdict for v in state.judged if v.verdict != "PENDING"}


def test_memory_stays_flat_when_a_stream_says_ever_new_things() -> None:
    reducer = Reducer(smoke_contract())
    reducer.feed([run_event(t=EPOCH)])
    for begin in range(0, 30_000, 1_000):
        reducer.feed(
            Verdict(id=f"F-{n}", verdict="PASS", severity="gate", claim="", expected="", observed="", step=0, t=EPOCH)
            for n in range(begin, begin + 1_000)
        )
    assert len(reducer.state.stated) == MAX_MARKS
    assert len(reducer.state.log) == MAX_LOG_LINES
