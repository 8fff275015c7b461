"""A file here while it is fetched: NAME.part until it is whole, hashed and on the disk."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from dispatch.host_tool import PART, Writer, open_below, parent_of, sync_directory
from dispatch.transfer import TransferError, digest_of
from engine.text import clean


class Part:
    """A file here while it is fetched."""

    def __init__(self, root: Path, name: str) -> None:
        self.target = root / name
        self._root, self._name = str(root), name
        self._descriptor = -1
        self._writer: Writer | None = None
        self._digest = hashlib.sha256()
        self._done = False
        self.size = 0

    def open(self) -> None:
        """Opens and locks it, and reads what is there."""
        self._descriptor = open_below(self._root, self._name + PART, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._abandon()
            raise TransferError(f"{clean(str(self.target), 300)}: is being fetched by another process") from None
        with parent_of(self._root, self._name) as (directory, last):
            there = os.stat(last + PART, dir_fd=directory, follow_symlinks=False)
        if not os.path.samestat(os.fstat(self._descriptor), there):
            self._abandon()
            raise TransferError(f"{clean(str(self.target), 300)}: was fetched by another process just now")
        self._digest, self.size = digest_of(self._descriptor)

    def _abandon(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    @property
    def sha256(self) -> str:
        """Of what is there."""
        found: str = (self._digest if self._writer is None else self._writer).hexdigest()
        return found

    def start(self, offset: int, size: int) -> None:
        """Cuts it, and writes on from there."""
        if offset == 0:
            self._digest = hashlib.sha256()
        os.ftruncate(self._descriptor, offset)
        os.lseek(self._descriptor, offset, os.SEEK_SET)
        free = shutil.disk_usage(self.target.parent).free
        if size - offset > free:
            what = f"{clean(str(self.target), 300)}: the disk is full"
            raise TransferError(f"{what}: {size - offset:,} bytes are to come, {free:,} are free", do="free some")
        self._writer = Writer(self._descriptor, self._digest)

    def write(self, chunks: Sequence[bytes]) -> None:
        """The next bytes."""
        assert self._writer is not None
        self._writer.write(chunks[0] if len(chunks) == 1 else b"".join(chunks))

    def commit(self) -> None:
        """It is whole: to the disk with it, and then it gets its name."""
        assert self._writer is not None
        self._writer.finish()
        with parent_of(self._root, self._name) as (directory, last):
            os.rename(last + PART, last, src_dir_fd=directory, dst_dir_fd=directory)
            sync_directory(directory)
        self._done = True

    def discard(self) -> None:
        """It can be of no use."""
        with parent_of(self._root, self._name) as (directory, last), contextlib.suppress(FileNotFoundError):
            os.unlink(last + PART, dir_fd=directory)

    def close(self) -> None:
        """What is there stays for the next attempt."""
        if self._writer is not None:
            self._writer.join()
        if self._descriptor >= 0:
            if os.fstat(self._descriptor).st_size == 0 and not self._done:
                self.discard()
            os.close(self._descriptor)
            self._descriptor = -1


def existing(root: Path, name: str, size: int | None) -> tuple[str, int] | None:
    """SHA-256 and size of a finished file here, None when there is none of this size."""
    try:
        descriptor = open_below(str(root), name)
    except OSError:
        return None
    try:
        if size is not None and os.fstat(descriptor).st_size != size:
            return None
        digest, found = digest_of(descriptor)
        return digest.hexdigest(), found
    finally:
        os.close(descriptor)
