"""A host over SSH, behind the same protocol as this machine: one connection, kept alive, made again when it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import stat as modes
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final, cast

import asyncssh

from dispatch.host_keys import Address, address_of, explain, known_hosts, ssh_config, trusted_keys
from dispatch.hosts import Host
from dispatch.transport import (
    FILE_SECONDS,
    RUN_SECONDS,
    Completed,
    FileStat,
    HostRefusal,
    MissingFile,
    TransportError,
    TransportTimeout,
)
from engine.text import clean

CONNECT_SECONDS: Final = 20.0
KEEPALIVE_SECONDS: Final = 5.0
KEEPALIVE_COUNT: Final = 2
"""A link that answers to none of so many keepalives is lost: at most 15 s after its last sign of life."""
MAX_CHANNELS: Final = 6
"""At once; OpenSSH allows ten a connection by default."""

_CIPHERS: Final = (
    *("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com"),
    *("aes128-ctr", "aes192-ctr", "aes256-ctr"),
)
"""The quickest first: a GPU host has AES in hardware."""
_GONE = (asyncssh.SFTPNoConnection, asyncssh.SFTPConnectionLost, asyncssh.DisconnectError, asyncssh.ConnectionLost)


class _Client(asyncssh.SSHClient):
    """Keeps the key that was refused, for the message."""

    presented: asyncssh.SSHKey | None = None

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Called for a key that no known_hosts file has; never taken."""
        self.presented = key
        return False


