"""Contracts as they are written, and verdicts as a fold over the stream."""

from __future__ import annotations

import itertools
import math
import pickle
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.contract import Contract
from engine.errors import ConfigError, ExitCode
from engine.falsifiers import (
    CALM,
    FAIL,
    JUDGE_PHASE,
    PASS,
    PENDING,
    UNKNOWN,
    Judge,
    builtin_contract,
    exit_code_of,
    parse_contract,
)
from engine.judging import mean_of
from engine.stream import (
    EVENT_TYPES,
    Event,
    Heartbeat,
    Log,
    Measure,
    Phase,
    Projection,
    Run,
    Step,
    Verdict,
    Vitals,
    decode_line,
    encode,
)
from tests.streams import (
    EPOCH,
    end_event,
    eval_event,
    run_event,
    smoke_contract,
    smoke_events,
    stamped,
    step_event,
    with_verdicts,
)

JUDGE = Phase(name=JUDGE_PHASE, detail="steps")


def contract(*bodies: str) -> Contract:
    lines = [f"  - {{id: F-TEST-{i:03}, claim: it holds, {body}}}" for i, body in enumerate(bodies)]
    return parse_contract("\n".join(["version: 1", "name: test", "falsifiers:", *lines]), "test.yaml")


def judged(what: str | Contract, *events: Event, **run: Any) -> Verdict:
    """The only verdict on a run of these events, each half a second after the one before."""
    judge = Judge(contract(what) if isinstance(what, str) else what)
    for event in stamped([run_event(**run), *events]):
        judge.observe(event)
    [verdict] = judge.verdicts
    return verdict


def measure(value: float) -> Measure:
    return Measure(name="x", value=value)


@pytest.mark.parametrize("mode", ["smoke", "train"])
def test_a_built_in_contract_parses_and_says_what_is_fatal(mode: str) -> None:
    parsed = parse_contract(builtin_contract(mode), mode)
    assert parsed.name == mode
    assert {f.id for f in parsed.falsifiers if f.severity == "fatal"} >= {
        "F-DISTILL-KDSTEP-001", "F-DISTILL-TEACHER-002", "F-DISTILL-V2-001-TEACHER-DIVERGENCE", "F-FINITE-001",
    }  # fmt: skip


def test_from_10_steps_on_the_smoke_contract_is_fully_judged_and_passes() -> None:
    judge = Judge(smoke_contract())
    for event in smoke_events(10, max_steps=10, reason="max_steps"):
        judge.observe(event)
    assert {v.id: v.verdict for v in judge.verdicts} == {f.id: PASS for f in smoke_contract().falsifiers}
    assert exit_code_of(judge.verdicts) == ExitCode.OK


def test_with_9_steps_the_smoke_contract_is_undecided() -> None:
    judge = Judge(smoke_contract())
    for event in smoke_events(9):
        judge.observe(event)
    undecided = {v.id: v.observed for v in judge.verdicts if v.verdict != PASS}
    assert undecided == {
        "F-DISTILL-PIPELINE-001": "not enough data: 9 of 10 values",
        "FT-SMOKE-003": "missing: projection.p50_seconds",
    }
    assert exit_code_of(judge.verdicts) == ExitCode.UNDECIDED


def test_what_needs_a_teacher_or_max_steps_is_left_out_of_a_run_without() -> None:
    judge = Judge(smoke_contract())
    for event in smoke_events(10, teacher=None):
        judge.observe(event)
    left_out = {f.id for f in smoke_contract().falsifiers} - {v.id for v in judge.verdicts}
    assert left_out == {
        "F-DISTILL-TEACHER-002", "F-DISTILL-V2-001-TEACHER-DIVERGENCE", "F-DISTILL-KD-002", "FT-SMOKE-001",
    }  # fmt: skip
    assert exit_code_of(judge.verdicts) == ExitCode.OK


@pytest.mark.parametrize(
    ("limit", "value", "verdict"),
    [
        ("at_most: 1", 1.0, PASS),
        ("at_most: 1", math.nextafter(1, 2), FAIL),
        ("at_least: 1", 1.0, PASS),
        ("at_least: 1", math.nextafter(1, 0), FAIL),
        ("below: 1", math.nextafter(1, 0), PASS),
        ("below: 1", 1.0, FAIL),
        ("above: 1", math.nextafter(1, 2), PASS),
        ("above: 1", 1.0, FAIL),
        ("at_most: 1", -math.inf, PASS),
        ("above: 1", math.inf, PASS),
        ("at_most: 1", math.inf, FAIL),
    ],
)
def test_a_threshold_holds_to_the_last_bit(limit: str, value: float, verdict: str) -> None:
    assert judged(f"kind: threshold, metric: measure.x, {limit}", measure(value)).verdict == verdict


