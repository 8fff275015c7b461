"""Files from here to a host; see `dispatch.transfer` for what a transfer promises."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatch.tool_client import Answer, Conversation, HostToolError, Say, conversation, field
from dispatch.transfer import BATCH, Meter, Tell, TransferError, Transferred, digest_of, local_errors, split
from dispatch.transport import Transport, TransportError
from engine.errors import RunError
from engine.text import clean


@dataclass(frozen=True, slots=True)
class Source:
    """A file here that is sent."""

    path: Path
    name: str
    """Below the directory there."""
    size: int
    sha256: str | None = None


async def put(
    transport: Transport,
    local: Path,
    remote: str,
    *,
    sha256: str | None = None,
    progress: Tell | None = None,
    say: Say | None = None,
    python: str | None = None,
) -> Transferred:
    """Sends a file; one attempt, which goes on where an earlier one stopped (see `resuming`).

    The host computes the SHA-256 of what it writes; the file gets its name there when that is right and the disk has
    it. Two at once: the second waits.

    Args:
        transport: reaches the host.
        local: the file.
        remote: where it goes; replaced when it is there with other contents.
        sha256: what it has; when the host has it already, nothing is sent.
        progress: hears how far the host is.
        say: hears what takes long.
        python: the host's Python; by its settings without it.

    Raises:
        TransferError: the file cannot be read, or was changed meanwhile.
        HostToolError: the host does not take it: full disk, no permission. What has arrived is kept.
        TransportError: the connection was lost; what has arrived is kept.
    """
    root, name = split(remote)
    with local_errors(local):
        size = os.stat(local).st_size
    source = Source(local, name, size, sha256)
    request = {"op": "receive", "root": root}
    digests, resumed = await _send(transport, request, [source], progress, say, python)
    return Transferred(size, digests[0], resumed)


async def put_tree(
    transport: Transport,
    sources: Sequence[Source],
    root: str,
    place: str,
    *,
    progress: Tell | None = None,
    say: Say | None = None,
    python: str | None = None,
) -> int:
    """Sends files into the directory `root`, which becomes `place` when all of them are there and right.

    Both are paths of the host and stand beside each other. Returns the bytes that were there already: all of them,
    when the tree stands at its place. For errors see `put`; every source has its SHA-256.
    """
    request = {"op": "receive", "root": root, "place": place}
    return (await _send(transport, request, sources, progress, say, python))[1]


async def _send(
    transport: Transport,
    request: Mapping[str, object],
    sources: Sequence[Source],
    progress: Tell | None,
    say: Say | None,
    python: str | None,
) -> tuple[list[str], int]:
    meter = Meter(sum(source.size for source in sources), progress)
    files = [[source.name, source.size, source.sha256] for source in sources]
    async with conversation(transport, {**request, "files": files}, python=python, say=say) as talk:
        answer = await talk.answer()
        if answer.get("present") is True:
            total = sum(source.size for source in sources)
            meter.at(total)
            return [source.sha256 or "" for source in sources], total
        have = field(answer, "have", list)
        if len(have) != len(sources):
            raise HostToolError(f"{transport.host}: answers for other files")
        going = [await asyncio.to_thread(_compare, *pair) for pair in zip(sources, have, strict=True)]
        await talk.tell({"from": [start for start, _ in going]})
        listening = asyncio.create_task(_listen(talk, meter))
        try:
            digests = [
                source.sha256 or "" if digest is None else await _contents(talk, source, start, digest)
                for source, (start, digest) in zip(sources, going, strict=True)
            ]
            await listening
        except HostToolError:
            raise
        except TransportError:
            await listening  # the host's reason, if it had time to give one, and not the broken pipe
            raise
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError, TransportError, RunError):
                await listening
    meter.at(sum(source.size for source in sources))
    return digests, sum(start for start, _ in going)


async def _listen(talk: Conversation, meter: Meter) -> Answer:
    while True:
        answer = await talk.answer()
        if answer.get("done") is True:
            return answer
        meter.at(field(answer, "at", int))


def _compare(source: Source, have: object) -> tuple[int, Any]:
    """Where to go on with a file, and the digest so far; no digest where the host has all of it, finished."""
    match have:
        case [int(offset), str(sha256)] if 0 < offset <= source.size:
            if offset == source.size and sha256 == source.sha256:
                return offset, None
            with local_errors(source.path):
                descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    digest, size = digest_of(descriptor, offset)
                finally:
                    os.close(descriptor)
            if size == offset and digest.hexdigest() == sha256:
                return offset, digest
    return 0, hashlib.sha256()


async def _contents(talk: Conversation, source: Source, start: int, digest: Any) -> str:
    """Sends the rest of one file and its SHA-256. While one batch is on its way, the next is read and hashed."""
    changed = TransferError(f"{clean(str(source.path), 300)}: was changed while it was sent", do="try again")
    with local_errors(source.path):
        descriptor = os.open(source.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        before = os.fstat(descriptor)
        rooms = [memoryview(bytearray(min(BATCH, source.size))) for _ in range(2)]

        def read(offset: int) -> memoryview:
            room = rooms[0][: source.size - offset]
            rooms.reverse()
            data = room[: os.preadv(descriptor, [room], offset)]
            digest.update(data)
            return data

        with local_errors(source.path):
            ahead = asyncio.create_task(asyncio.to_thread(read, start))
            try:
                while start < source.size:
                    data = await ahead
                    if not data:
                        raise changed
                    start += len(data)
                    ahead = asyncio.create_task(asyncio.to_thread(read, start))
                    await talk.send(data)
            finally:
                await asyncio.wait([ahead])
            after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    found: str = digest.hexdigest()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or after.st_size != source.size:
        raise changed
    if source.sha256 is not None and found != source.sha256:
        raise TransferError(f"{clean(str(source.path), 300)}: has SHA-256 {found}", expected=clean(source.sha256, 100))
    await talk.send(digest.digest())
    return found
