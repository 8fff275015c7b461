"""Where a run is, and how it is started, asked and stopped there: the same calls for this machine and for any other."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING

from dispatch import runs
from dispatch.follower import Follower
from dispatch.manifest import EVENTS, EXIT, FIRST_FILES, SUMS, RunStatus
from dispatch.mirror import MirroredTransport
from dispatch.runs import Launch, RunDir, Stop
from dispatch.supervisor import MAX_RECORD_BYTES, STOP_GRACE_SECONDS, write_atomic
from dispatch.transport import LocalTransport, MissingFile, Transport
from engine.errors import RunError

if TYPE_CHECKING:
    from dispatch.hosts import Host

PIECE_BYTES = 1 << 20
ANOTHER_SECONDS = 60.0
"""So long another console that is keeping a run's stream is waited for."""


@dataclass(frozen=True)
class Place:
    """A run's directory on its host, and what runs it there."""

    transport: Transport
    run_dir: str
    """On the host, absolute."""
    python: str = sys.executable
    supervisor: tuple[str, ...] = runs.SUPERVISOR
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables for the trainer beside those that the supervisor passes on."""
    command: tuple[str, ...] = ()
    """Another trainer than the supervisor's own Python with the engine."""
    direct: Transport | None = None
    """Reaches the host without any copy here, where `transport` has one."""

    @property
    def local(self) -> bool:
        """It is this machine."""
        return isinstance(self.transport, LocalTransport)

    def close(self) -> None:
        """Lets go of the copy of the stream, if there is one."""
        if isinstance(self.transport, MirroredTransport):
            self.transport.close()

    async def launch(self, *, gpu: bool, devices: int = 1, again: bool = False) -> Launch:
        """See `runs.launch`."""
        return await runs.launch(
            self.transport,
            self.run_dir,
            python=self.python,
            supervisor=self.supervisor,
            command=self.command,
            environment=self.environment,
            gpu=gpu,
            devices=devices,
            again=again,
        )

    async def status(self) -> RunStatus:
        """See `runs.status`."""
        return await runs.status(self.transport, self.run_dir, python=self.python, supervisor=self.supervisor)

    async def stop(self, *, grace: float = STOP_GRACE_SECONDS, kill: bool = False) -> Stop:
        """See `runs.stop`."""
        return await runs.stop(
            self.transport, self.run_dir, grace=grace, kill=kill, python=self.python, supervisor=self.supervisor
        )

    def follower(self, run: str) -> Follower:
        """Follows the run of this uuid from its beginning."""
        return Follower(self.transport, self.run_dir, run, python=self.python, supervisor=self.supervisor)


