"""A TCP proxy between console and sshd: it loses connections, falls silent, delays, throttles and damages them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from types import TracebackType

_PIECE = 1 << 16
_IN_FLIGHT = 64
"""Pieces in one direction that were read and are not sent on yet."""


class Proxy:
    """Carries connections to a port of this machine; belongs to one event loop.

    Args:
        target: the port.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self._flows = asyncio.Event()
        self._flows.set()
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.connections = 0
        """How many were made through it."""
        self.delay = 0.0
        """Seconds that what comes from now on is held back, in each direction."""
        self.rate: float | None = None
        """Bytes per second and direction; None: as quick as it goes."""

    def freeze(self) -> None:
        """From now on nothing comes through, neither bytes nor the end of a connection."""
        self._flows.clear()

    def thaw(self) -> None:
        """What was held back comes through now."""
        self._flows.set()

    def silence(self) -> None:
        """The connections of this moment carry nothing any more and never end; later ones are as ever."""
        for link in self._links:
            link.silent = True

    def kill(self) -> None:
        """Resets every connection, the silent ones too."""
        for link in list(self._links):
            link.reset()

    def end_silent(self) -> None:
        """Resets the connections that were silenced: whoever still waits on one learns it now."""
        for link in list(self._links):
            if link.silent:
                link.reset()

    def end(self) -> None:
        """Closes every connection in an orderly way, without a word to what it carries."""
        for link in list(self._links):
            link.close()

    def damage(self) -> None:
        """Turns one bit of the next piece of each connection that comes from the host."""
        for link in self._links:
            link.damaged = True

    def refuse(self) -> None:
        """Resets every connection, and takes none until `accept`."""
        assert self._server is not None
        self._server.close()
        self._server = None
        self.kill()

    async def accept(self) -> None:
        """Takes connections, on the same port as before."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)

    async def __aenter__(self) -> Proxy:
        await self.accept()
        assert self._server is not None
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        self.kill()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:  # nobody listens there: neither do we
            _reset(writer)
            return
        link = _Link(self, writer, back)
        self._links.add(link)
        with contextlib.suppress(asyncio.CancelledError):
            await link.carry(reader, there)
        self._links.discard(link)

    async def flowing(self) -> None:
        """Returns when nothing is frozen."""
        await self._flows.wait()


class _Link:
    """One connection: the console's half and the host's."""

    def __init__(self, proxy: Proxy, console: asyncio.StreamWriter, host: asyncio.StreamWriter) -> None:
        self._proxy, self._console, self._host = proxy, console, host
        self._tasks: list[asyncio.Task[None]] = []
        self.silent = self.damaged = False

    def reset(self) -> None:
        for writer in (self._console, self._host):
            _reset(writer)
        self._stop()

    def close(self) -> None:
        for writer in (self._console, self._host):
            writer.close()
        self._stop()

    def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def carry(self, from_console: asyncio.StreamReader, from_host: asyncio.StreamReader) -> None:
        there: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_IN_FLIGHT)
        back: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_IN_FLIGHT)
        self._tasks = [
            asyncio.create_task(work)
            for work in (
                self._take(from_console, there),
                self._give(there, self._host),
                self._take(from_host, back),
                self._give(back, self._console),
            )
        ]
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _take(self, source: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        now = asyncio.get_running_loop().time
        data = b" "
        while data:
            try:
                data = await source.read(_PIECE)
            except OSError:
                data = b""
            await queue.put((now() + self._proxy.delay, data))

    async def _give(self, queue: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter) -> None:
        now = asyncio.get_running_loop().time
        with contextlib.suppress(OSError):
            while True:
                due, data = await queue.get()
                if due > now():
                    await asyncio.sleep(due - now())
                await self._proxy.flowing()
                if self.silent:
                    continue
                if not data:
                    target.close()
                    return
                if self.damaged and target is self._console:
                    self.damaged = False
                    data = data[:-1] + bytes([data[-1] ^ 1])
                await self._send(data, target)

    async def _send(self, data: bytes, target: asyncio.StreamWriter) -> None:
        begin = 0
        while begin < len(data):
            rate = self._proxy.rate
            size = _PIECE if rate is None else max(1, int(rate * 0.02))
            target.write(data[begin : begin + size])
            await target.drain()
            if rate is not None:
                await asyncio.sleep(size / rate)
            begin += size


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection with RST, as a host does that knows nothing of it."""
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