class SSHTransport:
    """A host that is reached over SSH. It belongs to one event loop.

    Commands are argument vectors and are quoted for the login shell; files are reached over SFTP. A lost connection is
    a `TransportError`, and the next operation makes a new one. Nothing is forwarded: no agent, no port, no variable.

    Args:
        host: from hosts.yaml, or known to ssh_config alone.
        environ: where HOME, SSH_AUTH_SOCK and the place of hosts.yaml are read.
    """

    def __init__(self, host: Host, environ: Mapping[str, str] = os.environ) -> None:
        self.settings = host
        self._environ = environ
        self._connecting = asyncio.Lock()
        self._channels = asyncio.Semaphore(MAX_CHANNELS)
        self._link: tuple[asyncssh.SSHClientConnection, asyncssh.SFTPClient] | None = None
        self._home = ""

    @property
    def host(self) -> str:
        """See `Transport.host`."""
        return self.settings.name

    async def resolve(self, path: str, *, timeout: float = FILE_SECONDS) -> str:
        """A path of the host made absolute: `~/` is the home directory there."""
        if not path.startswith("~/"):
            return path
        async with self._sftp(path, timeout):
            home = self._home
        return f"{home}/{path[2:]}"

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = RUN_SECONDS) -> Completed:
        """See `Transport.run`. On a lost connection it is unknown whether the command ran to its end."""
        what = clean(" ".join(argv[:4]), 200)
        async with self._channels, self._using(what, timeout, keep=True) as (connection, _):
            process: asyncssh.SSHClientProcess[bytes] = await connection.create_process(
                "exec " + shlex.join(argv), encoding=None, request_pty=False, send_env=None
            )
            try:
                stdout, stderr = await process.communicate(stdin)
            finally:
                if process.exit_status is None and process.exit_signal is None:
                    with contextlib.suppress(OSError, asyncssh.Error):
                        process.kill()
                process.close()
            if process.exit_signal is None and process.exit_status is None:
                raise asyncssh.ConnectionLost("while it ran")
        if process.exit_signal is not None:
            number = getattr(signal, f"SIG{process.exit_signal[0]}", signal.SIGKILL)
            return Completed(-int(number), stdout, stderr)
        return Completed(process.exit_status or 0, stdout, stderr)

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
        async with self._sftp(path, timeout) as sftp, await sftp.open(path, "rb") as file:
            data = cast("bytes", await file.read(limit, offset))  # asyncssh types it as text, whatever the mode
        return data

    async def list(self, path: str, *, timeout: float = FILE_SECONDS) -> tuple[str, ...]:
        """See `Transport.list`. Names are as the host gives them: whoever uses one as a path checks it first."""
        async with self._sftp(path, timeout) as sftp:
            return tuple(sorted(name for name in await sftp.listdir(path) if name not in (".", "..")))

    async def close(self) -> None:
        """Ends the connection; what runs on the host goes on."""
        link, self._link = self._link, None
        if link is not None:
            link[0].close()
            with contextlib.suppress(TimeoutError, OSError, asyncssh.Error):
                await asyncio.wait_for(link[0].wait_closed(), 5.0)

    # The connection

    @contextlib.asynccontextmanager
    async def _sftp(self, path: str, timeout: float) -> AsyncIterator[asyncssh.SFTPClient]:
        async with self._using(clean(path, 300), timeout) as (_, sftp):
            yield sftp

    @contextlib.asynccontextmanager
    async def _using(
        self, what: str, timeout: float, keep: bool = False
    ) -> AsyncIterator[tuple[asyncssh.SSHClientConnection, asyncssh.SFTPClient]]:
        """The connection for one operation; every failure becomes one of ours, and a lost link is forgotten.

        A time-out forgets it too, unless `keep` is set: a slow command says nothing of the link, a slow file does.
        """
        link = None
        try:
            async with asyncio.timeout(timeout):
                link = await self._connected()
                yield link
        except TimeoutError:
            if not keep:
                self._forget(link)
            raise TransportTimeout(f"{self.host}: {what}: no answer after {timeout:g} s") from None
        except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath, asyncssh.SFTPNotADirectory) as error:
            raise MissingFile(f"{self.host}: {what}: {_reason(error)}") from None
        except _GONE as error:
            self._forget(link)
            raise TransportError(f"{self.host}: {what}: connection lost: {_reason(error)}") from None
        except asyncssh.SFTPError as error:
            raise TransportError(f"{self.host}: {what}: {_reason(error)}") from None
        except (asyncssh.Error, OSError) as error:
            self._forget(link)
            raise TransportError(f"{self.host}: {what}: {_reason(error)}") from None

    def _forget(self, link: tuple[asyncssh.SSHClientConnection, asyncssh.SFTPClient] | None) -> None:
        if link is not None:
            link[0].abort()
            if self._link is link:
                self._link = None

    async def _connected(self) -> tuple[asyncssh.SSHClientConnection, asyncssh.SFTPClient]:
        async with self._connecting:
            if self._link is None or self._link[0].is_closed():
                self._link = None
                async with asyncio.timeout(CONNECT_SECONDS):
                    self._link = await self._connect()
            return self._link

    async def _connect(self) -> tuple[asyncssh.SSHClientConnection, asyncssh.SFTPClient]:
        host, client = self.settings, _Client()
        address = address_of(host, self._environ)
        options = {
            "port": address.port,
            **({} if host.user is None else {"username": host.user}),
            **({} if host.identity is None else {"client_keys": [str(host.identity)]}),
        }
        try:
            connection = await asyncssh.connect(
                host.endpoint,
                config=ssh_config(self._environ) or None,
                known_hosts=known_hosts(self._environ),
                client_factory=lambda: client,
                encryption_algs=_CIPHERS,
                compression_algs=("none",),
                preferred_auth=("publickey",),
                keepalive_interval=KEEPALIVE_SECONDS,
                keepalive_count_max=KEEPALIVE_COUNT,
                connect_timeout=CONNECT_SECONDS,
                login_timeout=CONNECT_SECONDS,
                agent_forwarding=False,
                x11_forwarding=False,
                send_env=None,
                **options,
            )
        except asyncssh.HostKeyNotVerifiable as error:
            raise self._untrusted(address, client, error) from None
        except asyncssh.PermissionDenied as error:
            raise self._denied(error) from None
        except TimeoutError:
            raise TransportTimeout(f"{self.host}: {address.host}:{address.port}: no answer in time") from None
        except (OSError, asyncssh.Error) as error:
            raise TransportError(
                f"{self.host}: cannot connect to {clean(address.host, 300)}:{address.port}: {_reason(error)}",
                do="what runs there is unknown, not failed",
            ) from None
        try:
            sftp = await connection.start_sftp_client()
            self._home = str(await sftp.realpath("."))
        except BaseException:
            connection.abort()
            raise
        return connection, sftp

    def _untrusted(self, address: Address, client: _Client, error: asyncssh.Error) -> TransportError:
        if client.presented is None:
            return HostRefusal(f"{self.host}: host key: {_reason(error)}")
        return explain(self.host, address, client.presented, trusted_keys(address, self._environ))

    def _denied(self, error: asyncssh.PermissionDenied) -> TransportError:
        host = self.settings
        tried = f"the key {clean(str(host.identity), 300)}" if host.identity else "the keys of agent and ssh_config"
        return HostRefusal(
            f"{self.host}: the host lets nobody in with {tried}: {_reason(error)}",
            do=f"see whether `ssh -v {clean(host.endpoint, 200)}` gets in; set `user` and `identity` in hosts.yaml",
        )


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return clean(str(reason), 300)
