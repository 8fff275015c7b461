"""What stands in a run directory beside the stream: manifest, exit record, process identities."""

from __future__ import annotations

import hashlib
import os
import platform
import pwd
import signal
import socket
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from dispatch.facts import HostFacts
from dispatch.redaction import redact
from dispatch.supervisor import open_regular, read_regular, write_atomic
from engine.errors import RunError
from engine.text import clean

MANIFEST = "dispatch.json"
EXIT = "exit.json"
EVENTS = "events.jsonl"
CONFIG = "config.yaml"
CONTRACT = "contract.yaml"
SUMS = "SHA256SUMS"
VERSION = 2
"""Of dispatch.json, and of what its directory's checksums cover."""
SMALL_FILES = (CONFIG, CONTRACT, MANIFEST, EVENTS, "launch.log", "supervisor.jsonl", EXIT)
"""What a run directory holds at its end, in the order of SHA256SUMS."""
FIRST_FILES = (CONFIG, CONTRACT, MANIFEST)
"""What it holds from its beginning on; the others may be missing where the trainer never came to write them."""

MAX_NAME = 200
"""Characters of what an operator calls a run."""
_MAX_JSON_BYTES = 1 << 20
_T = TypeVar("_T")

RunState = Literal["starting", "running", "ended", "lost"]
"""Starting: not launched yet, or being launched. Lost: no exit record and no process, so the outcome is unknown."""


class ProcessIdentity(msgspec.Struct, frozen=True):
    """A process that cannot be mistaken for a later one with the same pid."""

    pid: int
    start_ticks: int
    boot_id: str
    run: str


class Orphan(msgspec.Struct, frozen=True):
    """A process that the trainer left behind, and the signal that was needed to end it."""

    pid: int
    name: str
    signal: int


class EndedStall(msgspec.Struct, frozen=True, kw_only=True):
    """A stall for which the supervisor ended the trainer, as it was configured to."""

    phase: str
    seconds: float


class ExitRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How the trainer ended, as the supervisor saw it: the last thing written to a run directory on its host.

    Exactly one of `exit_code`, `signal` and `error` (the trainer could not be started) is set. Times are Unix seconds.
    """

    v: int
    run: str
    exit_code: int | None
    signal: int | None
    error: str | None = None
    started: float
    ended: float
    seconds: float
    stall: EndedStall | None = None
    wrote: bool = True
    """It wrote to the stream; else an `end` that stands there is that of an earlier attempt."""
    orphans: tuple[Orphan, ...] = ()
    user_seconds: float | None = None
    system_seconds: float | None = None
    max_rss_bytes: int | None = None

    def describe(self) -> str:
        """The end in words: `exit code 3`, `killed by SIGKILL`, `cannot start python3: …`."""
        if self.error is not None:
            return clean(self.error, 500)
        known = {int(each): each.name for each in signal.Signals}
        if self.signal is None:
            how = f"exit code {self.exit_code}"
        else:
            how = f"killed by {known.get(self.signal, f'signal {self.signal}')}"
        if self.stall is None:
            return how
        return f"{how}, ended by its supervisor after {self.stall.seconds:,.0f} s without progress"


class Stall(msgspec.Struct, frozen=True, kw_only=True):
    """No progress for longer than is allowed, as the supervisor sees it."""

    phase: str
    since: float
    """When progress was last seen; Unix seconds of the host's clock."""
    allowed_seconds: float
    process: str = ""
    """State of the trainer's process in the kernel's letters, such as T (suspended) and D (waits for a device)."""
    stacks: bool = False
    """The stacks of all threads were asked for, and stand in launch.log."""


class SupervisorHeartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """The supervisor's last sign of life, and what it saw of the trainer then."""

    run: str
    beat: int
    """Their number; it grows while the supervisor lives."""
    t: float
    phase: str
    waited_seconds: float
    """Since the trainer last made progress."""
    stall: Stall | None = None
    seconds: float | None = None
    """How old this is, by the host's clock; None where that cannot be told."""
    cpu_seconds: float | None = None
    rss_bytes: int | None = None


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the host knows of a run; `unsupervised`: it runs, but nobody will record its end.

    `rebooted`: it is lost because the host was started anew. `heartbeat` is None for a run that has ended.
    """

    state: RunState
    run: str
    trainer: ProcessIdentity | None = None
    supervisor: ProcessIdentity | None = None
    unsupervised: bool = False
    rebooted: bool = False
    heartbeat: SupervisorHeartbeat | None = None
    exit: ExitRecord | None = None


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The machine a run was created on."""

    hostname: str
    platform: str
    machine: str
    python: str
    cpus: int


