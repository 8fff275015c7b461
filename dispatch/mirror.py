"""A stream that stands on another host, kept here as it is read: the copy is an exact prefix of the original.

The length of the copy is the cursor: what stands in it is never fetched again, what is fetched is appended to it whole
lines at a time, and so a console that dies at any instant leaves a prefix that the next one goes on from.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from dispatch.manifest import EVENTS
from dispatch.transport import FILE_SECONDS, RUN_SECONDS, Completed, FileStat, Transport
from engine.errors import RunError
from engine.text import clean


class MirroredTransport:
    """A transport whose reads of one run's stream go through a copy on this machine.

    One console at a time keeps the copy; another one that follows the same run reads from the host and writes nothing.
    A copy that cannot be written (a full disk, say) is no reason to stop looking: `problem` says so, and reading goes
    on without it.

    Args:
        transport: reaches the host.
        run_dir: the run's directory on the host.
        copy: the run's directory here.

    Raises:
        RunError: the copy cannot be opened.
    """

    def __init__(self, transport: Transport, run_dir: str, copy: Path) -> None:
        self.problem = ""
        self._transport = transport
        self._events = f"{run_dir}/{EVENTS}"
        path = copy / EVENTS
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._file: int | None = os.open(path, flags, 0o600)
        except OSError as error:
            raise RunError(f"{path}: cannot be opened: {error.strerror}", expected="a file of ours") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            self._file = None
        self._length = 0 if self._file is None else _cut_torn_tail(self._file)

    def __enter__(self) -> MirroredTransport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def host(self) -> str:
        """See `Transport.host`."""
        return self._transport.host

    @property
    def keeping(self) -> bool:
        """The copy is ours to write, and could be written so far."""
        return self._file is not None

    @property
    def length(self) -> int:
        """Bytes of whole lines in the copy."""
        return self._length

    def close(self) -> None:
        """Makes the copy durable and lets it go."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file)
            os.close(self._file)
            self._file = None

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = RUN_SECONDS) -> Completed:
        """See `Transport.run`."""
        return await self._transport.run(argv, stdin=stdin, timeout=timeout)

    async def stat(self, path: str, *, timeout: float = FILE_SECONDS) -> FileStat | None:
        """See `Transport.stat`."""
        return await self._transport.stat(path, timeout=timeout)

    async def list(self, path: str, *, timeout: float = FILE_SECONDS) -> tuple[str, ...]:
        """See `Transport.list`."""
        return await self._transport.list(path, timeout=timeout)

    async def read(self, path: str, offset: int, limit: int, *, timeout: float = FILE_SECONDS) -> bytes:
        """See `Transport.read`. Of the stream, what the copy has beyond `offset` comes from there.

        The last byte of the copy alone is not worth an answer: whoever reads it wants to see what follows.
        """
        if path == self._events and self._file is not None and offset < self._length - 1:
            return os.pread(self._file, min(limit, self._length - offset), offset)
        data = await self._transport.read(path, offset, limit, timeout=timeout)
        if path == self._events and self._file is not None:
            self._keep(data, offset)
        return data

    def _keep(self, data: bytes, offset: int) -> None:
        """Appends the whole lines of what was read beyond the copy's end; nothing that does not continue it exactly."""
        assert self._file is not None
        known = self._length - offset
        if not 0 <= known <= len(data) or data[:known] != os.pread(self._file, known, offset):
            return  # the reader finds out by itself that the stream was cut or replaced
        fresh = data[known : data.rfind(b"\n") + 1]
        written = 0
        try:
            while written < len(fresh):
                written += os.pwrite(self._file, fresh[written:], self._length + written)
            self._length += len(fresh)
        except OSError as error:
            self.problem = clean(f"{EVENTS}: the copy here cannot be written: {error.strerror}", 300)
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._length)
            self.close()


def _cut_torn_tail(file: int) -> int:
    """Cuts off a last line that was not written whole; returns what remains, in bytes."""
    size = end = os.fstat(file).st_size
    while end > 0:
        begin = max(0, end - (1 << 16))
        newline = os.pread(file, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            end = begin + newline + 1
            break
        end = begin
    if end != size:
        os.ftruncate(file, end)
    return end