@pytest.mark.parametrize("over", ["each", "last", "min", "max"])
@pytest.mark.parametrize("limit", ["at_most: 1", "at_least: -1", "below: 1", "above: -1"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_never_passes_a_threshold(over: str, limit: str, place: int) -> None:
    values = [0.0, 0.0, 0.0]
    values[2 if over == "last" else place] = math.nan
    verdict = judged(f"kind: threshold, metric: measure.x, {limit}, over: {over}", *map(measure, values), JUDGE)
    assert (verdict.verdict, verdict.observed) == (FAIL, "nan")


@pytest.mark.parametrize(
    ("over", "values", "verdict", "observed"),
    [
        ("each", [1, 2], PASS, "2"),
        ("each", [1, 9, 2], FAIL, "9"),
        ("last", [9, 2], PASS, "2"),
        ("last", [2, 9], FAIL, "9"),
        ("min", [9, 2, 8], PASS, "2"),
        ("min", [9, 4, 8], FAIL, "4"),
        ("max", [1, 3, 2], PASS, "3"),
        ("max", [1, 4, 2], FAIL, "4"),
    ],
)
def test_a_threshold_counts_each_the_last_the_least_or_the_largest_value(
    over: str, values: list[float], verdict: str, observed: str
) -> None:
    told = judged(f"kind: threshold, metric: measure.x, at_most: 3, over: {over}", *map(measure, values), JUDGE)
    assert (told.verdict, told.observed) == (verdict, observed)


def test_a_threshold_over_each_value_is_judged_as_the_values_come_and_the_others_at_the_end() -> None:
    kind = "kind: threshold, metric: measure.x, at_most: 3"
    assert judged(kind, measure(1)).verdict == PASS
    assert judged(f"{kind}, over: last", measure(1)).verdict == PENDING


def test_a_threshold_without_a_value_is_unknown() -> None:
    told = judged("kind: threshold, metric: measure.x, at_most: 3", JUDGE)
    assert (told.verdict, told.observed) == (UNKNOWN, "not enough data: 0 values")


@pytest.mark.parametrize(("precision", "verdict"), [("fp32", FAIL), ("bf16", PASS), ("fp16", UNKNOWN), ("", UNKNOWN)])
def test_a_limit_counts_for_its_precision_and_another_one_has_none(precision: str, verdict: str) -> None:
    kind = "kind: threshold, metric: measure.x, at_most: {fp32: 1.0e-5, bf16: 2.0e-2}"
    told = judged(kind, measure(1e-3), precision=precision)
    assert told.verdict == verdict
    if verdict == UNKNOWN:
        assert f"a limit for precision {precision}" in told.expected
        assert exit_code_of([told]) == ExitCode.UNDECIDED


def test_what_was_observed_never_reads_like_the_limit_that_it_missed() -> None:
    told = judged("kind: threshold, metric: measure.x, below: 3", measure(3.00000001))
    assert (told.verdict, told.expected, told.observed) == (FAIL, "x < 3", "3.00000001")


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_trend_compares_the_first_window_with_the_last_at_every_length(window: int) -> None:
    kind = f"kind: trend, metric: measure.x, direction: falls, window: {window}"
    for count in range(3 * window + 2):
        values = [100.0 - i * i for i in range(count)]
        told = judged(kind, *map(measure, values), JUDGE)
        if count < 2 * window:
            assert (told.verdict, told.observed) == (UNKNOWN, f"not enough data: {count} of {2 * window} values")
            continue
        first, last = sum(values[:window]) / window, sum(values[-window:]) / window
        assert told.verdict == PASS
        shown = [float(number) for number in told.observed.split(" to ")]
        assert shown == pytest.approx([first, last], abs=1e-4)


@pytest.mark.parametrize(
    ("direction", "by", "values", "verdict"),
    [
        ("falls", 0, [2, 1], PASS),
        ("falls", 0, [2, 2], FAIL),
        ("falls", 0, [1, 2], FAIL),
        ("rises", 0, [1, 2], PASS),
        ("rises", 0, [2, 2], FAIL),
        ("falls", 0.25, [4, 3], PASS),
        ("falls", 0.25, [4, 3.01], FAIL),
        ("rises", 0.25, [4, 5], PASS),
        ("rises", 0.25, [-4, -3], PASS),
        ("rises", 0.25, [-4, -3.01], FAIL),
        ("falls", 0.25, [0, 0], FAIL),
        ("falls", 0, [2, math.nan], FAIL),
        ("falls", 0, [math.nan, 2], FAIL),
        ("falls", 0, [math.inf, 2], FAIL),
        ("rises", 0, [2, math.nan], FAIL),
        ("falls", 0.25, [math.inf, 2], FAIL),
        ("falls", 0, [2, -math.inf], FAIL),
        ("rises", 0, [2, math.inf], FAIL),
        ("falls", 0, [1e308, -1e308], PASS),
    ],
)
def test_a_trend_holds_when_the_end_is_beyond_the_beginning_by_that_fraction(
    direction: str, by: float, values: list[float], verdict: str
) -> None:
    kind = f"kind: trend, metric: measure.x, direction: {direction}, by: {by}"
    assert judged(kind, *map(measure, values), JUDGE).verdict == verdict
    assert judged(kind, *map(measure, values)).verdict == PENDING


HUGE = sys.float_info.max


@pytest.mark.parametrize(
    ("values", "verdict", "observed"),
    [
        ([HUGE, HUGE, HUGE, 1.0, 1.0, 1.0], PASS, "1.8e+308 to 1"),
        ([HUGE, HUGE, HUGE, 1e308, 1e308, 1e308], PASS, "1.8e+308 to 1e+308"),
        ([1e308, 1e308, 1e308, HUGE, HUGE, HUGE], FAIL, "1e+308 to 1.8e+308"),
        ([HUGE, HUGE, math.inf, 1.0, 1.0, 1.0], FAIL, "inf to 1"),
        ([math.inf, -math.inf, 2.0, 1.0, 1.0, 1.0], FAIL, "nan to 1"),
    ],
)
def test_a_trend_of_values_whose_sum_is_no_float_is_judged_by_their_mean(
    values: list[float], verdict: str, observed: str
) -> None:
    told = judged("kind: trend, metric: measure.x, direction: falls, window: 3", *map(measure, values), JUDGE)
    assert (told.verdict, told.observed) == (verdict, observed)


@given(
    st.lists(st.sampled_from([HUGE, -HUGE, 1e308, 1.0]) | st.floats(allow_nan=False, allow_infinity=False), min_size=1)
)
def test_a_mean_lies_between_the_values_however_large_they_are(values: list[float]) -> None:
    mean = mean_of(values)
    low, high = min(values), max(values)
    assert low <= mean <= high or mean in (pytest.approx(low, rel=1e-15), pytest.approx(high, rel=1e-15))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite_fails_at_the_first_value_that_is_no_number_and_names_its_step(bad: float) -> None:
    told = judged("kind: finite, metric: step.loss", *(step_event(i, bad if i == 2 else 1.0) for i in (1, 2, 3)), JUDGE)
    assert (told.verdict, told.observed, told.step) == (FAIL, f"{bad} at step 2", 2)


def test_finite_passes_at_the_end_and_needs_a_value() -> None:
    kind = "kind: finite, metric: step.loss"
    assert judged(kind, step_event(1, 1.0)).verdict == PENDING
    assert judged(kind, step_event(1, 1.0), JUDGE).verdict == PASS
    assert judged(kind, JUDGE).verdict == UNKNOWN


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([1.0], PASS), ([math.nan, 1.0], PASS), ([math.nan], FAIL), ([math.inf], FAIL), ([], UNKNOWN)],
)
def test_present_wants_a_last_value_that_is_a_number(values: list[float], verdict: str) -> None:
    kind = "kind: present, metrics: [measure.x, step.loss]"
    assert judged(kind, step_event(1, 1.0), *map(measure, values), JUDGE).verdict == verdict


