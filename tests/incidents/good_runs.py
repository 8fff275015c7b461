"""Runs in which nothing is wrong, however odd they look: nobody may be alarmed by one of them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import model_dirs
from afar import afar
from faults import can_mount, small_disk
from scene import SMOKE, TRAIN, Scene

from engine.config import load_config
from engine.measures import measures_of
from tests.console_rig import Desk, Outcome, RunFiles
from tests.ssh_rig import MISSING

TWELVE = ("--max-steps", "12", "--budget", "120")
"""As short as one gets with every verdict; the time is for machines that have other things to do."""
ALARMING = re.compile(r"(?:warning|error): |\b(?:FAIL|UNKNOWN|NO-GO|DISPUTED|CRASHED|STALLED|Traceback)\b|[✘⚠]")
"""What no good run may have on standard error or in its report."""
OWN_CONTRACT = """\
version: 1
name: mine
falsifiers:
  - {id: F-MINE-001, claim: it falls by a tenth, kind: trend, metric: eval.loss, direction: falls, by: 0.1}
  - {id: F-MINE-002, claim: the models differ, kind: threshold, metric: measure.teacher_student_distance, above: 0.0}
  - {id: F-MINE-003, claim: each step is finite, kind: finite, metric: step.grad_norm, severity: fatal}
"""


@dataclass(frozen=True)
class Ran:
    """A good run after its last command."""

    outcome: Outcome
    run: RunFiles
    attempts: int = 1
    """More than one: those before the last were ended on purpose."""


def alarms(ran: Ran) -> list[str]:
    """Everything about a run that would alarm its operator, one sentence each; empty is what it has to be.

    Strictly: the exit code is 0, the end is COMPLETED, no verdict ever was FAIL or UNKNOWN and at the end each is PASS,
    those that only warn included; no line of the log is a warning or an error, no checkpoint failed, the supervisor saw
    no stall, and neither standard error nor the report has a word that alarms. And what is said to be measured is.
    """
    found = [f"exit code {ran.outcome.rc}"] if ran.outcome.rc else []
    events = ran.run.events()
    ends = [event for event in events if event["event"] == "end"]
    found += [] if ends and ends[-1]["status"] == "COMPLETED" else [f"it ended as {[end['status'] for end in ends]}"]
    verdicts = [event for event in events if event["event"] == "verdict"]
    found += [f"{v['verdict']} {v['id']}: {v['observed']}" for v in verdicts if v["verdict"] in ("FAIL", "UNKNOWN")]
    last = {verdict["id"]: verdict["verdict"] for verdict in verdicts}
    found += [f"{name} is {verdict}" for name, verdict in last.items() if verdict != "PASS"]
    found += [] if last else ["no verdict"]
    found += [f"{e['level']}: {e['message']}" for e in events if e["event"] == "log" and e["level"] != "info"]
    found += [f"checkpoint {e['step']} failed" for e in events if e["event"] == "checkpoint_failed"]
    journal = ran.run.path / "supervisor.jsonl"
    found += ["the supervisor saw a stall"] if '"event":"stall"' in journal.read_text().replace(" ", "") else []
    said = (*ran.outcome.err.splitlines(), *ran.outcome.out.splitlines())
    found += [line.strip() for line in said if ALARMING.search(line)]
    if ran.attempts == 1:
        measured = {event["name"] for event in events if event["event"] == "measure"}
        expected = measures_of(load_config(ran.run.path / "config.yaml"))
        found += [f"measures: {sorted(measured ^ expected)}"] if measured != expected else []
    return found


def called(desk: Desk, *arguments: str, **variables: str) -> Ran:
    return Ran(desk.call(*arguments, variables=variables), desk.run)


# Smokes


def smoke_builtin(scene: Scene) -> Ran:
    """A smoke on the standard library's own source"""
    small = ("--set", "train.batch=2", "--set", "train.sequence=64", "--set", "data.limit_bytes=400000")
    return called(scene.desk(), "--headless", "smoke", *TWELVE, *small)


def smoke_file(scene: Scene) -> Ran:
    """A smoke on one text file"""
    return called(scene.desk(), *SMOKE, *TWELVE)


def smoke_directory(scene: Scene) -> Ran:
    """A smoke on a directory of 30 sources, by a pattern of names"""
    desk = scene.desk()
    text = (desk.cwd / "corpus.txt").read_text().splitlines(keepends=True)
    (desk.cwd / "sources" / "deep").mkdir(parents=True)
    for number in range(30):
        place = desk.cwd / "sources" / ("deep" if number % 2 else ".") / f"{number}.py"
        place.write_text("".join(text[number * 100 : number * 100 + 100]))
    return called(desk, *SMOKE, *TWELVE, "--data", "sources", "--set", "data.glob=**/*.py")


