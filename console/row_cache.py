"""Rows of runs that are over, kept between two starts of the console, and believed only while no file has changed.

A row is taken from here only if every file that it came from is still the one that it was: the same inode, size, mode,
and times of change, of which the kernel's own (`ctime`) cannot be set back. Whatever cannot be read, was written by
another version, or says what no row can say, is passed over, and the files are read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import stat
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgspec

import console
import dispatch
import engine
from console.palette import ORDER
from console.row import RUN, Row
from dispatch.manifest import versions
from engine.text import clean

SCHEMA = 1
MAX_ROWS = 5_000
MAX_BYTES = 16 << 20
MAX_TEXT = 500
SETTLED_SECONDS = 2.0
"""A file that changed less than this before it was looked at may change again without its times telling."""

Stamp = tuple[int, int, int, int, int]
"""A file's inode, size, times of change of contents and of the file, in nanoseconds, and mode."""
Signature = tuple[Stamp | None, ...]
"""Of the files that a row came from; None for one that was not there."""

_ENDED = frozenset(("COMPLETED", "FAILED", "STOPPED", "TIMEOUT", "CRASHED", "DISPUTED", "LOST"))
_TEXTS = tuple(each.name for each in fields(Row) if each.type == "str")


class _Kept(msgspec.Struct, frozen=True, array_like=True):
    """A row with the names of its files, relative to its path, and their signature."""

    files: tuple[str, ...]
    signature: Signature
    row: Row


class _File(msgspec.Struct, frozen=True, array_like=True):
    schema: int
    software: str
    rows: tuple[msgspec.Raw, ...]


def cache_path() -> Path:
    """Where the rows are kept, whether or not there are any: `~/.cache/kdconsole/rows` on Linux."""
    from platformdirs import user_cache_path

    return user_cache_path("kdconsole") / "rows"


def stamp(path: str | Path) -> Stamp | None:
    """What tells whether a file changed; None where there is none. Links are not followed."""
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_mode


def signature(path: Path, files: Iterable[str]) -> Signature:
    """The stamps of some files of a directory; `.` is the path itself."""
    base = os.fspath(path)
    return tuple(stamp(base if name == "." else f"{base}/{name}") for name in files)


class RowCache:
    """The rows that were kept. Nothing here raises, and nothing is lost where it does not work.

    Args:
        path: the file; None keeps nothing.
        readonly: rows are taken from it, and none is written.
    """

    def __init__(self, path: Path | None, *, readonly: bool = False) -> None:
        self._path, self._readonly = path, readonly
        self._rows: dict[Path, _Kept] | None = None
        self._changed = False

    def files(self, path: Path) -> tuple[str, ...] | None:
        """Names of the files that the row of a path came from; None where none is kept."""
        kept = self._loaded().get(path)
        return None if kept is None else kept.files

    def row(self, path: Path, found: Signature) -> Row | None:
        """The row of a path whose files have this signature now; None where it must be read."""
        kept = self._loaded().get(path)
        return kept.row if kept is not None and kept.signature == found else None

    def keep(self, row: Row, files: tuple[str, ...], found: Signature, looked: float) -> None:
        """Keeps a row, if it can only change with its files.

        Args:
            row: what was made of the files.
            files: names of those that it came from, relative to its path.
            found: their signature, taken before they were read.
            looked: when that was; Unix seconds.
        """
        settled = (looked - SETTLED_SECONDS) * 1e9
        if _lasts(row) and all(each is None or max(each[2:4]) < settled for each in found):
            self._loaded()[row.path] = _Kept(files, found, row)
            self._changed = True

    def clear(self) -> None:
        """Nothing that was kept before is believed any more."""
        self._rows = {}

    def save(self, present: Collection[Path] = (), folders: Sequence[Path] = ()) -> None:
        """Writes what changed since it was read, beside what other consoles wrote meanwhile.

        Args:
            present: paths that are there now; where there is no room for all, others go first.
            folders: where was looked; what is kept of other paths in them is given up.
        """
        if not self._changed or self._path is None or self._readonly:
            return
        self._changed = False
        rows = self._loaded()
        merged = _read(self._path) | rows
        here = [each for each in merged.values() if each.row.path in present or not _below(each.row.path, folders)]
        order = sorted(here, key=lambda each: (each.row.path in present, each.row.created), reverse=True)
        encoded, room = list[msgspec.Raw](), MAX_BYTES
        for kept in order[:MAX_ROWS]:
            with contextlib.suppress(ValueError, OverflowError, TypeError):
                raw = _encoder.encode(kept)
                room -= len(raw) + 8
                if room < 1 << 12:
                    break
                encoded.append(msgspec.Raw(raw))
        with contextlib.suppress(OSError):
            _write(self._path, _encoder.encode(_File(SCHEMA, _software(), tuple(encoded))))

    def _loaded(self) -> dict[Path, _Kept]:
        if self._rows is None:
            self._rows = _read(self._path) if self._path is not None else {}
        return self._rows


