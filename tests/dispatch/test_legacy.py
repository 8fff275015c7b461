from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dispatch.legacy import LegacyLog, OldManifest
from dispatch.legacy_lines import ends_a_run, may_mean_something, tells_an_error
from engine.falsifiers import Judge, builtin_contract, parse_contract
from engine.human import human_lines
from engine.stream import (
    Checkpoint,
    CheckpointFailed,
    End,
    Eval,
    Event,
    Log,
    Measure,
    Phase,
    Projection,
    Run,
    Step,
    Verdict,
    encode,
)
from engine.text import clean
from tests import old_evidence as old
from tests.streams import smoke_events, with_verdicts

E = TypeVar("E", bound=Event)
STYLES = pytest.mark.parametrize("style", old.STYLES.values(), ids=old.STYLES.keys())


def read(data: bytes | str | Iterable[str], manifest: OldManifest | None = None, piece: int = 1 << 18) -> list[Event]:
    """The events of a log that comes in pieces."""
    if not isinstance(data, (bytes, str)):
        data = "".join(f"{line}\n" for line in data)
    raw = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    log = LegacyLog(manifest)
    events = [event for at in range(0, len(raw), piece) for event in log.feed(raw[at : at + piece])]
    return events + log.finish()


def of(kind: type[E], events: Iterable[Event]) -> list[E]:
    return [event for event in events if isinstance(event, kind)]


def end_of(data: bytes | str | Iterable[str], manifest: OldManifest | None = None) -> End:
    events = read(data, manifest)
    assert isinstance(events[-1], End)
    assert len(of(End, events)) == 1
    return events[-1]


def judged(events: Iterable[Event]) -> dict[str, tuple[str, str]]:
    """Verdicts of the contract that old logs are judged by, and what was observed."""
    judge = Judge(parse_contract(builtin_contract("predecessor"), "predecessor.yaml"))
    for event in events:
        judge.observe(event)
    return {v.id: (v.verdict, v.observed) for v in judge.verdicts if v.verdict in ("PASS", "FAIL")}


# Every form, whatever became of the log


@STYLES
def test_a_training_is_read_with_its_losses_steps_and_duration_in_every_style(style: old.Style) -> None:
    lines = [old.saved(50), old.not_saved(60), "F-MINE-001: PASS"]
    events = read(old.train_log(style, more=lines))
    assert [step.step for step in of(Step, events)] == list(range(1, 63))
    assert of(Step, events)[0].loss == 7.6746
    assert of(Step, events)[-1].loss == 7.2036
    end = of(End, events)[0]
    assert (end.status, end.steps, end.seconds, end.exit_code) == ("COMPLETED", 62, 122.7, None)
    assert end.summary == {"initial_loss": 7.6746, "final_loss": 7.2036, "train_seconds": 122.7}
    run = of(Run, events)[0]
    assert (run.mode, run.device_name, run.target_steps) == ("train", "NVIDIA GB10", 62)
    assert [(c.step, c.path) for c in of(Checkpoint, events)] == [(50, "/home/op/runs/checkpoint.apr")]
    failed = of(CheckpointFailed, events)
    assert [(c.step, c.error) for c in failed] == [(60, "No space left on device (os error 28)")]
    assert [(v.id, v.verdict) for v in of(Verdict, events)] == [("F-MINE-001", "PASS")]
    assert judged(events)["F-DISTILL-PIPELINE-001"] == ("PASS", "7.6746 to 7.2036")


@STYLES
@pytest.mark.parametrize("decimals", [0, 1], ids=["6000s", "6000.0s"])
def test_a_smoke_is_read_with_its_projection_in_every_style(style: old.Style, decimals: int) -> None:
    events = read(old.smoke_log(style, steps=60, seconds=60.0, project_to=6_000, decimals=decimals))
    end = of(End, events)[0]
    assert (end.status, end.steps, end.seconds) == ("COMPLETED", 60, 60.0)
    assert end.summary["steps_per_second"] == 1.0
    projection = of(Projection, events)[0]
    assert (projection.target_steps, projection.p50_seconds) == (6_000, 6_000.0)
    assert math.isnan(projection.p10_seconds)
    assert math.isnan(projection.p90_seconds)
    run = of(Run, events)[-1]
    assert (run.mode, run.max_steps) == ("smoke", 60)
    verdicts = {identifier: verdict for identifier, (verdict, _) in judged(events).items()}
    assert verdicts == dict.fromkeys(
        ("F-DISTILL-PIPELINE-001", "F-FINITE-001", "FT-SMOKE-001", "FT-SMOKE-003", "FT-SMOKE-004"), "PASS"
    )


