"""Incidents found in past runs: each kind in a run that has it, and none in runs that went well."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from console.findings.rules import NOTE, SEVERE, WARNING, Finding, find, worst
from console.irregular import spikes
from console.run_reader import LoadedRun, load_run
from console.run_state import Reducer
from dispatch.manifest import EVENTS, EXIT, MANIFEST, SUMS
from dispatch.sums import Checked
from engine.stream import (
    Checkpoint,
    CheckpointFailed,
    End,
    Eval,
    Event,
    Log,
    Measure,
    Phase,
    Step,
    Verdict,
    decode_line,
)
from tests.console import run_dirs as dirs
from tests.old_evidence import SCENES
from tests.streams import end_event, smoke_events, stamped, with_verdicts

ROOT = Path(__file__).parents[2]
COMMITTED = sorted(path.parent for path in (ROOT / "evidence").glob("*/dispatch.json"))


def found(path: Path) -> dict[str, Finding]:
    """The findings of a run by kind."""
    return {each.kind: each for each in find(load_run(path))}


def serious(findings: Sequence[Finding]) -> list[str]:
    return [each.kind for each in findings if each.severity != NOTE]


def make(
    evidence: Path, events: list[Event], exit_code: int = 0, end: End | None = None, mode: str = "train", **how: object
) -> Path:
    """A run directory with verdicts, and an end that agrees with them."""
    made = max((e.step for e in events if isinstance(e, Step)), default=0)
    whole = with_verdicts(stamped(events), dirs.train_contract(), end or dirs.ending(made, exit_code))
    return dirs.make_run(evidence, whole, exit_code, mode, **how)  # type: ignore[arg-type]


def paused(events: Sequence[Event], seconds: float, before: Callable[[Event], bool]) -> list[Event]:
    """The events with a time in which nothing comes, before the first one that is meant."""
    at = next(index for index, event in enumerate(events) if before(event))
    return [*events[:at], *dirs.shifted(events[at:], seconds)]


def journal(path: Path, *lines: dict[str, object]) -> None:
    with (path / "supervisor.jsonl").open("a") as file:
        file.writelines(json.dumps({"v": 1, **line}) + "\n" for line in lines)


def changed_exit(path: Path, **changes: object) -> None:
    record = json.loads((path / EXIT).read_text())
    (path / EXIT).write_text(json.dumps({**record, **changes}))


# Nothing


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_a_committed_run_that_passed_alarms_nobody(path: Path) -> None:
    loaded = load_run(path)
    assert loaded.state.end is not None
    alarms = serious(find(loaded))
    if loaded.state.end.exit_code == 0:
        # A warning that the run's own contract gave is told; it is no invention of ours.
        warned = [v for v in loaded.state.judged if v.verdict == "FAIL" and v.severity == "warn"]
        assert alarms == ["verdict-failed"] * len(warned)
    else:
        assert alarms


def test_there_are_committed_runs() -> None:
    assert len(COMMITTED) >= 2


@pytest.mark.parametrize("build", [dirs.good_smoke, dirs.good_train])
def test_a_good_run_gives_no_finding(build: Callable[[Path], Path], tmp_path: Path) -> None:
    assert found(build(tmp_path)) == {}


def test_a_run_that_goes_on_is_not_said_to_have_ended_in_any_way(tmp_path: Path) -> None:
    assert found(dirs.live_run(tmp_path)) == {}


@pytest.mark.parametrize("scene", ["smoke", "smoke-6000s", "smoke-6000.0s", "every-tenth"])
def test_a_good_run_of_the_predecessor_alarms_nobody(scene: str, tmp_path: Path) -> None:
    assert serious(find(load_run(SCENES[scene](tmp_path / "old")))) == []


# Losses


def test_all_spikes_are_counted_and_the_worst_is_told_however_long_ago(tmp_path: Path) -> None:
    high = {400: 4.0, 401: 4.0, 900: 7.0, 2_000: 5.0}
    path = make(tmp_path, dirs.train_events(3_000, lambda step: dirs.falling(step) * high.get(step, 1.0)))
    [told] = [each for each in find(load_run(path)) if each.kind == "spike"]
    assert (told.severity, told.count, told.step, told.source) == (WARNING, 3, 900, EVENTS)
    assert told.text.startswith("3 spikes, the worst of 7.04 times")
    assert told.at == pytest.approx(900 * 0.65, abs=30)


def test_neighbours_are_one_spike() -> None:
    losses = np.full(200, 2.0)
    losses[100:104] = 9.0
    losses[150] = 9.0
    seen = spikes(losses)
    assert seen is not None
    assert (len(seen.rows), seen.groups) == (5, 2)


def test_a_loss_that_is_no_number_is_severe_and_carries_its_verdict(tmp_path: Path) -> None:
    told = found(dirs.nan_run(tmp_path, 60))["non-finite"]
    assert (told.severity, told.step, told.verdict) == (SEVERE, 60, "F-FINITE-001")
    assert told.text == "loss NaN at step 60; it was the last step"


def test_a_gradient_that_is_no_number_is_found_where_all_losses_are_finite(tmp_path: Path) -> None:
    events = dirs.train_events(100)
    bad = [
        msgspec.structs.replace(e, grad_norm=math.inf) if isinstance(e, Step) and e.step in (50, 51) else e
        for e in events
    ]
    told = found(make(tmp_path, bad))["non-finite"]
    assert (told.severity, told.text, told.count) == (
        WARNING,
        "gradient norm infinite at step 50, and at 1 step more",
        2,
    )


def test_a_held_out_loss_that_is_no_number_is_found(tmp_path: Path) -> None:
    events = dirs.train_events(100)
    bad = [msgspec.structs.replace(e, loss=math.nan) if isinstance(e, Eval) and e.step == 50 else e for e in events]
    assert found(make(tmp_path, bad))["non-finite"].text == "held-out loss NaN at step 50"


@pytest.mark.parametrize(
    ("loss", "kind", "text"),
    [
        (lambda step: 5.0 + step * 0.01, "loss-rose", "the loss rose: 5.0"),
        (lambda step: 5.0 - (step % 2) * 1e-4, "loss-never-moved", "the loss never moved: 4.999"),
        (lambda step: dirs.falling(step) if step < 250 else 7.0, "loss-rose", "the loss did not hold: "),
    ],
)
def test_a_loss_that_rose_or_never_moved_or_did_not_hold(
    loss: Callable[[int], float], kind: str, text: str, tmp_path: Path
) -> None:
    told = found(make(tmp_path, dirs.train_events(300, loss), 1))
    assert told[kind].text.startswith(text)


def test_a_run_of_a_few_steps_whose_loss_did_not_fall_is_a_note_unless_a_verdict_says_so(tmp_path: Path) -> None:
    events = [
        e for e in dirs.train_events(4, lambda step: 5.0 + step) if not (isinstance(e, Phase) and e.name == "judge")
    ]
    assert found(make(tmp_path, events, 5))["loss-rose"].severity == NOTE


# Checkpoints


def test_a_failed_checkpoint_is_told_with_the_steps_that_stood_unsaved(tmp_path: Path) -> None:
    told = found(dirs.failed_checkpoint_run(tmp_path))["checkpoint-failed"]
    assert (told.severity, told.step) == (WARNING, 100)
    assert told.text == (
        "checkpoint at step 100 failed: No space left on device: 412 MB free, 988 MB needed; "
        "200 steps since its beginning stood unsaved until step 200"
    )


def test_a_failed_checkpoint_after_which_none_was_saved_is_severe(tmp_path: Path) -> None:
    begin = [*dirs.opening(400), Phase(name="train"), *dirs.steps_between(1, 350, failed=[200, 300])]
    path = make(tmp_path, begin, 130)
    told = found(path)["checkpoint-failed"]
    assert (told.severity, told.count, told.step) == (SEVERE, 2, 300)
    assert told.text.startswith("2 checkpoints failed; checkpoint at step 300 failed")
    assert told.text.endswith("250 steps since step 100 stood unsaved, and no later one was saved")


def without_checkpoints(events: Sequence[Event]) -> list[Event]:
    return [e for e in events if not isinstance(e, Checkpoint | CheckpointFailed) or e.kind == "final"]


@pytest.mark.parametrize(("steps", "told"), [(5_000, False), (5_001, True)])
def test_a_long_run_without_an_intermediate_checkpoint(steps: int, told: bool, tmp_path: Path) -> None:
    kinds = found(make(tmp_path, without_checkpoints(dirs.train_events(steps))))
    assert ("no-checkpoint" in kinds) is told
    if told:
        assert kinds["no-checkpoint"].severity == WARNING
        assert kinds["no-checkpoint"].text == (
            "no intermediate checkpoint in 5,001 steps and 0.7 h: a fault would have cost all of it"
        )


def test_few_steps_that_took_hours_want_a_checkpoint_too(tmp_path: Path) -> None:
    end = msgspec.structs.replace(dirs.ending(100), summary={"train_seconds": 90_000.0})
    told = found(make(tmp_path, without_checkpoints(dirs.train_events(100)), end=end))
    assert told["no-checkpoint"].text.startswith("no intermediate checkpoint in 100 steps and 25.0 h")


# Teacher and student


def with_kd(events: Sequence[Event], kd: float) -> list[Event]:
    return [msgspec.structs.replace(e, kd=kd) if isinstance(e, Step) else e for e in events]


def test_a_kd_that_is_about_zero_means_that_the_student_is_the_teacher(tmp_path: Path) -> None:
    told = found(make(tmp_path, with_kd(dirs.train_events(100), 1e-4)))["teacher-is-student"]
    assert told.severity == WARNING  # of so few steps
    assert "kd is about zero: 0.0001 nats at the first step" in told.text


def test_in_a_long_run_that_is_severe(tmp_path: Path) -> None:
    assert found(make(tmp_path, with_kd(dirs.train_events(5_000), 1e-4)))["teacher-is-student"].severity == SEVERE


@pytest.mark.parametrize("run", [{"teacher": None, "alpha": 1.0}, {"alpha": 1.0}])
def test_without_a_teacher_that_counts_a_kd_of_zero_is_as_it_should_be(run: dict[str, Any], tmp_path: Path) -> None:
    assert "teacher-is-student" not in found(make(tmp_path, with_kd(dirs.train_events(100, **run), 0.0)))


def test_two_names_that_are_one(tmp_path: Path) -> None:
    same: dict[str, Any] = {"teacher": "/models/qwen", "student": "/models/qwen"}
    events = [e for e in dirs.train_events(100, **same) if not (isinstance(e, Measure) and "distance" in e.name)]
    told = found(make(tmp_path, events))["teacher-is-student"]
    assert told.text == "teacher and student are the same model: both are /models/qwen"
    # The same name for two models that were measured to differ, one made of the other's layers, is no alarm.
    assert "teacher-is-student" not in found(make(tmp_path, dirs.train_events(100, **same), name="layers"))


def test_the_predecessors_manifest_with_one_model_twice(tmp_path: Path) -> None:
    path = SCENES["asked-50-ran-62"](tmp_path / "old")
    manifest = json.loads((path / MANIFEST).read_text())
    teacher = next(key for key in manifest if key.startswith("teacher"))
    student = next(key for key in manifest if key.startswith("student"))
    manifest[student] = manifest[teacher]
    (path / MANIFEST).write_text(json.dumps(manifest))
    told = found(path)["teacher-is-student"]
    assert (told.severity, told.source) == (WARNING, MANIFEST)
    assert manifest[teacher] in told.text


# Steps


def test_asked_and_ran_are_both_told_with_where_each_is_from(tmp_path: Path) -> None:
    told = found(SCENES["asked-50-ran-62"](tmp_path / "old"))["steps-differ"]
    assert told.text == "asked 50 steps (dispatch.json), ran 62 (the log, launch.log)"
    assert told.severity == WARNING


def test_a_completed_run_of_ours_that_made_fewer_steps(tmp_path: Path) -> None:
    told = found(make(tmp_path, dirs.train_events(100, target=150)))["steps-differ"]
    assert told.text == "asked 150 steps (config.yaml), ran 100 (events.jsonl)"


def test_a_smoke_that_its_budget_ended_asked_for_no_more(tmp_path: Path) -> None:
    assert "steps-differ" not in found(dirs.good_smoke(tmp_path, 30))


def test_an_end_that_counts_otherwise_than_the_steps(tmp_path: Path) -> None:
    told = found(make(tmp_path, dirs.train_events(100), end=dirs.ending(120)))
    assert told["steps-differ"].text == "its end says 120 steps, its last step is 100"


# Waits


def test_a_wait_for_a_step_is_found_with_the_step_before_it(tmp_path: Path) -> None:
    events = paused(dirs.train_events(200), 90.0, lambda e: isinstance(e, Step) and e.step == 121)
    told = found(make(tmp_path, events))["stall"]
    assert (told.severity, told.step, told.source) == (WARNING, 120, EVENTS)
    assert told.text == "no step for 1m 32s after step 120"


def test_a_wait_beyond_the_contract_is_severe_and_carries_its_verdict(tmp_path: Path) -> None:
    events = paused(dirs.train_events(200), 5_400.0, lambda e: isinstance(e, Step) and e.step == 121)
    told = found(make(tmp_path, events, 1))
    assert (told["stall"].severity, told["stall"].verdict) == (SEVERE, "F-NO-STALL-001")
    assert told["stall"].text == "no step for 1h 30m after step 120"
    assert "verdict-failed" not in told


def test_a_run_that_hung_at_step_0_until_it_was_killed(tmp_path: Path) -> None:
    begin = stamped([*dirs.opening(50_000), Phase(name="train")])
    beats = [msgspec.structs.replace(dirs.beat(0)[0], t=begin[-1].t + 5.0 * n) for n in range(1, 1_081)]
    path = dirs.make_run(tmp_path, dirs.live([*begin, *stamped(beats)], dirs.train_contract()), None, "train", signal=9)
    told = found(path)
    assert told["stall"].severity == SEVERE
    assert told["stall"].text == "no step for 1h 30m: the first one did not come; it never went on"
    assert told["crash"].text == "killed by SIGKILL in phase train; launch.log does not say why"


def test_an_evaluation_or_a_save_in_between_is_no_wait_and_neither_is_the_time_between_two_attempts(
    tmp_path: Path,
) -> None:
    events = paused(dirs.train_events(200), 55.0, lambda e: isinstance(e, Step) and e.step == 51)
    events = paused(events, 55.0, lambda e: isinstance(e, Eval) and e.step == 50)
    assert "stall" not in found(make(tmp_path, events))
    assert "stall" not in found(dirs.resumed_run(tmp_path))


def test_a_phase_over_its_budget(tmp_path: Path) -> None:
    events = paused(dirs.train_events(50), 2_000.0, lambda e: isinstance(e, Phase) and e.name == "load-teacher")
    told = found(make(tmp_path, events, 1))["stall"]
    assert told.text.startswith("phase self-check took 33m ")
    assert told.text.endswith("of its 30m 00s")


def test_what_the_supervisor_saw_is_told_with_the_wait_it_saw(tmp_path: Path) -> None:
    events = paused(dirs.train_events(200), 900.0, lambda e: isinstance(e, Step) and e.step == 121)
    path = make(tmp_path, events, 1)
    since = next(e.t for e in load_events(path) if isinstance(e, Step) and e.step == 120)
    seen = {"event": "stall", "t": since + 600, "seconds": 600.0, "phase": "train", "since": since}
    journal(
        path, {**seen, "allowed_seconds": 600.0, "process": "D", "stacks": True}, {"event": "recovered", "t": since}
    )
    [told] = [each for each in find(load_run(path)) if each.kind == "stall"]
    assert told.source == "events.jsonl, supervisor.jsonl"
    assert told.text == (
        "no step for 15m 02s after step 120; the supervisor saw it; the process waits for a device; "
        "its stacks are in launch.log"
    )


def load_events(path: Path) -> list[Event]:
    return [e for line in (path / EVENTS).read_bytes().splitlines() if (e := decode_line(line)) is not None]


def test_a_stall_for_which_the_supervisor_ended_the_run(tmp_path: Path) -> None:
    path = dirs.crashed_run(tmp_path)
    last = load_run(path).state.last_t
    stall = {"event": "stall", "t": last, "seconds": 600.0, "phase": "train", "since": last, "allowed_seconds": 600.0}
    journal(path, stall, {"event": "signal", "signal": 15, "by": "stall", "t": last})
    changed_exit(path, stall={"phase": "train", "seconds": 660.0}, ended=last + 700)
    told = found(path)
    assert told["stall"].severity == SEVERE
    assert "the supervisor ended the run for it; it never went on" in told["stall"].text
    assert told["stall"].source == "events.jsonl, supervisor.jsonl, exit.json"
    assert "crash" not in told


def test_many_waits_are_told_up_to_five_and_the_rest_counted(tmp_path: Path) -> None:
    events = dirs.train_events(200)
    for step in range(20, 180, 20):
        events = paused(events, 80.0 + step, lambda e, step=step: isinstance(e, Step) and e.step == step)  # type: ignore[misc]
    told = [each for each in find(load_run(make(tmp_path, events))) if each.kind == "stall"]
    assert [each.count for each in told] == [1, 1, 1, 1, 4]
    assert told[-1].text.endswith("; and 3 shorter ones")


def test_a_clock_that_was_set_back(tmp_path: Path) -> None:
    events = paused(dirs.train_events(200), -3_600.0, lambda e: isinstance(e, Step) and e.step == 121)
    told = found(make(tmp_path, events))["clock-set-back"]
    assert (told.severity, told.step) == (WARNING, 121)
    assert "set back by 59m 58s" in told.text


# The end


def test_an_end_that_nobody_recorded(tmp_path: Path) -> None:
    told = found(dirs.lost_run(tmp_path))["end-unrecorded"]
    assert (told.severity, told.step) == (SEVERE, 120)
    assert told.text.endswith("in phase train after step 120")


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("  Step 1\nTraceback (most recent call last):\n  File x\nRuntimeError: no kernel image\n", "RuntimeError: no"),
        ("torch.OutOfMemoryError: CUDA out of memory\n  Step 3/9: loss: 1.0\n", "torch.OutOfMemoryError: CUDA"),
        ("thread 'main' panicked at x.rs\n", "thread 'main' panicked at x.rs"),
    ],
)
def test_a_crash_is_told_with_its_failing_line(log: str, line: str, tmp_path: Path) -> None:
    path = dirs.crashed_run(tmp_path)
    (path / "launch.log").write_text(log)
    told = found(path)
    assert (told["crash"].severity, told["crash"].source) == (SEVERE, "exit.json, launch.log")
    assert told["crash"].text.startswith(f"killed by SIGKILL in phase train after step 80: {line}")
    assert told["torn-line"].severity == NOTE


def test_a_crash_that_the_run_itself_told_of(tmp_path: Path) -> None:
    end = msgspec.structs.replace(
        dirs.ending(50), status="CRASHED", exit_code=5, reason="RuntimeError: no kernel image"
    )
    told = found(make(tmp_path, [*dirs.opening(99), Phase(name="train"), *dirs.steps_between(1, 50)], 5, end))
    assert told["crash"].text == "it crashed: RuntimeError: no kernel image"


def test_a_stop_is_a_note(tmp_path: Path) -> None:
    told = found(make(tmp_path, [*dirs.opening(99), Phase(name="train"), *dirs.steps_between(1, 50)], 130))
    assert {kind: each.severity for kind, each in told.items()} == {"stopped": NOTE}
    assert told["stopped"].text.startswith("it was stopped after 50 of 99 steps")


@pytest.mark.parametrize("scene", ["panic", "error"])
def test_a_failure_in_an_old_log_is_told_with_its_line(scene: str, tmp_path: Path) -> None:
    told = found(SCENES[scene](tmp_path / "old"))["crash"]
    assert told.severity == SEVERE
    assert "CUDA_ERROR_OUT_OF_MEMORY" in told.text or "Validation failed" in told.text


def test_an_old_log_that_breaks_off(tmp_path: Path) -> None:
    told = found(SCENES["broken-off"](tmp_path / "old"))["end-unrecorded"]
    assert (told.severity, told.text) == (WARNING, "the log does not say how it ended; its last step is 30")


def test_verdicts_that_are_stated_otherwise_than_they_are_judged(tmp_path: Path) -> None:
    told = found(SCENES["contradiction"](tmp_path / "old"))["disputed"]
    assert "F-DISTILL-PIPELINE-001" in told.text
    path = dirs.good_train(tmp_path)
    lines = (
        (path / EVENTS)
        .read_bytes()
        .replace(b'"id":"F-FINITE-001","verdict":"PASS"', b'"id":"F-FINITE-001","verdict":"FAIL"')
    )
    (path / EVENTS).write_bytes(lines)
    assert found(path)["disputed"].severity == SEVERE


def test_an_exit_code_that_the_verdicts_do_not_give(tmp_path: Path) -> None:
    path = make(tmp_path, dirs.train_events(100, lambda step: 5.0 + step * 0.1), 1, end=dirs.ending(100, 0))
    assert found(path)["disputed"].text == "verdicts contradict: its end says exit code 0, its verdicts say 1"


def test_an_export_that_failed(tmp_path: Path) -> None:
    events = [
        msgspec.structs.replace(e, value=12.0) if isinstance(e, Measure) and e.name == "export_missing_tensors" else e
        for e in dirs.train_events(100)
    ]
    told = found(make(tmp_path, events, 1))["export-failed"]
    assert (told.severity, told.verdict) == (SEVERE, "F-EXPORT-001")
    assert "missing_tensors 12" in told.text


def test_a_model_of_the_predecessor_that_is_an_empty_file(tmp_path: Path) -> None:
    path = SCENES["asked-50-ran-62"](tmp_path / "old")
    (path / "model.safetensors").write_bytes(b"\0" * 200)
    assert found(path)["export-failed"].text == "model.safetensors has 200 bytes: no model is in it"


def test_resumed_attempts_and_what_they_made_again(tmp_path: Path) -> None:
    told = found(dirs.resumed_run(tmp_path))["resumed"]
    assert (told.severity, told.text) == (WARNING, "it took 2 attempts; 30 steps lost and made again")


def test_a_host_that_was_started_anew_while_the_run_was_on_it(tmp_path: Path) -> None:
    path = dirs.resumed_run(tmp_path)
    boots = ["one", "two", "three"]
    lines = [{"event": "starting", "t": 1.0, "supervisor": {"boot_id": boot}} for boot in boots]
    (path / "supervisor.jsonl").write_text("")
    journal(path, lines[0], lines[1], {"event": "exited", "exit_code": 0}, lines[2])
    told = [each for each in find(load_run(path)) if each.kind == "host-rebooted"]
    assert [each.text for each in told] == ["the host was started anew while attempt 1 ran"]


def test_processes_that_outlived_the_trainer(tmp_path: Path) -> None:
    path = dirs.good_train(tmp_path)
    changed_exit(path, orphans=[{"pid": 7, "name": "pt_data_worker", "signal": 9}])
    told = found(path)["orphans"]
    assert told.text == "1 of its processes outlived it: pt_data_worker (7); 1 had to be killed"
    journal(path, {"event": "unkillable", "pids": [8, 9]})
    assert [e.severity for e in find(load_run(path)) if e.kind == "orphans"] == [SEVERE, WARNING]


def test_files_that_are_not_as_they_were_sealed(tmp_path: Path) -> None:
    loaded = load_run(dirs.good_train(tmp_path))
    told = find(loaded, Checked("0" * 64, tuple(f"file-{n}: changed" for n in range(8)), ()))
    assert [each.kind for each in told] == ["changed"] * 5
    assert told[-1].text == "not as it was sealed: file-4: changed; and 3 more"
    assert {each.source for each in told} == {SUMS}


def test_a_fail_that_nothing_else_tells_of_is_told_once(tmp_path: Path) -> None:
    high = [msgspec.structs.replace(e, loss=e.loss + 5) if isinstance(e, Eval) else e for e in dirs.train_events(200)]
    [told] = [each for each in find(load_run(make(tmp_path, high))) if each.verdict]
    assert (told.kind, told.severity, told.verdict) == ("verdict-failed", WARNING, "F-DISTILL-V2-001")


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    path = dirs.good_train(tmp_path)
    (path / "contract.yaml").unlink()
    missing = [each for each in find(load_run(path)) if each.kind == "missing"]
    assert len(missing) == 1
    assert "contract.yaml" in missing[0].text


def test_of_a_stream_that_breaks_off_in_junk_only_that_is_said_and_nothing_is_invented(tmp_path: Path) -> None:
    path = dirs.good_train(tmp_path)
    lines = (path / EVENTS).read_bytes().splitlines(keepends=True)
    (path / EVENTS).write_bytes(b"".join(lines[:120]) + b'{"x\n')
    assert serious(find(load_run(path))) == ["unreadable"]


def test_a_run_of_another_host_whose_end_is_not_here_is_unknown_and_not_lost(tmp_path: Path) -> None:
    path = dirs.lost_run(tmp_path)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["remote"] = {"host": "gx10", "run_dir": "/r", "python": "/p", "engine": "/e", "env": []}
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert found(path) == {}


# All of them


def test_the_worst_comes_first_and_is_the_one_to_tell_where_there_is_room_for_one(tmp_path: Path) -> None:
    path = dirs.nan_run(tmp_path)
    changed_exit(path, orphans=[{"pid": 7, "name": "x", "signal": 15}])
    told = find(load_run(path))
    assert [each.severity for each in told] == sorted((e.severity for e in told), key=[SEVERE, WARNING, NOTE].index)
    assert worst(told) == told[0]
    assert worst([each for each in told if each.severity == NOTE]) is None


HOSTILE = ["\x1b[2J", "\x9b31m", "\u202etxt.exe", "a\nb", "[red]x[/]", "é" * 5_000, "\ud800"]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_finding_holds_a_control_character_whatever_a_directory_holds(text: str, tmp_path: Path) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    path = dirs.crashed_run(tmp_path)
    (path / "launch.log").write_bytes(b"RuntimeError: " + raw + b"\n")
    spoken = text.encode("utf-8", "replace").decode()
    changed_exit(path, orphans=[{"pid": 7, "name": spoken, "signal": 15}])
    journal(path, {"event": "stall", "t": 1, "since": 1, "seconds": 9e9, "phase": spoken, "process": spoken})
    for each in find(load_run(path)):
        assert each.text.isprintable(), each
        assert len(each.text) < 2_000


@pytest.mark.parametrize(
    "line",
    [
        b"null", b"[]", b'{"event":"stall","since":"x","seconds":null}', b'{"event":"exited"}', b"\xff\xfe",
        b'{"event":"stall","since":1e999,"seconds":' + b"9" * 400 + b"}", b'{"event":"starting","supervisor":[]}',
        b'{"event":"unkillable","pids":3}', b"[" * 9_000,
    ],
)  # fmt: skip
def test_a_journal_that_is_none_breaks_nothing(line: bytes, tmp_path: Path) -> None:
    path = dirs.good_train(tmp_path)
    with (path / "supervisor.jsonl").open("ab") as file:
        file.write(line + b"\n")
    find(load_run(path))


_number = st.floats(width=32) | st.just(math.nan) | st.just(1e308) | st.just(-1e308)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(_number, _number, _number, _number, st.integers(1, 40)), max_size=30),
    st.lists(st.sampled_from(["import", "train", "export", "judge", "resume"]), max_size=6),
)
def test_whatever_numbers_a_stream_holds_it_is_looked_through(
    steps: list[tuple[float, float, float, float, int]], phases: list[str]
) -> None:
    events: list[Event] = [*dirs.opening(40), Phase(name="train")]
    for index, (loss, kd, t, seconds, step) in enumerate(steps):
        made = dirs.train_step(step, loss, seconds=seconds)
        events.append(msgspec.structs.replace(made, kd=kd, t=t if math.isfinite(t) else 0.0))
        if index < len(phases):
            events.append(Phase(name=phases[index], t=seconds if math.isfinite(seconds) else 0.0))
    events += [Log(level="error", message="x"), Verdict(id="X", verdict="FAIL", severity="gate", claim="", expected="",
                                                        observed="", step=0)]  # fmt: skip
    state = Reducer(dirs.train_contract()).feed(stamped(events))
    for each in find(LoadedRun(path=Path("/nowhere"), state=state, host_state="ended")):
        assert each.text.isprintable()
        assert each.at is None or 0 <= each.at < math.inf


def test_copies_say_the_same(tmp_path: Path) -> None:
    """What is found follows from the directory, wherever it stands."""
    path = dirs.resumed_run(tmp_path)
    copy = tmp_path / "elsewhere" / path.name
    shutil.copytree(path, copy)
    assert find(load_run(copy)) == find(load_run(path))


def test_checks_that_were_overridden_are_noted(tmp_path: Path) -> None:
    path = dirs.good_train(tmp_path)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"overrides": ["teacher-is-student: a control"]}))
    told = found(path)["overridden"]
    assert (told.severity, told.text) == (NOTE, "started against a check: teacher-is-student: a control")


def test_a_smoke_that_spent_its_budget_before_it_trained_is_noted(tmp_path: Path) -> None:
    events = paused(smoke_events(12), 45.0, lambda e: isinstance(e, Phase) and e.name == "load-student")
    path = dirs.make_run(tmp_path, with_verdicts(events, end=end_event(12)), 0, "smoke")
    told = found(path)["slow-start"]
    assert (told.severity, told.text[:24]) == (NOTE, "it took 54.0 s of its 1m")
