"""Incidents of runs: 1, 2, 3, 4, 9, 11 and 13."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import model_dirs
from afar import afar
from faults import can_mount, fill_up, small_disk
from netns import somebody_else, why_no_pid
from scene import NO_GATE, SMOKE, TRAIN, Caught, Going, NotMade, Scene, Way

from engine.checkpoint import MODEL, directory_name
from tests.console_rig import Outcome, RunFiles, until
from tests.ssh_rig import MISSING

DISK_MIB = 64
STALL_SECONDS = 15
IMPATIENT = f"""\
version: 1
name: impatient
falsifiers:
  - {{id: F-NO-STALL-001, claim: training never waits long for a step, kind: no_stall, seconds: {STALL_SECONDS}}}
"""


def empty_export(scene: Scene) -> Iterator[Way]:
    """25 hours of training, and the exported model.safetensors was an empty file of 200 bytes.

    Made inside a training's engine: its exporter's serialiser gets an empty map, leaves those 200 bytes, or saves the
    weights from before training.
    """
    for made, spoilt, words in (
        ("the serialiser gets an empty map", "export_of_an_empty_map", "no weights in it"),
        ("the file has 200 bytes and no tensor", "export_of_200_bytes", "200 bytes"),
        ("the weights from before training are saved", "export_of_the_untrained", "the weights are the initial ones"),
    ):
        going = scene.start(scene.desk(), *TRAIN, spoilt=spoilt)
        outcome = going.end()
        assert outcome.rc == 1, outcome.said
        assert not (going.run.path / "model").exists(), "there is a model/"
        failed = going.failed(made, "F-EXPORT-001")
        line = going.caught(made, failed.by, ("error: the export is not the trained model", words))
        yield replace(failed, message=line.message)


def lost_steps(scene: Scene) -> Iterator[Way]:
    """25 hours without an intermediate checkpoint.

    Made by asking for none; by a disk that refuses them while training goes on; and by a SIGKILL, after which a resume
    has to make no more steps again than came since the newest one, and to end bit by bit as an undisturbed training.
    """
    desk = scene.desk()
    none = ("--set", "train.steps=50000", "--set", "checkpoint.every_steps=0", "--dry-run")
    outcome = desk.call(*TRAIN, *none)
    line = next(line for line in outcome.err.splitlines() if line.startswith("warning: "))
    assert "50,000 steps without a periodic checkpoint: a crash loses all of them" in line, outcome.said
    yield Caught("50,000 steps, checkpoint.every_steps: 0", "warning", line, outcome.seconds, launched=False)
    yield _refused_checkpoint(scene)
    yield _killed_and_resumed(scene)


def _refused_checkpoint(scene: Scene) -> Way:
    made = "the disk refuses every checkpoint"
    going = scene.start(scene.desk(), *TRAIN)
    going.until(lambda event: event["event"] == "phase", "its beginning")
    # A file in the directory's place: nothing, root included, can make a checkpoint there.
    (going.run.path / "checkpoints").write_text("")
    event = going.until(lambda event: event["event"] == "checkpoint_failed", "a checkpoint that failed")
    outcome = going.end()
    assert len(going.run.events("step")) == 12, outcome.said
    assert any(step["t"] > event["t"] for step in going.run.events("step")), "training did not go on"
    return going.caught(made, "checkpoint_failed", ("error: checkpoint of step 5 not saved",), event)


def _killed_and_resumed(scene: Scene) -> Way:
    calm = scene.start(scene.desk(steps=30), *TRAIN)
    assert calm.end().rc == 0, calm.end().said
    going = scene.start(scene.desk(steps=30), *TRAIN)
    going.until(lambda event: event["event"] == "checkpoint" and event["step"] >= 5, "a checkpoint")
    os.kill(going.run.trainer(), signal.SIGKILL)
    caught = going.caught("SIGKILL between two checkpoints", "CRASHED", ("CRASHED", "SIGKILL"))
    made = max(step["step"] for step in going.run.events("step"))
    before = len(going.run.events())
    resumed = going.desk.call("--headless", "train", "--resume", going.run.path.name)
    assert resumed.rc == 0, resumed.said
    again = [step["step"] for step in going.run.events()[before:] if step["event"] == "step"]
    lost = made - (again[0] - 1)
    assert 0 <= lost <= 10, f"{lost} steps were lost"
    final = Path("checkpoints", directory_name(30), MODEL)
    assert (going.run.path / final).read_bytes() == (calm.run.path / final).read_bytes(), "not the undisturbed weights"
    told = f"{caught.message}; resumed from step {again[0] - 1}, {lost} of {made} steps made again, the same weights"
    return Caught(caught.made, caught.by, told, caught.seconds, launched=True)


def hang(scene: Scene) -> Iterator[Way]:
    """A run hung silently at step 0 for an hour and a half.

    Made inside the engine: its first step sleeps for ever, while its heartbeat goes on. The smoke has the contract that
    ships; a long training may not start without one, and a contract of its own can be as impatient.
    """
    for made, arguments in (
        ("a smoke sleeps at step 0", SMOKE),
        (
            f"a training sleeps at step 0, its contract allows {STALL_SECONDS} s",
            (*TRAIN, "--contract", "impatient.yaml"),
        ),
    ):
        desk = scene.desk()
        desk.write("impatient.yaml", IMPATIENT)
        going = scene.start(desk, *arguments, spoilt="sleep_at_step_0")
        event = going.until(lambda e: (e["event"], e.get("id")) == ("verdict", "F-NO-STALL-001"), "a verdict")
        beats = going.run.events("heartbeat")
        assert beats[0]["t"] - going.began < 10, "no heartbeat from the start"
        assert (beats[-1]["phase"], beats[-1]["step"]) == ("train", 0), beats[-1]
        os.kill(going.run.trainer(), signal.SIGKILL)
        yield going.caught(made, "F-NO-STALL-001", ("FAIL", "F-NO-STALL-001", "after step 0"), event)


def one_model(scene: Scene) -> Iterator[Way]:
    """Two production runs had the same model as teacher and student, inherited from a smoke: 30 hours.

    Made with 5,000 steps: the same directory, a copy of it under another name, and the same weights in other files,
    which only the loaded models tell. And with a smoke, which is what a production run begins with.
    """
    long = ("--set", "train.steps=5000", *NO_GATE)
    desk = scene.desk()
    words = ("teacher and student have the same weights", "5,000 steps")
    same = (*TRAIN, *long, "--student", "builtin:teacher")
    yield scene.refused("5,000 steps, the same directory twice", desk, *same, words=words)
    shutil.copytree(model_dirs.TEACHER, desk.cwd / "copy")
    copy = (*TRAIN, *long, "--student", "copy")
    yield scene.refused("5,000 steps, a copy of the teacher as student", desk, *copy, words=words)
    model_dirs.teacher_in_two_files(desk.cwd / "shards")
    going = scene.start(desk, *TRAIN, *long, "--student", "shards")
    yield going.refused("5,000 steps, the same weights in other files", *words)
    going = scene.start(scene.desk(), *SMOKE, "--student", "builtin:teacher")
    assert going.end().rc == 1, going.end().said
    yield going.failed("a smoke of a model on itself", "F-DISTILL-V2-001-TEACHER-DIVERGENCE")


def degenerate_batch(scene: Scene) -> Iterator[Way]:
    """The smoke's batch paired one input with N different labels, so that the loss could only rise: a day.

    Made with token shards whose windows have the same 32 inputs and differ in the label of the last one alone; and with
    a text that is one token over and over.
    """
    desk = scene.desk()
    (desk.cwd / "shards").mkdir()
    for number in range(40):
        window = [*range(100, 132), 500 + number]  # and as many tokens to be held out, so that no window crosses
        tokens = [*window, *((number * 37 + 11 * i) % 2_000 for i in range(33))]
        (desk.cwd / "shards" / f"{number:02}.bin").write_bytes(struct.pack(f"<{len(tokens)}I", *tokens))
    shards = ("--data", "shards", "--set", "data.heldout_fraction=0.5", "--set", "train.batch=8")
    going = scene.start(desk, *SMOKE, *shards)
    yield _degenerate(going, "8 windows of one input and 8 different labels", "the same inputs with different labels")
    desk = scene.desk()
    desk.write("same.txt", "a " * 20_000)
    going = scene.start(desk, *SMOKE, "--data", "same.txt")
    yield _degenerate(going, "a corpus of one token", "one token repeated")


def _degenerate(going: Going, made: str, words: str) -> Way:
    caught = going.refused(made, "degenerate", words)
    assert not going.run.has("step"), "it made a step"
    return caught


def full_disk(scene: Scene) -> Iterator[Way]:
    """A run of 50,000 steps writes 12 GB of checkpoints and a model: a disk filled up.

    Made on a real file system of a few MiB: too small from the start, and filled up to the last byte under a training.
    Where nothing can be mounted: more checkpoints are to be kept than any disk takes.
    """
    words = ("not enough room", "disk", "GiB needed", "GiB free")
    if not can_mount():
        many = ("--set", "checkpoint.keep_last=100000000", "--set", "train.steps=1000000000", *NO_GATE)
        made = "100,000,000 checkpoints are to be kept"
        yield scene.refused(made, scene.desk(), *TRAIN, *many, words=words)
        yield NotMade("a disk that fills up under a training", "no file system can be mounted here")
        return
    with small_disk(scene.root / "tiny", 16) as disk:
        desk = scene.desk(evidence=disk / "evidence")
        yield scene.refused("a disk of 16 MiB", desk, *TRAIN, words=words)
    with small_disk(scene.root / "disk", DISK_MIB) as disk:
        desk = scene.desk(steps=4_000, evidence=disk / "evidence")
        going = scene.start(desk, *TRAIN, "--force", "--set", "checkpoint.every_steps=200")
        going.until_step(3)
        ballast = fill_up(disk, leave=1 << 20)
        event = going.until(
            lambda event: event["event"] == "log" and event["level"] in ("warning", "error"), "a word of the full disk"
        )
        ballast.unlink()
        going.stop()
        yield going.caught(
            "a disk that fills up under a training", f"{event['level']} in the log", ("bytes are free",), event
        )


def lost_process(scene: Scene) -> Iterator[Way]:
    """`kill -0 PID` five seconds after the launch was the only look at whether the run lived.

    Made by SIGKILL of the trainer; and of trainer and supervisor both, their pids given to others, which `kill -0`
    would take for the run: here, and on a host over SSH.
    """
    going = scene.start(scene.desk(steps=4_000), *TRAIN)
    going.until_step(3)
    os.kill(going.run.trainer(), signal.SIGKILL)
    outcome = going.end()
    assert outcome.rc == 5, outcome.said
    yield going.caught("SIGKILL of the trainer", "CRASHED", ("CRASHED", "killed by SIGKILL"))
    if (why := why_no_pid()) is not None:
        yield NotMade("their pids are taken by others", why)
        return
    desk = scene.desk(steps=4_000)
    going = scene.start(desk, *TRAIN)
    yield _taken(going, "both killed, their pids taken", lambda: going.run, desk.call)
    made = "the same on a host over SSH"
    if MISSING is not None:
        yield NotMade(made, MISSING)
        return
    with afar(scene) as far:
        going = scene.start(far.desk, *TRAIN, "--host", "gx10", "--set", "train.steps=4000", **far.variables)
        yield _taken(going, made, lambda: far.there(going.run), far.call)


def _taken(going: Going, made: str, there: Callable[[], RunFiles], call: Callable[..., Outcome]) -> Way:
    """Kills a run's processes, gives their pids to others, and asks what is known of the run."""
    going.until_step(3)
    run = there()
    lines = (run.path / "supervisor.jsonl").read_text().splitlines()
    started = next(entry for line in lines if (entry := json.loads(line))["event"] == "started")
    pids = [started["supervisor"]["pid"], started["trainer"]["pid"]]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "their pids to be free")
    with contextlib.ExitStack() as stack:
        for pid in pids:
            stack.enter_context(somebody_else(pid))
        caught = going.caught(made, "CRASHED", ("CRASHED", "its end was not recorded"))
        assert going.end().rc == 5, going.end().said
        attached = call("--headless", "attach", going.run.path.name)
        assert (attached.rc, "CRASHED" in attached.text) == (5, True), attached.said
        stopped = call("stop", going.run.path.name)
        assert stopped.rc in (0, 2), stopped.said
        for pid in pids:
            os.kill(pid, 0)  # what the old script asked: they live, and are not the run
    return caught
