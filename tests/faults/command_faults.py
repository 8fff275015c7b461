"""Series of faults to full runs: what is done, how each outcome is judged, and how they must all end."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from command_rig import EVALUATE_EVERY, SECONDS, STEPS, Attempt, ForkedTraining, Going, Training
from faults import can_make_read_only, fill_up, hold_in_a_write, is_being_written, read_only, small_disk
from hook import A_WRITE, A_WRITE_THAT_HANGS
from tally import Tally

from engine.checkpoint import DIRECTORY, read_manifest
from engine.stop import SAME_REQUEST_SECONDS
from tests.console_rig import Outcome, until
from tests.nursery import Nursery

T = TypeVar("T", bound=Training)
EARLY = {
    "prepare-checkpoints": "phase prepare-checkpoints",
    "import": "phase import",
    "self-check": "phase self-check",
    "load-teacher": "phase load-teacher",
    "load-student": "phase load-student",
    "load-data": "phase load-data",
    "resume": "phase resume",
    "baseline-evaluation": "phase baseline-evaluation",
}
"""Phases before the first step, and where the engine is met in each. `resume` is what a second attempt has in place of
`prepare-checkpoints`."""
LATE = {
    "train": "step 5",
    "evaluation": f"step {EVALUATE_EVERY}",
    "checkpoint": A_WRITE,
    "resume with steps": "phase resume",
    "final-evaluation": "phase final-evaluation",
    "export": "phase export",
}
"""The same from the first step on; the evaluation that follows a step and a checkpoint's write are in phase train."""
NAMED = {"evaluation": "train", "checkpoint": "train", "resume with steps": "resume"}
"""How the `end` event calls a phase, where otherwise than here."""
DAY = 86_400.0
DISK_MIB = 48
EARLY_SECONDS = 4.0
"""About what an attempt takes before its first step."""


@contextlib.contextmanager
def cleared(training: T) -> Iterator[T]:
    """Leaves no process behind, wherever the series breaks off."""
    try:
        yield training
    finally:
        training.clear()


# What is done


@dataclass(frozen=True)
class Stopped:
    """A run that was stopped in every phase but its last, each attempt on another day."""

    training: Training
    stops: Mapping[str, Attempt]
    twice: Attempt
    """It got a second signal while the checkpoint that the first one asked for hung in the disk."""
    unsaved: Attempt | None
    """The disk refused what it was to commit; None where this user cannot make a directory read-only."""


@dataclass(frozen=True)
class Troubled:
    """A run whose directory became read-only; then the clock jumped under it, and a signal came when all was done."""

    training: Training
    read_only: Attempt | None
    """None where this user cannot make a directory read-only."""
    refused: Outcome | None
    last: Attempt


def undisturbed(root: Path, corpus: Path, nursery: Nursery) -> Training:
    with cleared(ForkedTraining(root, corpus, nursery)) as training:
        training.finish()
    return training


def stopped(root: Path, corpus: Path, nursery: Nursery) -> Stopped:
    """What is stopped are engines that one process forks: the phases are theirs."""
    with cleared(ForkedTraining(root, corpus, nursery)) as training:
        stops = {phase: _stopped(training, moment) for phase, moment in EARLY.items()}
        stops |= {phase: _stopped(training, LATE[phase]) for phase in ("train", "evaluation", "checkpoint")}
        twice = _stopped_twice(training)
        unsaved = _stopped_on_a_read_only_disk(training) if can_make_read_only() else None
        stops |= {phase: _stopped(training, moment) for phase, moment in LATE.items() if phase not in stops}
        return Stopped(training, stops, twice, unsaved)


def _stopped(training: Training, moment: str) -> Attempt:
    """One attempt, each on the day after the one before; SIGTERM and SIGINT in turn."""
    number = len(training.attempts)
    going = training.start(moment, clock=DAY * number)
    going.until_met()
    going.send(signal.SIGINT if number % 2 else signal.SIGTERM)
    return going.wait()


