"""What stands at a path: a run directory of ours, one of the predecessor's, a bare log, or a manifest alone.

Nothing that lies there can do harm: links are not followed, nothing is waited for, and what is read is bounded.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, Final

from dispatch.manifest import CONFIG, CONTRACT, EVENTS, EXIT, MANIFEST, VERSION
from dispatch.old_logs import NOTES, Sniffed, is_named_log, may_be_text, sniff, sorted_texts
from dispatch.old_manifest import MAX_BYTES, OldManifest, Pairs, is_old, is_ours, json_object, old_manifest
from dispatch.supervisor import open_regular
from engine.errors import RunError
from engine.text import clean

LAUNCH_LOG: Final = "launch.log"
MAX_ENTRIES: Final = 100_000
"""Of one directory: what is looked at by name."""
MAX_TEXTS: Final = 200
"""Of one directory: what is looked into."""
_MAX_TOLD: Final = 10
"""Of the logs that are not read: so many are told of by name."""
_TRIED: Final = 20
"""Texts that are looked into to tell whether a folder without a manifest is evidence."""
_NEVER_INSIDE: Final = frozenset(
    ("checkpoints", "model", "model.rejected", "node_modules", "__pycache__", "site-packages", "venv", "target")
)
_WANTED: Final = "a run directory, one of the predecessor's, or a log of a training"


class Kind(StrEnum):
    """What a piece of evidence is."""

    RUN = "run"
    """A run directory of ours, of any version."""
    OLD = "predecessor"
    """A directory of the predecessor's: its manifest, and a log at least."""
    LOG = "log"
    """A log alone, or a directory with logs and without a stream or a manifest of the predecessor's."""
    MANIFEST = "manifest"
    """A manifest alone, ours or the predecessor's: what was asked for, and not what came of it."""


@dataclass(frozen=True)
class Evidence:
    """One piece of evidence, and where its parts stand. Names of files are as they are: clean them to show them."""

    path: Path
    """Absolute; a directory, or the log itself."""
    kind: Kind
    logs: tuple[Path, ...] = ()
    """Texts of a training: the one to read, then the others."""
    notes: tuple[Path, ...] = ()
    """Other texts; nothing that they say is taken."""
    old: OldManifest | None = None
    remarks: tuple[str, ...] = ()
    """What is missing or odd, a sentence each, safe to print."""


def open_evidence(path: Path) -> Evidence:
    """Tells what stands at a path, by names, by manifest and by the two ends of its texts.

    Raises:
        RunError: nothing is there, nothing of ours or the predecessor's, or it cannot be read.
    """
    path = Path(os.path.abspath(path))
    shown = clean(str(path), 500)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        why = error.strerror if isinstance(error, OSError) else "no name of a file"
        raise RunError(f"{shown}: {why}", expected=_WANTED) from None
    if stat.S_ISREG(mode):
        return _open_file(Path(os.path.realpath(path)), shown)
    if not stat.S_ISDIR(mode):
        raise RunError(f"{shown}: no directory and no regular file", expected=_WANTED)
    return _Directory(path, shown).open()


def _open_file(path: Path, shown: str) -> Evidence:
    if path.name in (MANIFEST, EVENTS):
        raise RunError(f"{shown}: one file of a directory", expected=_WANTED, do="give the directory")
    found = sniff(path)
    if found is None:
        raise RunError(f"{shown}: {_why_no_text(path)}", expected=_WANTED)
    if found.training:
        return Evidence(path, Kind.LOG, logs=(path,))
    if path.suffix.lower() in NOTES or not may_be_text(path.name):
        raise RunError(f"{shown}: no line of a training near its ends", expected=_WANTED)
    name = clean(path.name, 100)
    return Evidence(path, Kind.LOG, logs=(path,), remarks=(f"{name}: no line of a training near its ends",))


