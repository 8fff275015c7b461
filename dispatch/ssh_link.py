"""Connections over SSH: strict host keys at every hop, keys and agent for authentication only, nothing forwarded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

import asyncssh

from dispatch.hosts import Host
from dispatch.known_hosts import Known, explain
from dispatch.ssh_route import Hop, Keys, way_to
from dispatch.transport import HostRefusal, TransportError, TransportTimeout
from engine.errors import ExitCode
from engine.text import clean

CONNECT_SECONDS: Final = 20.0
KEEPALIVE_SECONDS: Final = 5.0
KEEPALIVE_COUNT: Final = 2
"""A link that answers to none of so many keepalives is lost: at most 15 s after its last sign of life."""

_CIPHERS: Final = (
    *("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com"),
    *("aes128-ctr", "aes192-ctr", "aes256-ctr"),
)
"""The quickest first: a GPU host has AES in hardware."""
_IGNORE: Final = 2
"""SSH_MSG_IGNORE of RFC 4253."""
_HOST_KEYS: Final = {
    "ssh-ed25519": ("ssh-ed25519",),
    "ecdsa-sha2-nistp256": ("ecdsa-sha2-nistp256",),
    "ecdsa-sha2-nistp384": ("ecdsa-sha2-nistp384",),
    "ecdsa-sha2-nistp521": ("ecdsa-sha2-nistp521",),
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
}
"""Kinds of host keys, and the signatures that each is asked for."""
_CERTIFIED: Final = "-cert-v01@openssh.com"

# What asyncssh has to say comes to us as exceptions; a log line would go across the screen.
logging.getLogger("asyncssh").addHandler(logging.NullHandler())


_UNKNOWN: Final = "what runs there is unknown, not failed"


class Unreachable(TransportTimeout):
    """No connection in time."""

    exit_code = ExitCode.CONNECTION


async def open_connection(
    host: Host,
    environ: Mapping[str, str] = os.environ,
    *,
    connect_seconds: float = CONNECT_SECONDS,
    keepalive_seconds: float = KEEPALIVE_SECONDS,
) -> asyncssh.SSHClientConnection:
    """A connection to a host whose key is trusted, over the hosts that ssh_config puts before it.

    Raises:
        Unreachable: no connection in time.
        HostRefusal: the host is not the one that was trusted, or does not let us in.
        TransportError: no connection.
        ConfigError: a known_hosts file cannot be read.
    """
    over = None
    try:
        async with asyncio.timeout(connect_seconds):
            hops = await asyncio.to_thread(way_to, host, environ)
            over = await _over(host, hops[:-1], keepalive_seconds)
            connection = await _open(host.name, hops[-1], over, keepalive_seconds)
    except BaseException as error:
        if over is not None:
            over.abort()
        if isinstance(error, TimeoutError):
            raise Unreachable(f"{host.name}: no connection after {connect_seconds:g} s", do=_UNKNOWN) from None
        raise
    if over is not None:
        connection.set_tunnel(over)  # so that it ends with this one
    return connection


async def presented_key(
    host: Host, environ: Mapping[str, str] = os.environ, *, connect_seconds: float = CONNECT_SECONDS
) -> asyncssh.SSHKey:
    """The key that a host presents now; the connection ends there, before anything of ours is sent.

    Raises:
        TransportError: it cannot be reached, or a host before it is not trusted.
    """
    over = None
    try:
        async with asyncio.timeout(connect_seconds):
            hops = await asyncio.to_thread(way_to, host, environ)
            over = await _over(host, hops[:-1], KEEPALIVE_SECONDS)
            return await _look(host.name, hops[-1], over)
    except TimeoutError:
        raise Unreachable(f"{host.name}: no connection after {connect_seconds:g} s", do=_UNKNOWN) from None
    finally:
        if over is not None:
            over.abort()


async def _over(host: Host, hops: Sequence[Hop], keepalive_seconds: float) -> asyncssh.SSHClientConnection | None:
    """The connection that the last one goes over; each ends the one before it."""
    over = None
    try:
        for hop in hops:
            connection = await _open(f"{host.name}: over {clean(hop.name, 200)}", hop, over, keepalive_seconds)
            if over is not None:
                connection.set_tunnel(over)
            over = connection
    except BaseException:
        if over is not None:
            over.abort()
        raise
    return over


class _Client(asyncssh.SSHClient):
    """Says which host keys are believed, and keeps the one that is not, for the message."""

    def __init__(self, hop: Hop, believes: bool) -> None:
        self._hop, self._believes = hop, believes
        self.known = Known()
        self.presented: asyncssh.SSHKey | None = None

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        """See asyncssh; it sends an empty packet before every other, which is of use with CBC alone."""
        send = conn.send_packet

        def without_empty(kind: int, *args: bytes, **more: Any) -> None:
            if kind != _IGNORE:
                send(kind, *args, **more)

        conn.send_packet = without_empty  # type: ignore[method-assign, assignment]

    def believed(self, _host: str, _addr: str, _port: int | None) -> Sequence[Sequence[asyncssh.SSHKey]]:
        """The host's keys, authorities and revoked keys, as asyncssh asks for them."""
        if not self._believes:
            return (), (), ()
        self.known = self._hop.known
        keys = {*self.known.keys, *self.known.any_port} - {*self.known.revoked}
        # Revoked keys are refused by being none of these; only what authorities certify has to be looked up there.
        return tuple(keys), self.known.authorities, self.known.revoked if self.known.authorities else ()

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Called for a key that is not believed; never taken."""
        self.presented = key
        return False


async def _open(
    who: str, hop: Hop, over: asyncssh.SSHClientConnection | None, keepalive_seconds: float
) -> asyncssh.SSHClientConnection:
    client = _Client(hop, believes=True)
    where = f"{clean(hop.address.host, 300)}:{hop.address.port}"
    try:
        return await _connect(hop, client, over, keepalive_seconds)
    except asyncssh.HostKeyNotVerifiable as error:
        if client.presented is None:
            raise HostRefusal(f"{who}: the host key of {where} is not trusted: {reason(error)}") from None
        raise explain(who, hop.address, client.presented, client.known, hop.trust) from None
    except asyncssh.PermissionDenied as error:
        raise _denied(who, hop, error) from None
    except (OSError, asyncssh.Error, ValueError) as error:
        if isinstance(error, TimeoutError):
            raise
        if "Too many authentication failures" in str(error):
            raise _denied(who, hop, error) from None
        raise TransportError(f"{who}: cannot connect to {where}: {reason(error)}", do=_UNKNOWN) from None


async def _look(who: str, hop: Hop, over: asyncssh.SSHClientConnection | None) -> asyncssh.SSHKey:
    client = _Client(hop, believes=False)
    where = f"{clean(hop.address.host, 300)}:{hop.address.port}"
    try:
        connection = await _connect(hop, client, over, KEEPALIVE_SECONDS)
    except asyncssh.HostKeyNotVerifiable as error:
        if client.presented is None:
            raise TransportError(f"{who}: {where} presents no host key: {reason(error)}") from None
        return client.presented
    except (OSError, asyncssh.Error, ValueError) as error:
        if isinstance(error, TimeoutError):
            raise
        raise TransportError(f"{who}: cannot connect to {where}: {reason(error)}") from None
    connection.abort()
    raise TransportError(f"{who}: {where} presents no host key")


async def _connect(
    hop: Hop, client: _Client, over: asyncssh.SSHClientConnection | None, keepalive_seconds: float
) -> asyncssh.SSHClientConnection:
    known, keys = hop.known, hop.keys
    # Kinds that are known first, the others after them: a host that has none of the known ones any more shall show
    # which key it has instead.
    kinds = [key.get_algorithm() for key in (*known.keys, *known.any_port)]
    order = sorted(_HOST_KEYS, key=lambda kind: kinds.index(kind) if kind in kinds else len(kinds))
    algorithms = [name for kind in order for name in _HOST_KEYS[kind]]
    if known.authorities:
        algorithms = [*(name + _CERTIFIED for name in algorithms), *algorithms]
    options: dict[str, Any] = {} if over is None else {"proxy_command": None}
    async with _with_agent(keys) as pairs:
        return await asyncssh.connect(
            hop.name,
            hop.address.port,
            config=hop.config or None,
            tunnel=over,
            username=hop.user,
            client_factory=lambda: client,
            # The host, and that it is meant
            known_hosts=client.believed,  # asyncssh takes loaded keys too
            server_host_key_algs=algorithms,
            x509_trusted_certs=None,
            # Who we are
            preferred_auth=("publickey",),
            password_auth=False,
            kbdint_auth=False,
            gss_auth=False,
            gss_kex=False,
            host_based_auth=False,
            client_host_keysign=False,
            client_keys=pairs or None,
            agent_path="",  # its keys are among them
            pkcs11_provider=None,
            # The link
            encryption_algs=_CIPHERS,
            compression_algs=("none",),
            keepalive_interval=keepalive_seconds,
            keepalive_count_max=KEEPALIVE_COUNT,
            connect_timeout=None,  # the caller has one for the whole way
            login_timeout=CONNECT_SECONDS,
            # Nothing else, whatever ssh_config says
            agent_forwarding=False,
            x11_forwarding=False,
            command=None,
            env=None,
            send_env=None,
            request_pty=False,
            **options,
        )


@contextlib.asynccontextmanager
async def _with_agent(keys: Keys) -> AsyncIterator[list[asyncssh.SSHKeyPair]]:
    """Keys of files, then those of the agent, which is let go of again once they were used."""
    pairs = list(keys.pairs)
    async with contextlib.AsyncExitStack() as stack:
        if keys.agent_path:
            with contextlib.suppress(OSError, ValueError, asyncssh.Error):  # no agent is no reason not to try
                agent = await stack.enter_async_context(asyncssh.connect_agent(keys.agent_path))
                only = None if keys.agent_only is None else list(keys.agent_only)
                have = {pair.public_data for pair in pairs}
                pairs.extend(pair for pair in await agent.get_keys(only) if pair.public_data not in have)
        yield pairs


def _denied(who: str, hop: Hop, error: BaseException) -> HostRefusal:
    login = clean(f"{hop.user}@{hop.name}", 300)
    return HostRefusal(
        f"{who}: the host lets {clean(hop.user, 100)} not in with {hop.keys.tried}: {reason(error)}",
        do=f"see whether `ssh -v -p {hop.address.port} {login}` gets in; set `user` and `identity` in hosts.yaml",
    )


def reason(error: BaseException) -> str:
    """What an error of asyncssh or of the system says, cleaned: much of it comes from the host."""
    found = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return clean(str(found), 300)