class Supervise(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor, which reads no YAML, needs to know of the configuration's `supervise`."""

    stall_seconds: float
    kill_after_stall_seconds: float | None = None


class Remote(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run of another host stands there; all paths are absolute."""

    host: str
    """Its name in hosts.yaml or ssh_config."""
    run_dir: str
    python: str
    engine: str
    """The directory of the engine's bundle, named by its content's SHA-256."""
    env: tuple[str, ...] = ()
    """Names of the variables of the console's machine that it was given; never their values."""
    facts: HostFacts | None = None
    """The host as its pre-flight found it."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One start of the trainer. Times are Unix seconds, None where nobody saw them."""

    number: int
    started: float | None = None
    ended: float | None = None
    end: str | None = None
    """How it ended, in words: `exit code 0`, `killed by SIGKILL`; None where nobody saw that."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended: what it said itself, and what its supervisor saw of its process."""

    status: str
    """COMPLETED, FAILED, STOPPED, TIMEOUT or CRASHED, as the stream's last event says; LOST where nobody knows."""
    reason: str
    exit_code: int | None = None
    signal: int | None = None
    steps: int | None = None


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """The last that the engine said of one falsifier."""

    id: str
    verdict: str
    severity: str
    expected: str
    observed: str
    step: int


class Evaluated(msgspec.Struct, frozen=True, kw_only=True):
    """The model that an evaluation is of, as the console found it."""

    model: str
    """Its directory or file: an absolute path of the console's machine, `host:/path`, or a built-in one."""
    run: str | None = None
    """uuid of the training that exported it; None where a directory was named."""
    run_id: str | None = None
    sha256: str | None = None
    """Of its files, see `dispatch.model_files.model_digest`; None of one that is on a host and stands in no list."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """dispatch.json: who, where and with what; completed when the run is sealed. No variable's value, no secret.

    Version 1 had neither what follows `remote` nor weights among its checksums.
    """

    v: int = VERSION
    run: str
    """uuid that every event, process identity and exit record of this run carries."""
    id: str
    """Name of the run's directory."""
    name: str | None = None
    """What the operator calls it."""
    overrides: list[str] = []
    """Checks that the operator overrode when starting it."""
    mode: str
    created: str
    """ISO 8601, UTC."""
    created_unix: float
    host: Host
    versions: dict[str, str | None]
    config_fingerprint: str
    gate_fingerprint: str
    contract_sha256: str
    supervise: Supervise | None = None
    remote: Remote | None = None
    """Where it runs, if not on the machine that this directory is on."""
    operator: str | None = None
    """Name of the user who made it, on the machine that it was made on."""
    ran_as: str | None = None
    """Name of the user that it ran as, on the machine that it ran on."""
    engine_sha256: str | None = None
    """Of the engine's bundle: every file of the engine, by name and contents; see `dispatch.bundle`."""
    ran_on: HostFacts | None = None
    """The machine that it ran on; of a run of another host `remote.facts` until it is sealed."""
    engine_versions: dict[str, str] = {}
    """What the engine ran with, as it said itself."""
    device: str | None = None
    """What it trained on, as it said itself."""
    inputs: dict[str, str] = {}
    """SHA-256 of teacher, student, tokenizer and data, as the engine loaded them; see docs/evidence.md."""
    started: float | None = None
    """Of the first attempt, Unix seconds."""
    ended: float | None = None
    """Of the last attempt, Unix seconds."""
    seconds: float | None = None
    """That it ran, over all attempts."""
    attempts: tuple[Attempt, ...] = ()
    outcome: Outcome | None = None
    """None until the run is sealed."""
    verdicts: tuple[Judged, ...] = ()
    evaluated: Evaluated | None = None
    """Of an evaluation alone."""

    @property
    def where(self) -> str:
        """The host that it runs on, as the operator knows it."""
        return self.remote.host if self.remote else self.host.hostname


def host_facts() -> Host:
    """The facts of this machine; nothing is spawned and nothing imported for them."""
    return Host(
        hostname=socket.gethostname(),
        platform=platform.platform(),
        machine=platform.machine(),
        python=platform.python_version(),
        cpus=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
    )


def versions(names: Iterable[str] = ("kdconsole", "torch", "transformers", "msgspec")) -> dict[str, str | None]:
    """Installed versions read from package metadata, without importing the packages; None where there is none."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def iso_utc(moment: float) -> str:
    """Unix seconds as ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def user_name() -> str:
    """Name of the user that this process runs as, or the number where it has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes dispatch.json at once and durably, mode 0600; what looks like a secret in its texts is taken out."""
    text = msgspec.json.format(msgspec.json.encode(_redacted(manifest)), indent=2)
    write_atomic(directory / MANIFEST, text + b"\n")


def _redacted(manifest: Manifest) -> Manifest:
    """Of the texts that the operator or a trainer wrote."""
    outcome = manifest.outcome
    return msgspec.structs.replace(
        manifest,
        name=None if manifest.name is None else redact(manifest.name),
        overrides=[redact(each) for each in manifest.overrides],
        outcome=None if outcome is None else msgspec.structs.replace(outcome, reason=redact(outcome.reason)),
        verdicts=tuple(
            msgspec.structs.replace(each, expected=redact(each.expected), observed=redact(each.observed))
            for each in manifest.verdicts
        ),
    )


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a run directory, its texts cleaned.

    Raises:
        RunError: missing, too large, or not a manifest of this software.
    """
    path = directory / MANIFEST
    try:
        raw = read_regular(path, _MAX_JSON_BYTES)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}", expected="a run directory") from None
    return decode(Manifest, raw, str(path))


def decode(kind: type[_T], raw: bytes, source: str) -> _T:
    """JSON as a typed record, its texts cleaned for a terminal; unknown fields are passed over.

    Raises:
        RunError: not JSON, nested too deeply, or not of this form; names `source`.
    """
    try:
        # JSON holds control characters only as escapes: plain ASCII without a backslash has nothing to clean.
        if b"\\" not in raw and b"\x7f" not in raw and raw.isascii():
            return msgspec.json.decode(raw, type=kind)
        return msgspec.convert(_cleaned(msgspec.json.decode(raw)), kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, a number too long
        raise RunError(f"{source}: {clean(str(error), 300)}", expected=f"a {kind.__name__}") from None


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_cleaned(each) for each in value]
    if isinstance(value, dict):
        return {clean(name): _cleaned(each) for name, each in value.items()}
    return value


def sha256_file(path: Path) -> str:
    """SHA-256 of a regular file's bytes, hexadecimal."""
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