def _stopped_twice(training: Training) -> Attempt:
    going = training.start(A_WRITE, A_WRITE_THAT_HANGS, clock=DAY * len(training.attempts))
    going.until_met()
    going.send(signal.SIGTERM)
    going.until_met()
    heard = time.monotonic()
    until(lambda: time.monotonic() > heard + SAME_REQUEST_SECONDS, "what makes it a request of its own")
    going.send(signal.SIGTERM)
    return going.wait()


def _stopped_on_a_read_only_disk(training: Training) -> Attempt:
    going = training.start("step 23", clock=DAY * len(training.attempts))
    going.until_met()
    with read_only(going.run.path / DIRECTORY):
        going.send(signal.SIGTERM)
        return going.wait()


def troubled(root: Path, corpus: Path) -> Troubled:
    with cleared(Training(root, corpus)) as training:
        attempt, refused = _read_only_midway(training) if can_make_read_only() else (None, None)
        return Troubled(training, attempt, refused, _jumping_clock_and_late_signal(training))


def _read_only_midway(training: Training) -> tuple[Attempt, Outcome]:
    """The run directory becomes read-only under a training; after its end one tries to resume it there."""
    going = training.start("step 45", clock=DAY * len(training.attempts))
    going.until_met()
    run = going.run.path
    with read_only(run):
        going.send()
        until(lambda: going.ended, "the engine's end", SECONDS)
    attempt = going.wait()
    with read_only(run):
        return attempt, training.desk.call("--headless", "train", "--resume", run.name)


def _jumping_clock_and_late_signal(training: Training) -> Attempt:
    """The machine's clock jumps a month ahead, then a year back, under a training that goes on to its end."""
    going = training.start("step 50", "step 55", "phase judge", clock=0.0)
    for ahead in (30 * DAY, -365 * DAY):
        going.until_met()
        training.set_clock(ahead)
        going.send()
    going.until_met()
    going.send(signal.SIGTERM)
    return going.wait()


def full(root: Path, corpus: Path, tally: Tally, calm: Training) -> None:
    """The disk fills up to the last byte under a training, which is resumed when there is room again."""
    with small_disk(root / "disk", DISK_MIB) as disk:
        with cleared(Training(root / "desk", corpus, evidence=disk / "evidence")) as training, tally.counts():
            going = training.start("step 20", arguments=("--force",))
            going.until_met()
            ballast = fill_up(disk)
            going.send()
            until(lambda: going.ended, "the engine's end", SECONDS)
            ballast.unlink()
            attempt = going.wait()
            assert (attempt.exit_code, attempt.answer) == (2, 5), attempt.log  # its end did not fit into the stream
            assert "Traceback" not in attempt.log, attempt.log
            training.finish()
            check_same_end(training, calm)
        tally.cost(STEPS - attempt.kept)  # it made them all, and could write down none of the last


