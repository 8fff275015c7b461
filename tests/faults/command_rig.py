"""The real command, `kdconsole --headless train`, and what is done to its engine from outside.

A `Training` is one run directory: started, disturbed, resumed, until it is done. Where a moment is too short to be met
by looking, the engine stops itself there with SIGSTOP and waits for what comes (`meet`): see `HOOK`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import held

from dispatch.supervisor import read_process
from engine.checkpoint import MODEL, committed, directory_name, verify
from tests.console_rig import ROOT, Desk, Outcome, RunFiles, until

STEPS, EVERY, EVALUATE_EVERY = 60, 4, 10
CONFIG = f"""\
teacher: builtin:teacher
student: builtin:student
data: {{path: CORPUS, heldout_windows: 4}}
train:
  {{steps: {STEPS}, batch: 2, sequence: 32, warmup_steps: 5, learning_rate: 6.0e-3, min_learning_rate: 3.0e-4,
   evaluate_every: {EVALUATE_EVERY}, threads: 1}}
checkpoint: {{every_steps: {EVERY}}}
"""
HOOK = '''\
"""Imported by every Python process of a run, since its directory stands on PYTHONPATH."""
import json, os, signal, sys, time

HERE, MEET = os.path.dirname(__file__), CONST_MEET
real_time, real_write, real_mkdir = time.time, os.write, os.mkdir


def clock():
    with open(f"{HERE}/offset") as file:
        return real_time() + float(file.read())


def meet(where):
    here = bool(MEET) and MEET[0] == where
    if here:
        del MEET[0]
        os.kill(os.getpid(), signal.SIGSTOP)
    return here


def write(fd, data):
    done = real_write(fd, data)
    if bytes(data[:1]) == b"{" and len(data) < 65_536:
        event = json.loads(bytes(data))
        meet(" ".join(str(event[key]) for key in ("event", "name", "step") if key in event))
    return done


def mkdir(path, *rest, **options):
    real_mkdir(path, *rest, **options)
    if os.fspath(path).endswith(".partial"):
        if not meet("a checkpoint's write") and meet("a checkpoint's write that hangs"):
            time.sleep(3_600)


if os.path.exists(f"{HERE}/offset"):
    time.time = clock
if MEET and sys.orig_argv[2:4] == ["-m", "engine"]:
    os.write, os.mkdir = write, mkdir
'''


@dataclass(frozen=True)
class Attempt:
    """One process's part of a training, after its end."""

    outcome: Outcome
    events: list[dict[str, Any]]
    log: str
    exit: dict[str, Any]
    kept: int
    """Step of the newest checkpoint, 0 where there is none; every one of them was verified."""
    reported: int
    """The newest checkpoint that the stream ever spoke of as committed, earlier attempts included."""

    @property
    def made(self) -> int:
        """The highest step that it made."""
        return max((e["step"] for e in self.events if e["event"] == "step"), default=0)

    @property
    def lost(self) -> int:
        """Steps that it made and that have to be made again."""
        return max(0, self.made - self.kept)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


