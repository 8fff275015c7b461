"""A run directory on this machine, read up to a cursor; whatever lies in it, reading it breaks nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import msgspec

from console.run_state import Reducer, RunState
from dispatch.manifest import CONFIG, CONTRACT, EVENTS, EXIT, MANIFEST, ExitRecord, Manifest, decode
from dispatch.manifest import RunState as HostState
from dispatch.supervisor import Refused
from dispatch.supervisor import status as supervisor_status
from engine.errors import ConfigError, RunError, StreamError
from engine.falsifiers import Contract, parse_contract
from engine.stream import MAX_LINE_BYTES, Event, decode_line
from engine.text import clean
from engine.yaml_io import parse_yaml

READ_BYTES = 1 << 18
"""One piece of a stream: a few dozen milliseconds of folding."""
SMALL_BYTES = 1 << 20
_NOTHING_JUDGED = Contract(version=1, name="none", falsifiers=[])
_SUPERVISOR_BYTES = 4 << 20


@dataclass(frozen=True)
class LoadedRun:
    """What a run directory held when it was read.

    `problem` says what of it could not be read; empty when all is well. `config` has full key paths, such as
    `train.steps`; `config_problem` says why there is none.
    """

    path: Path
    manifest: Manifest | None = None
    state: RunState = field(default_factory=RunState)
    host_state: HostState = "starting"
    exit: ExitRecord | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    config_problem: str = ""
    problem: str = ""

    @property
    def going_on(self) -> bool:
        """Something may still be appended to it."""
        return self.host_state in ("starting", "running")

    @property
    def label(self) -> str:
        """What to call it: the operator's name for it, or its directory's."""
        return (self.manifest.name if self.manifest else None) or clean(self.path.name, 200)


def read_small(path: Path, limit: int = SMALL_BYTES) -> bytes | None:
    """A small regular file's bytes; None where there is none. Never waits, never follows a link.

    Raises:
        RunError: something else is there, or it is larger than `limit` bytes, or it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
                raise RunError(f"{path.name}: no regular file of at most {limit:,} bytes")
            return os.pread(descriptor, limit, 0)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path.name}: {error.strerror}") from None


def read_manifest(path: Path) -> Manifest:
    """The manifest of a run directory, its texts cleaned for a terminal.

    Raises:
        RunError: missing, too large, or not a manifest.
    """
    raw = read_small(path / MANIFEST)
    if raw is None:
        raise RunError(f"no {MANIFEST}", expected="a run directory")
    try:
        manifest = decode(Manifest, raw, MANIFEST)
    except RecursionError:
        raise RunError(f"{MANIFEST}: nested too deeply", expected="a Manifest") from None
    host = msgspec.structs.replace(
        manifest.host, **{name: clean(getattr(manifest.host, name), 200) for name in ("hostname", "platform")}
    )
    return msgspec.structs.replace(
        manifest,
        run=clean(manifest.run, 100),
        id=clean(manifest.id, 200),
        name=None if manifest.name is None else clean(manifest.name, 200),
        overrides=[clean(each, 200) for each in manifest.overrides[:50]],
        mode=clean(manifest.mode, 20),
        created=clean(manifest.created, 40),
        host=host,
        versions={clean(k, 60): None if v is None else clean(v, 60) for k, v in manifest.versions.items()},
    )


def read_exit(path: Path) -> ExitRecord | None:
    """How the trainer ended; None while that is not on record.

    Raises:
        RunError: what is there is no exit record.
    """
    raw = read_small(path / EXIT)
    if raw is None:
        return None
    try:
        return decode(ExitRecord, raw, EXIT)
    except RecursionError:
        raise RunError(f"{EXIT}: nested too deeply", expected="an exit record") from None


def read_contract(path: Path) -> Contract:
    """What a run is judged by.

    Raises:
        RunError, ConfigError: missing, or no contract.
    """
    raw = read_small(path / CONTRACT)
    if raw is None:
        raise RunError(f"no {CONTRACT}")
    try:
        return _parsed_contract(raw.decode())
    except UnicodeDecodeError:
        raise RunError(f"{CONTRACT}: not UTF-8") from None


@lru_cache(maxsize=64)
def _parsed_contract(text: str) -> Contract:
    # A thousand runs share a handful of contracts, and reading YAML takes longer than reading a short stream.
    return parse_contract(text, CONTRACT)


def read_config(path: Path) -> dict[str, object]:
    """The resolved configuration of a run, as full key paths and plain values; texts are cleaned.

    Raises:
        RunError, ConfigError: it cannot be read.
    """
    raw = read_small(path / CONFIG)
    if raw is None:
        raise RunError(f"no {CONFIG}")
    try:
        return dict(_flat("", parse_yaml(raw.decode(), CONFIG)))
    except UnicodeDecodeError:
        raise RunError(f"{CONFIG}: not UTF-8") from None


def _flat(prefix: str, value: object) -> list[tuple[str, object]]:
    if isinstance(value, dict):
        parts = (_flat(f"{prefix}.{clean(str(key), 100)}".lstrip("."), inner) for key, inner in value.items())
        return [pair for part in parts for pair in part]
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return [(prefix, clean(value, 500) if isinstance(value, str) else value)]


