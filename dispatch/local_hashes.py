"""SHA-256 of this machine's large files, remembered while nobody has touched them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, Final

from dispatch.supervisor import write_atomic

MIN_BYTES: Final = 1 << 20
"""Smaller files are read again every time."""
MAX_ENTRIES: Final = 4096
RACY_NS: Final = 2_000_000_000
"""A file written to so shortly before it was hashed could be written to again without its times telling."""
CHUNK: Final = 1 << 20


def cache_path() -> Path:
    """Where they are remembered."""
    from platformdirs import user_cache_path

    return user_cache_path("kdconsole") / "hashes.json"


class LocalHashes:
    """Hashes files, and remembers by size, times of content and of inode, and inode.

    Args:
        path: the file of remembered hashes; one that cannot be read or written is done without.
        remember: write what was hashed into it; else it is only read.
    """

    def __init__(self, path: Path | None = None, *, remember: bool = True) -> None:
        self._path, self._remember = path or cache_path(), remember
        self._known = self._load()
        self._new: dict[str, list[Any]] = {}

    def sha256(self, path: Path) -> tuple[int, str]:
        """Size and SHA-256 of a file.

        Raises:
            OSError: it cannot be read.
        """
        name = os.path.realpath(path)
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            now = time.time_ns()
            before = _look(descriptor)
            known = self._new.get(name) or self._known.get(name)
            if known is not None and known[:-1] == before and isinstance(known[-1], str):
                self._new[name] = known
                return before[0], known[-1]
            digest, size = hashlib.sha256(), 0
            while data := os.read(descriptor, CHUNK):
                digest.update(data)
                size += len(data)
            found = digest.hexdigest()
            after = _look(descriptor)
            if after == before and size == before[0] >= MIN_BYTES and max(before[1], before[2]) + RACY_NS < now:
                self._new[name] = [*before, found]
        finally:
            os.close(descriptor)
        return size, found

    def save(self) -> None:
        """Remembers what was hashed; what another console has remembered meanwhile stays."""
        if not self._remember or all(self._known.get(name) == entry for name, entry in self._new.items()):
            return
        merged = {**self._load(), **self._new}
        for name in list(merged)[: max(0, len(merged) - MAX_ENTRIES)]:
            del merged[name]
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(self._path, json.dumps(merged).encode())

    def _load(self) -> dict[str, list[Any]]:
        try:
            value = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(value, dict):
            return {}
        return {name: entry for name, entry in value.items() if isinstance(entry, list) and len(entry) == 5}


def _look(descriptor: int) -> list[int]:
    found = os.fstat(descriptor)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
