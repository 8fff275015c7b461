"""Full runs, and what is done to their engines from outside.

A `Training` is one run directory: started, disturbed, resumed, until it is done, by the real command
(`kdconsole --headless train`) or, where only the engine matters, by engines that are forked (`tests.nursery`). Where a
moment is too short to be met by looking, the engine stops itself there with SIGSTOP and waits for what comes: see
`hook`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from faults import held

from console.launch import Job, create
from dispatch.supervisor import read_process
from engine.checkpoint import MODEL, committed, directory_name, verify
from engine.config import load_config
from tests.console_rig import ROOT, Desk, Outcome, RunFiles, processes_of, until
from tests.nursery import Nursery, customize

SECONDS = 180.0
"""The longest wait for anything, on a machine that is busy with other things."""

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
HOOK = Path(__file__).with_name("hook.py")


def end_all(directory: Path) -> None:
    """Kills every process that names a directory on its command line."""
    for pid in processes_of(directory):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Attempt:
    """One process's part of a training, after its end."""

    outcome: Outcome | None
    """The console's; None where the engine was forked, and there was none."""
    exit_code: int | None
    signal: int | None
    """Of the engine: one of the two, as its parent saw it."""
    events: list[dict[str, Any]]
    log: str
    """What it printed."""
    kept: int
    """Step of the newest checkpoint, 0 where there is none; every one of them was verified."""
    reported: int
    """The newest checkpoint that the stream ever spoke of as committed, earlier attempts included."""
    went_on: int
    """Steps that it made after it was first told to stop."""

    @property
    def answer(self) -> int | None:
        """Exit code of the command, or of a forked engine."""
        return self.exit_code if self.outcome is None else self.outcome.rc

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
        self.offset = self.hooks / "offset"
        self.attempts: list[Attempt] = []

    def start(self, *moments: str, clock: float | None = None, arguments: Sequence[str] = ()) -> Going:
        """Starts it, or resumes it.

        Args:
            moments: where the engine stops and waits, see `hook.stop_at`.
            clock: seconds that every process of the attempt believes to be later than it is; see `set_clock`.
            arguments: more of them for the command.
        """
        self.offset.unlink(missing_ok=True)
        if clock is not None:
            self.set_clock(clock)
        return self._begin(list(moments), arguments)

    def _begin(self, moments: list[str], arguments: Sequence[str]) -> Going:
        hook = f"{HOOK.read_text()}\n\ncustomize({moments!r}, {str(self.offset)!r})\n"
        customize(self.hooks, hook)
        what = ["--resume", self.run.path.name] if self.attempts else [str(self.config)]
        path = os.pathsep.join((str(self.hooks), str(ROOT)))
        return Commanded(self, *what, *arguments, variables={"PYTHONPATH": path})

    def set_clock(self, seconds: float) -> None:
        """Changes the clock of an attempt that was started with one, at once."""
        new = self.hooks / "offset.new"
        new.write_text(str(seconds))
        new.replace(self.offset)

    def finish(self) -> Attempt:
        """Undisturbed to the end, however often it was disturbed before."""
        attempt = self.start().wait()
        assert attempt.answer == attempt.exit_code == 0, attempt.log
        return attempt

    def clear(self) -> None:
        """Leaves no process behind."""
        end_all(self.desk.evidence)

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


class ForkedTraining(Training):
    """The same, its engines forked by a nursery; there is no console and no supervisor."""

    def __init__(self, root: Path, corpus: Path, nursery: Nursery) -> None:
        super().__init__(root, corpus)
        create(Job(load_config(self.config), self.desk.evidence))
        self.nursery = nursery
        self._last: Forked | None = None

    def _begin(self, moments: list[str], arguments: Sequence[str]) -> Going:
        self._last = Forked(self, moments)
        return self._last

    def clear(self) -> None:
        super().clear()
        if self._last is not None and not self._last.ended:
            os.kill(self._last.pid, signal.SIGKILL)