@STYLES
def test_epochs_are_rows_of_the_series_where_nothing_else_is_counted(style: old.Style) -> None:
    lines = [old.epoch(1, 3, 7.6, 40.0, 7.9), old.epoch(2, 3, 7.4, 41.5), old.epoch(3, 3, 7.3, 41.2, 7.5)]
    log = LegacyLog()
    events = log.feed(style.text(lines)) + log.finish()
    assert log.unit == "epoch"
    assert [(s.step, s.loss, s.seconds) for s in of(Step, events)] == [(1, 7.6, 40.0), (2, 7.4, 41.5), (3, 7.3, 41.2)]
    assert [(e.step, e.loss) for e in of(Eval, events)] == [(1, 7.9), (3, 7.5)]
    assert judged(events)["F-DISTILL-SMOKE-001"] == ("PASS", "7.9 to 7.5")


def test_an_epoch_beside_steps_is_an_evaluation_at_the_last_of_them() -> None:
    log = LegacyLog()
    lines = [old.step(1, 4, 7.0), old.step(2, 4, 6.0), old.epoch(1, 2, 6.5, 3.0, 6.8), old.step(3, 4, 5.0)]
    events = log.feed("\n".join(lines).encode()) + log.finish()
    assert log.unit == "step"
    assert [s.step for s in of(Step, events)] == [1, 2, 3]
    assert [(e.step, e.loss) for e in of(Eval, events)] == [(2, 6.8)]


def test_steps_after_epochs_are_what_the_log_counts() -> None:
    log = LegacyLog()
    log.feed(f"{old.epoch(1, 2, 6.5, 3.0)}\n{old.step(1, 4, 7.0)}\n".encode())
    log.finish()
    assert log.unit == "step"


def test_losses_of_the_last_line_alone_are_known_and_judged_and_no_step_is_made_up() -> None:
    events = read(old.STYLES["whole"].text([*old.head(700), old.complete(7.6746, 7.2036, 62, 122.7)]))
    assert not of(Step, events)
    assert of(End, events)[0].summary["initial_loss"] == 7.6746
    assert judged(events) == {"F-DISTILL-PIPELINE-001": ("PASS", "7.6746 to 7.2036")}


NUMBERS = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6)
COUNTS = st.integers(0, 10**9)
JUNK = st.sampled_from(("", "  ", old.STAMP, "INFO apr: ", "\x1b[2m2026\x1b[0m ", "\ufffd"))


def one(kind: type[E], line: str) -> E:
    return of(kind, read(line))[-1]


@given(JUNK, COUNTS, COUNTS, NUMBERS)
@example("", 1, 1, 0.0)
def test_a_step_that_is_printed_is_the_step_that_is_read(junk: str, step: int, total: int, loss: float) -> None:
    found = one(Step, junk + old.step(step, total, loss))
    assert (found.step, found.loss) == (step, round(loss, 4))


@given(JUNK, COUNTS, COUNTS, NUMBERS, st.none() | NUMBERS, st.floats(0, 1e6))
def test_an_epoch_that_is_printed_is_read(
    junk: str, epoch: int, epochs: int, loss: float, held: float | None, seconds: float
) -> None:
    events = read(junk + old.epoch(epoch, epochs, loss, seconds, held))
    assert [(s.step, s.loss, s.seconds) for s in of(Step, events)] == [(epoch, round(loss, 4), round(seconds, 1))]
    assert [e.loss for e in of(Eval, events)] == ([] if held is None else [round(held, 4)])


