"""Files and directories that are either wholly on the disk or not there, whatever instant the process ends at."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def write_new(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Writes a file that is not there yet, mode 0600, down to the disk.

    Returns:
        The SHA-256 of what was to be written, computed from memory and not from the disk.

    Raises:
        OSError: it is there already, or the disk does not take it; a part of it may stand there then.
    """
    digest = hashlib.sha256()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        for chunk in chunks:
            digest.update(chunk)
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
        if hasattr(os, "posix_fadvise"):
            # What is read back shall come from the disk, as far as the kernel will do that.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return digest.hexdigest()


def replace(path: Path, content: bytes) -> None:
    """Puts a small file in place of an old one; whoever reads it meets the old one or the new one.

    Raises:
        OSError: the disk does not take it; the old one stands as it was.
    """
    partial = partial_of(path)
    discard(partial)
    try:
        write_new(partial, [content])
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            discard(partial)
        raise
    sync_directory(path.parent)


def partial_of(path: Path) -> Path:
    """The hidden sibling in which a file or directory is made."""
    return path.with_name(f".{path.name}.partial")


def discard(path: Path) -> None:
    """Removes a file, a link or a whole directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Waits until the directory's entries, as they are now, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
