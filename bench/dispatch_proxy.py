"""`python bench/dispatch_proxy.py PORT SECONDS`: a far way to a port of this machine; prints its own port.

What comes is passed on so many seconds later, in each direction, in its order and however much is on its way: a line of
any width and a certain length. A process of its own, so that it takes no time from those that it serves.
"""

from __future__ import annotations

import asyncio
import sys


class Half(asyncio.Protocol):
    """One end of a connection; what it hears goes to the other end."""

    other: Half | None = None
    transport: asyncio.Transport

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._loop = asyncio.get_running_loop()
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(1 << 30)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._loop.call_later(self._delay, self._pass_on, data)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._loop.call_later(self._delay, self._end)

    def join(self, other: Half) -> None:
        """From now on this is the other end."""
        self.other = other
        for data in self._early:
            other.transport.write(data)

    def _end(self) -> None:
        if self.other is not None:
            self.other.transport.close()

    def _pass_on(self, data: bytes) -> None:
        if self.other is None:
            self._early.append(data)
        elif not self.other.transport.is_closing():
            self.other.transport.write(data)


class Near(Half):
    """The end at whoever connects."""

    def __init__(self, delay: float, target: int) -> None:
        super().__init__(delay)
        self._target = target

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        super().connection_made(transport)
        self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        _, far = await self._loop.create_connection(lambda: Half(self._delay), "127.0.0.1", self._target)
        far.join(self)
        self.join(far)


async def main(target: int, delay: float) -> None:
    """Serves until it is killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Near(delay, target), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
