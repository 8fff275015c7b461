"""Commands on a host whose input and output are streamed: what transfers need beyond `Transport`."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol

from dispatch.transport import KILLED_SECONDS, LocalTransport, Transport, TransportError, TransportTimeout
from engine.text import clean

_BUFFER: Final = 1 << 20
_MAX_ERRORS: Final = 64 << 10


class Stream(Protocol):
    """A running command. `timeout` is in seconds without any progress; when it is over, TransportTimeout is raised."""

    async def read(self, limit: int, *, timeout: float, at_least: int = 1) -> bytes:
        """Up to `limit` bytes of standard output, empty at its end. TransportError when the connection is lost.

        Waits for `at_least` so many, as far as that is no trouble: fewer may come at any time.
        """
        ...

    async def write(self, data: bytes | memoryview, *, timeout: float) -> None:
        """Waits until there is room, then takes the bytes. TransportError when nobody reads them any more.

        The memory that they stand in is the caller's own again then.
        """
        ...

    def errors(self) -> bytes:
        """What came on standard error so far, its beginning."""
        ...


def open_stream(
    transport: Transport, argv: Sequence[str], *, much: bool = False
) -> contextlib.AbstractAsyncContextManager[Stream]:
    """Starts a command; it loses its input and output when the context is left, and is expected to end then.

    `much`: it will write megabytes.

    Raises, when it is entered:
        TransportError: the host cannot be reached, or the command not be run.
    """
    if isinstance(transport, LocalTransport):
        return local_stream(argv)
    from dispatch.ssh import SSHTransport
    from dispatch.ssh_stream import ssh_stream

    if not isinstance(transport, SSHTransport):
        raise TypeError(f"{type(transport).__name__} has no streams")
    return ssh_stream(transport, argv, much)


async def resolve(transport: Transport, path: str) -> str:
    """A path of the host made absolute: `~/` is the home directory there."""
    if isinstance(transport, LocalTransport) or not path.startswith("~/"):
        return os.path.expanduser(path)
    from dispatch.ssh import SSHTransport

    return await transport.resolve(path) if isinstance(transport, SSHTransport) else path


class LocalStream:
    """See `Stream`; the command runs on this machine."""

    def __init__(self, process: asyncio.subprocess.Process, what: str) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self._what = what
        self._errors = b""
        self._listening = asyncio.create_task(self._listen(process.stderr))

    async def _listen(self, stderr: asyncio.StreamReader) -> None:
        while data := await stderr.read(_MAX_ERRORS):
            self._errors = (self._errors + data)[:_MAX_ERRORS]

    async def read(self, limit: int, *, timeout: float, at_least: int = 1) -> bytes:
        """See `Stream.read`."""
        async with self._within(timeout):
            data = await self._stdout.read(limit)
            if not data:
                await self._listening
        return data

    async def write(self, data: bytes | memoryview, *, timeout: float) -> None:
        """See `Stream.write`."""
        try:
            async with self._within(timeout):
                self._stdin.write(bytes(data))
                await self._stdin.drain()
        except OSError as error:
            raise TransportError(f"{self._what}: it has ended: {error.strerror}") from None

    def errors(self) -> bytes:
        """See `Stream.errors`."""
        return self._errors

    @contextlib.asynccontextmanager
    async def _within(self, timeout: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout):
                yield
        except TimeoutError:
            raise TransportTimeout(f"{self._what}: nothing for {timeout:g} s") from None


@contextlib.asynccontextmanager
async def local_stream(argv: Sequence[str]) -> AsyncIterator[Stream]:
    """A command on this machine, in a session of its own.

    Raises:
        TransportError: it cannot be run.
    """
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, limit=_BUFFER
        )
    except OSError as error:
        raise TransportError(f"{clean(argv[0], 300)}: cannot be run: {error.strerror}") from None
    stream = LocalStream(process, clean(argv[0], 300))
    try:
        yield stream
    finally:
        for number in range(3):
            if (end := process._transport.get_pipe_transport(number)) is not None:  # type: ignore[attr-defined]
                end.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), KILLED_SECONDS)
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        stream._listening.cancel()
