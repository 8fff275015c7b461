"""Full runs: killed with SIGKILL at random moments, stopped in every phase, put in trouble, and resumed until done.

What stands then is bitwise what one undisturbed run left. All of them are made here, two at a time, for that one run to
serve every comparison.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from command_faults import (
    EARLY,
    LATE,
    Stopped,
    Troubled,
    check_clock,
    check_nothing_left_to_stop,
    check_read_only,
    check_refused,
    check_same_end,
    check_stopped,
    check_stopped_twice,
    check_stopped_unsaved,
)
from command_rig import CONFIG, EVALUATE_EVERY, EVERY, STEPS, Training
from conftest import COMMAND_KILLS, Killed
from faults import can_make_read_only, read_only

from engine.formats import resolve_builtin
from tests.console_rig import Desk, until, write_corpus

pytestmark = pytest.mark.timeout(600)


# Stopped in every phase, a directory that becomes read-only, a clock that jumps


@pytest.mark.parametrize("phase", EARLY)
def test_a_signal_before_the_first_step_ends_the_run_with_130_and_no_checkpoint(stopped: Stopped, phase: str) -> None:
    attempt = stopped.stops[phase]
    check_stopped(attempt, phase)
    assert attempt.kept == 0
    assert not attempt.of("step")


@pytest.mark.parametrize("phase", LATE)
def test_a_signal_from_the_first_step_on_leaves_all_that_was_made_committed(stopped: Stopped, phase: str) -> None:
    attempt = stopped.stops[phase]
    check_stopped(attempt, phase)
    assert attempt.kept >= max(attempt.made, 5)


@pytest.mark.parametrize("phase", ["train", "evaluation", "final-evaluation"])
def test_what_a_signal_makes_committed_is_called_an_interrupt(stopped: Stopped, phase: str) -> None:
    attempt = stopped.stops[phase]
    last = attempt.of("checkpoint")[-1]
    assert (last["kind"], last["step"]) == ("interrupt", attempt.kept)


@pytest.mark.parametrize("phase", ["resume with steps", "export"])
def test_what_was_committed_already_is_not_committed_again(stopped: Stopped, phase: str) -> None:
    assert "interrupt" not in {event["kind"] for event in stopped.stops[phase].of("checkpoint")}


def test_an_evaluation_is_left_in_its_midst(stopped: Stopped) -> None:
    attempt = stopped.stops["evaluation"]
    assert attempt.made == EVALUATE_EVERY
    assert EVALUATE_EVERY not in {event["step"] for event in attempt.of("eval")}


def test_a_checkpoint_that_is_being_written_is_committed_and_then_the_interrupt(stopped: Stopped) -> None:
    kinds = [event["kind"] for event in stopped.stops["checkpoint"].of("checkpoint")]
    assert kinds == ["periodic", "interrupt"]


def test_an_export_that_is_stopped_leaves_no_model_behind(stopped: Stopped) -> None:
    assert stopped.stops["export"].of("end")
    assert not [path.name for path in stopped.training.run.path.iterdir() if "model" in path.name]


def test_a_second_signal_stops_at_once_although_the_disk_hangs_and_loses_nothing_committed(stopped: Stopped) -> None:
    check_stopped_twice(stopped.twice)
    assert stopped.twice.kept == stopped.twice.of("checkpoint")[-1]["step"] < stopped.twice.made


def test_a_stop_on_a_disk_that_refuses_the_checkpoint_says_so_and_loses_nothing_committed(stopped: Stopped) -> None:
    if stopped.unsaved is None:
        pytest.skip("nothing stops root from writing where it may not mount")
    check_stopped_unsaved(stopped.unsaved)


def test_a_run_that_was_stopped_in_every_phase_on_another_day_ends_as_the_undisturbed_one(
    stopped: Stopped, undisturbed: Training
) -> None:
    check_same_end(stopped.training, undisturbed)


@pytest.mark.slow
def test_a_signal_that_finds_nothing_left_to_stop_changes_nothing(troubled: Troubled) -> None:
    check_nothing_left_to_stop(troubled.last)


@pytest.mark.slow
def test_a_clock_that_jumps_a_month_ahead_and_a_year_back_changes_no_verdict(troubled: Troubled) -> None:
    check_clock(troubled.training, troubled.last)


@pytest.mark.slow
def test_a_run_directory_that_becomes_read_only_ends_in_one_clear_error(troubled: Troubled) -> None:
    if troubled.read_only is None:
        pytest.skip("nothing stops root from writing where it may not mount")
    check_read_only(troubled.training, troubled.read_only)


@pytest.mark.slow
def test_a_read_only_run_is_not_resumed_and_one_line_says_why(troubled: Troubled) -> None:
    if troubled.refused is None:
        pytest.skip("nothing stops root from writing where it may not mount")
    check_refused(troubled.training, troubled.refused)


@pytest.mark.slow
def test_a_run_in_trouble_ends_as_the_undisturbed_one(troubled: Troubled, undisturbed: Training) -> None:
    check_same_end(troubled.training, undisturbed)


def test_a_read_only_evidence_directory_is_refused_before_anything_starts(desk: Desk) -> None:
    if not can_make_read_only():
        pytest.skip("nothing stops root from writing where it may not mount")
    desk.evidence.mkdir()
    with read_only(desk.evidence):
        desk.call("--headless", "smoke").refused(str(desk.evidence), "expected a directory that can be written")


# The real command, killed with SIGKILL at random moments and resumed until done


def test_a_run_that_was_killed_again_and_again_ends_well(killed: Killed) -> None:
    attempts = killed.training.attempts
    assert [attempt.signal for attempt in attempts] == [signal.SIGKILL] * COMMAND_KILLS + [None]
    assert attempts[-1].outcome is not None
    assert attempts[-1].outcome.rc == 0
    assert killed.anywhere.survived + killed.writing.survived == COMMAND_KILLS


def test_half_of_the_kills_met_a_checkpoint_in_the_making(killed: Killed) -> None:
    assert 2 * killed.writing.times >= COMMAND_KILLS


def test_weights_and_losses_are_bitwise_those_of_the_undisturbed_run(killed: Killed, undisturbed: Training) -> None:
    check_same_end(killed.training, undisturbed)
    assert sorted(undisturbed.losses()) == list(range(1, STEPS + 1))


def test_the_stream_marks_what_was_run_again(killed: Killed) -> None:
    seen: set[int] = set()
    for step in killed.training.run.events("step"):
        assert step["again"] == (step["step"] in seen)
        seen.add(step["step"])


def test_no_kill_cost_more_steps_than_since_the_checkpoint_before_the_last(killed: Killed) -> None:
    assert max(killed.anywhere.lost, killed.writing.lost) < 2 * EVERY


def test_the_export_is_proven(killed: Killed) -> None:
    verdicts = {event["id"]: event["verdict"] for event in killed.training.run.events("verdict")}
    assert verdicts["F-EXPORT-001"] == "PASS"


def test_a_finished_run_is_not_resumed(killed: Killed, desk: Desk) -> None:
    outcome = desk.call("--headless", "train", "--resume", str(killed.training.run.path))
    assert outcome.rc == 2
    assert "complete already" in outcome.err


def test_a_changed_teacher_is_refused_by_name_and_can_be_allowed(warm_desk: Desk, tmp_path: Path) -> None:
    desk, corpus = warm_desk, write_corpus(tmp_path / "corpus.txt")
    teacher = tmp_path / "teacher"
    shutil.copytree(resolve_builtin("builtin:teacher"), teacher)
    text = CONFIG.replace("CORPUS", str(corpus)).replace("builtin:teacher", str(teacher))
    config = desk.write("config.yaml", text.replace(f"steps: {STEPS}", "steps: 4000"))
    going = desk.start("--headless", "train", str(config))
    run = desk.run
    until(lambda: run.has("checkpoint"), "a checkpoint")
    assert desk.call("stop", run.path.name).rc == 0
    assert going.wait().rc == 130
    assert run.events("checkpoint")[-1]["kind"] in ("interrupt", "periodic", "periodic+interrupt")
    assert run.end["status"] == "STOPPED"

    weights = teacher / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-2] ^= 1  # the lowest bit of the last weight
    weights.write_bytes(raw)
    refused = desk.call("--headless", "train", "--resume", run.path.name)
    assert refused.rc == 2, refused.said
    assert "the teacher's weights: changed since the run began" in refused.text
    assert "--allow-changed teacher" in refused.text

    going = desk.start("--headless", "train", "--resume", run.path.name, "--allow-changed", "teacher", "--quiet")
    until(lambda: len(run.events("run")) == 3, "a third attempt")
    last = max(e["step"] for e in run.events("step"))
    until(lambda: max(e["step"] for e in run.events("step")) > last, "a step of the third attempt")
    assert desk.call("stop", run.path.name).rc == 0
    going.wait()
    desk.is_quiet()
