"""Runs on a host as they are left there: made by this software, with real checkpoints of a real small training."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import os
import shutil
import sys
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from dispatch.fetch import Choice, Fetched, fetch
from dispatch.hosts import add_host
from dispatch.manifest import Remote, write_manifest
from dispatch.places import Reach
from dispatch.runs import RunDir, create_run, open_run
from dispatch.supervisor import identify, note
from engine.config import load_config
from engine.falsifiers import builtin_contract
from engine.stream import encode
from tests.engine.checkpoint_rig import RUN
from tests.engine.checkpoint_rig import Rig as Training
from tests.ssh_rig import Rig
from tests.streams import smoke_events, stamped

ROOT = Path(__file__).parents[2]
_T = TypeVar("_T")
_numbers = itertools.count()


def trained(directory: Path, width: int = 64) -> Path:
    """A directory with the checkpoints of steps 2, 4 (the best) and 6 (the newest), and a model."""
    training = Training(directory, width, keep_last=5)
    directory.mkdir(parents=True, exist_ok=True)
    training.saved(2)
    training.saved(2, "best", "periodic", heldout=1.0)
    training.saved(2, "final")
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text("{}")
    (directory / "model" / "model.safetensors").write_bytes(b"weights" * 10_000)
    return directory


@dataclass
class Afar:
    """A host of its own name and directory behind one sshd, and an evidence directory here."""

    rig: Rig
    name: str
    base: Path
    evidence: Path
    locks: dict[str, int] = field(default_factory=dict)

    @classmethod
    def make(cls, rig: Rig, root: Path, port: int | None = None) -> Afar:
        """A host that nothing has been put on yet; by another port where a proxy is in between."""
        name, base = f"host-{next(_numbers)}", root / "base"
        given = {"address": "127.0.0.1", "port": port or rig.port, "identity": str(rig.identity)}
        add_host(name, {**given, "python": sys.executable, "run_dir": str(base)}, rig.environ)
        if port is not None:
            public = (rig.directory / "host_key.pub").read_text()
            with (rig.hosts_file.parent / "known_hosts").open("a") as file:
                file.write(f"[127.0.0.1]:{port} {public}")
        return cls(rig, name, base, root / "evidence")

    def run(self, weights: Path | None = None, *, state: str = "ended") -> RunDir:
        """A run of this console that stands on the host; of one that is `running` this process has the lock."""
        config = load_config(None, template="builtin", overrides={"mode": "train"})
        remote = Remote(host=self.name, run_dir=f"{self.base}/runs", python=sys.executable, engine=str(ROOT))
        made = create_run(config, evidence=self.evidence, contract_text=builtin_contract("train"), remote=remote)
        run = made.run if weights is None else RUN  # that of the checkpoints
        made = RunDir(made.path, msgspec.structs.replace(made.manifest, run=run))
        write_manifest(made.path, made.manifest)
        there = self.there(made)
        shutil.copytree(made.path, there)
        if weights is not None:
            shutil.copytree(weights, there, dirs_exist_ok=True)
        (there / "launch.log").write_text("a line\n")
        if state != "new":
            note(there, "starting", supervisor=dead(run), session=0)
            note(there, "started", supervisor=dead(run), trainer=dead(run), session=0)
            self.steps(made, 8)
        if state == "ended":
            self.end(made)
        if state == "running":
            self.lock(made)
        return open_run(made.path)

    def there(self, run_dir: RunDir) -> Path:
        """The run's directory on the host."""
        return self.base / "runs" / run_dir.path.name

    def steps(self, run_dir: RunDir, count: int) -> None:
        """What a trainer writes."""
        with (self.there(run_dir) / "events.jsonl").open("ab") as file:
            for event in stamped(smoke_events(steps=count)):
                file.write(encode(msgspec.structs.replace(event, run=run_dir.run)))

    def lock(self, run_dir: RunDir) -> None:
        """What a supervisor does first."""
        self.locks[run_dir.id] = os.open(self.there(run_dir) / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self.locks[run_dir.id], fcntl.LOCK_EX)

    def end(self, run_dir: RunDir) -> None:
        """The last that a supervisor writes."""
        if run_dir.id in self.locks:
            os.close(self.locks.pop(run_dir.id))
        record = {
            "v": 1,
            "run": run_dir.run,
            "exit_code": 0,
            "signal": None,
            "started": 1.0,
            "ended": 2.0,
            "seconds": 1.0,
        }
        (self.there(run_dir) / "exit.json").write_text(json.dumps(record))

    def use(self, scenario: Callable[[Reach], Awaitable[_T]]) -> _T:
        """Runs something with the ways to the hosts."""

        async def whole() -> _T:
            async with Reach(self.rig.environ) as reach:
                return await scenario(reach)

        return asyncio.run(whole())

    def fetch(self, run_dir: RunDir, choice: Choice | None = None, said: list[str] | None = None) -> Fetched:
        """What `kdconsole fetch` does."""
        heard = [] if said is None else said
        return self.use(lambda reach: fetch(reach, run_dir, choice or Choice(), heard.append))


def dead(run: str) -> dict[str, object]:
    """The identity of a process of another boot."""
    return {**identify(1, run), "boot_id": str(uuid.uuid4())}


def same(one: Path, other: Path, name: str) -> None:
    """Two directories hold the same files below a name."""
    ours, theirs = (
        {str(path.relative_to(root)): path.read_bytes() for path in (root / name).rglob("*") if path.is_file()}
        for root in (one, other)
    )
    assert ours == theirs
    assert ours
