"""A host behind a real sshd with everything that can be done to it, and runs on it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import netns
import paced_trainer
from faults import can_mount, small_disk

from dispatch import supervisor
from dispatch.hosts import add_host, load_hosts
from dispatch.manifest import EXIT, SUMS, Remote
from dispatch.mirror import MirroredTransport
from dispatch.places import Place
from dispatch.runs import RunDir, create_run
from dispatch.ssh import SSHTransport
from dispatch.transport import TransportError
from engine.config import load_config
from tests.console_rig import ROOT, processes_of
from tests.ssh_proxy import Proxy
from tests.ssh_rig import Rig, make_key, running_sshd

SECONDS = 60.0
"""The longest wait for anything."""
KEEPALIVE_SECONDS = 0.5
"""Of consoles in this process: a silent link is noticed ten times as quickly as by default."""
DISK_MIB = 96


async def until(condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    """Polls with a deadline."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not condition():
        assert loop.time() < deadline, f"waited {seconds:g} s in vain: {what}"
        await asyncio.sleep(0.01)


@dataclass
class FarHost:
    """An sshd, the way to it, the disks on both sides."""

    root: Path
    rig: Rig
    proxy: Proxy | None
    """What the way goes through; None where it is a cable."""
    network: netns.Network | None
    disks: bool
    """The directories of both sides are small disks of their own."""
    trusts: asyncio.Event = field(default_factory=asyncio.Event)
    """The host has the key that is trusted."""

    @property
    def base(self) -> Path:
        """The host's run directory."""
        return self.root / "far"

    @property
    def evidence(self) -> Path:
        return self.root / "near"

    def transport(self, keepalive: float = KEEPALIVE_SECONDS) -> SSHTransport:
        """One console's connection."""
        settings = load_hosts(self.rig.environ).named("gx10")
        return SSHTransport(settings, self.rig.environ, connect_seconds=10.0, keepalive_seconds=keepalive)

    def variables(self) -> Mapping[str, str]:
        """What a real console is given."""
        return {**self.rig.environ, "PYTHONPATH": str(ROOT)}

    def make(self, rate: float) -> FarRun:
        """A run that is on the host and was not launched yet."""
        config = load_config(template="builtin", overrides={"mode": "train"})
        remote = Remote(host="gx10", run_dir=str(self.base / "runs"), python=sys.executable, engine=str(ROOT))
        run_dir = create_run(config, evidence=self.evidence, contract_text=paced_trainer.CONTRACT, remote=remote)
        there = self.base / "runs" / run_dir.id
        shutil.copytree(run_dir.path, there)
        return FarRun(self, run_dir, there, rate)

    def change_key(self) -> None:
        """The host presents a key that nobody knows; open connections go on."""
        self.trusts.clear()
        for name in ("host_key", "host_key.pub"):
            shutil.copy(self.rig.directory / name, self.rig.directory / f"trusted_{name}")
        self.rig.end_listener()
        make_key(self.rig.directory / "host_key")
        self.rig.restart()

    def restore_key(self) -> None:
        """And the old one again."""
        self.rig.end_listener()
        for name in ("host_key", "host_key.pub"):
            shutil.copy(self.rig.directory / f"trusted_{name}", self.rig.directory / name)
        self.rig.restart()
        self.trusts.set()


@contextlib.asynccontextmanager
async def far_host(root: Path, *, cable: bool = False, disks: bool = True) -> AsyncIterator[FarHost]:
    """A host while inside.

    Args:
        root: is made.
        cable: it stands in a network of its own; else behind a proxy.
        disks: the directories of both sides are small disks, where those can be mounted.
    """
    async with contextlib.AsyncExitStack() as stack:
        root.mkdir(parents=True)
        disks = disks and can_mount()
        for name in ("far", "near"):
            (root / name).mkdir()
            if disks:
                stack.enter_context(small_disk(root / name, DISK_MIB))
        network = stack.enter_context(netns.network()) if cable else None
        address, inside = (network.host, network.inside) if network else ("127.0.0.1", ())
        rig = stack.enter_context(running_sshd(root / "sshd", "LogLevel ERROR", address, inside))
        proxy = None if cable else await stack.enter_async_context(Proxy(rig.port))
        port = proxy.port if proxy else rig.port
        given = {"address": address, "port": port, "identity": str(rig.identity)}
        add_host("gx10", {**given, "python": sys.executable, "run_dir": str(root / "far")}, rig.environ)
        host = FarHost(root, rig.trusted(port), proxy, network, disks)
        host.trusts.set()
        try:
            yield host
        finally:
            for pid in processes_of(root):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@dataclass
