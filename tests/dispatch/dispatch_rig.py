"""Real runs of small trainers under the real supervisor, and a look at what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# The real supervisor with its waits shortened; the graces themselves are not what is tested.
HASTY = """
import sys
from dispatch import supervisor
supervisor.SETTLE_SECONDS, supervisor.ORPHAN_GRACE_SECONDS = 0.15, 0.3
supervisor.WATCH_SECONDS, supervisor.BEAT_SECONDS, supervisor.STALL_GRACE_SECONDS = 0.05, 0.1, 0.3
{tune}
sys.exit(supervisor.main(sys.argv[1:]))
"""


def until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Polls with a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain: {what}"
        time.sleep(0.01)


class Run:
    """One run directory and the supervisor's commands on it, each in a process of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = str(uuid.uuid4())
        self.tune = ""
        """More of the supervisor's waits to be shortened, as Python."""
        path.mkdir(mode=0o700)
        self.supervise()

    def supervise(self, **rules: float) -> None:
        """Writes the manifest, with what the supervisor is to do about a stall."""
        (self.path / "dispatch.json").write_text(json.dumps({"run": self.run, "supervise": rules}))

    def argv(self, command: str, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-c", HASTY.format(tune=self.tune), command, str(self.path), *arguments]

    def trainer(self, script: str) -> list[str]:
        return ["--", sys.executable, "-I", "-S", "-c", script]

    def call(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.argv(command, *arguments), capture_output=True, text=True, timeout=60, check=False)

    def start(self, script: str) -> dict[str, object]:
        done = self.call("run", *self.trainer(script))
        assert done.returncode == 0, done.stderr
        answer: dict[str, object] = json.loads(done.stdout)
        return answer

    def status(self) -> dict[str, object]:
        done = self.call("status")
        assert done.returncode == 0, done.stderr
        answer: dict[str, object] = json.loads(done.stdout)
        return answer

    def stop(self, *options: str) -> dict[str, object]:
        done = self.call("stop", *options)
        assert done.returncode in (0, 4), done.stderr
        answer: dict[str, object] = json.loads(done.stdout)
        return {**answer, "rc": done.returncode}

    def exit(self) -> dict[str, object]:
        until((self.path / "exit.json").exists, "exit.json")
        record: dict[str, object] = json.loads((self.path / "exit.json").read_text())
        return record

    def log(self) -> str:
        try:
            return (self.path / "launch.log").read_text()
        except FileNotFoundError:
            return ""

    def said(self, text: str) -> None:
        until(lambda: text in self.log(), f"{text!r} in launch.log")

    def lines(self, event: str = "") -> list[dict[str, Any]]:
        """What the supervisor noted, of one kind or all of it."""
        noted = [json.loads(line) for line in (self.path / "supervisor.jsonl").read_text().splitlines()]
        return [line for line in noted if event in ("", line["event"])]


def processes_of(directory: Path) -> list[int]:
    """Pids that work in a directory or name it on their command line; zombies are done and do not count."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            # Of a process that is gone or a zombie neither can be read.
            inside = os.readlink(f"/proc/{entry}/cwd").startswith(str(directory))
            named = str(directory).encode() in Path(f"/proc/{entry}/cmdline").read_bytes()
        except OSError:
            continue
        if (inside or named) and int(entry) != os.getpid():
            found.append(int(entry))
    return found