def test_present_reads_projections() -> None:
    projection = Projection(
        target_steps=9, p10_seconds=1, p50_seconds=2, p90_seconds=3, step_seconds=1, fixed_seconds=0, samples=8
    )
    assert judged("kind: present, metrics: [projection.p50_seconds]", projection, JUDGE).verdict == PASS


@pytest.mark.parametrize(
    ("made", "reason", "verdict"),
    [(7, "max_steps", PASS), (6, "max_steps", FAIL), (8, "max_steps", FAIL), (6, "budget", PASS), (8, "budget", FAIL)],
)
def test_exact_steps_counts_what_was_made(made: int, reason: str, verdict: str) -> None:
    steps = [step_event(i, 1.0) for i in range(1, made + 1)]
    end = Phase(name=JUDGE_PHASE, detail=reason)
    assert judged("kind: exact_steps", *steps, end, max_steps=7).verdict == verdict


def test_steps_that_a_later_attempt_made_again_are_counted_once() -> None:
    first = [step_event(i, 1.0) for i in (1, 2, 3, 4)]
    second = [msgspec.structs.replace(step_event(i, 1.0), again=i <= 4) for i in (3, 4, 5, 6, 7)]
    told = judged("kind: exact_steps", *first, run_event(attempt=2), *second, JUDGE, max_steps=7)
    assert (told.verdict, told.observed) == (PASS, "7 steps")


