"""A host over SSH, behind the same protocol as this machine: one connection, kept alive, made again when it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shlex
import signal
import stat as modes
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast

import asyncssh

from dispatch.hosts import Host
from dispatch.ssh_link import CONNECT_SECONDS, KEEPALIVE_SECONDS, open_connection, reason
from dispatch.transport import (
    FILE_SECONDS,
    RUN_SECONDS,
    Completed,
    FileStat,
    MissingFile,
    TransportError,
    TransportTimeout,
)
from engine.text import clean

MAX_CHANNELS: Final = 6
"""Commands at once; OpenSSH allows ten sessions a connection by default, and files take one."""
MAX_OUTPUT: Final = 64 << 20
"""Most bytes that a command may write; its output is kept in memory."""
CLOSE_SECONDS: Final = 5.0
KILL_SECONDS: Final = 10.0
_FULL_SECONDS: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Between tries to get a channel."""

_LOST: Final = (asyncssh.SFTPNoConnection, asyncssh.SFTPConnectionLost, asyncssh.DisconnectError, ConnectionError)
_T = TypeVar("_T")


class _Files(NamedTuple):
    """The one channel for files, and the home directory there."""

    connection: asyncssh.SSHClientConnection
    sftp: asyncssh.SFTPClient
    home: str


class SSHTransport:
    """A host that is reached over SSH. It belongs to one event loop.

    Commands are argument vectors and are quoted for the login shell; files are reached over SFTP. A lost connection is
    a `TransportError`, and the next operation makes a new one. Nothing is forwarded: no agent, no port, no variable.

    Args:
        host: from hosts.yaml, or known to ssh_config alone.
        environ: where HOME, SSH_AUTH_SOCK and the place of hosts.yaml are read.
        connect_seconds: most that a connection may take, ssh_config's jumps included.
        keepalive_seconds: a silent link is asked for a sign of life so often, and lost after the second in vain.
    """

    def __init__(
        self,
        host: Host,
        environ: Mapping[str, str] = os.environ,
        *,
        connect_seconds: float = CONNECT_SECONDS,
        keepalive_seconds: float = KEEPALIVE_SECONDS,
    ) -> None:
        self.settings = host
        self._environ = environ
        self._seconds = {"connect_seconds": connect_seconds, "keepalive_seconds": keepalive_seconds}
        self._channels = asyncio.Semaphore(MAX_CHANNELS)
        self._killing = asyncio.Lock()
        self._connection = _Shared(self._connect, lambda connection: not connection.is_closed())
        self._files = _Shared(self._start_sftp, lambda files: not files.connection.is_closed())
        self._loose: set[asyncio.Task[Any]] = set()

    @property
    def host(self) -> str:
        """See `Transport.host`."""
        return self.settings.name

    async def connection(self, *, timeout: float = FILE_SECONDS) -> asyncssh.SSHClientConnection:
        """The connection, made if there is none."""
        async with self._bounded("connection", timeout):
            return await self._connection.get()

    async def resolve(self, path: str, *, timeout: float = FILE_SECONDS) -> str:
        """A path of the host made absolute: `~/` is the home directory there."""
        if not path.startswith("~/"):
            return path
        async with self._bounded(clean(path, 300), timeout):
            files = await self._files.get()
        return f"{files.home.rstrip('/')}/{path[2:]}"

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = RUN_SECONDS) -> Completed:
        """See `Transport.run`. On a lost connection it is unknown whether the command ran to its end."""
        async with self._bounded(clean(" ".join(argv[:4]), 200), timeout):
            connection = await self._connection.get()
            await self._channels.acquire()
            call = Call(connection, argv, stdin)
            call.task.add_done_callback(lambda _: self._channels.release())
            try:
                return await asyncio.shield(call.task)
            except asyncio.CancelledError:
                # Nobody waits for it any more; its channel is in use until it is gone.
                self._later(self._abandon(call))
                raise

    async def stat(self, path: str, *, timeout: float = FILE_SECONDS) -> FileStat | None:
        """See `Transport.stat`."""
        try:
            async with self._sftp(path, timeout) as sftp:
                found = await sftp.stat(path)
        except MissingFile:
            return None
        is_dir = modes.S_ISDIR(found.permissions or 0)
        return FileStat(found.size or 0, float(found.mtime or 0), is_dir)

    async def read(self, path: str, offset: int, limit: int, *, timeout: float = FILE_SECONDS) -> bytes:
        """See `Transport.read`."""
        async with self._sftp(path, timeout) as sftp:
            file = await sftp.open(path, "rb")
            try:
                data = await _read(file, offset, limit)
            finally:
                # Nobody waits for it: it would be a round trip more, and on a dead link a long one.
                self._later(_closed(file))
        return data

    async def list(self, path: str, *, timeout: float = FILE_SECONDS) -> tuple[str, ...]:
        """See `Transport.list`. Names are as the host gives them: whoever uses one as a path checks it first."""
        async with self._sftp(path, timeout) as sftp:
            return tuple(sorted(name for name in await sftp.listdir(path) if name not in (".", "..")))

    async def close(self) -> None:
        """Ends the connection; what runs on the host goes on."""
        self._files.drop()
        connection = self._connection.drop()
        if connection is not None:
            if self._loose and not connection.is_closed():
                await asyncio.wait(self._loose, timeout=CLOSE_SECONDS)
            connection.close()
            with contextlib.suppress(TimeoutError, OSError, asyncssh.Error):
                await asyncio.wait_for(connection.wait_closed(), CLOSE_SECONDS)
            connection.abort()

    # The connection

    @contextlib.asynccontextmanager
    async def _sftp(self, path: str, timeout: float) -> AsyncIterator[asyncssh.SFTPClient]:
        used: list[_Files] = []
        try:
            async with self._bounded(clean(path, 300), timeout):
                used.append(await self._files.get())
                yield used[0].sftp
        except TransportTimeout:
            # Its server does one thing after the other, so that whatever holds it up would hold up the next as well.
            self._give_up(used)
            raise
        except TransportError as error:
            if isinstance(error.__context__, _LOST):
                self._give_up(used)
            raise

    @contextlib.asynccontextmanager
    async def _bounded(self, what: str, timeout: float) -> AsyncIterator[None]:
        """One operation: it ends in time, and every failure becomes one of ours.

        What a time-out says of the link is left to the keepalives: other operations may be well on it.
        """
        try:
            async with asyncio.timeout(timeout):
                yield
        except TransportError:
            raise
        except TimeoutError:
            raise TransportTimeout(f"{self.host}: {what}: no answer after {timeout:g} s") from None
        except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath, asyncssh.SFTPNotADirectory) as error:
            raise MissingFile(f"{self.host}: {what}: {reason(error)}") from None
        except _LOST as error:
            raise TransportError(f"{self.host}: {what}: connection lost: {reason(error)}") from None
        except (asyncssh.Error, OSError) as error:
            raise TransportError(f"{self.host}: {what}: {reason(error)}") from None

    def _give_up(self, used: Sequence[_Files]) -> None:
        for files in used:
            self._files.drop(files)
            files.sftp.exit()

    async def _abandon(self, call: Call) -> None:
        async with self._killing:  # one after the other: they take a channel too
            await call.kill()

    async def _connect(self) -> asyncssh.SSHClientConnection:
        return await open_connection(self.settings, self._environ, **self._seconds)

    async def _start_sftp(self) -> _Files:
        connection = await self._connection.get()
        async with asyncio.timeout(FILE_SECONDS):
            sftp = await connection.start_sftp_client()
            return _Files(connection, sftp, str(await sftp.realpath(".")))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._loose.add(task)
        task.add_done_callback(self._loose.discard)


