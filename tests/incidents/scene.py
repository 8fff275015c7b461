"""Where an incident is made: places to call the real command from, and how it is told that something was caught.

A run is started as an operator starts it. Caught means three things at once: a verdict, an event or a refusal that
names what is wrong; the moment of it, within a minute of the command's start; and a line that the operator gets to
read. Where one of them is missing, an `AssertionError` says which.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute().parent
sys.path[:0] = [path for path in (str(HERE.parents[1]), str(HERE.parent / "faults")) if path not in sys.path]

from tests.console_rig import ROOT, Desk, Outcome, RunFiles, Started, processes_of, until, write_corpus  # noqa: E402
from tests.nursery import Nursery, customize  # noqa: E402

LIMIT_SECONDS = 60.0
"""From the command's start to the moment of the catch."""
SECONDS = 120.0
"""The longest wait for anything."""
CONFIG = """\
teacher: builtin:teacher
student: builtin:student
data: {path: corpus.txt, heldout_windows: 4}
train:
  {steps: STEPS, batch: 2, sequence: 32, warmup_steps: 2, learning_rate: 6.0e-3, min_learning_rate: 3.0e-4, threads: 1,
   device: cpu}
checkpoint: {every_steps: 5}
"""
SMOKE = ("--headless", "smoke", "config.yaml")
TRAIN = ("--headless", "train", "config.yaml")
NO_GATE = ("--no-gate", "to make the incident")
"""A long training needs no passed smoke: what is to be seen is who else catches it."""

_RUN_ID = re.compile(r"\d{8}-\d{6}-(?:smoke|train|evaluate)-[0-9a-f]{6}")

Event = dict[str, Any]


@dataclass(frozen=True)
class Caught:
    """One way of making an incident, and how it ended."""

    made: str
    """What was done."""
    by: str
    """What caught it: a verdict's id, an event, or who refused it."""
    message: str
    """The line that the operator read."""
    seconds: float
    """Before launch: those that the command took. After it: from the command's start to the catch."""
    launched: bool
    """A trainer was started."""

    @property
    def in_time(self) -> bool:
        return self.seconds <= LIMIT_SECONDS


@dataclass(frozen=True)
class NotMade:
    """One way of making an incident for which this machine lacks something."""

    made: str
    why: str


Way = Caught | NotMade


@dataclass
class Scene:
    """Everything of one incident, or of one good run, below one directory.

    Args:
        root: an existing directory.
        nursery: forks the engines, see there; not for engines that are spoilt, or ended by their pid.
    """

    root: Path
    nursery: Nursery | None = None
    desks: list[Desk] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def desk(self, steps: int = 12, evidence: Path | None = None) -> Desk:
        """A place to call the command from, with a corpus and a `config.yaml`.

        Args:
            steps: of a training by that file.
            evidence: where its runs come to stand; beside it by default.
        """
        root = self.root / f"desk{next(self._numbers)}"
        root.mkdir()
        desk = Desk(root, self.nursery)
        if evidence is not None:
            desk.evidence = evidence
        write_corpus(desk.cwd / "corpus.txt")
        desk.write("config.yaml", CONFIG.replace("STEPS", str(steps)))
        self.desks.append(desk)
        return desk

    def refused(self, made: str, desk: Desk, *arguments: str, words: Sequence[str]) -> Caught:
        """Calls the command, which is to start nothing and to say in its last line why."""
        outcome = desk.call(*arguments)
        assert outcome.rc == 2, outcome.said
        assert "Traceback" not in outcome.err, outcome.said
        assert not desk.evidence.exists() or not any(desk.evidence.iterdir()), "a run directory was made"
        line = next((line for line in outcome.err.splitlines() if line.startswith(("error: ", "Error: "))), "")
        for word in words:
            assert word in line, outcome.said
        return Caught(made, "refused", self._clean(line), outcome.seconds, launched=False)

    def start(self, desk: Desk, *arguments: str, spoilt: str = "", **variables: str) -> Going:
        """Starts a run.

        Args:
            desk: where.
            arguments: of the command.
            spoilt: a function of `spoil` that its engine begins with.
            variables: of its environment.
        """
        if spoilt:
            variables["PYTHONPATH"] = os.pathsep.join((str(self._hooks(desk, spoilt)), str(ROOT)))
        began = time.time()
        return Going(self, desk, desk.start(*arguments, variables=variables), began)

    def _hooks(self, desk: Desk, way: str) -> Path:
        """A directory whose `sitecustomize` spoils the engines of a command, those that a nursery forks included."""
        hooks = desk.cwd.parent / "hooks"
        hooks.mkdir(exist_ok=True)
        text = (HERE / "spoil.py").read_text()
        if self.nursery is None:
            text += f"\n\ncustomize({way!r})\n"
        else:
            prepare = f"{text}\n\n{way}()\n"
            stand_in = (Path(self.nursery.python_path.split(os.pathsep)[0]) / "sitecustomize.py").read_text()
            text = stand_in.replace('"prepare": ""', f'"prepare": {prepare!r} if module == "engine" else ""')
            assert text != stand_in, "the nursery hands its orders over in another way"
        customize(hooks, text)
        return hooks

    def clear(self) -> None:
        """Ends what is left of any run here."""
        for pid in processes_of(self.root):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    def _clean(self, text: str) -> str:
        """Without the names that only this scene has: of its directories, and of its runs."""
        for desk in self.desks:
            text = text.replace(f"{desk.cwd}/", "").replace(str(desk.evidence), "evidence")
        return " ".join(_RUN_ID.sub("RUN", text).split())


