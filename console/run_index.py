"""All runs of some evidence directories, one row each: at once from the ends of their files, then exactly."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from console.outlook import SILENCE_SECONDS, outlook, verdict_counts
from console.row import UNASKED, UNREADABLE, Row
from console.run_files import host_state, read_exit, read_manifest
from console.run_reader import LoadedRun, RunReader, load_run, read_ends
from console.view import Link, View
from dispatch.manifest import EVENTS, EXIT, MANIFEST, Manifest, Remote
from dispatch.manifest import RunState as HostState
from engine.errors import ExitCode, RunError, StreamError
from engine.falsifiers import exit_code_of
from engine.stream import End, Eval, Event, Run, Step
from engine.text import clean

__all__ = ["LoadedRun", "Row", "RunIndex", "find_smoke", "load_run"]

NEVER_STARTED_SECONDS = 120.0
"""From then on a run directory whose run was not started counts as one that nobody will start."""
BATCH = 50
"""Directories that are looked at between two chances to show them."""


Signature = tuple[tuple[int, int, int, int] | None, ...]


@dataclass
class _Entry:
    path: Path
    signature: Signature
    row: Row
    reader: RunReader | None = None
    """Of a run that goes on, once its stream was folded: what is appended is folded on top."""
    done: bool = False
    """Nothing is left to be folded."""


class RunIndex:
    """Looks after the rows. Not for several threads at once; rows themselves never change.

    Args:
        evidence: directories that hold run directories, or run directories themselves.
        clock: Unix seconds.
    """

    def __init__(self, evidence: Sequence[Path], clock: Callable[[], float]) -> None:
        self._evidence = tuple(dict.fromkeys(Path(os.path.abspath(each)) for each in evidence))
        self._clock = clock
        self._entries: dict[Path, _Entry] = {}
        self._half_read: RunReader | None = None
        self._queue: list[_Entry] = []
        """What is still to be folded, the next one at the end."""

    def rows(self) -> tuple[Row, ...]:
        """What is known now, the newest first."""
        found = (entry.row for entry in self._entries.values())
        return tuple(sorted(found, key=lambda row: (row.created, row.id), reverse=True))

    @property
    def to_fold(self) -> int:
        """How many rows are not exact yet."""
        return len(self._queue)

    def look(self) -> Iterator[None]:
        """Looks at every directory once, and reads the ends of what changed; yields now and then on the way."""
        found = dict(_directories(self._evidence))
        for path in self._entries.keys() - found.keys():
            del self._entries[path]
        # New ones by their names from the last on, which begin with the time: the first batch is what one looks for.
        for number, path in enumerate(sorted(found, key=lambda each: each.name, reverse=True), 1):
            signature = found[path]
            entry = self._entries.get(path)
            if entry is None:
                self._entries[path] = _Entry(path, signature, _quick_row(path, self._clock()))
            elif entry.signature != signature or entry.row.live:
                self._renew(entry, signature)
            if number % BATCH == 0:
                yield
        waiting = (entry for entry in self._entries.values() if not entry.done)
        self._queue = sorted(waiting, key=lambda each: (each.row.live, each.row.created, each.row.id))
        yield

    def _renew(self, entry: _Entry, signature: Signature) -> None:
        before, changed = entry.signature, entry.signature != signature
        entry.signature = signature
        if entry.row.exact and entry.row.problem and _grew(before, signature):
            return  # What could not be read of it still stands there.
        reader = entry.reader
        if reader is not None and reader is not self._half_read:
            loaded = reader.read()
            if not loaded.problem:
                entry.row = _exact_row(loaded, self._clock())
                entry.reader = reader if loaded.going_on else None
                return
        if changed or reader is None:
            entry.row, entry.reader = _kept(entry.row, _quick_row(entry.path, self._clock())), None
            entry.done = entry.done and not changed

    def fold_next(self) -> bool:
        """Folds a piece of a stream, of runs that go on first and then of the newest; False when nothing is left."""
        while self._queue and self._entries.get(self._queue[-1].path) is not self._queue[-1]:
            self._queue.pop()
        if not self._queue:
            return False
        entry = self._queue[-1]
        reader = self._half_read
        if reader is None or reader.path != entry.path:
            reader = self._half_read = RunReader(entry.path)
        if not reader.advance():
            loaded = reader.loaded()
            entry.row = _exact_row(loaded, self._clock())
            entry.reader = reader if loaded.going_on and not loaded.problem else None
            entry.done, self._half_read = True, None
            self._queue.pop()
        return True

    def forget(self) -> None:
        """Everything is read again at the next look."""
        self._entries.clear()
        self._queue.clear()
        self._half_read = None


def _directories(evidence: Iterable[Path]) -> Iterator[tuple[Path, Signature]]:
    """Run directories with what tells whether they changed."""
    for directory in evidence:
        candidates = [directory]
        try:
            with os.scandir(directory) as entries:
                candidates += [directory / entry.name for entry in entries if _is_directory(entry)]
        except OSError:
            continue
        for path in candidates:
            signature = tuple(_stamp(path / name) for name in (MANIFEST, EVENTS, EXIT))
            if signature[0] or signature[1]:
                yield path, signature


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, stat.S_IFMT(found.st_mode)


def _grew(before: Signature, now: Signature) -> bool:
    """The stream is the same file, no shorter, and nothing beside it changed."""
    old, new = before[1], now[1]
    same = old is not None and new is not None and (old[0], old[3]) == (new[0], new[3]) and old[1] <= new[1]
    return same and before[::2] == now[::2]


# Rows


def _quick_row(path: Path, now: float) -> Row:
    """A row from the manifest, the exit record and the two ends of the stream."""
    row = Row(path=path, id=clean(path.name, 200))
    try:
        manifest = read_manifest(path)
        row = _with_manifest(row, manifest)
        record = read_exit(path)
        state = "ended" if record is not None else host_state(path)
        events = read_ends(path)
    except (RunError, StreamError) as error:
        problem = clean(str(error), 500)
        return replace(row, status=UNREADABLE, reason=problem, problem=problem)
    for event in events:
        row = _with_event(row, event)
    end = events[-1] if events and isinstance(events[-1], End) else None
    row = replace(row, last_t=_time(max((e.t for e in events), default=0.0), row))
    if end is not None:
        return replace(row, status=end.status, reason=end.reason)
    if record is not None:
        return replace(row, status="CRASHED", reason=f"{record.describe()}, without an end event; see launch.log")
    if manifest.remote is not None:
        return replace(row, status=UNASKED, reason=_elsewhere(manifest.remote))
    return _with_host_state(row, state, now, heard=bool(events))


def _with_host_state(row: Row, state: HostState, now: float, *, heard: bool) -> Row:
    if state == "starting" and not (row.path / "supervisor.jsonl").exists():
        if now - row.created > NEVER_STARTED_SECONDS:
            return replace(row, status="LOST", reason="it was never started")
        return replace(row, status="STARTING")
    if state == "lost":
        return replace(row, status="LOST", reason="neither an end nor a process was found")
    if heard and now - row.last_t > SILENCE_SECONDS:
        return replace(row, status="STALLED", reason="nothing is heard from it")
    return replace(row, status="RUNNING" if row.device else "STARTING")


def _elsewhere(remote: Remote) -> str:
    return f"on {remote.host}, which was not asked; open it to follow it"


def _with_manifest(row: Row, manifest: Manifest) -> Row:
    return replace(
        row,
        name=manifest.name or "",
        mode=manifest.mode,
        host=manifest.where,
        created=manifest.created_unix,
        last_t=manifest.created_unix,
    )


def _with_event(row: Row, event: Event) -> Row:
    if isinstance(event, Run):
        # A smoke goes on for as long as it may, and not to the steps of the run that it stands for.
        target = event.max_steps if event.mode == "smoke" else event.steps_asked
        return replace(row, host=event.host, device=_device(event), target=target)
    if isinstance(event, Step):
        return replace(row, step=event.step, loss=event.loss)
    if isinstance(event, Eval):
        return replace(row, heldout=event.loss)
    return row


def _time(t: float, row: Row) -> float:
    """A time that a stream told, if it is one; else when the run was created."""
    return t if 0 < t < math.inf else row.created


def _device(run: Run) -> str:
    return f"{run.device} {run.device_name}, {run.precision}"


def _kept(old: Row, new: Row) -> Row:
    """A quick row with what the one before it knew better."""
    if new.problem or new.created != old.created:
        return new
    verdicts = {"verdicts": old.verdicts, "failing": old.failing} if not new.verdicts else {}
    return replace(new, heldout=old.heldout if new.heldout is None else new.heldout, **verdicts)  # type: ignore[arg-type]


def _exact_row(loaded: LoadedRun, now: float) -> Row:
    """A row from the whole stream."""
    state = loaded.state
    row = Row(path=loaded.path, id=clean(loaded.path.name, 200), exact=True, problem=loaded.problem)
    if loaded.manifest is not None:
        row = _with_manifest(row, loaded.manifest)
    for event in (state.run, state.last_step, *state.evals[-1:]):
        row = row if event is None else _with_event(row, event)
    counts = dict(verdict_counts(state)) if state.judged else {}
    failing = tuple(v.id for v in state.judged if v.verdict == "FAIL")
    row = replace(row, verdicts=counts, failing=failing, last_t=_time(state.last_t, row))
    if loaded.problem:
        return replace(row, status=UNREADABLE, reason=loaded.problem)
    remote = loaded.manifest.remote if loaded.manifest else None
    if remote is not None and state.end is None and loaded.exit is None:
        return replace(row, status=UNASKED, reason=_elsewhere(remote))
    if loaded.host_state == "starting" and not state.events:
        return _with_host_state(row, "starting", now, heard=False)
    told = outlook(view_of(loaded, now))
    doing = f"phase {state.phase}" if loaded.going_on else ""
    return replace(row, status=told.status, reason=told.reason or "; ".join(told.alarm) or doing)


def view_of(loaded: LoadedRun, now: float) -> View:
    """A run that was read from its directory, as the panes see one."""
    link = Link(
        status=loaded.host_state, heard=loaded.state.last_t, exit=loaded.exit, live=loaded.going_on
    )  # fmt: skip
    return View(loaded.state, link, now if loaded.going_on else loaded.state.last_t, loaded.manifest)


# What a smoke said


def find_smoke(
    evidence: Iterable[Path], gate_fingerprint: str, host: str, steps: int
) -> tuple[float, float, float] | None:
    """What the newest passed smoke of a configuration promised, for so many steps.

    Args:
        evidence: directories that hold run directories.
        gate_fingerprint: of the configuration, as manifests have it.
        host: where it ran.
        steps: of the run that is asked about.

    Returns:
        p10, p50 and p90 of the wall time in seconds; the part of the steps is scaled to `steps`, what is spent around
        them stays. None where no smoke of it passed there.
    """
    candidates: list[tuple[float, Path]] = []
    for path, _ in _directories(evidence):
        try:
            manifest = read_manifest(path)
            record = read_exit(path)
        except RunError:
            continue
        same = manifest.gate_fingerprint == gate_fingerprint and manifest.where == host
        if manifest.mode == "smoke" and same and record is not None and record.exit_code == ExitCode.OK:
            candidates.append((manifest.created_unix, path))
    for _, path in sorted(candidates, reverse=True):
        loaded = load_run(path)
        state, projection = loaded.state, loaded.state.projection
        passed = state.end is not None and state.end.status == "COMPLETED" and state.end.exit_code == ExitCode.OK
        # The exit code is believed only where the stream says the same.
        if loaded.problem or not passed or exit_code_of(state.judged) != ExitCode.OK or state.disagreements:
            continue
        if projection is not None and projection.target_steps > 0:
            fixed, scale = projection.fixed_seconds, steps / projection.target_steps
            p10, p50, p90 = (
                fixed + (seconds - fixed) * scale
                for seconds in (projection.p10_seconds, projection.p50_seconds, projection.p90_seconds)
            )
            return p10, p50, p90
    return None
