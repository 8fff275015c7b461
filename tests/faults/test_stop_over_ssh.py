"""One run on a host behind a real sshd, told to stop over SSH in each of its phases, and resumed after each until done.

Everything between the operator and the engine is the real thing: what `kdconsole stop` does, the supervisor there, the
way to it. The engine stops itself where it is to be met (see `hook`), so the signal finds it exactly there. Where an
attempt has to load torch it is forked (see `tests.nursery`), but for one in the midst of training and the one that
takes SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from command_faults import EARLY, LATE, NAMED
from command_rig import CONFIG, EVERY, HOOK, SECONDS, STEPS
from faults import held
from hook import A_WRITE

from console.launch import Job, make, start_again
from dispatch.places import Place, Reach
from dispatch.runs import RunDir
from dispatch.stopping import Stopped, stop_run
from dispatch.supervisor import read_process, read_start
from engine.checkpoint import committed, verify
from engine.config import load_config
from tests.console.host_rig import Lab, needs_sshd, running_lab
from tests.console_rig import RunFiles, processes_of, until
from tests.nursery import Nursery, customize

pytestmark = [needs_sshd, pytest.mark.timeout(600)]

HOST = "hooked"
GRACE_SECONDS = SECONDS
SHORT_GRACE_SECONDS = 1.0
DEAF = "deaf"
"""The attempt that never goes on from where it stands, as one that ignores SIGTERM."""
DEAF_AFTER = "resume with steps"
FIRST_SAVED = 5
"""The first step that is to be found saved."""
MOMENTS = {**EARLY, **LATE}
ALWAYS = ("load-student", "train", "export")
"""Phases that every scene is stopped in; the last one leaves nothing but the end to be done."""
NOT_FORKED = ("import", "train", DEAF)
"""One that stands still before torch is loaded, one that trains, and one that takes SIGKILL: it would not reach a fork
that cannot look at its socket."""
NO_STEP = "CANCELLED: exit code 130; no step was made"
TREE_SECONDS = 5.0
"""What is left of the process tree once the exit record is written: a supervisor that is about to return."""


# The host's Python

HEAR = """

def hear_first(kill=os.kill):
    def stand(pid, number):
        kill(pid, number)
        deadline = time.monotonic() + 5.0
        while number == signal.SIGSTOP and time.monotonic() < deadline:
            if getattr(signal.getsignal(signal.SIGTERM), "signal", None):
                break
            time.sleep(0.001)

    os.kill = stand


hear_first()
"""
"""An engine that goes on has its signal, but any of its threads may be the one that takes it: what the others do before
that one's turn would be in the next phase, if this one is short."""


def edited(text: str, old: str, new: str) -> str:
    """With the one place replaced where it says that."""
    assert text.count(old) == 1, f"the nursery's stand-in has changed: {old!r}"
    return text.replace(old, new)


@dataclass(frozen=True)
class HookedPython:
    """A Python for the host whose engines stop themselves where they are told, forked or not."""

    directory: Path
    nursery: Nursery

    @property
    def path(self) -> Path:
        return self.directory / "python"

    @property
    def pid(self) -> Path:
        """Where a forked engine's pid stands."""
        return self.directory / "pid"

    def make(self) -> HookedPython:
        self.directory.mkdir()
        more = f"PYTHONPATH='{self.directory}'${{PYTHONPATH:+:$PYTHONPATH}}"
        self.path.write_text(f"#!/bin/sh\n{more} exec '{sys.executable}' \"$@\"\n")
        self.path.chmod(0o755)
        return self

    def next(self, *moments: str, forked: bool) -> None:
        """Says where the next engine stops itself, the last time to be told to stop, and whether it is forked."""
        self.pid.unlink(missing_ok=True)
        hear = HEAR if len(moments) == 1 else ""
        text, never = f"{HOOK.read_text()}{hear}\n\n", str(self.directory / "no offset")
        if not forked:
            customize(self.directory, f"{text}customize({list(moments)!r}, {never!r})\n")
            return
        prepare = f"{text}in_an_engine({list(moments)!r}, {never!r})\n"
        stand_in = Path(self.nursery.python_path.split(os.pathsep)[0], "sitecustomize.py").read_text()
        stand_in = edited(stand_in, '"prepare": ""', f'"prepare": {prepare!r} if module == "engine" else ""')
        # A signal has to be there while the engine still stands, and what is sent to its socket would not be.
        known = f"""\
pid = json.loads(answers.readline())["pid"]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    if module == "engine":
        with open({str(self.pid)!r}, "w") as file:
            file.write(f"{{pid}}\\n")
"""
        stand_in = edited(stand_in, "answers.readline()  # its pid\n", known)
        customize(self.directory, stand_in)


