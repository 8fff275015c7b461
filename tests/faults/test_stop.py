"""The real command is stopped in every phase, its directory becomes read-only, its clock jumps: what stands then."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_faults import (
    EARLY,
    LATE,
    Early,
    Late,
    check_clock,
    check_judged,
    check_read_only,
    check_refused,
    check_same_end,
    check_stopped,
    check_stopped_twice,
)
from command_rig import EVALUATE_EVERY, Training
from faults import can_make_read_only, read_only

from tests.console_rig import Desk

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("phase", EARLY)
def test_a_signal_before_the_first_step_ends_the_run_with_130_and_no_checkpoint(early: Early, phase: str) -> None:
    attempt = early.stops[phase]
    check_stopped(attempt, phase)
    assert attempt.kept == 0
    assert not attempt.of("step")


@pytest.mark.parametrize("phase", LATE)
def test_a_signal_from_the_first_step_on_leaves_all_that_was_made_committed(late: Late, phase: str) -> None:
    attempt = late.stops[phase]
    check_stopped(attempt, phase)
    assert attempt.kept >= max(attempt.made, 5)


@pytest.mark.parametrize("phase", ["train", "evaluation", "final-evaluation"])
def test_what_a_signal_makes_committed_is_called_an_interrupt(late: Late, phase: str) -> None:
    last = late.stops[phase].of("checkpoint")[-1]
    assert (last["kind"], last["step"]) == ("interrupt", late.stops[phase].kept)


@pytest.mark.parametrize("phase", ["resume with steps", "export"])
def test_what_was_committed_already_is_not_committed_again(late: Late, phase: str) -> None:
    assert "interrupt" not in {event["kind"] for event in late.stops[phase].of("checkpoint")}


def test_an_evaluation_is_left_in_its_midst(late: Late) -> None:
    attempt = late.stops["evaluation"]
    assert attempt.made == EVALUATE_EVERY
    assert EVALUATE_EVERY not in {event["step"] for event in attempt.of("eval")}


def test_a_checkpoint_that_is_being_written_is_committed_and_then_the_interrupt(late: Late) -> None:
    kinds = [event["kind"] for event in late.stops["checkpoint"].of("checkpoint")]
    assert kinds[-2:] in (["periodic", "interrupt"], ["best", "interrupt"])


def test_a_signal_that_finds_nothing_left_to_stop_changes_nothing(late: Late) -> None:
    check_judged(late.judge)


def test_a_second_signal_stops_at_once_although_the_disk_hangs_and_loses_nothing_committed(late: Late) -> None:
    check_stopped_twice(late.twice)
    assert late.twice.kept == late.twice.of("checkpoint")[-1]["step"] < late.twice.made


def test_a_run_directory_that_becomes_read_only_ends_in_one_clear_error(late: Late) -> None:
    if late.read_only is None:
        pytest.skip("nothing stops root from writing where it may not mount")
    check_read_only(late.training, late.read_only)


def test_a_read_only_run_is_not_resumed_and_one_line_says_why(late: Late) -> None:
    if late.refused is None:
        pytest.skip("nothing stops root from writing where it may not mount")
    check_refused(late.training, late.refused)


def test_a_read_only_evidence_directory_is_refused_before_anything_starts(tmp_path: Path) -> None:
    if not can_make_read_only():
        pytest.skip("nothing stops root from writing where it may not mount")
    desk = Desk(tmp_path)
    desk.evidence.mkdir()
    with read_only(desk.evidence):
        desk.call("--headless", "smoke").refused(str(desk.evidence), "expected a directory that can be written")


def test_a_clock_that_jumps_a_month_ahead_and_a_year_back_changes_no_verdict(early: Early) -> None:
    check_clock(early.training, early.clock)


def test_a_run_that_was_stopped_in_every_early_phase_ends_as_the_undisturbed_one(
    early: Early, undisturbed: Training
) -> None:
    check_same_end(early.training, undisturbed)


def test_a_run_that_was_stopped_in_every_late_phase_on_another_day_ends_as_the_undisturbed_one(
    late: Late, undisturbed: Training
) -> None:
    check_same_end(late.training, undisturbed)