def host_state(path: Path) -> HostState:
    """What this machine knows of a run, as the supervisor's `status` tells it; no process is started for it on Linux.

    Raises:
        RunError: its records cannot be read.
    """
    # The supervisor trusts its own files; here they may come from anywhere, and a pipe would never answer.
    for name in (MANIFEST, EXIT, "supervisor.jsonl"):
        read_small(path / name, _SUPERVISOR_BYTES)
    try:
        state: HostState = msgspec.convert(supervisor_status(path)["state"], HostState)
    except (Refused, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"supervisor.jsonl: {clean(str(error), 200)}") from None
    return state


class StreamFold:
    """Folds a stream up to a cursor, which always stands at the beginning of a line.

    Args:
        path: the run directory.
        contract: what the run is judged by.
        run: uuid that every event must carry; None takes the first event's.
    """

    def __init__(self, path: Path, contract: Contract, run: str | None) -> None:
        self.offset = 0
        self.problem = ""
        """Why nothing more can be read; what stood before that is in the state."""
        self._path, self._run, self._seq = path / EVENTS, run, -1
        self._reducer = Reducer(contract)

    @property
    def state(self) -> RunState:
        """The run so far."""
        return self._reducer.state

    def advance(self) -> bool:
        """Folds the next piece; False when there is nothing more to be had now."""
        if self.problem:
            return False
        try:
            data = self._read()
            events, more = self._take(data)
        except StreamError as error:
            self.problem = str(error)
            return False
        try:
            self._reducer.feed(events)
        except ArithmeticError as error:
            self.problem = f"{EVENTS}: numbers that nothing can be computed from: {error}"
        return more and not self.problem

    def _read(self) -> bytes:
        overlap = 1 if self.offset else 0
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise StreamError(f"{EVENTS}: no regular file")
                data = os.pread(descriptor, READ_BYTES + overlap, self.offset - overlap)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            if self.offset:
                raise StreamError(f"{EVENTS}: is gone") from None
            return b""
        except OSError as error:
            raise StreamError(f"{EVENTS}: {error.strerror}") from None
        # One byte before the cursor tells whether the file was cut or replaced below it.
        if overlap and data[:1] != b"\n":
            raise StreamError(f"{EVENTS}: was cut or replaced while it was read")
        return data[overlap:]

    def _take(self, data: bytes) -> tuple[list[Event], bool]:
        *whole, torn = data.split(b"\n")
        events: list[Event] = []
        for line in whole:
            try:
                event = self._decode(line)
            except StreamError as error:
                self.problem = f"{EVENTS}, byte {self.offset:,}: {error}"
                return events, False
            self.offset += len(line) + 1
            if event is not None:
                events.append(event)
        if len(torn) > MAX_LINE_BYTES:
            self.problem = f"{EVENTS}, byte {self.offset:,}: a line without an end"
        return events, len(data) == READ_BYTES and bool(whole)

    def _decode(self, line: bytes) -> Event | None:
        if len(line) > MAX_LINE_BYTES:
            raise StreamError(f"a line of {len(line):,} bytes", expected=f"at most {MAX_LINE_BYTES:,}")
        event = decode_line(line)
        if event is None:
            return None
        self._run = self._run or event.run
        if event.run != self._run:
            raise StreamError("an event of another run", expected=self._run)
        if event.seq <= self._seq:
            raise StreamError(f"seq {event.seq} after seq {self._seq}", expected="a growing seq")
        self._seq = event.seq
        return event


class RunReader:
    """Reads one run directory, whole at first and then what was appended.

    Args:
        path: the run directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest | None = None
        self._problem = ""
        self._fold: StreamFold | None = None
        self._config: dict[str, object] | None = None

    @property
    def state(self) -> RunState:
        """The run, as far as its stream was read."""
        return self._fold.state if self._fold else RunState()

    def advance(self) -> bool:
        """Reads the next piece of the stream; False when there is nothing more to be had now."""
        if self._fold is None:
            self._fold = self._open()
        return self._fold.advance()

    def _open(self) -> StreamFold:
        contract = _NOTHING_JUDGED
        try:
            self.manifest = read_manifest(self.path)
            contract = read_contract(self.path)
        except (RunError, ConfigError) as error:
            self._problem = str(error)
        return StreamFold(self.path, contract, self.manifest.run if self.manifest else None)

    def loaded(self) -> LoadedRun:
        """The run as it was read so far, with what stands beside the stream as it is now."""
        problem = self._problem or (self._fold.problem if self._fold else "")
        record: ExitRecord | None = None
        config: dict[str, object] = self._config or {}
        config_problem = ""
        state: HostState = "lost"
        try:
            if self._config is None:
                self._config = config = read_config(self.path)
        except (RunError, ConfigError) as error:
            config_problem = clean(str(error), 500)
        try:
            record = read_exit(self.path)
            state = "ended" if record is not None else host_state(self.path)
        except RunError as error:
            problem = problem or str(error)
        if state in ("ended", "lost"):
            # Its last lines may have come between the last look at the stream and the one at its end.
            while self.advance():
                pass
            problem = problem or (self._fold.problem if self._fold else "")
        return LoadedRun(
            path=self.path,
            manifest=self.manifest,
            state=self.state,
            host_state=state,
            exit=record,
            config=config,
            config_problem=config_problem,
            problem=clean(problem, 500),
        )

    def read(self, stopped: Callable[[], bool] = lambda: False) -> LoadedRun:
        """Reads on to the end of what is there, or until `stopped`."""
        while self.advance() and not stopped():
            pass
        return self.loaded()


def load_run(path: Path) -> LoadedRun:
    """A run directory, read whole; what cannot be read of it is said in `problem`."""
    return RunReader(path).read()
