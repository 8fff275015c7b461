"""Files between here and a host: resumed where they stopped, hashed, on the disk before they get their name.

A file that is not whole stands as NAME.part; all of it is contents in order, so its length is how far it is. An
attempt goes on from there when both sides have the same SHA-256 over those bytes, and begins anew when they have not:
the source was changed. What is in flight is bounded by the SSH window, whatever the file's size.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from dispatch.host_tool import PART, Writer, open_below, parent_of, sync_directory
from dispatch.names import LeftOut, check_names
from dispatch.tool_client import Answer, Conversation, HostToolError, Say, ask, conversation, field
from dispatch.transport import HostRefusal, Transport, TransportError
from engine.errors import RunError
from engine.text import clean

BATCH: Final = 1 << 20
PROGRESS_SECONDS: Final = 0.1
RATE_SECONDS: Final = 5.0
PATIENCE_SECONDS: Final = 600.0
MAX_SIZE: Final = 1 << 53
_T = TypeVar("_T")


class TransferError(RunError):
    """A transfer that another attempt alone will not save: wrong contents, a full disk, no permission."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer is."""

    done: int
    """Bytes that are there, those of earlier attempts included."""
    total: int
    rate: float
    """Bytes per second lately; 0 while it is not known."""
    eta: float | None
    """Seconds to the end, None while that is not known."""


Tell = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Transferred:
    """A file that is whole where it should be."""

    size: int
    sha256: str
    resumed: int
    """Bytes that were there already: all of them, when nothing had to be done."""


@dataclass(frozen=True, slots=True)
class FetchedTree:
    """The files of a directory that was fetched."""

    files: Mapping[str, Transferred]
    left_out: tuple[LeftOut, ...]
    """What the directory has besides: nothing that could be fetched safely."""


class Meter:
    """Turns bytes into progress, told at most every PROGRESS_SECONDS, and at the end."""

    def __init__(self, total: int, tell: Tell | None) -> None:
        self._total = total
        self._tell = tell
        self._marks: list[tuple[float, int]] = []
        self._told = 0.0

    def at(self, done: int) -> None:
        """So many bytes are there."""
        now = time.monotonic()
        if self._tell is None or (now - self._told < PROGRESS_SECONDS and done < self._total):
            return
        self._told = now
        if self._marks and done < self._marks[-1][1]:
            self._marks.clear()
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[1][0] > RATE_SECONDS:
            del self._marks[0]
        (then, before), seconds = self._marks[0], now - self._marks[0][0]
        rate = (done - before) / seconds if seconds > 0 and then < now else 0.0
        left = self._total - done
        eta = 0.0 if left == 0 else (left / rate if rate > 0 else None)
        self._tell(Progress(done, self._total, rate, eta))


async def resuming(attempt: Callable[[], Awaitable[_T]], *, say: Say | None = None) -> _T:
    """Repeats an attempt while connections get lost, until one comes to its end.

    Args:
        attempt: goes on where the one before stopped.
        say: hears of each loss.

    Raises:
        TransportError: no attempt got anywhere for PATIENCE_SECONDS, or the host lets us in no more.
        TransferError: what another attempt does not mend.
    """
    failures, since = 0, time.monotonic()
    while True:
        started = time.monotonic()
        try:
            return await attempt()
        except HostRefusal:
            raise
        except TransportError as error:
            now = time.monotonic()
            if now - started > RATE_SECONDS:
                failures, since = 0, now
            if now - since > PATIENCE_SECONDS:
                raise
            pause = min(5.0, 0.1 * 2**failures) * random.uniform(0.5, 1.5)
            failures = min(failures + 1, 10)
            if say is not None:
                say(f"{error}; trying again")
            await asyncio.sleep(pause)


# From the host to here


class _Part:
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


def digest_of(descriptor: int, limit: int = MAX_SIZE) -> tuple[Any, int]:
    """A SHA-256 over a file's first bytes, to be gone on with, and their number."""
    digest, done = hashlib.sha256(), 0
    os.lseek(descriptor, 0, os.SEEK_SET)
    while done < limit and (data := os.read(descriptor, min(BATCH, limit - done))):
        digest.update(data)
        done += len(data)
    return digest, done


@contextlib.contextmanager
def _local(path: Path) -> Iterator[None]:
    """Errors of this machine's disk, each one clear message."""
    try:
        yield
    except OSError as error:
        raise TransferError(
            f"{clean(str(path), 300)}: {error.strerror or error}", do="what has arrived is kept and gone on with"
        ) from None


def _existing(root: Path, name: str, size: int | None) -> tuple[str, int] | None:
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


def split(remote: str) -> tuple[str, str]:
    """A file of the host as directory and name; both as the tool there takes them."""
    root, _, name = remote.rpartition("/")
    if not name or not remote.startswith(("/", "~/")):
        raise TransferError(f"{clean(remote, 300)}: no file on a host", expected="a path that begins with / or ~/")
    return ("~/." if root == "~" else root or "/"), name


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
    part = _Part(local.parent, local.name)
    with _local(local):
        local.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if sha256 is not None:
            existing = await asyncio.to_thread(_existing, local.parent, local.name, size)
            if existing is not None and existing[0] == sha256:
                Meter(existing[1], progress).at(existing[1])
                return Transferred(existing[1], sha256, existing[1])
        try:
            await asyncio.to_thread(part.open)
            request = {"op": "send", "root": root, "files": [[name, part.size, part.sha256, size]]}
            async with conversation(transport, request, python=python, say=say) as talk:
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


async def _take(talk: Conversation, part: _Part, header: _Header, meter: Meter, before: int) -> None:
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


async def _settle(part: _Part, sha256: str | None, what: str) -> None:
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
    with _local(local):
        local.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = os.open(local, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _hold(held, local)
            plan = await asyncio.to_thread(_plan, local, wanted)
            files = [[name, offset, sha256, wanted[name]] for name, (offset, sha256, _) in plan.items()]
            request = {"op": "send", "root": field(listing, "root", str), "files": files, "digest": True}
            async with conversation(transport, request, python=python, say=say) as talk:
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
                        part = _Part(local, name)
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
        finished = _existing(local, name, size)
        part = None if finished else _existing(local, name + PART, None)
        if finished:
            plan[name] = (finished[1], finished[0], True)
        elif part and 0 < part[1] <= size:
            plan[name] = (part[1], part[0], False)
        else:
            plan[name] = (0, None, False)
    return plan


# From here to the host


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
    with _local(local):
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
            with _local(source.path):
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
    with _local(source.path):
        descriptor = os.open(source.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        before = os.fstat(descriptor)

        def read(offset: int) -> bytes:
            data = os.pread(descriptor, min(BATCH, source.size - offset), offset)
            digest.update(data)
            return data

        with _local(source.path):
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