def test_a_run_without_a_budget_is_not_said_to_have_one() -> None:
    told = judged("kind: exact_steps", step_event(1, 1.0), JUDGE, mode="train", max_steps=2, budget_seconds=None)
    assert (told.verdict, told.expected, told.observed) == (FAIL, "exactly 2 steps", "1 step")


def test_more_steps_than_the_whole_run_has_are_the_whole_run() -> None:
    told = judged("kind: exact_steps", step_event(1, 1.0), step_event(2, 1.0), JUDGE, max_steps=9, target_steps=2)
    assert (told.verdict, told.expected) == (PASS, "exactly 2 steps, or fewer by the time budget")


def test_exact_steps_does_not_apply_where_no_number_was_given() -> None:
    judge = Judge(contract("kind: exact_steps"))
    judge.observe(run_event())
    assert judge.verdicts == []


STALL = "kind: no_stall, seconds: 30, factor: 20"


def at(t: float, event: Event) -> Event:
    return msgspec.structs.replace(event, t=EPOCH + t)


def beat(t: float) -> Event:
    return at(t, Heartbeat(phase="train", step=0, rss_bytes=0))


def test_a_reader_that_skips_vitals_judges_the_same() -> None:
    seen, skipped = Judge(contract(STALL)), Judge(contract(STALL))
    events = [run_event(), Phase(name="train"), step_event(1, 1.0), at(40.0, Vitals()), at(80.0, Vitals()), beat(20.0)]
    for event in stamped(events):
        changed = seen.observe(event)
        assert changed == ([] if isinstance(event, Vitals) else skipped.observe(event))
    assert seen.verdicts == skipped.verdicts
    assert seen.verdicts[0].verdict == PENDING


def stall(*events: Event, end: float | None = None) -> Verdict:
    closing = [] if end is None else [at(end, JUDGE)]
    return judged(STALL, at(0.5, Phase(name="train")), *events, *closing)


def test_a_run_that_steps_in_time_has_no_stall() -> None:
    told = stall(*(at(i + 1, step_event(i, 1.0)) for i in range(5)), beat(34.9), end=35)
    assert (told.verdict, told.observed) == (PASS, "longest wait 1.0 s")


def test_a_wait_is_a_stall_from_the_moment_on_that_it_is_too_long() -> None:
    assert stall(at(1, step_event(1, 1.0)), beat(31)).verdict == PENDING
    told = stall(at(1, step_event(1, 1.0)), beat(31.1), at(32, step_event(2, 1.0)), end=33)
    assert (told.verdict, told.observed, told.step) == (FAIL, "no step for 30 s after step 1", 1)


def test_a_wait_without_any_heartbeat_is_seen_by_the_step_that_ends_it() -> None:
    assert stall(at(1, step_event(1, 1.0)), at(61, step_event(2, 1.0, seconds=60.0))).verdict == FAIL
    assert stall(at(1, step_event(1, 1.0)), end=61).verdict == FAIL


def test_long_steps_may_take_long() -> None:
    slow = [at(i * 40, step_event(i, 1.0, seconds=40.0)) for i in (1, 2)]
    assert judged("kind: no_stall, seconds: 50", at(0.5, Phase(name="train")), *slow, beat(800)).verdict == PENDING
    assert judged("kind: no_stall, seconds: 50", at(0.5, Phase(name="train")), *slow, beat(881)).verdict == FAIL


def test_an_evaluation_between_two_steps_is_no_wait_for_a_step() -> None:
    told = stall(at(1, step_event(1, 1.0)), at(29, eval_event(1, 1.0)), at(55, step_event(2, 1.0)), end=56)
    assert told.verdict == PASS


def test_other_phases_may_take_their_time_unless_they_have_a_budget() -> None:
    phases = [at(1, Phase(name="load-teacher")), beat(900), at(901, Phase(name="train")), at(902, step_event(1, 1.0))]
    assert judged(STALL, *phases, at(903, JUDGE)).verdict == PASS
    phases[0] = at(1, Phase(name="load-teacher", budget_seconds=60))
    told = judged(STALL, *phases, at(903, JUDGE))
    assert (told.verdict, told.observed) == (FAIL, "phase load-teacher took 899 s of its 60 s")


def test_a_wall_clock_set_back_neither_makes_nor_hides_a_stall() -> None:
    steps = [at(10, step_event(1, 1.0)), at(-3_590, step_event(2, 1.0)), at(-3_589, step_event(3, 1.0))]
    assert stall(*steps, end=-3_588).verdict == PASS
    hangs = [beat(t) for t in (-3_585, -3_575, -3_565, -3_555)]
    told = stall(*steps, *hangs)
    assert (told.verdict, told.observed) == (FAIL, "no step for 34 s after step 3")


def test_a_clock_set_back_while_a_step_is_waited_for_does_not_undo_the_wait() -> None:
    told = stall(at(1, step_event(1, 1.0)), beat(21), beat(-3_600), beat(-3_585))
    assert (told.verdict, told.observed) == (FAIL, "no step for 35 s after step 1")


