"""What stands in a run directory beside the stream: manifest, exit record, process identities, checksums."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import signal
import socket
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import msgspec

from dispatch.supervisor import open_regular, read_regular, write_atomic
from engine.errors import RunError
from engine.text import clean

MANIFEST = "dispatch.json"
EXIT = "exit.json"
EVENTS = "events.jsonl"
CONFIG = "config.yaml"
CONTRACT = "contract.yaml"
SUMS = "SHA256SUMS"
SMALL_FILES = (CONFIG, CONTRACT, MANIFEST, EVENTS, "launch.log", "supervisor.jsonl", EXIT)
"""What a run directory holds at its end, in the order of SHA256SUMS."""
FIRST_FILES = (CONFIG, CONTRACT, MANIFEST)
"""What it holds from its beginning on; the others may be missing where the trainer never came to write them."""

MAX_NAME = 200
"""Characters of what an operator calls a run."""
_MAX_JSON_BYTES = 1 << 20
_MAX_SUMS_BYTES = 1 << 20
_SUM_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
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
    orphans: tuple[Orphan, ...] = ()
    user_seconds: float | None = None
    system_seconds: float | None = None
    max_rss_bytes: int | None = None

    def describe(self) -> str:
        """The end in words: `exit code 3`, `killed by SIGKILL`, `cannot start python3: …`."""
        if self.error is not None:
            return clean(self.error, 500)
        if self.signal is None:
            return f"exit code {self.exit_code}"
        known = {int(each): each.name for each in signal.Signals}
        return f"killed by {known.get(self.signal, f'signal {self.signal}')}"


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the host knows of a run; `unsupervised`: it runs, but nobody will record its end."""

    state: RunState
    run: str
    trainer: ProcessIdentity | None = None
    supervisor: ProcessIdentity | None = None
    unsupervised: bool = False
    exit: ExitRecord | None = None


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The machine a run was created on."""

    hostname: str
    platform: str
    machine: str
    python: str
    cpus: int


class Remote(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run of another host stands there; all paths are absolute."""

    host: str
    """Its name in hosts.yaml or ssh_config."""
    run_dir: str
    python: str
    engine: str
    """The directory of the engine's bundle, named by its content's SHA-256."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """dispatch.json: who, where and with what. Never an environment variable, never a secret."""

    v: int = 1
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
    remote: Remote | None = None
    """Where it runs, if not on the machine that this directory is on."""

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


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes dispatch.json at once and durably, mode 0600."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    write_atomic(directory / MANIFEST, text + b"\n")


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


def write_sums(directory: Path, names: Iterable[str] = SMALL_FILES) -> Path:
    """Writes SHA256SUMS over those of the named files that exist, in sha256sum's own format.

    Returns:
        The file; `sha256sum -c SHA256SUMS` run in the directory checks it.
    """
    lines = [f"{sha256_file(directory / name)}  {name}\n" for name in names if (directory / name).is_file()]
    write_atomic(directory / SUMS, "".join(lines).encode())
    return directory / SUMS


def verify_sums(directory: Path) -> tuple[str, ...]:
    """Checks a directory against its SHA256SUMS.

    Every file that `write_sums` would have listed has to be: a list that was emptied or shortened proves nothing.

    Returns:
        One line for each file that is missing, changed, not listed or not allowed; empty when everything agrees.

    Raises:
        RunError: there is no SHA256SUMS, or it cannot be read.
    """
    path = directory / SUMS
    try:
        lines = read_regular(path, _MAX_SUMS_BYTES).decode().splitlines()
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}", expected="the checksums of an ended run") from None
    except UnicodeDecodeError:
        raise RunError(f"{path}: not UTF-8", expected="the checksums of an ended run") from None
    problems = []
    listed = set()
    for number, line in enumerate(lines, 1):
        match = _SUM_LINE.fullmatch(line)
        if match is None:
            problems.append(f"{SUMS}: line {number} is not a checksum")
            continue
        wanted, name = match.groups()
        listed.add(str(PurePosixPath(name)))
        problem = _difference(directory, name, wanted)
        if problem is not None:
            problems.append(f"{clean(name, 200)}: {problem}")
    for name in SMALL_FILES:
        if name in listed:
            continue
        if os.path.lexists(directory / name):
            problems.append(f"{name}: not listed in {SUMS}")
        elif name in FIRST_FILES:
            problems.append(f"{name}: missing, and not listed in {SUMS}")
    return tuple(problems)


def _difference(directory: Path, name: str, wanted: str) -> str | None:
    """What is wrong with one file of the list. The list may come from elsewhere: nothing is read outside."""
    file, outside = directory / name, "not a regular file of this directory"
    try:
        if Path(name).is_absolute() or ".." in Path(name).parts or file.is_symlink():
            return outside
        if not file.exists():
            return "missing"
        if not file.is_file() or not file.resolve().is_relative_to(directory.resolve()):
            return outside
        return None if sha256_file(file) == wanted else "changed"
    except (OSError, ValueError) as error:  # a NUL in the name, a name that is too long, no permission
        return f"cannot be read: {clean(str(getattr(error, 'strerror', None) or error), 100)}"


def sha256_file(path: Path) -> str:
    """SHA-256 of a regular file's bytes, hexadecimal."""
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
