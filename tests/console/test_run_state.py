"""The reducer: one fold for a live run and a past one, judging for itself what the engine states."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from console.run_log import MAX_LOG_CHARACTERS
from console.run_state import MAX_LOG_LINES, MAX_MARKS, STREAM, Reducer, RunState, Source
from engine.falsifiers import Contract, builtin_contract, parse_contract
from engine.stream import (
    CheckpointFailed,
    End,
    Event,
    Heartbeat,
    Log,
    Measure,
    Phase,
    Projection,
    Verdict,
    Vitals,
    decode_line,
    encode,
)
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


ANYTHING = st.sampled_from(
    [
        *(step_event(step, loss) for step, loss in ((1, 5.0), (2, 4.0), (3, math.nan), (4, 3.0), (9, 2.0))),
        *(msgspec.structs.replace(step_event(step, 1.5), again=True) for step in (1, 2, 4)),
        *(eval_event(step, 2.0) for step in (0, 2, 4)),
        Heartbeat(phase="train", step=1, rss_bytes=1), Vitals(), Log(level="warning", message="look"),
        Phase(name="train"), Phase(name="train", budget_seconds=3.0), Phase(name="import"), Phase(name="judge"),
        run_event(), run_event(attempt=2, target_steps=9), end_event(), end_event(status="FAILED"),
        CheckpointFailed(step=2, kind="best", error="full", seconds=1.0), Measure(name="x", value=1.0),
        Verdict(id="F-FINITE-001", verdict="PASS", severity="fatal", claim="", expected="", observed="", step=1),
        Projection(target_steps=9, p10_seconds=1, p50_seconds=2, p90_seconds=3, step_seconds=1, fixed_seconds=1,
                   samples=9),
    ]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(ANYTHING, max_size=40),
    st.lists(st.sampled_from([0.0, 0.5, 2.0, 700.0, -1.0]), min_size=1, max_size=7),
    st.lists(st.integers(0, 40), max_size=5).map(sorted),
    st.sampled_from([STREAM, Source(verbatim=True), Source(judged_by_us=True)]),
    st.sampled_from([smoke_contract(), parse_contract(builtin_contract("predecessor"), "predecessor.yaml")]),
)
def test_any_stream_gives_the_same_state_at_once_and_event_by_event(
    kinds: list[Event], apart: list[float], cuts: list[int], source: Source, contract: Contract
) -> None:
    t, passing = 0.0, itertools.cycle(apart)
    events = [msgspec.structs.replace(e, run=RUN, seq=n, t=(t := t + next(passing))) for n, e in enumerate(kinds)]
    one, some, all_of_them = (Reducer(contract, source) for _ in range(3))
    for event in events:
        early = one.feed([event])
        assert len(early.log) == len(tuple(early.log))
    for begin, end in itertools.pairwise([0, *cuts, len(events)]):
        some.feed(events[begin:end])
    all_of_them.feed(events)
    assert one.state.steps == some.state.steps == all_of_them.state.steps
    states = [replace(each.state, steps=RunState().steps, log=tuple(each.state.log)) for each in (one, some)]
    expected = replace(all_of_them.state, steps=RunState().steps, log=tuple(all_of_them.state.log))
    assert [repr(state) for state in states] == [repr(expected)] * 2  # NaN is like NaN here


def test_steps_are_no_lines_of_the_log() -> None:
    assert [line.text for line in reduced(stamped([step_event(1, 5.0), Log(level="info", message="m")])).log] == [
        "info: m"
    ]


def test_lines_that_were_looked_at_stay_the_same_objects() -> None:
    reducer, events = Reducer(smoke_contract()), with_verdicts(smoke_events(12))
    unseen = reducer.feed(events[:20])
    first = reducer.feed(events[20:40])
    looked = list(first.log)
    second = reducer.feed(events[40:])
    assert all(a is b for a, b in zip(looked, second.log, strict=False))
    assert all(a is b for a, b in zip(unseen.log, second.log, strict=False))
    assert (looked[-1] in second.log, len(second.log) > len(looked)) == (True, True)


def test_the_log_has_as_many_lines_in_small_pieces_as_in_a_large_one() -> None:
    lines: list[Event] = stamped([Log(level="info", message=f"{i}") for i in range(1, MAX_LOG_LINES + 800)])
    small, looked_at = Reducer(smoke_contract()), Reducer(smoke_contract())
    for begin in range(0, len(lines), 61):
        small.feed(lines[begin : begin + 61])
        assert len(looked_at.feed(lines[begin : begin + 61]).log[-1:]) == 1
    large = reduced(lines).log
    assert len(large) == len(tuple(large)) == MAX_LOG_LINES
    assert large == small.state.log == looked_at.state.log
    assert large[0].text == "info: 800"


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


@pytest.mark.parametrize("looking", [False, True])
def test_memory_has_a_bound_whatever_the_texts_are(looking: bool) -> None:
    def texts(n: int) -> list[Event]:
        long = f"{n:06}" + "x" * 60_000
        verdict = Verdict(id=long, verdict="FAIL", severity="gate", claim="", expected="", observed="", step=0)
        failed = CheckpointFailed(step=n, kind="best", error=long, seconds=1.0)
        sent = map(encode, stamped([Log(level="info", message=long), Phase(name=long), verdict, failed]))
        return [event for event in map(decode_line, sent) if event is not None]

    reducer = Reducer(smoke_contract())
    tracemalloc.start()
    for n in range(600):
        state = reducer.feed(texts(n))
        if looking:
            assert len(state.log) > 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(state.stated) == len(state.checkpoints) == len(state.phases) == 600
    assert state.log[-4].text.startswith("info: 000599")
    assert sum(len(line.text) for line in state.log) <= MAX_LOG_CHARACTERS
    assert peak < 3 * MAX_LOG_CHARACTERS