def test_without_a_step_nothing_is_known_of_stalls() -> None:
    assert stall(end=2).verdict == UNKNOWN


def test_the_end_and_verdicts_change_no_verdict() -> None:
    judge = Judge(contract(STALL))
    for event in [at(0, run_event()), at(1, Phase(name="train")), at(2, step_event(1, 1.0))]:
        judge.observe(event)
    late = Verdict(id="F-TEST-000", verdict=PASS, severity="gate", claim="", expected="", observed="", step=1)
    assert judge.observe(at(500, late)) == []
    assert judge.observe(at(900, end_event())) == []
    assert judge.verdicts[0].verdict == PENDING


def test_a_second_attempt_goes_on_with_what_was_seen() -> None:
    kind = "kind: trend, metric: step.loss, direction: falls"
    told = judged(kind, step_event(1, 2.0), run_event(attempt=2, precision="bf16"), step_event(2, 1.0), JUDGE)
    assert (told.verdict, told.observed) == (PASS, "2 to 1")


def test_a_verdict_is_reported_by_the_event_that_changed_it_and_once() -> None:
    judge = Judge(smoke_contract())
    reported = [(event, verdict) for event in smoke_events(10) for verdict in judge.observe(event)]
    assert len({verdict.id for _, verdict in reported}) == len(reported) == len(judge.verdicts)
    by_event = {verdict.id: event for event, verdict in reported}
    assert isinstance(by_event["F-DISTILL-KDSTEP-001"], Measure)
    assert by_event["F-DISTILL-PIPELINE-001"] == smoke_events(10)[-1]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(allow_nan=True), min_size=8, max_size=14),
    st.lists(st.floats(-1e4, 1e4), min_size=60, max_size=60),
)
def test_judging_the_stream_again_gives_the_same_verdicts(losses: list[float], jumps: list[float]) -> None:
    events = smoke_events(len(losses), loss=lambda step: losses[step - 1])
    times = itertools.accumulate(jumps, initial=EPOCH)
    events = [msgspec.structs.replace(event, t=t) for event, t in zip(events, times, strict=False)]
    live, again, later = Judge(smoke_contract()), Judge(smoke_contract()), Judge(smoke_contract())
    stated: dict[str, Verdict] = {}
    for event in events:
        stated |= {verdict.id: verdict for verdict in live.observe(event)}
    for event in with_verdicts(events):
        again.observe(event)
        decoded = decode_line(encode(event))
        assert decoded is not None
        later.observe(decoded)
    assert live.verdicts == again.verdicts == later.verdicts
    assert {v.id: v.verdict for v in live.verdicts} == {
        v.id: stated[v.id].verdict if v.id in stated else PENDING for v in live.verdicts
    }


EVERY_KIND = contract(
    *(
        f"kind: threshold, metric: {metric}, {limit}, over: {over}"
        for metric, limit in (
            ("measure.x", "below: 3"),
            ("step.loss", "at_most: {fp32: 1.0}"),
            ("eval.cosine", "above: 0"),
            ("projection.p90_seconds", "at_least: -1.0e308"),
        )
        for over in ("each", "last", "min", "max")
    ),
    *(
        f"kind: trend, metric: {metric}, direction: {direction}, window: {window}, by: {by}"
        for metric in ("measure.x", "step.loss", "step.seconds", "eval.loss")
        for direction in ("falls", "rises")
        for window, by in ((1, 0), (3, 0.5))
    ),
    *(f"kind: finite, metric: {metric}" for metric in ("measure.x", "step.grad_norm", "step.tokens")),
    "kind: present, metrics: [measure.x, step.lr, projection.p50_seconds]",
    "kind: all_at_most, limits: {measure.x: 1.0, step.kd: -1.0e308}",
    "kind: exact_steps",
    "kind: no_stall, seconds: 1.0e-300, factor: 1.0e308",
)
EXTREMES = [math.nan, math.inf, -math.inf, HUGE, -HUGE, 1e308, -1e308, 5e-324, -0.0, 0.0, 1.0]
NUMBERS = st.sampled_from(EXTREMES) | st.just(HUGE) | st.floats()
INTEGERS = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)


@st.composite
def any_event(draw: st.DrawFn, kind: type[Event]) -> Event:
    """An event of a kind with whatever its fields can hold."""
    fields: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        told = str(field.type)
        if field.name in ("v", "versions"):
            continue
        strategy: st.SearchStrategy[Any]
        if field.name == "name" and kind is not Run:
            strategy = st.sampled_from(["x", "import", "train", JUDGE_PHASE])
        elif "dict" in told:
            strategy = st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2)
        elif "float" in told:
            strategy = NUMBERS
        elif "int" in told:
            strategy = INTEGERS
        else:
            strategy = st.booleans() if "bool" in told else st.sampled_from(["fp32", "budget", ""])
        fields[field.name] = draw(st.none() | strategy if "None" in told else strategy)
    return kind(**fields)


