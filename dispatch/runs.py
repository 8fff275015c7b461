"""Run directories and what is done with them: create, launch, ask, stop, find.

Launching, asking and stopping go through a transport and the supervisor on the host, the same way here and elsewhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

import msgspec

from dispatch.manifest import (
    CONFIG,
    CONTRACT,
    MANIFEST,
    MAX_NAME,
    Evaluated,
    Manifest,
    Remote,
    RunStatus,
    Supervise,
    decode,
    host_facts,
    iso_utc,
    read_manifest,
    user_name,
    versions,
    write_manifest,
)
from dispatch.supervisor import (
    FREE_SECONDS,
    KILL_SECONDS,
    SMI_SECONDS,
    START_SECONDS,
    STOP_GRACE_SECONDS,
    Refused,
    write_atomic,
)
from dispatch.supervisor import status as supervisor_status
from dispatch.transport import Completed, LocalTransport, Transport
from engine.config import RunConfig, fingerprint, gate_fingerprint, to_yaml
from engine.errors import RunError
from engine.problems import PROBLEMS
from engine.text import clean

SUPERVISOR = ("-m", "dispatch.supervisor")
"""How Python is told to run the supervisor: as a module, or as a copied file's path where this package is missing."""

_STILL_RUNNING = 4
_SLACK_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class RunDir:
    """A run directory on this machine."""

    path: Path
    manifest: Manifest

    @property
    def id(self) -> str:
        """The run's name in its evidence directory."""
        return self.manifest.id

    @property
    def run(self) -> str:
        """The run's uuid."""
        return self.manifest.run


class Launch(RunStatus, frozen=True, kw_only=True):
    """What became of a start; a second start of the same run starts nothing and says so."""

    result: Literal["started", "already_running", "already_ended"]


class Stop(RunStatus, frozen=True, kw_only=True):
    """What became of a stop. `stopped`: it is gone. `killed`: it took SIGKILL.

    `gpu` is the UUID of the GPU that the run was given, of several all of them with commas, None where it was given
    none. `gpu_free`: nobody of the run has their locks or is listed on one any more; None: it had none, or nobody can
    tell, and `gpu_problem` says why.
    """

    result: Literal["stopped", "already_ended", "still_running"]
    killed: bool = False
    gpu: str | None = None
    gpu_free: bool | None = None
    gpu_problem: str = ""

    @property
    def cancelled(self) -> bool:
        """The end was seen, and the GPU, if it had one, is free: nothing less is called CANCELLED."""
        return self.state == "ended" and (self.gpu is None or self.gpu_free is True)

    def describe(self) -> str:
        """What became of it, in words: `CANCELLED: exit code 130; the GPU is free`."""
        if self.result == "still_running":
            return "still running; what cannot be interrupted, such as loading or compiling, ends first"
        how = "its end was not recorded" if self.exit is None else self.exit.describe()
        if self.killed:
            how += ", after it did not heed SIGTERM in time"
        if self.gpu is not None:
            gpu = "the GPUs are" if "," in self.gpu else "the GPU is"
            told = {True: f"{gpu} free", False: f"{gpu} NOT free", None: f"whether {gpu} free is unknown"}
            how += f"; {told[self.gpu_free]}" + (f": {self.gpu_problem}" if self.gpu_problem else "")
        if self.result == "already_ended":
            return f"had ended already: {how}"
        return f"{'CANCELLED' if self.cancelled else 'stopped'}: {how}"