def _below(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.is_relative_to(each) for each in folders)


def _lasts(row: Row) -> bool:
    """It was read whole, and nothing but its files can change it."""
    nobody_knows = row.status == "LOST" and row.kind == RUN  # which is found by looking for its processes
    return row.exact and not row.problem and row.status in _ENDED and not nobody_knows


def _sound(row: Row) -> Row | None:
    """A row from a file that anybody may have written, its texts cleaned; None for one that no run can have."""
    counts = row.verdicts
    numbers = (row.created, row.last_t)
    if not _lasts(row) or not row.path.is_absolute() or not all(map(math.isfinite, numbers)):
        return None
    if not all(word in ORDER and count >= 0 for word, count in counts.items()):
        return None
    changes: dict[str, Any] = {name: clean(getattr(row, name), MAX_TEXT) for name in _TEXTS}
    changes["failing"] = tuple(clean(each, MAX_TEXT) for each in row.failing)
    changes["judged"] = {clean(name, MAX_TEXT): clean(word, MAX_TEXT) for name, word in row.judged.items()}
    return replace(row, **changes)


# The file


def _software() -> str:
    """What made the rows: the version, and the sources, which change without it where they are worked on."""
    digest = hashlib.sha256()
    for package in (console, dispatch, engine):
        for folder in (Path(package.__path__[0]), Path(package.__path__[0]) / "assets" / "contracts"):
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda each: each.name):
                    if entry.name.endswith((".py", ".yaml")):
                        found = entry.stat()
                        digest.update(f"{entry.name} {found.st_size} {found.st_mtime_ns}\n".encode(errors="replace"))
    return f"{versions(('kdconsole',))['kdconsole']} {digest.hexdigest()[:16]}"


def _read(path: Path) -> dict[Path, _Kept]:
    try:
        raw = _bytes(path)
        file = _file_decoder.decode(raw)
    except (OSError, msgspec.DecodeError, ValueError, RecursionError):
        return {}
    if file.schema != SCHEMA or file.software != _software():
        return {}
    rows: dict[Path, _Kept] = {}
    for each in file.rows[:MAX_ROWS]:
        try:
            kept = _decoder.decode(each)
        except (msgspec.DecodeError, ValueError, RecursionError):
            continue
        row = _sound(kept.row)
        if row is not None and len(kept.files) == len(kept.signature) > 0:
            rows[row.path] = _Kept(kept.files, kept.signature, row)
    return rows


def _bytes(path: Path) -> bytes:
    """The file, if it is a small regular one that nobody else can write."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        ours = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not stat.S_ISREG(found.st_mode) or not ours or found.st_size > MAX_BYTES:
            raise OSError("not a file of ours")
        return file.read(MAX_BYTES)


def _write(path: Path, raw: bytes) -> None:
    """Replaces the file at once: it is the old one or the new one. Nothing is flushed, for it can be made again."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not stat.S_ISDIR(os.lstat(path.parent).st_mode):
        raise OSError("not a directory of ours")
    descriptor, name = tempfile.mkstemp(prefix=".rows-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _path_in(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, bytes):
        return Path(os.fsdecode(value))
    raise ValueError("not a path")


def _path_out(value: Any) -> Any:
    if isinstance(value, Path):
        return os.fsencode(value)  # a name need not be text
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(type(value).__name__)


_encoder = msgspec.msgpack.Encoder(enc_hook=_path_out)
_file_decoder = msgspec.msgpack.Decoder(_File)
_decoder = msgspec.msgpack.Decoder(_Kept, dec_hook=_path_in)