class Going(ABC):
    """An attempt that is under way."""

    def __init__(self, training: Training) -> None:
        self._training = training
        evidence = training.desk.evidence
        there = evidence.is_dir() and any(evidence.iterdir())
        self._events = len(training.run.events()) if there else 0
        log = training.run.path / "launch.log" if there else None
        self._log = log.stat().st_size if log and log.exists() else 0
        self._told_at: int | None = None

    @property
    @abstractmethod
    def pid(self) -> int:
        """The engine's."""

    @property
    def run(self) -> RunFiles:
        return self._training.run

    @property
    def events(self) -> list[dict[str, Any]]:
        """What this attempt wrote so far."""
        return self.run.events()[self._events :]

    @property
    def steps(self) -> int:
        """How many steps it made so far."""
        return sum(event["event"] == "step" for event in self.events)

    def until_step(self, step: int) -> None:
        """Waits for a step of this attempt."""
        until(lambda: any(e["event"] == "step" and e["step"] >= step for e in self.events), f"step {step}", SECONDS)

    def until_met(self) -> None:
        """Waits until the engine stands where it was told to stop."""
        pid = self.pid
        until(lambda: held(pid) or self.ended, "the engine's stop", SECONDS)
        assert held(pid), f"it ended instead\n{self.wait().log}"

    def send(self, *numbers: int) -> None:
        """Signals to the engine, and on it goes if it stood still."""
        if numbers and self._told_at is None:
            self._told_at = self.steps
        for number in (*numbers, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def ended(self) -> bool:
        """Whether the engine is gone, whatever the others still do."""
        process = read_process(self.pid)
        return process is None or process.gone

    def wait(self) -> Attempt:
        """Its end; every checkpoint in the directory is verified then."""
        outcome, exit_code, number = self._end()
        run = self.run
        attempt = Attempt(
            outcome=outcome,
            exit_code=exit_code,
            signal=number,
            events=self.events,
            log=(run.path / "launch.log").read_bytes()[self._log :].decode(),
            kept=max((verify(path).step for path in committed(run.path)), default=0),
            reported=max((event["step"] for event in run.events("checkpoint")), default=0),
            went_on=0 if self._told_at is None else self.steps - self._told_at,
        )
        self._training.attempts.append(attempt)
        return attempt

    @abstractmethod
    def _end(self) -> tuple[Outcome | None, int | None, int | None]:
        """Waits for it; the console's outcome, and the engine's exit code or signal."""


class Commanded(Going):
    """Started by the command."""

    def __init__(self, training: Training, *arguments: str, variables: Mapping[str, str]) -> None:
        super().__init__(training)
        self._number = len(training.attempts) + 1
        self._started = training.desk.start("--headless", "train", *arguments, variables=variables)

    @cached_property
    def pid(self) -> int:  # known once the supervisor recorded it
        pids: list[int] = []

        def recorded() -> bool:
            with contextlib.suppress(FileNotFoundError):
                lines = (self.run.path / "supervisor.jsonl").read_text().splitlines()
                started = [entry for line in lines if (entry := json.loads(line))["event"] == "started"]
                pids[:] = [entry["trainer"]["pid"] for entry in started]
            return len(pids) >= self._number

        until(recorded, f"the engine of attempt {self._number}", SECONDS)
        return pids[self._number - 1]

    def _end(self) -> tuple[Outcome | None, int | None, int | None]:
        outcome = self._started.wait()
        seen = json.loads((self.run.path / "exit.json").read_text())
        return outcome, seen["exit_code"], seen["signal"]


class Forked(Going):
    """Forked."""

    pid = 0

    def __init__(self, training: ForkedTraining, moments: list[str]) -> None:
        super().__init__(training)
        run_dir = training.run.path
        hook = f"{HOOK.read_text()}\n\nin_an_engine({moments!r}, {str(training.offset)!r})\n"
        self._engine = training.nursery.fork(
            "engine", str(run_dir), cwd=run_dir, log=run_dir / "launch.log", prepare=hook
        )
        self.pid = self._engine.pid

    def _end(self) -> tuple[Outcome | None, int | None, int | None]:
        until(lambda: self.ended, "the engine's end", SECONDS)
        code = self._engine.wait()
        return None, *((code, None) if code >= 0 else (None, -code))