def create_run(
    config: RunConfig,
    *,
    evidence: Path,
    contract_text: str,
    name: str | None = None,
    overrides: Sequence[str] = (),
    remote: Remote | None = None,
    evaluated: Evaluated | None = None,
    problems: bytes | None = None,
) -> RunDir:
    """Makes the directory of a new run, durable and complete but for the run itself.

    Args:
        config: everything that decides the result; written resolved as config.yaml.
        evidence: where run directories live; made if missing.
        contract_text: the contract's YAML, kept with the run as contract.yaml.
        name: what the operator calls the run; cleaned, and cut to MAX_NAME characters.
        overrides: what was started against a check, by name.
        remote: where it is to run, if not here; its `run_dir` is the directory below which it is to stand there.
        evaluated: of an evaluation, the model that it is of.
        problems: of an evaluation on problems, all of them, kept with the run as problems.jsonl.

    Raises:
        RunError: `evidence` is not a directory that can be written.
    """
    from dispatch.bundle import engine_bundle
    from dispatch.local_facts import local_facts

    evidence = Path(os.path.abspath(evidence))
    if evidence.exists() and not evidence.is_dir():
        raise RunError(f"{evidence}: is a file", expected="a directory", do="choose one with --evidence DIR")
    now = time.time()
    try:
        evidence.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = _make_directory(evidence, f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{config.mode}")
        manifest = Manifest(
            run=str(uuid.uuid4()),
            id=path.name,
            name=None if name is None else clean(name, MAX_NAME),
            overrides=list(overrides),
            mode=config.mode,
            created=iso_utc(now),
            created_unix=now,
            host=host_facts(),
            operator=user_name(),
            ran_as=user_name() if remote is None else None,
            ran_on=local_facts() if remote is None else remote.facts,
            engine_sha256=engine_bundle().sha256 if remote is None else PurePath(remote.engine).name,
            versions=versions(),
            config_fingerprint=fingerprint(config),
            gate_fingerprint=gate_fingerprint(config),
            contract_sha256=hashlib.sha256(contract_text.encode()).hexdigest(),
            supervise=Supervise(
                stall_seconds=config.supervise.stall_seconds,
                kill_after_stall_seconds=config.supervise.kill_after_stall_seconds,
            ),
            remote=None if remote is None else msgspec.structs.replace(remote, run_dir=f"{remote.run_dir}/{path.name}"),
            evaluated=evaluated,
        )
        write_atomic(path / CONFIG, to_yaml(config).encode())
        write_atomic(path / CONTRACT, contract_text.encode())
        if problems is not None:
            write_atomic(path / PROBLEMS, problems)
        # The manifest comes last: a directory that has one is whole.
        write_manifest(path, manifest)
        _sync_directory(evidence)
    except OSError as error:
        raise RunError(
            f"{evidence}: {error.strerror}",
            expected="a directory that can be written",
            do="choose one with --evidence DIR",
        ) from None
    return RunDir(path, manifest)


def _make_directory(evidence: Path, stem: str) -> Path:
    while True:
        path = evidence / f"{stem}-{secrets.token_hex(3)}"
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            if not evidence.is_dir():
                raise
            continue
        return path


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def launch(
    transport: Transport,
    run_dir: str | PurePath,
    *,
    python: str = sys.executable,
    command: Sequence[str] = (),
    again: bool = False,
    gpu: bool = False,
    devices: int = 1,
    environment: Mapping[str, str] | None = None,
    supervisor: Sequence[str] = SUPERVISOR,
) -> Launch:
    """Starts a run, detached; returns once its trainer is on record. Safe to repeat: one run starts once.

    Args:
        transport: reaches the host.
        run_dir: the run's directory on the host, absolute.
        python: the host's Python that runs the supervisor and the engine.
        command: another trainer than `python -P -m engine RUN_DIR`.
        again: another attempt of a run that has ended or was lost.
        gpu: give it the host's GPU, and refuse to start while another run has it.
        devices: how many GPUs it is given, all or none.
        environment: variables for the trainer beside those that the supervisor passes on; sent on standard input.
        supervisor: what `python -P` is given to run the supervisor.

    Raises:
        RunError: it could not be started, and why.
        TransportError: the host could not be asked; whether the run started is unknown.
    """
    options = [
        *(["--again"] if again else []),
        *(["--gpu"] if gpu else []),
        *(["--devices", str(devices)] if gpu and devices > 1 else []),
        *(["--environment"] if environment else []),
    ]
    argv = [python, "-P", *supervisor, "run", *options, str(run_dir), *(["--", *command] if command else [])]
    timeout = 2 * START_SECONDS + _SLACK_SECONDS
    variables = json.dumps(dict(environment)).encode() if environment else b""
    done = await transport.run(argv, stdin=variables, timeout=timeout)
    answer = decode(Launch, _stdout(done, transport, "cannot start the run"), f"{transport.host}: supervisor")
    if answer.exit is not None and answer.exit.error is not None:
        raise RunError(f"{transport.host}: {answer.exit.describe()}", do="start a new run")
    return answer


async def status(
    transport: Transport,
    run_dir: str | PurePath,
    *,
    python: str = sys.executable,
    supervisor: Sequence[str] = SUPERVISOR,
) -> RunStatus:
    """What the host knows of a run.

    Raises:
        RunError: it is no run directory.
        TransportError: the host could not be asked.
    """
    if isinstance(transport, LocalTransport) and tuple(supervisor) == SUPERVISOR:
        # The same code without a process of its own, of which there would be one every few seconds.
        try:
            told = await asyncio.to_thread(supervisor_status, Path(run_dir))
        except (Refused, OSError) as error:
            raise RunError(f"{transport.host}: cannot tell the run's state: {clean(str(error), 500)}") from None
        return decode(RunStatus, json.dumps(told).encode(), f"{transport.host}: supervisor")
    done = await transport.run([python, "-P", *supervisor, "status", str(run_dir)])
    return decode(RunStatus, _stdout(done, transport, "cannot tell the run's state"), f"{transport.host}: supervisor")


async def stop(
    transport: Transport,
    run_dir: str | PurePath,
    *,
    grace: float = STOP_GRACE_SECONDS,
    kill: bool = False,
    python: str = sys.executable,
    supervisor: Sequence[str] = SUPERVISOR,
) -> Stop:
    """Asks the trainer to stop and waits for the end.

    A trainer that was asked before is only waited for, so this may be repeated; without a grace it is told to stop at
    once, without a checkpoint.

    Args:
        transport: reaches the host.
        run_dir: the run's directory on the host, absolute.
        grace: seconds to wait for the end.
        kill: SIGKILL to the trainer's process group after the grace.
        python: the host's Python.
        supervisor: what `python -P` is given to run the supervisor.

    Raises:
        RunError: there is nothing to stop.
        TransportError: the host could not be asked; whether the run stops is unknown.
    """
    options = ["--grace", str(grace), *(["--kill"] if kill else [])]
    timeout = grace + (KILL_SECONDS if kill else 0.0) + FREE_SECONDS + SMI_SECONDS + _SLACK_SECONDS
    done = await transport.run([python, "-P", *supervisor, "stop", str(run_dir), *options], timeout=timeout)
    output = done.stdout if done.rc == _STILL_RUNNING else _stdout(done, transport, "cannot stop the run")
    return decode(Stop, output, f"{transport.host}: supervisor")


def _stdout(done: Completed, transport: Transport, what: str) -> bytes:
    if done.rc == 0:
        return done.stdout
    told = done.stderr.decode(errors="replace").strip().splitlines()
    reason = told[-1].removeprefix("supervisor: ") if told else f"exit code {done.rc}"
    raise RunError(f"{transport.host}: {what}: {clean(reason, 500)}")


def open_run(path: Path) -> RunDir:
    """A run directory by its path.

    Raises:
        RunError: it has no manifest of this software.
    """
    return RunDir(path, read_manifest(path))


def find_runs(evidence: Path) -> list[RunDir]:
    """The runs in an evidence directory, newest first; whatever else lies there is passed over."""
    try:
        entries = list(evidence.iterdir())
    except OSError:
        return []
    found = []
    for path in entries:
        try:
            found.append(open_run(path))
        except RunError:
            continue
    return sorted(found, key=lambda each: (each.manifest.created_unix, each.id), reverse=True)


def resolve_run(evidence: Path, name: str) -> RunDir:
    """The run that an operator means: a directory's path, an id, or the unique beginning of one.

    Raises:
        RunError: there is none, or more than one.
    """
    path = Path(name)
    if os.sep in name and not path.is_dir():
        raise RunError(f"run {clean(repr(name), 200)}: no such directory", expected="an id, its beginning or a path")
    if (path / MANIFEST).is_file() or os.sep in name:
        return open_run(path)
    runs = find_runs(evidence)
    exact = [each for each in runs if each.path.name == name]
    matching = exact or [each for each in runs if name and each.path.name.startswith(name)]
    if len(matching) == 1:
        return matching[0]
    shown = clean(repr(name), 200)
    if matching:
        several = ", ".join(each.path.name for each in matching[:5]) + (", …" if len(matching) > 5 else "")
        raise RunError(f"run {shown}: {len(matching)} runs begin so: {several}", do="give more of the name")
    there = f"the newest there is {runs[0].path.name}" if runs else "there is none there yet"
    raise RunError(f"run {shown}: no such run in {evidence}", expected="an id, its beginning or a path", do=there)