def smoke_shards(scene: Scene) -> Ran:
    """A smoke on token shards, one much shorter than the other"""
    desk = scene.desk()
    (desk.cwd / "shards").mkdir()
    for name, count in (("long", 40_000), ("short", 700)):
        tokens = [300 + (i * i // 7 + i) % 50 for i in range(count)]
        (desk.cwd / "shards" / f"{name}.bin").write_bytes(struct.pack(f"<{count}I", *tokens))
    return called(desk, *SMOKE, *TWELVE, "--data", "shards")


def smoke_alone(scene: Scene) -> Ran:
    """A smoke without a teacher"""
    alone = ("teacher=null", "distill.alpha=1", "data.tokenizer=builtin")
    return called(scene.desk(), *SMOKE, *TWELVE, *(word for each in alone for word in ("--set", each)))


def smoke_bf16(scene: Scene) -> Ran:
    """A smoke in bf16"""
    return called(scene.desk(), *SMOKE, *TWELVE, "--set", "train.precision=bf16")


def smoke_layers(scene: Scene) -> Ran:
    """A smoke of a student made of some of the teacher's own layers"""
    student = "student={from: builtin:teacher, layers: [0]}"
    return called(scene.desk(), *SMOKE, *TWELVE, "--set", student)


def smoke_padded(scene: Scene) -> Ran:
    """A smoke of a teacher with 128 rows more than its student: cut there and renormalised"""
    desk = scene.desk()
    model_dirs.teacher_with_rows(desk.cwd / "padded", 2_176)
    ran = called(desk, *SMOKE, *TWELVE, "--teacher", "padded")
    words = "teacher has 2,176 rows, student 2,048"
    assert words in ran.outcome.err, ran.outcome.said
    return ran


def smoke_contract(scene: Scene) -> Ran:
    """A smoke with a contract of its own"""
    desk = scene.desk()
    desk.write("mine.yaml", OWN_CONTRACT)
    return called(desk, *SMOKE, *TWELVE, "--contract", "mine.yaml")


def smoke_busy(scene: Scene) -> Ran:
    """A smoke on a machine whose every core has two other things to do"""
    with contextlib.ExitStack() as stack:
        for _ in range(2 * (os.cpu_count() or 1)):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(busy.kill)
        return called(scene.desk(), *SMOKE, *TWELVE)


# Trainings


def train_plain(scene: Scene) -> Ran:
    """A training of 12 steps"""
    return called(scene.desk(), *TRAIN)


def train_alone(scene: Scene) -> Ran:
    """A training without a teacher"""
    alone = ("teacher=null", "distill.alpha=1", "data.tokenizer=builtin")
    return called(scene.desk(), *TRAIN, *(word for each in alone for word in ("--set", each)))


def train_bf16(scene: Scene) -> Ran:
    """A training in bf16, in two parts a step"""
    sets = ("train.precision=bf16", "train.batch=4", "train.accumulation=2")
    return called(scene.desk(steps=20), *TRAIN, *(word for each in sets for word in ("--set", each)))


def train_evaluated(scene: Scene) -> Ran:
    """A training that evaluates, and keeps its best"""
    return called(scene.desk(), *TRAIN, "--set", "train.evaluate_every=4", "--set", "checkpoint.keep_last=1")


def train_resumed(scene: Scene) -> Ran:
    """A training that was stopped, and resumed"""
    desk = scene.desk(steps=400)
    going = scene.start(desk, *TRAIN)
    going.until_step(8)
    assert going.stop().rc == 130, going.end().said
    return Ran(desk.call("--headless", "train", "--resume", going.run.path.name), going.run, attempts=2)


def train_unsaved(scene: Scene) -> Ran:
    """A short training that nothing is saved of on purpose"""
    return called(scene.desk(), *TRAIN, "--set", "checkpoint.every_steps=0")


def train_small_disk(scene: Scene) -> Ran:
    """A training on a disk that has room for it, and for little else"""
    if not can_mount():
        return called(scene.desk(), *TRAIN, "--set", "checkpoint.keep_last=1")
    with small_disk(scene.root / "disk", 160) as disk:
        desk = scene.desk(evidence=disk / "evidence")
        ran = called(desk, *TRAIN)
        kept = scene.root / "kept"
        shutil.copytree(ran.run.path, kept)
        return Ran(ran.outcome, RunFiles(kept))


def train_slow_disk(scene: Scene) -> Ran:
    """A training on a disk that takes a fifth of a second for each sync"""
    going = scene.start(scene.desk(), *TRAIN, spoilt="slow_disk")
    return Ran(going.end(), going.run)


# On a host


@contextlib.contextmanager
def _on_a_host(scene: Scene, *arguments: str) -> Iterator[Ran]:
    with afar(scene) as far:
        yield called(far.desk, *arguments, "--host", "gx10", **far.variables)


def smoke_over_ssh(scene: Scene) -> Ran:
    """A smoke on a host over SSH"""
    with _on_a_host(scene, *SMOKE, *TWELVE) as ran:
        return ran


def train_over_ssh(scene: Scene) -> Ran:
    """A training on a host over SSH"""
    with _on_a_host(scene, *TRAIN) as ran:
        return ran


GOOD: tuple[Callable[[Scene], Ran], ...] = (
    *(smoke_builtin, smoke_file, smoke_directory, smoke_shards, smoke_alone, smoke_bf16, smoke_layers, smoke_padded),
    *(smoke_contract, smoke_busy),
    *(train_plain, train_alone, train_bf16, train_evaluated, train_resumed, train_unsaved, train_small_disk),
    *((train_slow_disk, smoke_over_ssh, train_over_ssh) if MISSING is None else (train_slow_disk,)),
)
