"""All runs of some evidence directories, one row each: at once from the ends of their files, then exactly.

How long a list takes is the time of `for _ in RunIndex(evidence, time.time, cache).look(): pass`. Without a cache that
is the list as it is first shown, and `while index.fold_next(): pass` makes every row exact; `keep()` then writes the
cache. With a cache of these very files the look alone gives every row exactly.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from console.read_row import RUN_FILES, STREAM_AT, exact_row, files_of, quick_row, unreadable, view_of
from console.row import Row
from console.row_cache import RowCache, Signature, signature
from console.run_files import read_exit, read_manifest
from console.run_reader import LoadedRun, RunReader, load_run
from dispatch.evidence import find_evidence, open_evidence
from engine.errors import ExitCode, RunError
from engine.falsifiers import exit_code_of
from engine.text import clean

__all__ = ["LoadedRun", "Row", "RunIndex", "find_smoke", "load_run", "view_of"]

BATCH = 50
"""Directories that are looked at between two chances to show them."""


@dataclass
class _Entry:
    path: Path
    files: tuple[str, ...]
    """That the row comes from; see `read_row.files_of`."""
    signature: Signature
    looked: float
    """When the signature was taken; Unix seconds."""
    row: Row
    reader: RunReader | None = None
    """Of a run that goes on, once its stream was folded: what is appended is folded on top."""
    done: bool = False
    """Nothing is left to be folded."""


class RunIndex:
    """Looks after the rows. Not for several threads at once; rows themselves never change.

    Args:
        evidence: directories that hold evidence of any kind, or are evidence themselves.
        clock: Unix seconds.
        cache: rows of earlier looks; none by default.
    """

    def __init__(self, evidence: Sequence[Path], clock: Callable[[], float], cache: RowCache | None = None) -> None:
        self._evidence = tuple(dict.fromkeys(Path(os.path.abspath(each)) for each in evidence))
        self._clock = clock
        self._cache = cache or RowCache(None)
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
        found = dict.fromkeys(find_evidence(self._evidence))
        for path in self._entries.keys() - found.keys():
            del self._entries[path]
        # New ones by their names from the last on, which begin with the time: the first batch is what one looks for.
        for number, path in enumerate(sorted(found, key=lambda each: each.name, reverse=True), 1):
            entry = self._entries.get(path)
            if entry is None:
                self._entries[path] = self._kept(path) or self._read(path)
            else:
                self._renew(entry)
            if number % BATCH == 0:
                yield
        waiting = (entry for entry in self._entries.values() if not entry.done)
        self._queue = sorted(waiting, key=lambda each: (each.row.live, each.row.created, each.row.id))
        yield

    def _kept(self, path: Path) -> _Entry | None:
        """From the cache, where every file is as it was."""
        files = self._cache.files(path)
        if files is None:
            return None
        looked, now = time.time(), signature(path, files)
        row = self._cache.row(path, now)
        return None if row is None else _Entry(path, files, now, looked, row, done=True)

    def _read(self, path: Path) -> _Entry:
        """From the files, at once."""
        looked = time.time()
        try:
            evidence = open_evidence(path)
        except RunError as error:  # it went, or changed, since it was found
            why = str(error).removeprefix(f"{clean(str(path), 500)}: ")
            row = unreadable(Row(path=path, id=clean(path.name, 200)), why)
            return _Entry(path, (".", *RUN_FILES), signature(path, (".", *RUN_FILES)), looked, row, done=True)
        files = files_of(evidence)
        now = signature(path, files)
        return _Entry(path, files, now, looked, quick_row(evidence, self._clock()))

    def _renew(self, entry: _Entry) -> None:
        looked, now = time.time(), signature(entry.path, entry.files)
        before, changed = entry.signature, entry.signature != now
        if not changed and not entry.row.live:
            return
        entry.signature, entry.looked = now, looked
        if entry.row.exact and entry.row.problem and entry.files == RUN_FILES and _grew(before, now):
            return  # What could not be read of it still stands there.
        reader = entry.reader
        if reader is not None and reader is not self._half_read:
            loaded = reader.read()
            if not loaded.problem:
                self._exact(entry, reader, loaded)
                return
        if changed or reader is None:
            fresh = self._read(entry.path)
            entry.files, entry.signature, entry.looked = fresh.files, fresh.signature, fresh.looked
            entry.row, entry.reader = _better(entry.row, fresh.row), None
            entry.done = fresh.done or (entry.done and not changed)

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
            self._exact(entry, reader, reader.loaded())
            entry.done, self._half_read = True, None
            self._queue.pop()
        return True

    def _exact(self, entry: _Entry, reader: RunReader, loaded: LoadedRun) -> None:
        entry.row = exact_row(loaded, self._clock())
        entry.reader = reader if loaded.going_on and not loaded.problem else None
        self._cache.keep(entry.row, entry.files, entry.signature, entry.looked)

    def keep(self) -> None:
        """Writes what is exact now to the cache, for the next start; nothing where nothing changed."""
        self._cache.save(self._entries.keys(), self._evidence)

    def forget(self) -> None:
        """Everything is read again at the next look."""
        self._entries.clear()
        self._queue.clear()
        self._half_read = None
        self._cache.clear()


def _grew(before: Signature, now: Signature) -> bool:
    """The stream of a run is the same file, no shorter, and nothing beside it changed."""
    old, new = before[STREAM_AT], now[STREAM_AT]
    same = old is not None and new is not None and (old[0], old[4]) == (new[0], new[4]) and old[1] <= new[1]
    beside = [index for index in range(len(now)) if index != STREAM_AT]
    return same and [before[index] for index in beside] == [now[index] for index in beside]


def _better(old: Row, new: Row) -> Row:
    """A quick row with what the one before it knew better."""
    if new.problem or new.created != old.created:
        return new
    if not new.verdicts:
        new = replace(new, verdicts=old.verdicts, judged=old.judged, failing=old.failing)
    return replace(new, heldout=old.heldout if new.heldout is None else new.heldout)


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
    for path in find_evidence([Path(os.path.abspath(each)) for each in evidence]):
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