@given(JUNK, NUMBERS, NUMBERS, COUNTS, st.floats(0, 1e7))
def test_a_closing_line_that_is_printed_is_read(
    junk: str, first: float, last: float, steps: int, seconds: float
) -> None:
    end = end_of(junk + old.complete(first, last, steps, seconds))
    assert (end.status, end.steps, end.seconds) == ("COMPLETED", steps, round(seconds, 1))
    assert (end.summary["initial_loss"], end.summary["final_loss"]) == (round(first, 4), round(last, 4))


@given(JUNK, COUNTS, st.floats(0.01, 1e6), NUMBERS, NUMBERS)
def test_a_smokes_line_that_is_printed_is_read(
    junk: str, steps: int, seconds: float, first: float, last: float
) -> None:
    end = end_of(junk + old.smoked(steps, seconds, first, last))
    assert (end.steps, end.seconds, end.summary["final_loss"]) == (steps, round(seconds, 2), round(last, 4))
    assert end.summary["steps_per_second"] == float(f"{steps / seconds:.2f}")


@given(JUNK, COUNTS, st.floats(0, 1e9), st.integers(0, 3))
def test_a_projection_that_is_printed_is_read(junk: str, steps: int, seconds: float, decimals: int) -> None:
    projection = one(Projection, junk + old.projected(steps, seconds, decimals=decimals))
    assert projection.target_steps == steps
    assert projection.p50_seconds == float(f"{seconds:.{decimals}f}")


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=60)


@given(JUNK, COUNTS, WORDS)
def test_checkpoint_lines_that_are_printed_are_read(junk: str, step: int, text: str) -> None:
    saved = one(Checkpoint, junk + old.saved(step, text))
    assert (saved.step, saved.path) == (step, text)
    failed = one(CheckpointFailed, junk + old.not_saved(step, text))
    assert (failed.step, failed.error) == (step, text)


@given(JUNK, st.integers(1, 10**9))
def test_the_smokes_banner_that_is_printed_is_read(junk: str, steps: int) -> None:
    assert one(Run, junk + old.smoke_mode(steps)).max_steps == steps


@pytest.mark.parametrize(
    ("text", "value"),
    [("NaN", math.nan), ("nan", math.nan), ("inf", math.inf), ("-Infinity", -math.inf), ("1.5e-5", 1.5e-5), ("7", 7.0)],
)
def test_losses_may_be_no_numbers_or_have_exponents(text: str, value: float) -> None:
    found = one(Step, f"  Step 3/9: loss: {text}")
    assert found.loss == value or (math.isnan(value) and math.isnan(found.loss))


def test_a_loss_that_is_not_finite_fails_what_was_claimed() -> None:
    events = read(
        [old.step(1, 2, 7.0), "  Step 2/2: loss: NaN", "Distillation complete: initial_loss=7.0 final_loss=NaN"]
    )
    verdicts = {identifier: verdict for identifier, (verdict, _) in judged(events).items()}
    assert verdicts == {"F-DISTILL-PIPELINE-001": "FAIL", "F-FINITE-001": "FAIL"}


def test_every_line_is_a_log_and_what_it_says_stands_behind_it_with_its_number() -> None:
    events = read(["first", "", old.step(1, 5, 7.0), "last"])
    assert [(type(e).__name__, e.t) for e in events] == [
        *(("Log", 1), ("Log", 2), ("Log", 3), ("Run", 3), ("Phase", 3), ("Step", 3), ("Log", 4)),
        ("End", 4),
    ]
    assert [e.seq for e in events] == list(range(len(events)))
    assert {e.run for e in events} == {"predecessor"}
    assert [e.message for e in of(Log, events)] == ["first", "", "  Step 1/5: loss: 7.0000", "last"]


@pytest.mark.parametrize(
    "line",
    [
        *(
            old.step(1, 5, 7.0),
            old.epoch(1, 3, 7.0, 2.0),
            old.complete(7.0, 6.0, 9, 1.0),
            old.saved(3),
            old.not_saved(3),
        ),
        *(old.smoke_mode(9), old.no_export(), old.smoked(9, 1.0, 7.0, 6.0), old.projected(9, 9.0), "F-A-1: PASS"),
        *(
            "PASS F-A-1: expected x < 1, observed 0",
            "held-out at step 3: loss 2.5",
            "phase train",
            "phase judge: budget",
        ),
        *("COMPLETED: why (3 steps, 2.0s)", "smoke of a on b: cpu (c), fp32, 1,024 tokens a step", "nothing"),
    ],
)
def test_whatever_comes_first_the_run_is_told_before_it(line: str) -> None:
    told = [event for event in read(line) if not isinstance(event, Log)]
    assert isinstance(told[0], Run)
    assert isinstance(told[-1], End)