def _why_no_text(path: Path) -> str:
    try:
        descriptor = open_regular(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        return error.strerror or "cannot be read"
    try:
        return "no text" if os.fstat(descriptor).st_size else "empty"
    finally:
        os.close(descriptor)


class _Directory:
    """A directory that is being looked at."""

    def __init__(self, path: Path, shown: str) -> None:
        self._path, self._shown = path, shown
        self._remarks: list[str] = []
        try:
            self._names, more = _regular_files(path)
        except OSError as error:
            raise RunError(f"{shown}: {error.strerror}", expected=_WANTED) from None
        if more:
            self._remarks.append(f"more than {MAX_ENTRIES:,} entries: only so many were looked at")

    def open(self) -> Evidence:
        ours = {name for name in (EXIT, "supervisor.jsonl") if name in self._names}
        if EVENTS in self._names:
            return self._run()
        pairs, problem = self._manifest()
        if pairs is not None and is_ours(pairs):
            return self._without_stream(dict(pairs))
        if pairs is None and ours:
            return self._run()
        if pairs is not None and not is_old(pairs):
            pairs, problem = None, f"{MANIFEST}: no key of a manifest in it"
        old = None if pairs is None else old_manifest(pairs)
        logs, notes = self._texts()
        if problem:
            self._remarks.append(problem)
        if old is not None:
            self._remarks += [f"{MANIFEST}: {each}" for each in old.problems]
        if not logs and old is None:
            raise RunError(f"{self._shown}: {problem or 'no manifest, no stream and no log'}", expected=_WANTED)
        if old is None and not logs[0].training:
            raise RunError(f"{self._shown}: no line of a training near the ends of its logs", expected=_WANTED)
        if old is None and not problem:
            self._remarks.append(f"no {MANIFEST}: what was asked for is not known")
        if not logs:
            self._remarks.append("no log: what ran is not known")
        kind = Kind.LOG if old is None else Kind.OLD if logs else Kind.MANIFEST
        return self._evidence(kind, logs, notes, old)

    def _run(self) -> Evidence:
        pairs, problem = self._manifest()
        if pairs is None:
            self._remarks.append(problem or f"no {MANIFEST}: who made it, where and when is not known")
        else:
            self._version(dict(pairs))
        self._missing(EVENTS, CONFIG, CONTRACT)
        return self._evidence(Kind.RUN)

    def _without_stream(self, manifest: dict[str, Any]) -> Evidence:
        """A run of ours that has not begun, or whose stream is lost."""
        self._version(manifest)
        begun = EXIT in self._names or manifest.get("outcome") is not None
        whole = CONFIG in self._names and CONTRACT in self._names
        if whole and not begun:  # the stream may be on its way
            return self._evidence(Kind.RUN)
        log = sniff(self._path / LAUNCH_LOG) if LAUNCH_LOG in self._names else None
        if log is not None and log.training:
            self._remarks.append(f"no {EVENTS}: read from {LAUNCH_LOG}")
            return self._evidence(Kind.LOG, [log])
        if log is not None and begun:  # the exit record tells more than a log without a line of a training
            self._missing(EVENTS, CONFIG, CONTRACT)
            return self._evidence(Kind.RUN)
        self._remarks.append(f"no {EVENTS} and no {LAUNCH_LOG}: what ran is not known")
        return self._evidence(Kind.MANIFEST)

    def _missing(self, *names: str) -> None:
        self._remarks += [f"no {name}" for name in names if name not in self._names]

    def _version(self, manifest: dict[str, Any]) -> None:
        version = manifest.get("v")
        if version is None:
            self._remarks.append(f"{MANIFEST}: without a version")
        elif isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
            shown = clean(str(version), 40) if isinstance(version, (int, float, str)) else "no number"
            self._remarks.append(f"{MANIFEST}: version {shown}, and this software knows 1 to {VERSION}")

    def _manifest(self) -> tuple[Pairs | None, str]:
        """The manifest's keys and values, or why there are none; no reason where there is no manifest."""
        if MANIFEST not in self._names:
            return None, f"{MANIFEST}: no regular file" if os.path.lexists(self._path / MANIFEST) else ""
        try:
            descriptor = open_regular(self._path / MANIFEST, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                raw = os.pread(descriptor, MAX_BYTES + 1, 0)
            finally:
                os.close(descriptor)
            return json_object(raw, MANIFEST), ""
        except OSError as error:
            return None, f"{MANIFEST}: {error.strerror}"
        except RunError as error:
            return None, str(error)

    def _texts(self) -> tuple[list[Sniffed], list[Path]]:
        names = [name for name in self._names if name not in (MANIFEST, "SHA256SUMS") and may_be_text(name)]
        # Those that are logs by their names first: what is looked into is bounded.
        names.sort(key=lambda name: (not _like_a_log(name), name))
        if len(names) > MAX_TEXTS:
            self._remarks.append(f"{len(names):,} texts: {MAX_TEXTS} of them were looked into")
        logs, notes = sorted_texts(self._path / name for name in names[:MAX_TEXTS])
        known = {each.path for each in logs} | set(notes)
        named = [name for name in names[:MAX_TEXTS] if is_named_log(name) and self._path / name not in known]
        self._remarks += [f"{clean(name, 100)}: {_why_no_text(self._path / name)}" for name in named[:_MAX_TOLD]]
        if len(named) > _MAX_TOLD:
            self._remarks.append(f"{len(named) - _MAX_TOLD:,} more logs that are no text")
        return logs, notes

    def _evidence(
        self, kind: Kind, logs: Sequence[Sniffed] = (), notes: Sequence[Path] = (), old: OldManifest | None = None
    ) -> Evidence:
        if len(logs) > 1:
            first, *others = logs
            self._remarks.append(f"{len(logs)} logs: {_named(first)} is read ({first.phrase})")
            self._remarks += [f"{_named(each)} is not read ({each.phrase})" for each in others[:_MAX_TOLD]]
            if len(others) > _MAX_TOLD:
                self._remarks.append(f"{len(others) - _MAX_TOLD:,} more logs are not read")
        elif logs and not logs[0].training:
            self._remarks.append(f"{_named(logs[0])}: {logs[0].phrase}")
        paths = tuple(each.path for each in logs)
        return Evidence(self._path, kind, paths, tuple(notes), old, tuple(clean(each, 500) for each in self._remarks))


def _named(log: Sniffed) -> str:
    return clean(log.path.name, 100)


def _like_a_log(name: str) -> bool:
    return name.endswith((".log", ".txt", ".out", ".err")) or name.startswith("launch")


def _regular_files(path: Path) -> tuple[set[str], bool]:
    """Names of a directory's regular files, and whether there are more entries than are looked at."""
    with os.scandir(path) as entries:
        names = {entry.name for entry in islice(entries, MAX_ENTRIES) if _is(entry, directory=False)}
        return names, next(entries, None) is not None


def _is(entry: os.DirEntry[str], *, directory: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False) if directory else entry.is_file(follow_symlinks=False)
    except OSError:
        return False


def find_evidence(paths: Sequence[Path], depth: int = 3) -> Iterator[Path]:
    """Evidence at paths and below them, in the order of the paths and then of names; each once, as it is found.

    Links are not followed below a path, and folders that are hidden or hold weights or packages are passed over. Where
    evidence without a stream stands, what is below it is looked at as well. Nothing here is opened to the end: what is
    found may still be no evidence at a closer look.

    Args:
        paths: directories or logs; one that is evidence itself counts.
        depth: how many folders below each path are looked into.
    """
    seen: set[Path] = set()
    for path in paths:
        path = Path(os.path.abspath(path))
        found = _walk(path, depth) if path.is_dir() else _a_log(path)
        for each in found:
            if each not in seen:
                seen.add(each)
                yield each


def _a_log(path: Path) -> Iterator[Path]:
    try:
        yield open_evidence(path).path
    except RunError:
        return


def _walk(path: Path, depth: int) -> Iterator[Path]:
    names: set[str] = set()
    folders: list[str] = []
    try:
        with os.scandir(path) as entries:
            for entry in islice(entries, MAX_ENTRIES):
                if _is(entry, directory=False):
                    names.add(entry.name)
                elif not entry.name.startswith(".") and entry.name not in _NEVER_INSIDE and _is(entry, directory=True):
                    folders.append(entry.name)
    except OSError:
        return
    if EVENTS in names or MANIFEST in names or _has_a_log(path, names):
        yield path
    if EVENTS not in names and depth > 0:
        for name in sorted(folders):
            yield from _walk(path / name, depth - 1)


def _has_a_log(path: Path, names: set[str]) -> bool:
    """A training's log stands among these files, as far as a few of them tell."""
    likely = sorted(name for name in names if _like_a_log(name) and may_be_text(name))
    return any((text := sniff(path / name)) is not None and text.training for name in likely[:_TRIED])
