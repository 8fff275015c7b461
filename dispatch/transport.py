"""How a host is reached: one protocol for this machine and, over SSH, for another.

Nothing in the protocol assumes a shared file system, a shell or a shared environment: commands are argument vectors,
paths are strings of the host, bytes go in and come out, and every operation ends by its time-out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat as modes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from engine.errors import ExitCode, KdError

FILE_SECONDS = 30.0
RUN_SECONDS = 60.0
KILLED_SECONDS = 5.0
_T = TypeVar("_T")


class TransportError(KdError):
    """The host could not be reached, or refused an operation. What runs there is unknown, not failed."""

    exit_code = ExitCode.CONNECTION


class TransportTimeout(TransportError):
    """The host did not answer in time."""

    exit_code = ExitCode.TIMEOUT


class HostRefusal(TransportError):
    """The host lets us in no more, or is not the one that was trusted: asking again will not help."""


class MissingFile(TransportError):
    """The path does not exist on the host."""


@dataclass(frozen=True, slots=True)
class Completed:
    """A command that ran to its end; `rc` is negative when a signal ended it."""

    rc: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True, slots=True)
class FileStat:
    """What is known of a path; `size` in bytes, `mtime` in Unix seconds of the host's clock."""

    size: int
    mtime: float
    is_dir: bool


class Transport(Protocol):
    """The operations that running and following need; `timeout` is in seconds.

    Raises, all of them:
        TransportTimeout: no answer in time.
        TransportError: unreachable, or refused.
    """

    @property
    def host(self) -> str:
        """The host's name as the operator knows it."""
        ...

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = RUN_SECONDS) -> Completed:
        """Runs a command to its end; on a time-out it is killed."""
        ...

    async def stat(self, path: str, *, timeout: float = FILE_SECONDS) -> FileStat | None:
        """What is at a path (links followed), None when nothing is."""
        ...

    async def read(self, path: str, offset: int, limit: int, *, timeout: float = FILE_SECONDS) -> bytes:
        """Up to `limit` bytes from `offset`; fewer only at the end of the file. MissingFile when there is none."""
        ...

    async def list(self, path: str, *, timeout: float = FILE_SECONDS) -> tuple[str, ...]:
        """Names in a directory, sorted. MissingFile when there is none."""
        ...


class LocalTransport:
    """This machine, through the same protocol as any other."""

    host = "localhost"

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = RUN_SECONDS) -> Completed:
        """See `Transport.run`. The command gets a session of its own, so that Ctrl-C of the console passes it by."""
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
            )
        except OSError as error:
            raise TransportError(f"{argv[0]}: cannot be run: {error.strerror}") from None
        try:
            async with asyncio.timeout(timeout):
                stdout, stderr = await process.communicate(stdin)
        except TimeoutError:
            raise TransportTimeout(f"{' '.join(argv[:5])}: no end after {timeout:g} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                # Bounded: a grandchild that holds the pipes may keep asyncio from noticing the end.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), KILLED_SECONDS)
        return Completed(process.returncode or 0, stdout, stderr)

    async def stat(self, path: str, *, timeout: float = FILE_SECONDS) -> FileStat | None:
        """See `Transport.stat`."""

        def look() -> FileStat:
            found = os.stat(path)
            return FileStat(found.st_size, found.st_mtime, modes.S_ISDIR(found.st_mode))

        try:
            return await _in_thread(look, path, timeout)
        except MissingFile:
            return None

    async def read(self, path: str, offset: int, limit: int, *, timeout: float = FILE_SECONDS) -> bytes:
        """See `Transport.read`."""

        def read() -> bytes:
            # Unbuffered: a buffered file would read ahead and copy once more. Not blocking: a pipe is no run's file.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                return os.pread(descriptor, limit, offset)
            finally:
                os.close(descriptor)

        return await _in_thread(read, path, timeout)

    async def list(self, path: str, *, timeout: float = FILE_SECONDS) -> tuple[str, ...]:
        """See `Transport.list`."""
        return await _in_thread(lambda: tuple(sorted(os.listdir(path))), path, timeout)


async def _in_thread(operation: Callable[[], _T], path: str, timeout: float) -> _T:
    # A dead network mount blocks in the kernel; the thread is then left behind, the caller is not.
    try:
        async with asyncio.timeout(timeout):
            return await asyncio.to_thread(operation)
    except TimeoutError:
        raise TransportTimeout(f"{path}: no answer after {timeout:g} s") from None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFile(f"{path}: {error.strerror}") from None
    except OSError as error:
        raise TransportError(f"{path}: {error.strerror}") from None