def test_a_gpu_is_named_once_it_is_known() -> None:
    assert of(Run, read([old.step(1, 2, 7.0), old.GPU]))[-1].device_name == "NVIDIA GB10"
    assert (
        one(Run, "[init] GPU: NVIDIA GeForce RTX 4090 (24.0 GB), driver 560").device_name == "NVIDIA GeForce RTX 4090"
    )
    assert one(Run, "GPU: 0").device_name == ""


# Verdicts


@pytest.mark.parametrize(
    ("line", "stated"),
    [
        ("F-DISTILL-KDSTEP-001: PASS", {"F-DISTILL-KDSTEP-001": "PASS"}),
        ("[12:00] FT-SMOKE-001 PASSED in 3 s", {"FT-SMOKE-001": "PASS"}),
        ("FALSIFY-GQA-003 ... FAILED (0.3 > 0.1)", {"FALSIFY-GQA-003": "FAIL"}),
        ("| F-DISTILL-V2-001 | DISCHARGED |", {"F-DISTILL-V2-001": "PASS"}),
        ("DISCHARGED and PASS: F-A-1, FT-B-2", {"F-A-1": "PASS", "FT-B-2": "PASS"}),
        ("F-A-1 F-A-1 FAIL", {"F-A-1": "FAIL"}),
        ("F-A-1 PASS, F-B-2 FAIL", {}),
        ("F-A-1: not DISCHARGED", {}),
        ("F-A-1 is to be discharged", {}),
        ("F-A-1: BYPASS, PASS_RATE=1, PASSAGE", {}),
        ("XF-A-1 PASS", {}),
        ("F-a-1 PASS", {}),
        ("PASS", {}),
    ],
)
def test_a_verdict_is_a_falsifier_with_one_word(line: str, stated: dict[str, str]) -> None:
    events = read(line)
    assert {v.id: v.verdict for v in of(Verdict, events)} == stated
    assert len(of(Verdict, events)) == len(stated)
    failed = "FAIL" in stated.values()
    assert of(Log, events)[0].level == ("error" if failed else "info")
    assert of(End, events)[0].status == "LOST"


def test_a_discharged_verdict_says_its_word_and_its_line() -> None:
    verdict = one(Verdict, "\n  F-DISTILL-V2-001 is DISCHARGED")
    assert verdict.observed == "DISCHARGED, line 2: F-DISTILL-V2-001 is DISCHARGED"
    assert verdict.severity == "warn"
    assert one(Verdict, "F-NOBODY-KNOWS-001: FAIL").severity == "gate"


# How it ended


@pytest.mark.parametrize(
    "line",
    [
        "thread 'main' panicked at src/main.rs:1:2: index out of bounds",
        "kernel panic - not syncing",
        "PANIC: out of memory",
        "error: no such file",
        "Error: CUDA driver said no",
        "[ERROR] launch failed",
        "ERROR apr::cuda: launch failed",
        "error[E0308]: mismatched types",
        "CUDA error 700: an illegal memory access was encountered",
        "An error occurred while loading",
        "fatal error, stopping",
        "Validation failed: 3 tensors are missing",
        "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY",
        "RuntimeError: CUDA out of memory",
        "torch.cuda.OutOfMemoryError: no memory",
        "\x1b[31merror\x1b[0m: no such file",
    ],
)
def test_a_line_of_failure_is_how_a_run_ended_that_did_not_come_to_its_end(line: str) -> None:
    events = read([old.step(1, 9, 7.0), line, "note: run with RUST_BACKTRACE=1"])
    end = of(End, events)[0]
    assert end.status == "CRASHED"
    assert end.reason == f"line 2: {line.replace(chr(27) + '[31m', '').replace(chr(27) + '[0m', '')}"
    assert end.steps == 1
    assert [log.level for log in of(Log, events)][1] == "error"
    assert not of(Measure, events)