class FarRun:
    """One run, from both sides."""

    host: FarHost
    run_dir: RunDir
    there: Path
    rate: float
    """Events a second."""
    attempts: int = 0
    expected: str = ""
    """What was done to end the attempt that goes on: finish, fail, stop, kill or lose."""

    @property
    def here(self) -> Path:
        return self.run_dir.path

    @property
    def command(self) -> tuple[str, ...]:
        return (sys.executable, "-P", paced_trainer.__file__, str(self.there), str(self.rate))

    def place(self, transport: SSHTransport, keep: bool = False) -> Place:
        """The run as a console sees it."""
        way = MirroredTransport(transport, str(self.there), self.here) if keep else transport
        engine = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        script = (str(ROOT / "dispatch" / "supervisor.py"),)
        return Place(way, str(self.there), sys.executable, script, engine, self.command)

    async def launch(self, transport: SSHTransport) -> None:
        """Starts it, or another attempt of it, however often that takes."""
        again = self.attempts > 0
        self.attempts += 1
        self.expected = ""
        await insist(lambda: self.place(transport).launch(gpu=False, again=again))
        for name in (EXIT, SUMS):
            (self.here / name).unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        """What the host knows, asked there."""
        return supervisor.status(self.there)

    def pid(self, who: str) -> int | None:
        """Of the `trainer` or the `supervisor`, if it lives."""
        process = self.status()[who]
        return process["pid"] if supervisor.alive(process) else None

    @property
    def goes_on(self) -> bool:
        """Its trainer lives."""
        return self.pid("trainer") is not None

    @property
    def stream(self) -> bytes:
        """What stands on the host."""
        return (self.there / "events.jsonl").read_bytes()

    @property
    def kept(self) -> bytes:
        """What stands here."""
        path = self.here / "events.jsonl"
        return path.read_bytes() if path.exists() else b""

    def order(self, what: str) -> None:
        """Tells the trainer to `finish` or to `fail`."""
        self.expected = what
        new = self.there / "order.new"
        new.write_text(what)
        new.rename(self.there / paced_trainer.ORDER)

    def starts(self) -> list[str]:
        """One line for each trainer that was ever started."""
        path = self.there / paced_trainer.STARTS
        return path.read_text().splitlines() if path.exists() else []

    def problems(self) -> list[str]:
        """What is wrong with what the host has of an ended attempt, in sentences."""
        wrong = []
        starts, started = self.starts(), self._journal("started")
        if len(starts) != self.attempts or started != self.attempts:
            wrong.append(f"{self.attempts} attempts, {started} starts on record, trainers: {starts}")
        if any("TWICE" in line for line in starts):
            wrong.append(f"two trainers at once: {starts}")
        whole, torn = self.stream.rpartition(b"\n")[::2]
        if torn:
            wrong.append(f"the host's stream ends in half a line: {torn[:80]!r}")
        seqs = [_head.decode(line).seq for line in whole.split(b"\n")]
        if seqs != list(range(len(seqs))):
            wrong.append("the host's stream has a gap")
        return wrong

    def _journal(self, event: str) -> int:
        lines = (self.there / "supervisor.jsonl").read_bytes().splitlines()
        return sum(_event(line) == event for line in lines)


class _Head(msgspec.Struct):
    seq: int


_head = msgspec.json.Decoder(_Head)


def _event(line: bytes) -> object:
    with contextlib.suppress(ValueError):
        return json.loads(line).get("event")
    return None


async def insist(work: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Does it again while connections get lost; any other error is one."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while True:
        try:
            return await work()
        except TransportError:
            if loop.time() > deadline:
                raise
            await asyncio.sleep(0.05)