@settings(max_examples=150, deadline=None)
@given(
    any_event(Run),
    st.lists(any_event(Step) | st.sampled_from(EVENT_TYPES).flatmap(any_event), max_size=25),
    INTEGERS | st.none(),
)
def test_no_number_that_an_event_can_carry_makes_the_judge_raise(
    run: Event, events: list[Event], max_steps: int | None
) -> None:
    judge = Judge(EVERY_KIND)
    for event in [msgspec.structs.replace(run, teacher=None, max_steps=max_steps), *events, JUDGE]:
        judge.observe(event)
    verdicts = judge.verdicts
    assert len(verdicts) == len(EVERY_KIND.falsifiers) - (max_steps is None)
    assert all(verdict.verdict in (PASS, FAIL, UNKNOWN) for verdict in verdicts)
    assert all(decode_line(encode(each)) for each in stamped(list(verdicts)))


@pytest.mark.parametrize(
    ("severities", "verdicts", "code"),
    [
        (["fatal", "gate", "warn"], [PASS, PASS, PASS], ExitCode.OK),
        (["fatal", "gate", "warn"], [PASS, PASS, FAIL], ExitCode.OK),
        (["fatal", "gate", "warn"], [PASS, PASS, UNKNOWN], ExitCode.OK),
        (["fatal", "gate", "warn"], [FAIL, PASS, PASS], ExitCode.FAILED),
        (["fatal", "gate", "warn"], [PASS, FAIL, PASS], ExitCode.FAILED),
        (["fatal", "gate", "warn"], [UNKNOWN, FAIL, PASS], ExitCode.FAILED),
        (["fatal", "gate", "warn"], [PASS, PENDING, PASS], ExitCode.UNDECIDED),
        (["fatal", "gate", "warn"], [UNKNOWN, PASS, PASS], ExitCode.UNDECIDED),
        (["gate"], ["MAYBE"], ExitCode.UNDECIDED),
        (["warn"], [FAIL], ExitCode.OK),
        ([], [], ExitCode.UNDECIDED),
    ],
)
def test_the_exit_code_is_that_of_the_worst_binding_verdict(
    severities: list[str], verdicts: list[str], code: ExitCode
) -> None:
    told = [
        Verdict(id=f"F-{i}", verdict=verdict, severity=severity, claim="", expected="", observed="", step=0)
        for i, (severity, verdict) in enumerate(zip(severities, verdicts, strict=True))
    ]
    assert exit_code_of(told) == exit_code_of(iter(told)) == code