@pytest.mark.parametrize(
    "line",
    [
        "0 errors, 3 warnings",
        "no error",
        "finished without error",
        "error_rate=0.25",
        "error rate: 0.25",
        "error=0.01",
        "max error: 3.0e-7",
        "max error 3 ulp",
        "relative error 1e-6 (ok)",
        "quantization error: 0.003",
        "error: 0",
        "error: none",
        "error: 0.0001",
        "0 error(s)",
        "error-free",
        "errors: 0",
        "[FWD-CACHE] OK 'terror_kernel'",
        "error handling enabled",
        "panic=abort",
        "no panic so far",
        "panic hook installed",
        "CUDA_ERROR_LOGGING=1",
        "info: the word error stands in here",
        "warning: error: but only a warning",
        "PASS F-A-1: expected gradient error <= 1, observed 0",
        "F-A-1 PASS: no CUDA error: good",
        "LayerError",
        "the mirror is organic",
    ],
)
def test_a_line_that_only_has_the_word_is_no_failure(line: str) -> None:
    events = read([old.step(1, 9, 7.0), line])
    assert of(End, events)[0].status == "LOST"
    assert "error" not in [log.level for log in of(Log, events)]


@given(st.text(max_size=80))
def test_no_failure_is_missed_for_the_sake_of_speed(text: str) -> None:
    for word in ("error: ", "panic ", "Validation failed:", "CUDA_ERROR_X", "ValueError: "):
        if tells_an_error(word + text) or ends_a_run(word + text):
            assert may_mean_something(word + text)


def test_a_checkpoint_that_was_not_saved_ends_nothing() -> None:
    events = read([old.step(1, 9, 7.0), old.not_saved(1, "disk error: panic")])
    assert of(End, events)[0].status == "LOST"
    assert [log.level for log in of(Log, events)] == ["info", "error"]


def test_a_panic_is_told_with_the_line_that_says_what_it_was() -> None:
    end = end_of(old.broken_log(how=[old.PANIC, old.PANIC_WHAT, "stack backtrace:"]))
    assert end.reason.endswith(f"{old.PANIC} {old.PANIC_WHAT}")
    assert (end.status, end.steps) == ("CRASHED", 30)


def test_what_comes_after_a_step_says_nothing_of_the_panic_before_it() -> None:
    end = end_of([old.PANIC, old.step(1, 9, 7.0), "warning: hot", "more"])
    assert end.reason == f"line 1: {old.PANIC}"


def test_the_first_failure_is_the_reason_and_a_worse_one_takes_its_place() -> None:
    assert "one" in end_of(["error: one", "error: two"]).reason
    assert "two" in end_of(["error: one", "thread 'main' panicked at two", "Validation failed: three"]).reason


def test_an_error_that_training_outlived_is_not_how_it_ended_and_a_panic_is() -> None:
    assert end_of([old.step(1, 9, 7.0), "error: retried", old.step(2, 9, 6.0)]).status == "LOST"
    assert end_of([old.step(1, 9, 7.0), "worker panicked at x", old.step(2, 9, 6.0)]).status == "CRASHED"


def test_what_came_to_its_end_after_a_failure_is_complete_and_what_failed_after_its_end_is_not() -> None:
    done = old.complete(7.0, 6.0, 9, 1.0)
    assert end_of(["thread 'x' panicked at y", done]).status == "COMPLETED"
    crashed = end_of([done, "thread 'main' panicked at export"])
    assert crashed.status == "CRASHED"
    assert crashed.summary["final_loss"] == 6.0


def test_a_log_that_stops_is_lost_and_nothing_is_judged_at_an_end_that_it_never_had() -> None:
    events = read(old.broken_log(how=[]))
    end = of(End, events)[0]
    assert (end.status, end.reason, end.steps) == ("LOST", "the log does not say how it ended", 30)
    assert math.isnan(end.seconds)
    assert not judged(events)


def test_a_log_that_stops_at_its_last_step_is_judged() -> None:
    assert judged(read([old.step(n, 5, 7 - n) for n in range(1, 6)]))["F-DISTILL-PIPELINE-001"] == ("PASS", "6 to 2")


