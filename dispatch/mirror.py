"""A stream that stands on another host, kept here as it is read: the copy is an exact prefix of the original.

The length of the copy is the cursor: what stands in it is never fetched again, what is fetched is appended to it whole
lines at a time, and so a console that dies at any instant leaves a prefix that the next one goes on from. Before
anything is appended the host's file is held against it by hash. One that is shorter or differs is an error: neither
side is believed, nothing is cut and nothing is read again from the beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from dispatch.manifest import EVENTS
from dispatch.tool_client import ask
from dispatch.transport import FILE_SECONDS, RUN_SECONDS, Completed, FileStat, MissingFile, Transport, TransportError
from engine.errors import RunError
from engine.text import clean

REBOOT_SECONDS = 10.0
"""After so long without the host it may have been started anew, and what it has is looked at again."""
PIECE_BYTES = 1 << 20
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class LostTail(RunError):
    """The host was started anew and lost the end of the stream, which is here."""


class MirroredTransport:
    """A transport whose reads of one run's stream go through a copy on this machine.

    One console at a time keeps the copy; another one that follows the same run reads from the host and writes nothing.
    A copy that cannot be written (a full disk, say) is no reason to stop looking: `problem` says so, and reading goes
    on without it.

    Args:
        transport: reaches the host.
        run_dir: the run's directory on the host.
        copy: the run's directory here.
        python: the host's Python; the one of the host's settings without it.
        loss: accepts that the host lost the end of the stream with its last boot, and is told what; what is here is
            kept aside and no longer shown. Without it that is an error.

    Raises:
        RunError: the copy cannot be opened.
    """

    def __init__(
        self,
        transport: Transport,
        run_dir: str,
        copy: Path,
        *,
        python: str | None = None,
        loss: Callable[[str], object] | None = None,
    ) -> None:
        self.problem = ""
        self._transport = transport
        self._run_dir, self._events = run_dir, f"{run_dir}/{EVENTS}"
        self._copy = path = copy / EVENTS
        self._python, self._loss = python, loss
        self._checked = False
        self._away: float | None = None
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

        Raises:
            RunError: the host's stream is not the one that the copy is of.
            LostTail: it is, but the host lost the end of it; see `loss`.
        """
        if path != self._events or self._file is None:
            return await self._transport.read(path, offset, limit, timeout=timeout)
        if self._away is not None and time.monotonic() - self._away > REBOOT_SECONDS:
            self._checked = False
        try:
            # Whoever accepts a loss must not be shown what was lost.
            if not self._checked and (self._loss is not None or offset >= self._length - 1):
                await self.check()
            if self._file is not None and offset < self._length - 1:
                return os.pread(self._file, min(limit, self._length - offset), offset)
            data = await self._transport.read(path, offset, limit, timeout=timeout)
        except TransportError as error:
            if not isinstance(error, MissingFile) and self._away is None:
                self._away = time.monotonic()
            raise
        self._away = None
        if self._file is not None and not self._keep(data, offset):
            await self.check()
        return data

    async def check(self) -> None:
        """Holds the host's file against the copy; `read` does it before anything is appended.

        Raises:
            RunError, LostTail: see `read`.
            TransportError: the host cannot be asked.
        """
        if self._file is not None and self._length:
            ours = await asyncio.to_thread(self._digest)
            answer = await ask(self._transport, "hash", python=self._python, paths=[self._events], first=self._length)
            [there] = answer["files"]
            if "error" in there:
                raise self._differs(f"cannot be read: {clean(str(there['error']), 300)}", "the stream that is here")
            if there["size"] < self._length or there["sha256"] != ours:
                await self._explain(int(there["size"]), str(there["sha256"]), ours)
        self._checked, self._loss = True, None  # What is lost from now on was shown already.

    def _digest(self) -> str:
        assert self._file is not None
        digest = hashlib.sha256()
        for offset in range(0, self._length, PIECE_BYTES):
            digest.update(os.pread(self._file, min(PIECE_BYTES, self._length - offset), offset))
        return digest.hexdigest()

    async def _explain(self, size: int, theirs: str, ours: str) -> None:
        """Finds out what is not as it was; returns only where the loss is accepted."""
        assert self._file is not None
        same = await self._common(min(size, self._length))
        if same == 0:
            first = await self._transport.read(self._events, 0, PIECE_BYTES) if size else b""
            runs = [_field(line, "run") for line in (first, os.pread(self._file, PIECE_BYTES, 0))]
            if size and runs[0] != runs[1]:
                raise self._differs(f"is of run {runs[0]}", f"run {runs[1]}, of which the copy is")
        if same == 0 or not await self._rebooted():
            shorter = size < self._length
            what = f"has {size:,} bytes" if shorter else f"differs from byte {same:,} on (SHA-256 {theirs[:16]}…)"
            wanted = f"{self._length:,} or more, as the copy has" if shorter else f"{ours[:16]}…, as the copy has"
            raise self._differs(what, wanted)
        lost = os.pread(self._file, self._length - same, same).splitlines()
        span = f"events {_field(lost[0], 'seq')} to {_field(lost[-1], 'seq')}"
        what = f"{self.host} was started anew and lost the end of {self._events}: {span} are here only, in "
        if self._loss is None:
            raise LostTail(
                f"{what}{self._copy}",
                expected="them there as well",
                do=f"to go on without them: kdconsole --headless attach {self._copy.parent.name} --accept-loss "
                "(they are kept beside the copy)",
            )
        self._loss(f"{what}{self._put_aside(same)}")

    def _differs(self, what: str, expected: str) -> RunError:
        return RunError(
            f"{self.host}: {self._events} {what}",
            expected=f"{expected}: {self._copy}",
            do="see which of the two is right; if the host's is, move the copy away and attach again",
        )

    async def _common(self, end: int) -> int:
        """Bytes of whole lines that both begin with."""
        assert self._file is not None
        same = 0
        while same < end:
            ours = os.pread(self._file, min(PIECE_BYTES, end - same), same)
            theirs = await self._transport.read(self._events, same, len(ours))
            pairs = enumerate(zip(ours, theirs, strict=False))
            different = None if ours == theirs else next((at for at, (a, b) in pairs if a != b), None)
            equal = min(len(ours), len(theirs)) if different is None else different
            same += equal
            if equal < len(ours):
                break
        return _whole_lines(self._file, same)

    async def _rebooted(self) -> bool:
        """Whether the host was started anew since the run was first started; yes where it does not say."""
        try:
            now = (await self._transport.read(_BOOT_ID, 0, 100)).decode(errors="replace").strip()
            journal = await self._transport.read(f"{self._run_dir}/supervisor.jsonl", 0, 16 << 20)
        except MissingFile:
            return True
        boots = {_field(line, "supervisor", "boot_id") for line in journal.splitlines()} - {None}
        return any(boot != now for boot in boots)

    def _put_aside(self, end: int) -> Path:
        """Keeps all of the copy under another name and cuts it."""
        assert self._file is not None
        for number in itertools.count(1):
            path = self._copy.with_name(f"{EVENTS}.lost-{number}")
            try:
                aside = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                continue
            break
        try:
            with os.fdopen(aside, "wb") as file:
                for offset in range(0, self._length, PIECE_BYTES):
                    file.write(os.pread(self._file, min(PIECE_BYTES, self._length - offset), offset))
                file.flush()
                os.fsync(file.fileno())
            os.ftruncate(self._file, end)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise RunError(f"{path}: {error.strerror}", expected="room to keep what the host lost") from None
        self._length = end
        return path

    def _keep(self, data: bytes, offset: int) -> bool:
        """Appends the whole lines of what was read beyond the copy's end; False where it does not continue it."""
        assert self._file is not None
        known = self._length - offset
        if not 0 <= known <= len(data) or data[:known] != os.pread(self._file, known, offset):
            return False
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
        return True


async def check_copy(
    transport: Transport,
    run_dir: str,
    copy: Path,
    *,
    python: str | None = None,
    loss: Callable[[str], object] | None = None,
) -> None:
    """Holds a run's stream on its host against the copy here, before it goes on there; see `MirroredTransport`.

    Raises:
        RunError: they differ, or another console is writing the copy.
    """
    with MirroredTransport(transport, run_dir, copy, python=python, loss=loss) as kept:
        if not kept.keeping:
            raise RunError(f"{copy}: another console is following this run", do="close it, then try again")
        await kept.check()


def _cut_torn_tail(file: int) -> int:
    """Cuts off a last line that was not written whole; returns what remains, in bytes."""
    size = os.fstat(file).st_size
    end = _whole_lines(file, size)
    if end != size:
        os.ftruncate(file, end)
    return end


def _whole_lines(file: int, end: int) -> int:
    """How much of the first bytes of a file is whole lines."""
    while end > 0:
        begin = max(0, end - (1 << 16))
        newline = os.pread(file, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


def _field(text: bytes, *names: str) -> str | None:
    """A field of the first line's JSON object, as text; None where there is none."""
    try:
        value = json.loads(text.partition(b"\n")[0])
        for name in names:
            value = value[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return clean(str(value), 100)