class Going:
    """A command that was started, and the run that it makes."""

    def __init__(self, scene: Scene, desk: Desk, started: Started, began: float) -> None:
        self._scene, self.desk, self._started, self.began = scene, desk, started, began
        self._outcome: Outcome | None = None

    @property
    def run(self) -> RunFiles:
        return self.desk.run

    @property
    def ended(self) -> bool:
        """Whether the command has ended."""
        return self._started.process.poll() is not None

    def until(self, condition: Callable[[Event], object], what: str) -> Event:
        """Waits for an event of the stream."""
        found: list[Event] = []

        def there() -> bool:
            ended, made = self.ended, self.desk.evidence.is_dir() and any(self.desk.evidence.iterdir())
            found.extend(event for event in (self.run.events() if made else []) if condition(event))
            assert found or not ended, f"the run ended without {what}\n{self.end().said}"
            return bool(found)

        until(there, what, SECONDS)
        return found[0]

    def until_step(self, step: int) -> None:
        self.until(lambda event: event["event"] == "step" and event["step"] >= step, f"step {step}")

    def end(self) -> Outcome:
        """Waits for the command's end."""
        if self._outcome is None:
            self._outcome = self._started.wait()
            assert "Traceback" not in self._outcome.err, self._outcome.said
        return self._outcome

    def stop(self) -> Outcome:
        """Ends the run as an operator does, and waits for the command that watches it."""
        self.desk.call("stop", self.run.path.name, "--kill")
        return self.end()

    def caught(self, made: str, by: str, words: Sequence[str], event: Event | None = None) -> Caught:
        """How the run was caught, after the command's end.

        Args:
            made: what was done.
            by: what caught it.
            words: that the line which the operator reads has.
            event: the stream's event that tells; the command's own end without one.
        """
        outcome = self.end()
        lines = (*outcome.err.splitlines(), *outcome.out.splitlines(), outcome.text)
        line = next((line for line in lines if all(word in line for word in words)), None)
        assert line is not None, f"nobody could read {' and '.join(words)}\n{outcome.said}"
        seconds = outcome.seconds if event is None else event["t"] - self.began
        return Caught(made, by, self._scene._clean(line), seconds, launched=True)

    def failed(self, made: str, identifier: str) -> Caught:
        """How a verdict caught it, once the run has ended."""
        self.end()
        event = next((e for e in self.run.events("verdict") if e["id"] == identifier and e["verdict"] == "FAIL"), None)
        assert event is not None, f"no FAIL of {identifier}\n{self.end().said}"
        return self.caught(made, identifier, ("FAIL", identifier), event)

    def refused(self, made: str, *words: str) -> Caught:
        """How the engine itself refused it, once it had what it was to work with."""
        outcome = self.end()
        assert outcome.rc == 2, outcome.said
        end = self.run.end
        for word in words:
            assert word in end["reason"], end
        assert " ".join(end["reason"].split()) in outcome.text, f"the report does not say it\n{outcome.said}"
        return Caught(made, "refused by the engine", self._scene._clean(end["reason"]), end["t"] - self.began, True)