def waiting(pid: int, number: signal.Signals) -> bool:
    """Whether a signal was sent to a process that cannot take it yet."""
    with contextlib.suppress(OSError):
        found = re.search(r"^ShdPnd:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)
    return False


def tell(pid: int, number: signal.Signals) -> None:
    """A signal, if there still is somebody to take it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def lives(pid: int) -> bool:
    row = read_process(pid)
    return row is not None and not row.gone


# What is done


@dataclass(frozen=True)
class Attempt:
    """One attempt that was told to stop, as it was found afterwards."""

    done: Stopped
    tree: list[int]
    """The processes of the run when it was told."""
    left: list[int]
    """Those that are there after its end."""
    events: list[dict[str, Any]]
    signals: list[int]
    """Those on record as sent by `stop`."""
    base: int
    """The step that it began from."""
    kept: int
    """Step of the newest checkpoint, 0 where there is none; every one of them was verified."""

    @property
    def made(self) -> int:
        """The step that it had come to."""
        return max((event["step"] for event in self.of("step")), default=self.base)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


@dataclass
class Scene:
    """The run, and all of its attempts."""

    python: HookedPython
    place: Place
    run_dir: RunDir
    attempts: dict[str, Attempt] = field(default_factory=dict)

    @property
    def there(self) -> RunFiles:
        """Its directory on the host."""
        return RunFiles(Path(self.place.run_dir))

    def kept(self) -> int:
        return max((verify(path).step for path in committed(self.there.path)), default=0)

    async def begin(self, *moments: str, forked: bool = True) -> None:
        """Starts it, or resumes it."""
        self.python.next(*moments, forked=forked)
        if (await self.place.status()).exit is None:
            await self.place.launch(gpu=False)
        else:
            await start_again(self.run_dir, (), self.place)

    async def stop(self, phase: str) -> Attempt:
        """One attempt: it comes to its moment, is told to stop there, and only then goes on, if it does."""
        path, before, base = self.there.path, len(self.there.events()), self.kept()
        told = len(signals_of_stop(path))
        forked = phase not in NOT_FORKED
        moments = deaf_moments(base) if phase == DEAF else [MOMENTS[phase]]
        await self.begin(*moments, forked=forked)
        engine = await asyncio.to_thread(self._met, forked)
        for _ in moments[1:]:
            tell(engine, signal.SIGCONT)
            await asyncio.to_thread(self._met, forked)
        tree = sorted({engine, *processes_of(path)})
        grace = SHORT_GRACE_SECONDS if phase == DEAF else GRACE_SECONDS
        stopping = asyncio.create_task(stop_run(self.place, grace=grace, kill=True, say=lambda text: None))
        if phase != DEAF:
            await asyncio.to_thread(until, lambda: stopping.done() or waiting(engine, signal.SIGTERM), "SIGTERM")
            tell(engine, signal.SIGCONT)
        done = await stopping
        if not self.has_ended:  # so that the other phases are met all the same
            self.clear(engine)
            await asyncio.to_thread(until, lambda: self.has_ended, "the end of a run that was killed", SECONDS)
        left = await asyncio.to_thread(left_of, path, tree)
        return Attempt(done, tree, left, self.there.events()[before:], signals_of_stop(path)[told:], base, self.kept())

    def _met(self, forked: bool) -> int:
        """Waits until the engine stands at its moment; returns its pid."""

        def pid() -> int:
            if forked:
                return int(self.python.pid.read_text() or 0) if self.python.pid.exists() else 0
            trainer = read_start(self.there.path).trainer
            return trainer["pid"] if trainer else 0

        until(lambda: held(pid()) or self.has_ended, "the engine's stop", SECONDS)
        assert held(pid()), (self.there.path / "launch.log").read_text()
        return pid()

    def clear(self, *pids: int) -> None:
        """Kills the run's engine, and those that it was forked as."""
        trainer = read_start(self.there.path).trainer
        for pid in (*([trainer["pid"]] if trainer else []), *pids):
            tell(pid, signal.SIGKILL)

    @property
    def has_ended(self) -> bool:
        return (self.there.path / "exit.json").exists()


def deaf_moments(base: int) -> list[str]:
    """Right after the first checkpoint past a step, with another step made since: that one will be lost."""
    return [A_WRITE, f"checkpoint {base - base % EVERY + EVERY}"]


def signals_of_stop(run_dir: Path) -> list[int]:
    """What the supervisor's journal has of signals by `stop`."""
    journal = run_dir / "supervisor.jsonl"
    entries = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    return [entry["signal"] for entry in entries if entry["event"] == "signal" and entry["by"] == "stop"]


def left_of(run_dir: Path, tree: list[int]) -> list[int]:
    """Which processes of a run there are, a moment after its end."""
    left: list[int] = []

    def gone() -> bool:
        left[:] = sorted({pid for pid in tree if lives(pid)} | set(processes_of(run_dir)))
        return not left

    with contextlib.suppress(AssertionError):
        until(gone, "no process", TREE_SECONDS)
    return left


def phases(*names: str) -> list[Any]:
    """Parameters of a test: those that not every scene has are slow."""
    return [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in names]


def wanted(request: pytest.FixtureRequest) -> list[str]:
    """The phases that the selected tests ask for, in their order."""
    specs = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    asked = {spec.params["phase"] for spec in specs if spec is not None and "phase" in spec.params}
    if any(item.path == request.path and item.get_closest_marker("slow") for item in request.session.items):
        asked |= {DEAF, DEAF_AFTER}
    found = [phase for phase in MOMENTS if phase in asked or phase in ALWAYS]
    if DEAF in asked:
        found.insert(found.index(DEAF_AFTER) + 1, DEAF)
    return found


async def played(lab: Lab, python: HookedPython, phases: Sequence[str]) -> Scene:
    """The whole of it, stopped in these phases."""
    config = lab.config.with_name("stopped.yaml")
    config.write_text(CONFIG.replace("CORPUS", "corpus.txt"))
    job = Job(load_config(config, sets=["train.device=cpu"]), lab.config.parent / "evidence", host=HOST)
    async with Reach(lab.environ) as reach:
        run_dir = await make(job, reach, lambda text: None)
        scene = Scene(python, reach.place(run_dir), run_dir)
        for phase in phases:
            scene.attempts[phase] = await scene.stop(phase)
        await scene.begin()
        await asyncio.to_thread(until, lambda: scene.has_ended, "the run's end", SECONDS)
    return scene


@pytest.fixture(scope="module")
def scene(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, nursery: Nursery
) -> Iterator[Scene]:
    """A run that was stopped in every phase that is asked for, killed where that is, and resumed to its end."""
    root = tmp_path_factory.mktemp("stopped")
    with running_lab(root) as lab:
        python = HookedPython(root / "python", nursery).make()
        lab.add(HOST, python=str(python.path))
        yield asyncio.run(played(lab, python, wanted(request)))


# How it is judged


@pytest.mark.parametrize("phase", phases(*MOMENTS))
def test_a_stop_over_ssh_ends_the_run_by_its_own_doing_in_every_phase(scene: Scene, phase: str) -> None:
    attempt = scene.attempts[phase]
    stop = attempt.done.stop
    assert stop.exit is not None
    assert (stop.result, stop.cancelled, stop.killed) == ("stopped", True, False), stop
    assert (stop.exit.exit_code, stop.exit.signal, stop.exit.orphans) == (130, None, ()), stop.exit
    assert attempt.signals == [signal.SIGTERM]
    [end] = attempt.of("end")
    assert (end["status"], end["reason"]) == ("STOPPED", f"SIGTERM in phase {NAMED.get(phase, phase)}")


@pytest.mark.parametrize("phase", phases(*MOMENTS, DEAF))
def test_no_process_of_the_run_is_left(scene: Scene, phase: str) -> None:
    attempt = scene.attempts[phase]
    assert len(attempt.tree) >= 2, "there were to be a supervisor and an engine"
    assert attempt.left == []


@pytest.mark.parametrize("phase", phases(*EARLY))
def test_a_stop_before_the_first_step_saves_nothing_and_says_so(scene: Scene, phase: str) -> None:
    attempt = scene.attempts[phase]
    assert (attempt.of("step"), attempt.kept, attempt.done.step) == ([], 0, 0)
    assert attempt.done.describe() == NO_STEP


@pytest.mark.parametrize("phase", phases(*LATE))
def test_a_stop_from_the_first_step_on_saves_every_step_and_says_so(scene: Scene, phase: str) -> None:
    attempt = scene.attempts[phase]
    step = attempt.made
    assert FIRST_SAVED <= step == attempt.kept
    saved = f"{step} steps saved in checkpoints/ckpt-step-{step:06d}"
    assert attempt.done.describe() == f"CANCELLED: exit code 130; {saved}"


@pytest.mark.slow
def test_a_run_that_does_not_heed_sigterm_is_killed_after_the_grace(scene: Scene) -> None:
    attempt = scene.attempts[DEAF]
    stop = attempt.done.stop
    assert stop.exit is not None
    assert (stop.result, stop.cancelled, stop.killed) == ("stopped", True, True), stop
    assert (stop.exit.exit_code, stop.exit.signal) == (None, signal.SIGKILL)
    assert attempt.signals == [signal.SIGTERM, signal.SIGKILL]
    assert attempt.of("end") == []
    assert attempt.base < attempt.kept < attempt.made == attempt.done.step
    assert attempt.done.describe() == (
        "CANCELLED: killed by SIGKILL, after it did not heed SIGTERM in time; "
        f"{attempt.kept} of {attempt.made} steps saved in checkpoints/ckpt-step-{attempt.kept:06d}"
    )


def test_it_went_on_each_time_from_what_was_saved_and_ends_well(scene: Scene) -> None:
    exits = json.loads((scene.there.path / "exit.json").read_text())
    assert exits["exit_code"] == 0, (scene.there.path / "launch.log").read_text()
    assert scene.there.events("end")[-1]["status"] == "COMPLETED"
    attempts = list(scene.attempts.values())
    for before, after in itertools.pairwise(attempts):
        assert after.base == before.kept
        assert [step["step"] for step in after.of("step")] == list(range(after.base + 1, after.made + 1))
    assert attempts[-1].kept == STEPS
    assert scene.kept() == STEPS
    assert left_of(scene.there.path, []) == []