def test_one_step_is_no_trend() -> None:
    assert judged(read([old.step(1, 1, 7.0), old.complete(7.0, 7.0, 1, 1.0)])) == {
        "F-FINITE-001": ("PASS", "all finite to step 1")
    }


def test_a_log_without_a_line_is_lost() -> None:
    assert [type(event) for event in read(b"")] == [Run, End]


# What was asked for


def test_what_the_manifest_says_is_asked_and_what_the_log_says_is_run() -> None:
    manifest = OldManifest(steps=50, host="gx10", teacher="t", student="s", temperature=4.0, backend="cuda")
    events = read(old.train_log(), manifest)
    run = of(Run, events)[0]
    assert (run.target_steps, run.host, run.teacher, run.student, run.device) == (50, "gx10", "t", "s", "cuda")
    assert run.temperature == 4.0
    assert math.isnan(run.alpha)
    assert of(End, events)[0].steps == 62
    assert "FT-SMOKE-001" not in judged(events)


def test_what_a_run_goes_to_is_counted_in_what_its_log_counts() -> None:
    assert one(Run, old.epoch(1, 3, 7.0, 2.0)).target_steps == 3
    events = read([old.epoch(1, 3, 7.0, 2.0)], OldManifest(steps=50, epochs=4))
    assert of(Run, events)[-1].target_steps == 4
    assert one(Run, old.smoke_mode(9)).target_steps == 9
    assert of(Run, read("nothing"))[0].target_steps == 0


@pytest.mark.parametrize(("max_steps", "verdict"), [(62, "PASS"), (50, "FAIL")])
def test_exact_steps_are_judged_where_a_limit_is_known_and_by_what_ran(max_steps: int, verdict: str) -> None:
    events = read(old.train_log(every=10), OldManifest(steps=62, max_steps=max_steps))
    assert len(of(Step, events)) == 6
    assert judged(events)["FT-SMOKE-001"][0] == verdict


def test_the_smokes_own_limit_counts_before_the_manifests() -> None:
    events = read(old.smoke_log(steps=62), OldManifest(max_steps=50))
    assert judged(events)["FT-SMOKE-001"][0] == "PASS"


def test_a_smoke_that_wrote_a_model_fails_what_was_claimed_of_it() -> None:
    events = read([old.smoke_mode(5), old.smoked(5, 2.0, 7.0, 6.0), old.output()])
    assert judged(events)["FT-SMOKE-004"] == ("FAIL", "1")


# Several attempts


def test_attempts_in_one_log_are_told_apart_and_the_last_one_is_how_it_ended() -> None:
    first = [old.step(1, 9, 7.0), old.step(2, 9, 6.5), old.PANIC]
    events = read([*first, *(old.step(n, 9, 7 - n / 2) for n in range(1, 10)), old.complete(6.5, 2.5, 9, 4.0)])
    assert [run.attempt for run in of(Run, events)] == [1, 2]
    assert [step.again for step in of(Step, events)] == [False, False, True, True, *[False] * 7]
    end = of(End, events)[0]
    assert (end.status, end.steps) == ("COMPLETED", 9)


def test_a_second_attempt_that_breaks_off_is_not_complete_for_the_sake_of_the_first() -> None:
    done = old.complete(7.0, 6.0, 2, 1.0)
    assert end_of([old.step(1, 2, 7.0), old.step(2, 2, 6.0), done, old.step(1, 9, 7.0)]).status == "LOST"
    assert end_of([old.step(1, 2, 7.0), old.PANIC, old.smoke_mode(9), old.step(1, 9, 6.9)]).status == "LOST"


def test_the_smokes_banner_begins_an_attempt_that_has_to_end_by_itself() -> None:
    done = [old.step(1, 1, 7.0), old.complete(7.0, 6.0, 1, 1.0)]
    assert end_of(done).status == "COMPLETED"
    assert end_of([*done, old.smoke_mode(9)]).status == "LOST"
    assert end_of([old.smoke_mode(9), *done]).status == "COMPLETED"