async def _read(file: asyncssh.SFTPClientFile, offset: int, limit: int) -> bytes:
    """Reads in pieces that are asked for at once, and takes them up to the first that the file did not fill.

    A file that grows meanwhile may fill a later piece: asyncssh's own parallel read puts zeros in between.
    """
    size = file.read_len or limit
    sizes = {begin: min(size, offset + limit - begin) for begin in range(offset, offset + limit, size)}
    reads = (file.read(wanted, begin) for begin, wanted in sizes.items())
    data = bytearray()
    for wanted, piece in zip(sizes.values(), await asyncio.gather(*reads, return_exceptions=True), strict=True):
        if isinstance(piece, BaseException):
            raise piece
        data += cast("bytes", piece)  # asyncssh types it as text, whatever the mode
        if len(piece) < wanted:
            break
    return bytes(data)


async def _closed(file: asyncssh.SFTPClientFile) -> None:
    with contextlib.suppress(OSError, asyncssh.Error):
        await file.close()


class _Shared(Generic[_T]):
    """Something slow to make, made once however many ask for it; whoever stops waiting does not stop the making."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, _T]], is_good: Callable[[_T], bool]) -> None:
        self._make, self._is_good = make, is_good
        self._task: asyncio.Task[_T] | None = None

    async def get(self) -> _T:
        """It, made anew if there is none or it is no good any more."""
        if self._task is None or not self._serves(self._task):
            self._task = asyncio.create_task(self._make())
            self._task.add_done_callback(_failed)  # it may be nobody's failure by then
        task = self._task
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # not whoever asked was cancelled, but the making
                raise TransportError("the connection was closed") from None
            raise

    def drop(self, stale: _T | None = None) -> _T | None:
        """Forgets it, unless it is another one by now than the stale one; returns what was there."""
        task = self._task
        if task is None or (stale is not None and (not task.done() or _failed(task) or task.result() is not stale)):
            return None
        self._task = None
        if not task.done():
            task.cancel()
            return None
        return None if _failed(task) else task.result()

    def _serves(self, task: asyncio.Task[_T]) -> bool:
        return not task.done() or (not _failed(task) and self._is_good(task.result()))


def _failed(task: asyncio.Future[Any]) -> bool:
    return task.cancelled() or task.exception() is not None


class Call:
    """One command on the host.

    The first line of its output says which process it is; what shells say before that (`.bashrc` may greet) is no
    output of the command. It can be killed by that, which not every sshd does when it is asked to.

    Args:
        connection: whose channel it gets.
        argv: the command.
        stdin: what it reads.
    """

    def __init__(self, connection: asyncssh.SSHClientConnection, argv: Sequence[str], stdin: bytes) -> None:
        self._connection = connection
        self._name = secrets.token_hex(8)
        self._pid: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._room = MAX_OUTPUT
        self.task = asyncio.create_task(self._work(argv, stdin))
        self.task.add_done_callback(_failed)

    async def kill(self) -> None:
        """Kills the command and what it started in its process group, if it still runs; ends in time."""
        try:
            async with asyncio.timeout(KILL_SECONDS):
                await asyncio.wait((self.task, self._pid), return_when=asyncio.FIRST_COMPLETED)
                if not self.task.done():
                    with contextlib.suppress(OSError, asyncssh.Error):
                        line = "exec " + _quoted(("sh", "-c", _KILL, "kd", str(self._pid.result()), self._name))
                        await self._connection.run(line, encoding=None, stdin=asyncssh.DEVNULL)
                    await asyncio.wait((self.task,))
        except TimeoutError:
            pass
        finally:
            self.task.cancel()

    async def _work(self, argv: Sequence[str], stdin: bytes) -> Completed:
        process = await self._start(command(argv, self._name))
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended without reading
                if stdin:
                    process.stdin.write(stdin)
                process.stdin.write_eof()
            stdout, stderr = await asyncio.gather(
                self._read(process.stdout, self._begin), self._read(process.stderr, lambda data: True)
            )
            await process.wait_closed()
        finally:
            process.close()
        status, ended_by = process.exit_status, process.exit_signal
        if status is None and ended_by is None:
            raise asyncssh.ConnectionLost("before it ended")
        if not self._pid.done():
            said = clean((stdout or stderr).decode(errors="replace").strip(), 200)
            raise OSError(f"the login shell there runs no commands: {said or f'exit status {status}'}")
        if ended_by is not None:
            number = getattr(signal, f"SIG{ended_by[0]}", signal.SIGKILL)
            return Completed(-int(number), stdout, stderr)
        return Completed(status or 0, stdout, stderr)

    async def _start(self, line: str) -> asyncssh.SSHClientProcess[bytes]:
        # sshd counts a session until it has noticed that its command ended, a little after we have.
        for seconds in _FULL_SECONDS:
            try:
                return await self._connection.create_process(line, encoding=None)
            except asyncssh.ChannelOpenError:
                await asyncio.sleep(seconds)
        return await self._connection.create_process(line, encoding=None)

    async def _read(self, reader: asyncssh.SSHReader[bytes], has_begun: Callable[[bytearray], bool]) -> bytes:
        data, begun = bytearray(), False
        while chunk := await reader.read(1 << 16):
            data += chunk
            self._room -= len(chunk)
            if self._room < 0:
                raise OSError(f"more than {MAX_OUTPUT >> 20} MiB of output")
            begun = begun or has_begun(data)
        return bytes(data)

    def _begin(self, data: bytearray) -> bool:
        """Takes the first line off, once it is there."""
        at = data.find(self._name.encode())
        end = data.find(b"\n", at) if at >= 0 else -1
        if end < 0:
            return False
        self._pid.set_result(int(data[at + len(self._name) : end]))
        del data[: end + 1]
        return True


_BEGIN: Final = 'echo "$1 $$"; KD_CALL=$1; export KD_CALL; shift; exec "$@"'
"""The pid stays the same: the shell is replaced by the command, so that a signal meets the latter."""
_KILL: Final = 'if [ ! -r /proc/self/environ ] || grep -aq "KD_CALL=$2" "/proc/$1/environ"; then kill -KILL "-$1"; fi'
"""Only if the process still is the one that was begun."""


def command(argv: Sequence[str], name: str) -> str:
    """A command line that the host's login shell (POSIX or fish) takes apart into exactly these arguments.

    Args:
        argv: the command.
        name: the first line of its output begins with it and has the number of its process.
    """
    return "exec " + _quoted(("sh", "-c", _BEGIN, "kd", name, *argv))


def _quoted(argv: Sequence[str]) -> str:
    # Within single quotes fish takes a backslash for an escape, other shells do not; within double quotes all do.
    return shlex.join(argv).replace("\\", "'\"\\\\\"'")
