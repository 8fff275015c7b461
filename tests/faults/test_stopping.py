"""A full run is stopped in every phase, its directory becomes read-only, its clock jumps: what stands then."""

from __future__ import annotations

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
from command_rig import EVALUATE_EVERY, Training
from faults import can_make_read_only, read_only

from tests.console_rig import Desk

pytestmark = pytest.mark.timeout(600)


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


def test_a_signal_that_finds_nothing_left_to_stop_changes_nothing(troubled: Troubled) -> None:
    check_nothing_left_to_stop(troubled.last)


def test_a_clock_that_jumps_a_month_ahead_and_a_year_back_changes_no_verdict(troubled: Troubled) -> None:
    check_clock(troubled.training, troubled.last)


def test_a_run_directory_that_becomes_read_only_ends_in_one_clear_error(troubled: Troubled) -> None:
    if troubled.read_only is None:
        pytest.skip("nothing stops root from writing where it may not mount")
    check_read_only(troubled.training, troubled.read_only)


def test_a_read_only_run_is_not_resumed_and_one_line_says_why(troubled: Troubled) -> None:
    if troubled.refused is None:
        pytest.skip("nothing stops root from writing where it may not mount")
    check_refused(troubled.training, troubled.refused)


def test_a_run_in_trouble_ends_as_the_undisturbed_one(troubled: Troubled, undisturbed: Training) -> None:
    check_same_end(troubled.training, undisturbed)


def test_a_read_only_evidence_directory_is_refused_before_anything_starts(desk: Desk) -> None:
    if not can_make_read_only():
        pytest.skip("nothing stops root from writing where it may not mount")
    desk.evidence.mkdir()
    with read_only(desk.evidence):
        desk.call("--headless", "smoke").refused(str(desk.evidence), "expected a directory that can be written")