def test_a_smoke_is_one_by_any_of_its_lines() -> None:
    for line in (old.smoke_mode(9), old.no_export(), old.smoked(9, 1.0, 7.0, 6.0)):
        assert of(Run, read(line))[-1].mode == "smoke"
        assert "FT-SMOKE-004" in judged(read([line, old.output(), old.complete(7.0, 6.0, 9, 1.0)]))


def test_a_line_that_stands_twice_is_one_step() -> None:
    events = read([line for n in range(1, 4) for line in [old.step(n, 3, 7 - n)] * 2])
    assert [step.step for step in of(Step, events)] == [1, 2, 3]
    assert len(of(Run, events)) == 1


# Our own launch.log


def test_our_own_log_gives_the_losses_evaluations_and_verdicts_of_its_stream() -> None:
    events = with_verdicts(smoke_events(20))
    run = next(e for e in events if isinstance(e, Run))
    events[-1] = msgspec.structs.replace(events[-1], steps=20)
    found = read(line for event in events for line in human_lines(event, run))
    assert [(s.step, s.loss) for s in of(Step, found)] == [(s.step, round(s.loss, 4)) for s in of(Step, events)]
    seen, written = of(Eval, found), of(Eval, events)
    assert [(e.step, e.loss, e.ce, e.kd, e.agreement) for e in seen] == [
        (e.step, e.loss, e.ce, e.kd, round(e.agreement or 0, 3)) for e in written
    ]
    said = [(v.id, v.verdict, v.expected, v.observed, v.severity) for v in of(Verdict, found)]
    assert said == [(v.id, v.verdict, v.expected, v.observed, v.severity) for v in of(Verdict, events)]
    last = of(Run, found)[-1]
    assert (last.mode, last.student, last.teacher) == (run.mode, run.student, run.teacher)
    assert (last.device, last.device_name, last.precision, last.tokens_per_step) == ("cpu", "Some CPU", "fp32", 8_192)
    assert [p.name for p in of(Phase, found)] == [p.name for p in of(Phase, events)]
    end = of(End, found)[0]
    assert (end.status, end.reason, end.steps, end.seconds) == ("COMPLETED", "the time budget is reached", 20, 40.0)
    assert end.summary["steps_per_second"] == 0.5
    assert of(Projection, found)[0].p50_seconds == 25_000.0


def test_our_own_logs_means_over_five_steps_are_not_contradicted_by_single_steps() -> None:
    lines = ["phase import", "phase train", *(old.step(n, 4, 5 + (n == 4)) for n in range(1, 5)), "phase judge: steps"]
    events = read([*lines, "COMPLETED: every step is done (4 steps, 3.0s)"])
    assert "F-DISTILL-PIPELINE-001" not in judged(events)
    assert judged(events)["F-FINITE-001"][0] == "PASS"


@pytest.mark.parametrize("status", ["FAILED", "STOPPED", "TIMEOUT", "CRASHED"])
def test_our_own_closing_line_is_how_it_ended(status: str) -> None:
    why = "error: CUDA_ERROR_OUT_OF_MEMORY"
    end = end_of(["error: something", old.step(1, 9, 7.0), f"{status}: {why} (1 steps, 3.0s)"])
    assert (end.status, end.reason, end.steps, end.seconds) == (status, why, 1, 3.0)


def test_a_resumed_run_of_ours_that_broke_off_is_not_what_its_first_attempt_was() -> None:
    first = ["phase import", old.step(1, 9, 7.0), "STOPPED: by SIGTERM (1 steps, 3.0s)"]
    assert end_of([*first, "phase import", old.step(2, 9, 6.0)]).status == "LOST"


# Whatever comes


def without_control(event: Event) -> None:
    for name in event.__struct_fields__:
        value = getattr(event, name)
        for text in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
            assert clean(text, len(text) + 1) == text


