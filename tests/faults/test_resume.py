"""The real command, killed with SIGKILL at random moments and resumed until done: bitwise the undisturbed run."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from command_faults import check_same_end
from command_rig import CONFIG, EVERY, STEPS, Training
from conftest import COMMAND_KILLS, Killed

from engine.formats import resolve_builtin
from tests.console_rig import Desk, until, write_corpus

pytestmark = pytest.mark.timeout(600)


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


def test_a_changed_teacher_is_refused_by_name_and_can_be_allowed(desk: Desk, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.txt")
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
