"""The real `kdconsole`, called as a process of its own from an empty working directory and an empty home."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.nursery import Nursery

ROOT = Path(__file__).parents[1]
TINY = (
    *("--budget", "60"),
    *("--set", "train.batch=2", "--set", "train.sequence=32", "--set", "train.threads=1"),
    *("--set", "data.heldout_windows=4"),
)
"""A smoke that takes as long as it takes to import torch."""
CALL_SECONDS = 120.0
_COMMAND = ("-m", "console")


def write_corpus(path: Path, lines: int = 3_000) -> Path:
    """Text that a model can learn something of in a dozen steps."""
    choose = random.Random(0).choice
    path.write_text("".join(f"def f{choose(range(200))}(x): return x + 1\n" for _ in range(lines)))
    return path


def until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Polls with a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}"
        time.sleep(0.02)


def processes_of(directory: Path) -> list[int]:
    """Pids that name a directory on their command line; zombies are done and do not count."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.fsencode(directory) in Path(f"/proc/{entry}/cmdline").read_bytes():
                found.append(int(entry))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


@dataclass(frozen=True)
class RunFiles:
    """What a run left in its directory."""

    path: Path

    @property
    def stream(self) -> Path:
        return self.path / "events.jsonl"

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The stream's whole lines, those of one kind of event alone where one is given."""
        raw = self.stream.read_bytes() if self.stream.exists() else b""
        events = [json.loads(line) for line in raw.split(b"\n")[:-1]]
        return [event for event in events if kind in (None, event["event"])]

    def has(self, kind: str, name: str | None = None) -> bool:
        """Whether an event of this kind (and name) was written yet."""
        return any(name in (None, event.get("name")) for event in self.events(kind))

    @property
    def end(self) -> dict[str, Any]:
        [end] = self.events("end")
        return end

    def trainer(self) -> int:
        """Pid of the engine, as the supervisor recorded it."""
        lines = (self.path / "supervisor.jsonl").read_text().splitlines()
        pid = next(json.loads(line)["trainer"]["pid"] for line in lines if json.loads(line)["event"] == "started")
        assert isinstance(pid, int)
        return pid


@dataclass(frozen=True)
class Outcome:
    """A command that has ended."""

    rc: int
    out: str
    err: str
    seconds: float
    evidence: Path

    @property
    def said(self) -> str:
        """Everything it said, for the message of a failed assertion."""
        return f"exit code {self.rc} after {self.seconds:.1f} s\n{self.out}\n{self.err}"

    @property
    def text(self) -> str:
        """Standard output with its line breaks undone, so that a wrapped sentence is one again."""
        return " ".join(self.out.split())

    @cached_property
    def run(self) -> RunFiles:
        """The one run that it made."""
        [path] = self.evidence.iterdir()
        return RunFiles(path)

    def refused(self, *words: str, rc: int = 2) -> str:
        """Checks that nothing was started and one line on standard error says why; returns that line."""
        assert self.rc == rc, self.said
        assert not self.evidence.exists() or not any(self.evidence.iterdir()), "a run directory was made"
        assert self.out == "", self.said
        [line] = self.err.splitlines()
        assert line.startswith("error: "), line
        for word in words:
            assert word in line, line
        return line


class Desk:
    """A place to call the command from; everything below one directory.

    Args:
        root: an existing directory.
        nursery: forks the engines of runs on this machine, which costs a second in place of six; see there for what may
            not be tested so.
    """

    def __init__(self, root: Path, nursery: Nursery | None = None) -> None:
        self.cwd, self.home, self.evidence = root / "here", root / "home", root / "evidence"
        self._python_path = nursery.python_path if nursery else str(ROOT)
        self.cwd.mkdir()
        self.home.mkdir()

    def write(self, name: str, text: str) -> Path:
        path = self.cwd / name
        path.write_text(text)
        return path

    @property
    def run(self) -> RunFiles:
        """The one run made here, as soon as there is one."""
        until(lambda: self.evidence.is_dir() and any(self.evidence.iterdir()), "a run directory")
        [path] = self.evidence.iterdir()
        return RunFiles(path)

    def start(
        self, *arguments: str, command: Sequence[str] = _COMMAND, variables: Mapping[str, str] | None = None
    ) -> Started:
        """Starts `kdconsole ARGUMENTS` in a process group of its own, as a shell would."""
        keep = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
        environment = {
            **keep,
            "HOME": str(self.home),
            "PYTHONPATH": self._python_path,
            "KDCONSOLE_EVIDENCE": str(self.evidence),
            **(variables or {}),
        }
        argv = [sys.executable, *command, *arguments]
        return Started(
            subprocess.Popen(
                argv,
                cwd=self.cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                text=True,
            ),
            self.evidence,
        )

    def call(self, *arguments: str, **options: Any) -> Outcome:
        """Runs `kdconsole ARGUMENTS` to its end."""
        return self.start(*arguments, **options).wait()

    def smoke(self, *arguments: str, corpus: Path | str | None = None, **options: Any) -> Outcome:
        """Runs a tiny smoke to its end, and checks that it left no process behind."""
        data = ("--data", str(corpus)) if corpus else ()
        outcome = self.call("--headless", "smoke", *TINY, *data, *arguments, **options)
        self.is_quiet()
        return outcome

    def is_quiet(self) -> None:
        """Checks that no process works for a run of this desk any more."""
        until(lambda: not processes_of(self.evidence), f"no process of {self.evidence}", 10.0)

    def clear(self) -> None:
        """Ends what is left, whatever it is."""
        for pid in processes_of(self.evidence):
            os.kill(pid, signal.SIGKILL)


class Started:
    """A command that is running."""

    def __init__(self, process: subprocess.Popen[str], evidence: Path) -> None:
        self.process, self._evidence, self._began = process, evidence, time.monotonic()

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the whole group of the foreground."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> Outcome:
        try:
            out, err = self.process.communicate(timeout=CALL_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"no end after {CALL_SECONDS} s\n{out}\n{err}") from None
        return Outcome(self.process.returncode, out, err, time.monotonic() - self._began, self._evidence)


def side_by_side(jobs: Mapping[str, Callable[[], Outcome]], workers: int = 2) -> dict[str, Future[Outcome]]:
    """Runs jobs a few at a time, in their order, and returns at once; most of a tiny smoke is waiting for imports."""
    pool = ThreadPoolExecutor(workers)
    futures = {name: pool.submit(job) for name, job in jobs.items()}
    pool.shutdown(wait=False)
    return futures


def of(*jobs: str) -> pytest.MarkDecorator:
    """Gives a test the outcome of each of these jobs in turn, by the fixture `outcome` of its module."""
    return pytest.mark.parametrize("outcome", jobs, indirect=True)


def asked_for(request: pytest.FixtureRequest) -> set[str]:
    """The jobs that the selected tests name with `of`; the others need not be run."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    return {spec.params["outcome"] for spec in specs if spec is not None and "outcome" in spec.params}