SNIPPETS = st.sampled_from(
    [
        *(line.encode() for line in old.head(2)),
        *(old.step(n, 9, 7.0 - n / 9).encode() for n in range(1, 10)),
        *(old.epoch(1, 3, 7.0, 3.0, 6.0).encode(), old.complete(7.0, 6.0, 9, 1.0).encode(), old.saved(3).encode()),
        *(old.smoked(9, 3.0, 7.0, 6.0).encode(), old.projected(9, 9.0).encode(), old.smoke_mode(3).encode()),
        *(old.PANIC.encode(), old.not_saved(3).encode(), b"F-A-1: PASS", b"phase train", b"phase judge: x"),
        *(b"\n", b"\r\n", b"\r", b"\n\n", b"\x1b[31m", b"\x1b]0;title\x07", b"\x00", b"\xff\xfe", b"\xe2\x86", b"\t"),
        *(b"\xe2\x86\x92", b"\x9b31m", "\u202e".encode(), "\u2028".encode(), b"x" * 3_000, b"y" * 70_000),
    ]
)
LOGS = st.lists(SNIPPETS | st.binary(max_size=30), max_size=40).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(LOGS)
@example(b"\xff\xfe" + "  Step 1/2: loss: 3.0\n".encode("utf-16-le"))
def test_no_log_breaks_the_reader_and_nothing_that_it_gives_has_a_control_character(data: bytes) -> None:
    events = read(data)
    for event in events:
        without_control(event)
        encode(event)
    assert isinstance(events[-1], End)
    assert [event.seq for event in events] == list(range(len(events)))


@settings(max_examples=200, deadline=None)
@given(LOGS, st.integers(1, 200), st.integers(1, 5_000))
def test_how_a_log_is_cut_into_pieces_changes_nothing(data: bytes, small: int, large: int) -> None:
    whole = [encode(event) for event in read(data)]
    assert [encode(event) for event in read(data, piece=large)] == whole
    if len(data) < 20_000:
        assert [encode(event) for event in read(data, piece=small)] == whole


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_a_line_is_cut_alike_whether_it_comes_whole_or_not(encoding: str) -> None:
    mark = "\ufeff" if encoding != "utf-8" else ""
    for text in ("z" * 200_000, "→" * 100_000, "ab" + " " * 100_000 + "c", " " * 100_000 + "Step 1/2: loss: 3.0"):
        raw = f"{mark}first\n{text}\n{old.step(1, 2, 3.0)}\n".encode(encoding)
        whole, pieces = read(raw, piece=1 << 20), read(raw, piece=1_000)
        assert [encode(event) for event in whole] == [encode(event) for event in pieces]
        assert of(Log, whole)[1].message.endswith("(line cut)")
        assert len(of(Log, whole)[1].message) < 3_000
        assert len(of(Step, whole)) == 1


def test_a_log_of_any_length_takes_little_memory() -> None:
    tracemalloc.start()
    try:
        log = LegacyLog()
        for _ in range(64):
            log.feed(b"x" * (1 << 20))  # one line without an end
        many = b"".join(f"{line}\n".encode() for line in [old.step(1, 9, 7.0), old.step(2, 9, 6.0), "F-A-1: PASS"])
        for _ in range(300):
            log.feed(many * 20)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1 << 20
    assert peak < 16 << 20


def test_progress_that_was_written_over_itself_is_read_one_state_after_the_other() -> None:
    events = read(b"\r  Step 1/3: loss: 7.0\r  Step 2/3: loss: 6.0\r\n" + old.step(3, 3, 5.0).encode())
    assert [(s.step, s.t) for s in of(Step, events)] == [(1, 1), (2, 1), (3, 2)]


def test_what_is_no_utf8_is_replaced_and_the_rest_is_read() -> None:
    events = read(b"caf\xe9 \xff\n" + old.complete(7.0, 6.0, 9, 1.0).encode("latin-1", "replace") + b"\n")
    assert of(Log, events)[0].message == "caf\ufffd \ufffd"
    assert of(End, events)[0].status == "COMPLETED"


def test_numbers_beyond_all_measure_are_log_only() -> None:
    digits = "9" * 5_000
    for line in (
        f"Step {digits}/9: loss: 1.0",
        f"Distillation complete: initial_loss=1 final_loss=2 ({digits} steps, 1s)",
    ):
        events = read(line)
        assert not of(Step, events)
        assert len(of(Log, events)) == 1
    assert one(Step, "Step 1/2: loss: 1e999").loss == math.inf


@pytest.mark.parametrize("make", [old.train_log, old.smoke_log])
def test_every_event_can_be_written_as_a_stream(make: Callable[[], bytes]) -> None:
    for event in read(make()):
        encode(event)
