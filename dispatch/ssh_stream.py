"""A command on an SSH host whose input and output are streamed; `dispatch.streams.open_stream` opens it."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Final, cast

import asyncssh

from dispatch.ssh import SSHTransport
from dispatch.transport import FILE_SECONDS, TransportError, TransportTimeout
from engine.text import clean

LEAST_WINDOW: Final = 2 << 20
WINDOW: Final = 32 << 20
"""Most bytes that the host may send ahead; about so many can wait here unread, too.

A wide window is for a long way alone: sshd fills its memory up to it and moves all of that with each packet, which
takes it seconds of processor time. At 100 ms it makes up for that twice over.
"""
RATE: Final = 320 << 20
"""Bytes a second that the window has room for, up to a round trip of 100 ms."""
MEASURE_SECONDS: Final = 0.1
MEASURE_TRIPS: Final = 5
QUEUE: Final = 4 << 20
"""From so many unread bytes on, the host is given no more leave to send."""
WRITE_AHEAD: Final = 4 << 20
MAX_ERRORS: Final = 64 << 10


class SSHStream(asyncssh.SSHClientSession[bytes]):
    """See `dispatch.streams.Stream`.

    asyncssh's own readers and writers would do; this one copies less, and lets more be on its way.

    Args:
        what: names the host and the command in messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._chunks: deque[bytes] = deque()
        self._queued = 0
        self._errors = b""
        self._channel: asyncssh.SSHClientChannel[bytes]
        self._paused = False
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False
        self._lost: str | None = None

    # Called by asyncssh

    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        """See asyncssh."""
        self._channel = chan
        chan.set_write_buffer_limits(WRITE_AHEAD)

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        """See asyncssh."""
        if datatype is not None:
            self._errors = (self._errors + data)[:MAX_ERRORS]
            return
        self._chunks.append(data)
        self._queued += len(data)
        self._arrived.set()
        if self._queued >= QUEUE and not self._paused:
            self._paused = True
            self._channel.pause_reading()

    def eof_received(self) -> bool:
        """See asyncssh."""
        self._closed = True
        self._arrived.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncssh."""
        if exc is not None:
            self._lost = clean(getattr(exc, "reason", None) or str(exc) or type(exc).__name__, 300)
        elif self._channel.get_exit_status() is None and self._channel.get_exit_signal() is None:
            self._lost = "while it ran"
        self._closed = True
        self._arrived.set()
        self._room.set()

    def pause_writing(self) -> None:
        """See asyncssh."""
        self._room.clear()

    def resume_writing(self) -> None:
        """See asyncssh."""
        self._room.set()

    # Called by us

    async def read(self, limit: int, *, timeout: float, at_least: int = 1) -> bytes:
        """See `dispatch.streams.Stream.read`."""
        while self._queued < min(at_least, limit) and not (self._closed and self._chunks):
            if self._lost is not None:
                raise TransportError(f"{self._what}: connection lost: {self._lost}")
            if self._closed:
                return b""
            self._arrived.clear()
            await self._wait(self._arrived, timeout)
        taken = [self._chunks.popleft()]
        size = len(taken[0])
        while self._chunks and size + len(self._chunks[0]) <= limit:
            taken.append(self._chunks.popleft())
            size += len(taken[-1])
        if size > limit:
            self._chunks.appendleft(taken[0][limit:])
            taken, size = [taken[0][:limit]], limit
        self._queued -= size
        if self._paused and self._queued < QUEUE // 2:
            self._paused = False
            self._channel.resume_reading()
        return taken[0] if len(taken) == 1 else b"".join(taken)

    async def write(self, data: bytes | memoryview, *, timeout: float) -> None:
        """See `dispatch.streams.Stream.write`."""
        if not self._room.is_set():
            await self._wait(self._room, timeout)
        try:
            self._channel.write(cast("bytes", data))  # it copies them, whatever they are
        except (OSError, asyncssh.Error) as error:
            raise TransportError(f"{self._what}: connection lost: {clean(str(error), 300)}") from None

    def errors(self) -> bytes:
        """See `dispatch.streams.Stream.errors`."""
        return self._errors

    async def _wait(self, event: asyncio.Event, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await event.wait()
        except TimeoutError:
            raise TransportTimeout(f"{self._what}: nothing for {timeout:g} s") from None


@contextlib.asynccontextmanager
async def ssh_stream(transport: SSHTransport, argv: Sequence[str], much: bool = False) -> AsyncIterator[SSHStream]:
    """A command on a host, over the transport's own connection.

    Args:
        transport: reaches the host.
        argv: the command.
        much: it will write a lot, for which it is found out how far away the host is.

    Raises:
        TransportError: the host cannot be reached, or the command not be run.
    """
    what = f"{transport.host}: {clean(' '.join(argv[:2]), 200)}"
    window = await _window(transport) if much else LEAST_WINDOW
    connection = await transport.connection()
    try:
        async with asyncio.timeout(FILE_SECONDS):
            channel, session = await connection.create_session(
                lambda: SSHStream(what),
                _line(argv),
                encoding=None,
                request_pty=False,
                send_env=None,
                window=min(WINDOW, window),
            )
    except TimeoutError:
        raise TransportTimeout(f"{what}: no answer after {FILE_SECONDS:g} s") from None
    except (OSError, asyncssh.Error) as error:
        raise TransportError(f"{what}: {clean(str(error), 300)}") from None
    try:
        yield cast("SSHStream", session)
    finally:
        channel.close()


async def _window(transport: SSHTransport) -> int:
    """As wide as the quickest of a few round trips needs it."""
    quickest, began = float("inf"), time.monotonic()
    for _ in range(MEASURE_TRIPS):
        before = time.monotonic()
        await transport.stat("/")
        quickest = min(quickest, time.monotonic() - before)
        if time.monotonic() - began > MEASURE_SECONDS:
            break
    return max(LEAST_WINDOW, min(WINDOW, int(RATE * quickest)))


def _line(argv: Sequence[str]) -> str:
    # Within single quotes fish takes a backslash for an escape, other shells do not; within double quotes all do.
    return "exec " + shlex.join(argv).replace("\\", "'\"\\\\\"'")