def killed(
    root: Path,
    corpus: Path,
    kills: int,
    seed: int,
    anywhere: Tally,
    writing: Tally,
    tell: Callable[[str], None] = lambda text: None,
) -> Training:
    """SIGKILL to the engine, again and again; at least every other time while it writes a checkpoint."""
    chance = random.Random(seed)
    with cleared(Training(root, corpus)) as training:
        for kill in range(1, kills + 1):
            going = training.start(arguments=("--quiet",))
            _at_a_moment(going, max(1, STEPS * kill // (kills + 1)), 2 * writing.times < kill, chance)
            going.send(signal.SIGKILL)
            until(lambda: going.ended, "the engine's end", SECONDS)  # noqa: B023 - within this turn
            tally = writing if is_being_written(going.run.path) else anywhere
            with tally.counts():
                attempt = going.wait()
                assert (attempt.signal, attempt.answer) == (signal.SIGKILL, 5), attempt.log
                check_kept(attempt)
            tally.cost(attempt.lost)
            tell(f"the command: {kill} of {kills} kills, step {attempt.made}")
        training.finish()
    return training


def _at_a_moment(going: Going, step: int, in_a_write: bool, chance: random.Random) -> None:
    """Waits for the moment of a kill: in a write from `step` on, soon after it, or long before."""
    if not in_a_write and chance.random() < 0.3:
        _ = going.pid
        time.sleep(chance.uniform(0, EARLY_SECONDS))
        return
    going.until_step(step)
    if in_a_write:
        hold_in_a_write(going.pid, going.run.path, chance)
    else:
        time.sleep(chance.uniform(0, 0.05))


# How it is judged


def check_stopped(attempt: Attempt, phase: str) -> None:
    """It ended by itself within a step and says so, and all that it had made is committed."""
    end = _stop_of(attempt)
    named = NAMED.get(phase, phase)
    assert end["reason"] in (f"SIGTERM in phase {named}", f"SIGINT in phase {named}"), end["reason"]
    assert end["steps"] == attempt.kept, f"{end['steps']} steps, and the newest checkpoint is that of {attempt.kept}"


def check_stopped_unsaved(attempt: Attempt) -> None:
    """It ended by itself within a step, says that the last ones could not be committed, and lost no others."""
    end = _stop_of(attempt)
    expected = f"SIGTERM in phase train; step {attempt.made} is not saved: "
    assert end["reason"].startswith(expected), end["reason"]
    assert "Read-only file system" in end["reason"] or "Permission denied" in end["reason"], end["reason"]
    check_kept(attempt)


def _stop_of(attempt: Attempt) -> dict[str, Any]:
    """The `end` event of an attempt that stopped as it was told."""
    assert attempt.exit_code == 130, attempt.log
    assert "Traceback" not in attempt.log, attempt.log
    assert attempt.went_on <= 1, f"it made {attempt.went_on} steps more"
    [end] = attempt.of("end")
    assert (end["status"], end["exit_code"]) == ("STOPPED", 130), end
    return end


def check_stopped_twice(attempt: Attempt) -> None:
    """It ended without a word, and nothing that was committed is lost."""
    assert attempt.exit_code == 130, attempt.log
    assert not attempt.of("end"), "it took its time"
    assert "Traceback" not in attempt.log, attempt.log
    check_kept(attempt)


def check_read_only(training: Training, attempt: Attempt) -> None:
    """It says that the model could not be written and where, and nothing that was committed is lost."""
    assert attempt.answer == attempt.exit_code == 2, attempt.log
    [end] = attempt.of("end")
    assert end["reason"].startswith(f"{training.run.path}: the model cannot be written: "), end["reason"]
    assert "Traceback" not in attempt.log, attempt.log
    check_kept(attempt)


def check_refused(training: Training, outcome: Outcome) -> None:
    """One line says what is wrong with which directory."""
    assert outcome.rc == 2, outcome.said
    [line] = outcome.err.splitlines()
    assert line.startswith(f"error: {training.run.path}: "), line


def check_clock(training: Training, attempt: Attempt) -> None:
    """It ended well, and the clock really was a year behind then."""
    assert attempt.answer == attempt.exit_code == 0, attempt.log
    assert "Traceback" not in attempt.log, attempt.log
    behind = time.time() - read_manifest(training.final).created
    assert behind > 364 * DAY, f"the last checkpoint says that it was made {behind:.0f} s ago"


def check_nothing_left_to_stop(attempt: Attempt) -> None:
    """A signal that finds nothing left to stop changes nothing."""
    assert attempt.answer == attempt.exit_code == 0, attempt.log
    assert [event["status"] for event in attempt.of("end")] == ["COMPLETED"]


def check_kept(attempt: Attempt) -> None:
    """No checkpoint that was ever reported is newer than the newest one that is there."""
    assert attempt.kept >= attempt.reported, f"step {attempt.reported} was committed, the newest is {attempt.kept}"


def check_same_end(training: Training, calm: Training) -> None:
    """Holds a training that was disturbed, and has ended, against one that was not, bit by bit."""
    assert training.weights() == calm.weights(), "not the weights of the undisturbed run"
    assert training.losses() == calm.losses(), "not the losses of the undisturbed run"
    numbers = [event["seq"] for event in training.run.events()]
    assert numbers == list(range(len(numbers))), "a gap in the stream"
