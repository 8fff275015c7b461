"""A run directory on this machine, its stream read up to a cursor; whatever lies in it, reading breaks nothing."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from console.about import About, about
from console.log_fold import LogFold
from console.run_files import host_state, read_config, read_contract, read_exit, read_manifest
from console.run_state import STREAM, UNDER_NO_CONTRACT, Reducer, RunState, Source
from dispatch.evidence import Evidence, Kind, open_evidence
from dispatch.manifest import CONTRACT, EVENTS, EXIT, MANIFEST, ExitRecord, Manifest
from dispatch.manifest import RunState as HostState
from engine.errors import ConfigError, RunError, StreamError
from engine.falsifiers import Contract, builtin_contract, parse_contract
from engine.stream import MAX_LINE_BYTES, Eval, Event, Progress, Run, Step, decode_line
from engine.stream_reader import StreamReader
from engine.text import clean

READ_BYTES = 1 << 18
"""One piece of a stream: a few dozen milliseconds of folding."""
TAIL_BYTES = 1 << 16
HEAD_BYTES = 1 << 14
"""Room for the first events; the `run` event, which says of how many steps, is one of them."""
_NOTHING_JUDGED = Contract(version=1, name="none", falsifiers=[])

_OF_A_MODE = ("smoke", "train", "prepare")
"""Modes of which one contract ships; that of an evaluation depends on its suite."""


@dataclass(frozen=True)
class LoadedRun:
    """What a run directory, or a log, held when it was read.

    `problem` says what of it could not be read; empty when all is well. `remarks` say what is missing or odd, a
    sentence each. `config` has full key paths, such as `train.steps`; `config_problem` says why there is none.
    """

    path: Path
    kind: Kind = Kind.RUN
    evidence: Evidence | None = None
    """Of a kind that is no run directory of ours: its files, and the predecessor's manifest."""
    about: About = field(default_factory=About)
    remarks: tuple[str, ...] = ()
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
        return self.about.name or clean(self.path.name, 200)