class Reach:
    """The ways to all hosts of one process: one connection a host, made when it is first needed.

    Args:
        environ: where the hosts' file and SSH's own things are found, and what the hosts' `env` may pass on.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.environ = environ
        self._transports: dict[str, Transport] = {}

    def transport(self, name: str) -> Transport:
        """The way to a host by its name.

        Raises:
            ConfigError: hosts.yaml is wrong, or this can be no host's name.
        """
        if name not in self._transports:
            from dispatch.ssh import SSHTransport

            self._transports[name] = SSHTransport(self.host(name), self.environ)
        return self._transports[name]

    def place(self, run_dir: RunDir, *, keep: bool = False, loss: Callable[[str], object] | None = None) -> Place:
        """Where a run is; with `keep`, the stream of one on another host is kept here as it is read.

        With `keep`, one that was sealed is here: its host need not be there any more. `loss` accepts that the host lost
        the end of its stream; see `MirroredTransport`.

        Raises:
            ConfigError: see `transport`.
            RunError: the copy of its stream cannot be opened.
        """
        remote = run_dir.manifest.remote
        if remote is None or (keep and all((run_dir.path / name).is_file() for name in (EXIT, SUMS))):
            return Place(LocalTransport(), str(run_dir.path))
        direct = self.transport(remote.host)
        passed = self.passed_on(remote.host)
        if not keep:
            return place_there(direct, remote.run_dir, remote.python, remote.engine, passed)
        kept = MirroredTransport(direct, remote.run_dir, run_dir.path, python=remote.python, loss=loss)
        place = place_there(kept, remote.run_dir, remote.python, remote.engine, passed)
        return replace(place, direct=direct)

    def host(self, name: str) -> Host:
        """What hosts.yaml says of a host.

        Raises:
            ConfigError: see `transport`.
        """
        from dispatch.hosts import load_hosts

        return load_hosts(self.environ).named(name)

    def passed_on(self, name: str) -> dict[str, str]:
        """The variables of this process that a host's `env` names."""
        host = self.host(name)
        passed = {variable: self.environ[variable] for variable in host.env if variable in self.environ}
        return passed | ({} if host.gpu is None else {"CUDA_VISIBLE_DEVICES": str(host.gpu)})

    async def __aenter__(self) -> Reach:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all connections; what runs on the hosts goes on."""
        for transport in self._transports.values():
            close = getattr(transport, "close", None)
            if close is not None:
                await close()
        self._transports.clear()


def place_there(
    transport: Transport, run_dir: str, python: str, engine: str, environment: Mapping[str, str] | None = None
) -> Place:
    """A run's place on a host that has an engine bundle instead of this installation.

    Args:
        transport: reaches the host.
        run_dir: the run's directory there.
        python: the Python there that has what the engine needs.
        engine: the bundle's directory there.
        environment: more variables for the trainer.
    """
    supervisor = str(PurePosixPath(engine, "dispatch", "supervisor.py"))
    command: Sequence[str] = (python, "-P", "-m", "engine", run_dir)
    return Place(
        transport,
        run_dir,
        python,
        (supervisor,),
        {**(environment or {}), "PYTHONPATH": engine, "PYTHONDONTWRITEBYTECODE": "1"},
        tuple(command),
    )


async def collect(place: Place, run_dir: RunDir) -> None:
    """Brings the small files of an ended run here; the exit record last, for it says that the rest is there.

    The stream is not among them: whoever follows the run has it; see `catch_up`.

    Raises:
        TransportError: the host cannot be reached.
        RunError: a file cannot be written here.
    """
    if place.local:
        return
    from dispatch.getting import get_tree
    from dispatch.sums import is_passing, is_weight

    kept = (*FIRST_FILES, EVENTS, EXIT, SUMS)

    def want(name: str) -> bool:
        return name not in kept and not is_weight(name) and not is_passing(name)

    await get_tree(place.direct or place.transport, place.run_dir, run_dir.path, want=want, python=place.python)
    try:
        record = await place.transport.read(f"{place.run_dir}/{EXIT}", 0, MAX_RECORD_BYTES)
    except MissingFile:
        return
    path = run_dir.path / EXIT
    try:
        write_atomic(path, record)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}", expected="room to keep what the run left") from None


async def catch_up(place: Place, run_dir: RunDir) -> None:
    """Brings the rest of an ended run's stream here, as far as it has whole lines.

    Raises:
        TransportError: the host cannot be reached.
        RunError: it cannot be written here, or another console is writing it.
    """
    if place.local:
        return None
    deadline = time.monotonic() + ANOTHER_SECONDS
    mine = place.transport if isinstance(place.transport, MirroredTransport) else None
    while mine is None or not mine.keeping:
        if mine is not None and mine.problem:
            raise RunError(f"{run_dir.path}: {mine.problem}", do="free some space, then attach to the run")
        with MirroredTransport(
            place.direct or place.transport, place.run_dir, run_dir.path, python=place.python
        ) as other:
            if other.keeping:
                return await _to_the_end(other, place.run_dir, run_dir)
            mine = other
        if time.monotonic() > deadline:
            raise RunError(f"{run_dir.path}: another console is following this run", do="attach again when it is done")
        await asyncio.sleep(0.1)
    return await _to_the_end(mine, place.run_dir, run_dir)


async def _to_the_end(mirror: MirroredTransport, there: str, run_dir: RunDir) -> None:
    while True:
        length = mirror.length
        try:
            await mirror.read(f"{there}/{EVENTS}", max(0, length - 1), PIECE_BYTES)
        except MissingFile:
            return
        if mirror.problem:
            raise RunError(f"{run_dir.path}: {mirror.problem}", do="free some space, then attach to the run")
        if mirror.length == length:
            return