class Training:
    """One run of the real command.

    Args:
        root: a directory of its own, made here.
        corpus: what is learned.
        evidence: where the run directory comes to stand; below `root` by default.
    """

    def __init__(self, root: Path, corpus: Path, evidence: Path | None = None) -> None:
        root.mkdir(parents=True)
        self.desk = Desk(root)
        if evidence is not None:
            self.desk.evidence = evidence
        self.config = self.desk.write("config.yaml", CONFIG.replace("CORPUS", str(corpus)))
        self.hooks = root / "hooks"
        self.hooks.mkdir()
        self.attempts: list[Attempt] = []

    def start(self, *meet: str, clock: float | None = None, arguments: Sequence[str] = ()) -> Going:
        """Starts it, or resumes it.

        Args:
            meet: where the engine stops and waits, in this order: `phase NAME`, `step N`, `a checkpoint's write`, or
                `a checkpoint's write that hangs`, for ever.
            clock: seconds that every process of the attempt believes to be later than it is; see `set_clock`.
            arguments: more of them for the command.
        """
        (self.hooks / "sitecustomize.py").write_text(HOOK.replace("CONST_MEET", repr(list(meet))))
        (self.hooks / "offset").unlink(missing_ok=True)
        if clock is not None:
            self.set_clock(clock)
        return Going(self, arguments, os.pathsep.join((str(self.hooks), str(ROOT))))

    def set_clock(self, seconds: float) -> None:
        """Changes the clock of an attempt that was started with one, at once."""
        new = self.hooks / "offset.new"
        new.write_text(str(seconds))
        new.replace(self.hooks / "offset")

    def finish(self) -> Attempt:
        """Undisturbed to the end, however often it was disturbed before."""
        attempt = self.start().wait()
        assert attempt.outcome.rc == 0, attempt.outcome.said
        return attempt

    @property
    def run(self) -> RunFiles:
        return self.desk.run

    def losses(self) -> dict[int, tuple[float, ...]]:
        """Of each step as the last attempt that made it left it."""
        return {e["step"]: (e["loss"], e["ce"], e["kd"], e["grad_norm"]) for e in self.run.events("step")}

    @property
    def final(self) -> Path:
        """The checkpoint of the last step."""
        return self.run.path / "checkpoints" / directory_name(STEPS)

    def weights(self) -> str:
        """Digest of the weights after the last step, of the file itself."""
        return hashlib.sha256((self.final / MODEL).read_bytes()).hexdigest()


class Going:
    """An attempt that is under way."""

    def __init__(self, training: Training, arguments: Sequence[str], path: str) -> None:
        self._training = training
        first = not training.attempts
        run = None if first else training.run
        self._number = len(training.attempts) + 1
        self._events = len(run.events()) if run else 0
        self._log = (run.path / "launch.log").stat().st_size if run else 0
        what = [str(training.config)] if first or run is None else ["--resume", run.path.name]
        self.started = training.desk.start("--headless", "train", *what, *arguments, variables={"PYTHONPATH": path})

    @property
    def run(self) -> RunFiles:
        return self._training.run

    @property
    def events(self) -> list[dict[str, Any]]:
        """What this attempt wrote so far."""
        return self.run.events()[self._events :]

    @property
    def pid(self) -> int:
        """The engine's, once the supervisor recorded it."""
        pids: list[int] = []

        def recorded() -> bool:
            with contextlib.suppress(FileNotFoundError):
                lines = (self.run.path / "supervisor.jsonl").read_text().splitlines()
                started = [entry for line in lines if (entry := json.loads(line))["event"] == "started"]
                pids[:] = [entry["trainer"]["pid"] for entry in started]
            return len(pids) >= self._number

        until(recorded, f"the engine of attempt {self._number}")
        return pids[self._number - 1]

    def until_step(self, step: int) -> None:
        """Waits for a step of this attempt."""
        until(lambda: any(e["event"] == "step" and e["step"] >= step for e in self.events), f"step {step}")

    def until_met(self) -> None:
        """Waits until the engine stands where it was told to stop."""
        pid = self.pid
        until(lambda: held(pid) or self.started.process.poll() is not None, "the engine's stop")
        assert held(pid), self.started.wait().said

    def send(self, *numbers: int) -> None:
        """Signals to the engine, and on it goes if it stood still."""
        pid = self.pid
        for number in (*numbers, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    @property
    def ended(self) -> bool:
        """Whether the engine is gone, whatever the others still do."""
        process = read_process(self.pid)
        return process is None or process.gone

    def wait(self) -> Attempt:
        """Its end, seen through the console; every checkpoint in the directory is verified then."""
        outcome = self.started.wait()
        run = self.run
        attempt = Attempt(
            outcome=outcome,
            events=self.events,
            log=(run.path / "launch.log").read_bytes()[self._log :].decode(),
            exit=json.loads((run.path / "exit.json").read_text()),
            kept=max((verify(path).step for path in committed(run.path)), default=0),
            reported=max((event["step"] for event in run.events("checkpoint")), default=0),
        )
        self._training.attempts.append(attempt)
        return attempt