def read_ends(path: Path) -> list[Event]:
    """The `run` event and the last step, progress, evaluation and end near a stream's two ends, in their order.

    Raises:
        StreamError: it is no stream; one that is not there yet has no events.
    """
    try:
        descriptor = os.open(path / EVENTS, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise StreamError(f"{EVENTS}: no regular file")
            head = os.pread(descriptor, HEAD_BYTES, 0)
            tail = os.pread(descriptor, TAIL_BYTES, max(0, found.st_size - TAIL_BYTES))
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StreamError(f"{EVENTS}: {error.strerror}") from None
    events: list[Event] = []
    first = head.split(b"\n")[:-1]
    if first:
        decode_line(first[0])  # A file that is no stream says so here.
    events += [each for line in first if b'"run",' in line[:40] and isinstance(each := decode_line(line), Run)][-1:]
    lines = tail.split(b"\n")[:-1]
    if found.st_size > TAIL_BYTES:
        del lines[:1]
    return events + _last_of_each(lines)


def _last_of_each(lines: Sequence[bytes]) -> list[Event]:
    """The last step, progress and evaluation, and the very last event, searched from the end."""
    wanted: dict[type[Event], bytes] = {Step: b'"step"', Eval: b'"eval"', Progress: b'"progress"'}
    found: list[Event] = []
    for line in reversed(lines):
        if found and not any(tag in line for tag in wanted.values()):
            continue
        event = decode_line(line)
        if event is None:
            continue
        if not found or type(event) in wanted:
            found.append(event)
            wanted.pop(type(event), None)
        if not wanted:
            break
    return found[::-1]


class Fold(Protocol):
    """A source of events, folded as far as it was read."""

    offset: int
    """Bytes that were read."""
    problem: str

    @property
    def state(self) -> RunState:
        """The run so far."""
        ...

    def advance(self) -> bool:
        """Folds the next piece; False when there is nothing more to be had now."""
        ...


class StreamFold:
    """Folds a stream up to a cursor, which always stands at the beginning of a line.

    Args:
        path: the run directory.
        contract: what the run is judged by.
        run: uuid that every event must carry; None takes the first event's.
        source: what its lines can tell.
    """

    def __init__(self, path: Path, contract: Contract, run: str | None, source: Source = STREAM) -> None:
        self.offset = 0
        self.problem = ""
        """Why nothing more can be read; what stood before that is in the state."""
        self._path = path / EVENTS
        self._lines = StreamReader(run)
        self._reducer = Reducer(contract, source)

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
        whole = data.rfind(b"\n") + 1
        piece = self._lines.read(data[:whole])
        self.offset += piece.size
        if piece.error is not None:
            self.problem = f"{EVENTS}, byte {self.offset:,}: {piece.error}"
        elif len(data) - whole > MAX_LINE_BYTES:
            self.problem = f"{EVENTS}, byte {self.offset:,}: a line without an end"
        return piece.events, len(data) == READ_BYTES and whole > 0


class RunReader:
    """Reads one run, whole at first and then what was appended.

    Args:
        path: a directory of any kind, or a log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest | None = None
        self.evidence: Evidence | None = None
        self._problem = ""
        self._remarks: list[str] = []
        self._fold: Fold | None = None
        self._config: dict[str, object] | None = None

    @property
    def state(self) -> RunState:
        """The run, as far as it was read."""
        return self._fold.state if self._fold else RunState()

    @property
    def offset(self) -> int:
        """Bytes of its stream or log that were read."""
        return self._fold.offset if self._fold else 0

    @property
    def total(self) -> int:
        """Bytes of its stream or log, as it is now."""
        try:
            return self._read_from().stat().st_size
        except OSError:
            return 0

    def _read_from(self) -> Path:
        logs = self.evidence.logs if self.evidence else ()
        return logs[0] if logs else self.path / EVENTS

    def advance(self) -> bool:
        """Reads the next piece; False when there is nothing more to be had now."""
        if self._fold is None:
            self._fold = self._open()
        return self._fold.advance()

    def _open(self) -> Fold:
        try:
            self.evidence = found = open_evidence(self.path)
        except RunError as error:
            # Who shows it names the path.
            self._problem = str(error).removeprefix(f"{clean(os.path.abspath(self.path), 500)}: ")
            return StreamFold(self.path, _NOTHING_JUDGED, None)
        self._remarks += found.remarks
        if found.kind is Kind.RUN or (found.kind is Kind.MANIFEST and found.old is None):
            return self._open_run()
        if found.old is None and os.path.lexists(self.path / MANIFEST):  # ours, and its stream is lost
            self._read_manifest()
        return LogFold(found)

    def _open_run(self) -> StreamFold:
        self._read_manifest()
        contract, source = _NOTHING_JUDGED, STREAM
        try:
            contract = read_contract(self.path)
        except (RunError, ConfigError) as error:
            if self.manifest is not None and os.path.lexists(self.path / CONTRACT):
                self._problem = self._problem or str(error)
            else:
                contract, source = self._contract_of_ours(), UNDER_NO_CONTRACT
        return StreamFold(self.path, contract, self.manifest.run if self.manifest else None, source)

    def _read_manifest(self) -> None:
        try:
            self.manifest = read_manifest(self.path)
        except RunError as error:
            if os.path.lexists(self.path / MANIFEST):
                self._problem = str(error)

    def _contract_of_ours(self) -> Contract:
        """What ships for runs of its mode, in place of a contract that is lost."""
        run = next((each for each in _quiet_ends(self.path) if isinstance(each, Run)), None)
        mode = run.mode if run is not None else self.manifest.mode if self.manifest else ""
        if mode not in _OF_A_MODE:
            return _NOTHING_JUDGED
        self._remarks = [each for each in self._remarks if each != f"no {CONTRACT}"]
        self._remarks.append(f"no {CONTRACT}: judged by the one that ships for {mode}; what it gives is derived")
        return parse_contract(builtin_contract(mode), CONTRACT)

    def loaded(self) -> LoadedRun:
        """The run as it was read so far, with what stands beside the stream as it is now."""
        kind = self.evidence.kind if self.evidence else Kind.RUN
        if kind is not Kind.RUN:
            return self._loaded_log(kind)
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
            if record is not None:
                state = "ended"
            elif self.manifest is not None:  # else nobody can tell whether it goes on, and nobody follows it
                state = host_state(self.path)
        except RunError as error:
            problem = problem or str(error)
        if state in ("ended", "lost"):
            # Its last lines may have come between the last look at the stream and the one at its end.
            while self.advance():
                pass
            problem = problem or (self._fold.problem if self._fold else "")
        return LoadedRun(
            path=self.path,
            kind=kind,
            evidence=self.evidence,
            about=about(self.manifest, None, self.state, config),
            remarks=tuple(clean(each, 500) for each in self._remarks),
            manifest=self.manifest,
            state=self.state,
            host_state=state,
            exit=record,
            config=config,
            config_problem=config_problem,
            problem=clean(problem, 500),
        )

    def _loaded_log(self, kind: Kind) -> LoadedRun:
        found = self.evidence
        problem = self._problem or (self._fold.problem if self._fold else "")
        record: ExitRecord | None = None
        with contextlib.suppress(RunError):
            record = read_exit(self.path) if os.path.lexists(self.path / EXIT) else None
        return LoadedRun(
            path=self.path,
            kind=kind,
            evidence=found,
            about=about(self.manifest, found.old if found else None, self.state, {}),
            remarks=tuple(clean(each, 500) for each in self._remarks),
            manifest=self.manifest,
            state=self.state,
            host_state="ended" if self.state.end is not None else "lost",
            exit=record,
            config_problem="none was kept",
            problem=clean(problem, 500),
        )

    def read(self, stopped: Callable[[], bool] = lambda: False) -> LoadedRun:
        """Reads on to the end of what is there, or until `stopped`."""
        while self.advance() and not stopped():
            pass
        return self.loaded()


def _quiet_ends(path: Path) -> list[Event]:
    try:
        return read_ends(path)
    except StreamError:
        return []


def load_run(path: Path) -> LoadedRun:
    """A run of any kind, read whole; what cannot be read of it is said in `problem`."""
    return RunReader(path).read()
