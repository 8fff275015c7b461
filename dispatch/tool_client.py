"""Requests to `dispatch.host_tool` on a host, and its answers; what comes from there is checked and cleaned here."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from dispatch.streams import Stream, open_stream, resolve
from dispatch.transport import LocalTransport, Transport, TransportError
from engine.errors import RunError
from engine.text import clean

STALL_SECONDS: Final = 60.0
"""The tool gives a sign of life every few seconds, so after so long without one it hangs."""
MAX_LINE: Final = 64 << 20
READ: Final = 256 << 10

Answer = dict[str, Any]
Say = Callable[[str], None]


class HostToolError(RunError):
    """The host could not do what it was asked for, and says why."""

    def __init__(self, what: str, *, number: str | None = None, do: str | None = None) -> None:
        super().__init__(what, do=do)
        self.number = number
        """The error's name, such as ENOSPC, where it was the system's."""


@functools.cache
def source() -> str:
    """The tool as it travels."""
    return Path(__file__).with_name("host_tool.py").read_text(encoding="utf-8")


async def python_of(transport: Transport) -> str:
    """The Python that a host's settings name, or our own on this machine."""
    if isinstance(transport, LocalTransport):
        return sys.executable
    settings = getattr(transport, "settings", None)
    return await resolve(transport, getattr(settings, "python", "python3"))


class Conversation:
    """One running tool: requests and contents go in, answers and contents come out."""

    def __init__(self, host: str, stream: Stream, say: Say | None) -> None:
        self._host = host
        self._stream = stream
        self._say = say
        self._buffer = b""

    async def tell(self, message: Mapping[str, object]) -> None:
        """Sends one line. When the tool has given up, its reason is raised instead of the broken pipe."""
        try:
            await self.send((json.dumps(message) + "\n").encode())
        except TransportError:
            while True:
                await self.answer()  # raises at the latest at the end of the output

    async def send(self, data: bytes | memoryview) -> None:
        """Sends content."""
        await self._stream.write(data, timeout=STALL_SECONDS)

    async def answer(self) -> Answer:
        """The next answer; those that only tell that work goes on are passed to `say`.

        Raises:
            HostToolError: the tool refused.
            TransportError: the connection was lost, or the tool ended without an answer.
        """
        while True:
            line = await self._line()
            if "error" in line:
                number = line.get("errno")
                raise HostToolError(
                    f"{self._host}: {clean(str(line['error']), 2000)}",
                    number=number if isinstance(number, str) else None,
                )
            if "busy" in line:
                self._tell(str(line["busy"]))
            elif "say" in line:
                self._tell(str(line["say"]))
            elif "alive" not in line:
                return line

    def _tell(self, text: str) -> None:
        if self._say is not None:
            self._say(f"{self._host}: {clean(text, 1000)}")

    async def _line(self) -> Answer:
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_LINE:
                raise HostToolError(f"{self._host}: sends too long a line")
            data = await self._stream.read(READ, timeout=STALL_SECONDS)
            if not data:
                raise self._ended()
            self._buffer += data
        raw, _, self._buffer = self._buffer.partition(b"\n")
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            raise HostToolError(f"{self._host}: answers {clean(repr(raw[:200]), 300)}, no JSON") from None
        if not isinstance(value, dict):
            raise HostToolError(f"{self._host}: answers no JSON object")
        return value

    def _ended(self) -> HostToolError | TransportError:
        told = self._stream.errors().decode(errors="replace").strip().splitlines()
        if told:
            return HostToolError(
                f"{self._host}: {clean(told[-1], 500)}", do="see whether `python` in hosts.yaml is right"
            )
        return TransportError(f"{self._host}: the command on the host ended in the middle")

    async def take(self, limit: int, at_least: int) -> bytes:
        """Some bytes of content, at most so many; see `Stream.read`."""
        if self._buffer:
            data, self._buffer = self._buffer[:limit], self._buffer[limit:]
            return data
        data = await self._stream.read(limit, timeout=STALL_SECONDS, at_least=at_least)
        if not data:
            raise self._ended()
        return data


@contextlib.asynccontextmanager
async def conversation(
    transport: Transport,
    request: Mapping[str, object],
    *,
    python: str | None = None,
    say: Say | None = None,
    much: bool = False,
) -> AsyncIterator[Conversation]:
    """Starts the tool with a request.

    Args:
        transport: reaches the host.
        request: `op` and what it needs.
        python: the host's Python, 3.11 or newer; the one of the host's settings without it.
        say: hears what takes long.
        much: megabytes are asked for.
    """
    python = await resolve(transport, python) if python else await python_of(transport)
    async with open_stream(transport, [python, "-P", "-c", source()], much=much) as stream:
        opened = Conversation(transport.host, stream, say)
        await opened.tell(request)
        yield opened


async def ask(
    transport: Transport, op: str, *, python: str | None = None, say: Say | None = None, **arguments: object
) -> Answer:
    """One request with one answer.

    Raises:
        HostToolError: the tool refused; its reason.
        TransportError: the host could not be asked.
    """
    async with conversation(transport, {"op": op, **arguments}, python=python, say=say) as opened:
        return await opened.answer()


def field(answer: Answer, name: str, kind: type) -> Any:
    """A field of an answer, of the expected type.

    Raises:
        HostToolError: it is missing or of another type.
    """
    value = answer.get(name)
    if type(value) is not kind:
        raise HostToolError(f"the host's answer has {clean(repr(value)[:200], 300)} as {name}")
    return value
