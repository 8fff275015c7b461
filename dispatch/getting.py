"""Files from a host to here; see `dispatch.transfer` for what a transfer promises."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dispatch.host_tool import PART
from dispatch.names import LeftOut, check_names
from dispatch.part import Part, existing
from dispatch.tool_client import Conversation, HostToolError, Say, ask, conversation, field
from dispatch.transfer import BATCH, MAX_SIZE, Meter, Tell, TransferError, Transferred, local_errors, split
from dispatch.transport import Transport
from engine.text import clean


@dataclass(frozen=True, slots=True)
class FetchedTree:
    """The files of a directory that was fetched."""

    files: Mapping[str, Transferred]
    left_out: tuple[LeftOut, ...]
    """What the directory has besides: nothing that could be fetched safely."""


async def get(
    transport: Transport,
    remote: str,
    local: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    progress: Tell | None = None,
    say: Say | None = None,
    python: str | None = None,
) -> Transferred:
    """Fetches a file; one attempt, which goes on where an earlier one stopped (see `resuming`).

    Args:
        transport: reaches the host.
        remote: the file there, no symbolic link.
        local: where it goes; replaced when it is there with other contents.
        sha256: what it must have. Without it a file that is written to meanwhile is an error.
        size: in bytes, what it must have; with `sha256` as well only so much of a longer file is taken.
        progress: hears how far it is.
        say: hears what takes long.
        python: the host's Python; by its settings without it.

    Raises:
        TransferError: contents, disk or permissions are wrong; what has arrived is kept unless it is wrong.
        HostToolError: the host does not give the file.
        TransportError: the connection was lost; what has arrived is kept.
    """
    local = Path(os.path.abspath(local))
    root, name = split(remote)
    what = f"{transport.host}: {clean(remote, 300)}"
    part = Part(local.parent, local.name)
    with local_errors(local):
        local.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if sha256 is not None:
            have = await asyncio.to_thread(existing, local.parent, local.name, size)
            if have is not None and have[0] == sha256:
                Meter(have[1], progress).at(have[1])
                return Transferred(have[1], sha256, have[1])
        try:
            await asyncio.to_thread(part.open)
            request = {"op": "send", "root": root, "files": [[name, part.size, part.sha256, size]]}
            async with conversation(transport, request, python=python, say=say, much=True) as talk:
                header = await _header(talk, name, size, part.size)
                if size is not None and sha256 is None and header.there != size:
                    raise TransferError(f"{what}: has {header.there:,} bytes", expected=f"{size:,}")
                meter = Meter(header.size, progress)
                await _take(talk, part, header, meter, 0)
                trailer = await talk.answer()
                if sha256 is None and trailer.get("changed"):
                    raise TransferError(f"{what}: was changed while it was fetched", do="try again")
                await _settle(part, sha256, what)
        finally:
            await asyncio.to_thread(part.close)
    return Transferred(header.size, part.sha256, header.start)


@dataclass(frozen=True, slots=True)
class _Header:
    size: int
    start: int
    there: int


async def _header(talk: Conversation, name: str, size: int | None, offset: int) -> _Header:
    answer = await talk.answer()
    header = _Header(field(answer, "size", int), field(answer, "from", int), field(answer, "there", int))
    if answer.get("name") != name or header.start not in (0, offset) or not header.start <= header.size < MAX_SIZE:
        raise HostToolError(f"{clean(name, 300)}: the host answers with another file or size")
    if size is not None and header.size != size:
        raise HostToolError(f"{clean(name, 300)}: the host answers with {header.size:,} bytes, expected {size:,}")
    return header


async def _take(talk: Conversation, part: Part, header: _Header, meter: Meter, before: int) -> None:
    """Contents of one file into its part. While one batch is hashed and written, the next one arrives."""
    await asyncio.to_thread(part.start, header.start, header.size)
    done, batch, gathered = header.start, list[bytes](), 0
    writing: asyncio.Task[None] | None = None
    meter.at(before + done)
    try:
        while done < header.size:
            data = await talk.take(min(header.size - done, 2 * BATCH), BATCH)
            batch.append(data)
            gathered += len(data)
            done += len(data)
            if gathered >= BATCH:
                if writing is not None:
                    await writing
                writing = asyncio.create_task(asyncio.to_thread(part.write, batch))
                batch, gathered = [], 0
                meter.at(before + done)
    finally:
        if writing is not None:
            await writing
        if batch:
            await asyncio.to_thread(part.write, batch)
    meter.at(before + done)


async def _settle(part: Part, sha256: str | None, what: str) -> None:
    found = part.sha256
    if sha256 is not None and found != sha256:
        await asyncio.to_thread(part.discard)
        raise TransferError(f"{what}: arrived with SHA-256 {found}", expected=clean(sha256, 100))
    await asyncio.to_thread(part.commit)


async def get_tree(
    transport: Transport,
    remote: str,
    local: Path,
    *,
    want: Callable[[str], bool] = lambda _: True,
    sums: Mapping[str, str] | None = None,
    progress: Tell | None = None,
    say: Say | None = None,
    python: str | None = None,
) -> FetchedTree:
    """Fetches a directory's regular files; one attempt, which goes on where an earlier one stopped.

    Files that grow meanwhile are taken as long as they were when the directory was listed. Each is compared with the
    SHA-256 that the host computes from what it reads, and with `sums` where they have it.

    Args:
        transport: reaches the host.
        remote: the directory there.
        local: the directory here; made if missing, and what else is in it stays.
        want: of a name below the directory, whether to fetch it.
        sums: SHA-256 by name, from a manifest.
        progress: hears how far all of it is.
        say: hears what takes long.
        python: the host's Python; by its settings without it.

    Raises:
        TransferError, HostToolError, TransportError: see `get`.
    """
    sums = sums or {}
    local = Path(os.path.abspath(local))
    listing = await ask(transport, "tree", root=remote, python=python, say=say)
    listed, left_out = check_names(listing, transport.host)
    wanted = {name: size for name, size in listed.items() if want(name)}
    fetched: dict[str, Transferred] = {}
    with local_errors(local):
        local.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = os.open(local, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _hold(held, local)
            plan = await asyncio.to_thread(_plan, local, wanted)
            files = [[name, offset, sha256, wanted[name]] for name, (offset, sha256, _) in plan.items()]
            request = {"op": "send", "root": field(listing, "root", str), "files": files, "digest": True}
            async with conversation(transport, request, python=python, say=say, much=True) as talk:
                meter, before = Meter(sum(wanted.values()), progress), 0
                for name, (offset, _, finished) in plan.items():
                    what = f"{transport.host}: {clean(name, 300)}"
                    header = await _header(talk, name, wanted[name], offset)
                    if finished and header.start == header.size == offset:
                        sha256 = field(await talk.answer(), "sha256", str)
                        _agree(sha256, sums.get(name), what)
                        meter.at(before + header.size)
                    else:
                        start = 0 if finished else header.start
                        part = Part(local, name)
                        try:
                            await asyncio.to_thread(part.open)
                            await _take(talk, part, _Header(header.size, start, header.there), meter, before)
                            sha256 = field(await talk.answer(), "sha256", str)
                            _agree(sha256, sums.get(name), what)
                            await _settle(part, sha256, what)
                        finally:
                            await asyncio.to_thread(part.close)
                    before += header.size
                    fetched[name] = Transferred(header.size, sha256, header.start)
        finally:
            os.close(held)
    return FetchedTree(fetched, left_out)


def _hold(directory: int, path: Path) -> None:
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TransferError(f"{clean(str(path), 300)}: is being fetched into by another process") from None


def _agree(found: str, expected: str | None, what: str) -> None:
    if expected is not None and found != expected:
        raise TransferError(f"{what}: has SHA-256 {found}", expected=f"{clean(expected, 100)}, which its manifest has")


def _plan(local: Path, wanted: Mapping[str, int]) -> dict[str, tuple[int, str | None, bool]]:
    """Of each name: how many bytes are here, their SHA-256, and whether that is a finished file."""
    plan: dict[str, tuple[int, str | None, bool]] = {}
    for name, size in wanted.items():
        finished = existing(local, name, size)
        part = None if finished else existing(local, name + PART, None)
        if finished:
            plan[name] = (finished[1], finished[0], True)
        elif part and 0 < part[1] <= size:
            plan[name] = (part[1], part[0], False)
        else:
            plan[name] = (0, None, False)
    return plan