GOOD = "kind: threshold, metric: step.loss, at_most: 1"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{id: F-A-1, claim: c, kind: thresold}", '(F-A-1).kind: "thresold"; did you mean threshold?'),
        ("{id: F-A-1, claim: c, kind: 3}", "(F-A-1).kind: 3; expected threshold"),
        ("{id: F-A-1, claim: c}", "(F-A-1).kind: missing; expected threshold"),
        (f"{{id: F-A-1, claim: c, {GOOD}, limit: 3}}", "(F-A-1).limit: unknown key"),
        ("{id: F-A-1, claim: c, kind: threshold, metric: step.loss, at_mst: 1}", "did you mean at_most?"),
        (f"{{id: F-A-1, claim: c, {GOOD}, below: 2}}", "(F-A-1): 2 limits; expected exactly one of at_most"),
        ("{id: F-A-1, claim: c, kind: threshold, metric: step.loss}", "(F-A-1): no limits"),
        ("{id: F-A-1, claim: c, kind: threshold, at_most: 1}", "(F-A-1).metric: missing"),
        (
            "{id: F-A-1, claim: c, kind: threshold, metric: loss, at_most: 1}",
            '(F-A-1).metric: "loss"; expected a metric',
        ),
        ("{id: F-A-1, claim: c, kind: threshold, metric: step.los, at_most: 1}", "did you mean step.loss?"),
        (
            "{id: F-A-1, claim: c, kind: present, metrics: [eval.cosin]}",
            "unknown metric eval.cosin; did you mean eval.cos",
        ),
        ("{id: F-A-1, claim: c, kind: present, metrics: []}", "(F-A-1).metrics: an empty list"),
        ("{id: F-A-1, claim: c, kind: threshold, metric: step.loss, at_most: {}}", "(F-A-1).at_most: a mapping"),
        ("{id: F-A-1, claim: c, kind: threshold, metric: step.loss, at_most: {fp23: 1}}", "mapping of fp32 and bf16"),
        ("{id: F-A-1, claim: c, kind: threshold, metric: step.loss, at_most: .nan}", "(F-A-1).at_most: .nan"),
        ("{id: F-A-1, claim: c, kind: threshold, metric: step.loss, at_most: {fp32: .inf}}", "a finite number"),
        ("{id: F-A-1, claim: c, kind: threshold, metric: step.loss, at_most: '1'}", '(F-A-1).at_most: "1"'),
        ("{id: F-A-1, claim: c, kind: trend, metric: step.loss, direction: up}", "expected falls or rises"),
        ("{id: F-A-1, claim: c, kind: trend, metric: step.loss, direction: falls, by: 1}", "(F-A-1).by: 1; expected"),
        ("{id: F-A-1, claim: c, kind: trend, metric: step.loss, direction: falls, by: .nan}", "(F-A-1).by: .nan"),
        ("{id: F-A-1, claim: c, kind: trend, metric: step.loss, direction: falls, window: 0}", "(F-A-1).window: 0"),
        ("{id: F-A-1, claim: c, kind: no_stall}", "(F-A-1).seconds: missing; expected a number above 0"),
        ("{id: F-A-1, claim: c, kind: no_stall, seconds: .inf}", "(F-A-1).seconds: .inf"),
        (f"{{id: F-A-1, claim: c, {GOOD}, severity: bad}}", '(F-A-1).severity: "bad"; expected fatal, gate or warn'),
        (f"{{id: F-A-1, claim: c, {GOOD}, needs: [moon]}}", "(F-A-1).needs: a list; expected a list of teacher"),
        (f"{{id: f-a-1, claim: c, {GOOD}}}", '(f-a-1).id: "f-a-1"; expected 3 to 64 capitals'),
        (f'{{id: "F-A\\n", claim: c, {GOOD}}}', "expected 3 to 64 capitals"),
        (f"{{id: 7, claim: c, {GOOD}}}", "falsifiers[1].id: 7; expected"),
        (f"{{claim: c, {GOOD}}}", "falsifiers[1].id: missing"),
        (f"{{id: F-A-1, {GOOD}}}", "(F-A-1).claim: missing"),
        (f'{{id: F-A-1, claim: "\\e[2J", {GOOD}}}', "text without control characters"),
        (f"{{id: F-FIRST-1, claim: c, {GOOD}}}", "F-FIRST-1 stands twice; expected each identifier once"),
        ("just a text", 'falsifiers[1]: "just a text"; expected a mapping'),
    ],
)
def test_a_bad_falsifier_is_named_with_its_line(entry: str, message: str) -> None:
    text = f"version: 1\nname: mine\nfalsifiers:\n  - {{id: F-FIRST-1, claim: c, {GOOD}}}\n  - {entry}\n"
    with pytest.raises(ConfigError) as caught:
        parse_contract(text, "mine.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("mine.yaml: line 5: falsifiers[1]")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.yaml: empty; expected a mapping"),
        ("- 1", "mine.yaml: a list; expected a mapping"),
        ("version: 1\nname: x\nfalsifiers: []", "falsifiers: an empty list; expected a list of at least one falsifier"),
        ("version: 1\nname: x\nfalsifiers: {}", "falsifiers: a mapping; expected a list"),
        ("version: 1\nname: x", "falsifiers: missing"),
        ("version: 2\nname: x\nfalsifiers: []", "line 1: version: 2; expected 1"),
        ("name: x\nfalsifiers: []", "version: missing; expected 1"),
        ("version: 1\nfalsifiers: []", "name: missing; expected text"),
        ("version: 1\nname: x\nfalsifers: []", "line 3: falsifers: unknown key; did you mean falsifiers?"),
        ("version: [", "mine.yaml: line 1"),
    ],
)
def test_a_bad_contract_gives_one_clear_message(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_contract(text, "mine.yaml")
    assert message in str(caught.value)
    assert "$" not in str(caught.value)


@pytest.mark.parametrize("name", ["loss", "ce", "kd", "lr", "grad_norm", "tokens", "seconds"])
def test_every_number_of_a_step_is_a_metric(name: str) -> None:
    assert judged(f"kind: threshold, metric: step.{name}, at_least: 0", step_event(1, 3.0)).verdict == PASS


EVERYTHING = contract(
    "kind: finite, metric: step.loss",
    "kind: finite, metric: step.grad_norm",
    "kind: trend, metric: step.loss, direction: falls, window: 3",
    "kind: trend, metric: step.kd, direction: rises, window: 1",
    "kind: threshold, metric: step.ce, below: 3.0",
    "kind: threshold, metric: step.loss, below: 9.0, over: max",
    "kind: threshold, metric: step.loss, above: 1.0, over: min",
    "kind: threshold, metric: step.tokens, at_least: 10, over: last",
    "kind: no_stall, seconds: 5, factor: 2",
    "kind: no_stall, seconds: 40",
    "kind: exact_steps",
    "kind: present, metrics: [step.loss, measure.x, eval.loss]",
    "kind: all_at_most, limits: {step.seconds: 3.0, measure.x: 1.0}",
)
FEW = contract(
    "kind: finite, metric: step.loss",
    "kind: trend, metric: step.loss, direction: falls, window: 3",
    "kind: threshold, metric: step.loss, below: 9.0, over: max",
    "kind: no_stall, seconds: 60",
    "kind: present, metrics: [step.again]",
)
NUMBER = st.sampled_from([0.5, 1.0, 2.0, 2.5, 3.0, 7.0, 1e308]) | st.floats()
PASSED = st.sampled_from([0.5, 0.5, 0.1, 1.0, 6.0, 50.0, -3.0, math.inf, math.nan])


def any_step() -> st.SearchStrategy[Step]:
    kept = st.booleans()
    return st.builds(
        Step, step=st.integers(1, 9), loss=NUMBER, ce=NUMBER, kd=NUMBER, lr=NUMBER, grad_norm=NUMBER,
        tokens=st.integers(0, 99), seconds=st.sampled_from([0.1, 0.3, 7.0, math.nan]), again=kept,
    )  # fmt: skip


BETWEEN = st.sampled_from([Heartbeat(phase="train", step=0, rss_bytes=0), Log(level="info", message="m")])
OTHERS = st.sampled_from(
    [
        Phase(name="train"), Phase(name="train", budget_seconds=20.0), Phase(name="import"),
        Phase(name="eval", budget_seconds=3.0), eval_event(3, 2.0), Measure(name="x", value=0.5),
        Measure(name="y", value=0.5), JUDGE, run_event(attempt=2), Vitals(), end_event(),
    ]
)  # fmt: skip
BEAT = Heartbeat(phase="train", step=12, rss_bytes=0)
TWELVE: list[Event] = [step_event(step, 5.0) for step in range(1, 13)]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([EVERYTHING, FEW]),
    st.lists(st.lists(any_step() | BETWEEN, max_size=12) | OTHERS, max_size=8),
    st.lists(PASSED, min_size=1, max_size=10),
    st.sampled_from([None, 7]),
)
@example(FEW, [Phase(name="train", budget_seconds=20.0), TWELVE, TWELVE], [1.0], None)
@example(FEW, [Phase(name="train"), [*TWELVE, BEAT, BEAT], [BEAT, BEAT], TWELVE], [20.0], None)
@example(FEW, [Phase(name="train", budget_seconds=20.0), TWELVE, TWELVE], [6.0, -5.0], None)
@example(FEW, [Phase(name="train", budget_seconds=20.0), TWELVE, TWELVE], [1.0, math.nan], None)
def test_events_in_a_row_are_judged_as_one_by_one(
    what: Contract, parts: list[list[Event] | Event], times: list[float], most: int | None
) -> None:
    alone, together = Judge(what), Judge(what)
    seen: list[Sequence[Event]] = [[run_event(max_steps=most)], [Phase(name="train")]]
    for each in parts:
        seen.append(each if isinstance(each, list) else [each])
    t, passing = EPOCH, itertools.cycle(times)
    for part in [*seen, [JUDGE]]:
        stamped_part = [msgspec.structs.replace(event, t=(t := t + next(passing))) for event in part]
        expected = [(event, changed) for event in stamped_part if (changed := alone.observe(event))]
        if all(type(event) in CALM for event in stamped_part):
            assert together.observe_calm(stamped_part) == expected
        else:
            assert together.observe(stamped_part[0]) == [verdict for _, changed in expected for verdict in changed]
        assert repr(together.verdicts) == repr(alone.verdicts)


def test_steps_that_change_nothing_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge(parse_contract(builtin_contract("train"), "train"))
    for event in stamped([run_event(mode="train"), Phase(name="train")]):
        judge.observe(event)
    monkeypatch.setattr(judge, "observe", None)
    steps = [msgspec.structs.replace(step_event(step, 5.0), t=EPOCH + step) for step in range(1, 1_000)]
    assert judge.observe_calm(steps) == []


def test_a_judge_keeps_little_however_long_the_stream() -> None:
    judge = Judge(parse_contract(builtin_contract("train"), "train"))
    judge.observe(run_event(t=EPOCH))
    judge.observe_calm(TWELVE)
    before = len(pickle.dumps(judge))
    for number in range(1_000):
        judge.observe(Measure(name=f"made_up_{number}", value=1.0, t=EPOCH + number / 1_000))
        judge.observe_calm(TWELVE)
    assert len(pickle.dumps(judge)) < before + 1_000
