"""Host keys: believed only where known_hosts has them, shown as SHA-256 fingerprints, never taken on silently."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncssh

from dispatch.hosts import Host, config_dir
from dispatch.transport import HostRefusal, TransportError, TransportTimeout
from engine.errors import ConfigError
from engine.text import clean

CONNECT_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where a connection really goes, after ssh_config had its say."""

    host: str
    port: int
    alias: str
    """The name that known_hosts knows it by."""

    @property
    def pattern(self) -> str:
        """How a line of known_hosts names it."""
        return self.alias if self.port == 22 else f"[{self.alias}]:{self.port}"


def ssh_config(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The user's own ssh_config, if there is one."""
    path = Path(environ.get("HOME") or Path.home()) / ".ssh" / "config"
    return [str(path)] if path.is_file() else []


def own_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Where `kdconsole hosts trust` writes."""
    return config_dir(environ) / "known_hosts"


def known_hosts(environ: Mapping[str, str] = os.environ) -> asyncssh.SSHKnownHosts:
    """The keys that are believed: of the user's file, the system's and our own.

    Raises:
        ConfigError: one of the files cannot be read.
    """
    home = Path(environ.get("HOME") or Path.home())
    files = [home / ".ssh" / "known_hosts", Path("/etc/ssh/ssh_known_hosts"), own_file(environ)]
    try:
        return asyncssh.read_known_hosts([str(path) for path in files if path.is_file()])
    except (ValueError, OSError) as error:
        raise ConfigError(f"known_hosts: {clean(str(error), 300)}", do="correct it") from None


def address_of(host: Host, environ: Mapping[str, str] = os.environ) -> Address:
    """Where a host is, by hosts.yaml and ssh_config.

    Raises:
        TransportError: ssh_config cannot be read.
    """
    try:
        options = asyncssh.SSHClientConnectionOptions(host=host.endpoint, config=ssh_config(environ) or None)
    except (asyncssh.ConfigParseError, OSError, ValueError) as error:
        raise TransportError(f"ssh_config: {clean(str(error), 300)}", do="correct it") from None
    port = host.port or options.port or 22
    return Address(options.host or host.endpoint, port, options.host_key_alias or options.host or host.endpoint)


def fingerprint(key: asyncssh.SSHKey) -> str:
    """How a key is compared by eye, as `ssh-keygen -l` shows it: `SHA256:…`."""
    return key.get_fingerprint("sha256")


def trusted_keys(address: Address, environ: Mapping[str, str] = os.environ) -> tuple[asyncssh.SSHKey, ...]:
    """The keys that known_hosts files have for a host; revoked ones are not among them.

    Raises:
        ConfigError: one of the files cannot be read.
    """
    return tuple(asyncssh.match_known_hosts(known_hosts(environ), address.alias, "", address.port)[0])


def explain(name: str, address: Address, presented: asyncssh.SSHKey, trusted: Sequence[asyncssh.SSHKey]) -> HostRefusal:
    """Why a host was not talked to: a key nobody has trusted yet, or another one than that."""
    shown = f"{fingerprint(presented)} ({presented.get_algorithm()})"
    if not trusted:
        return HostRefusal(
            f"{name}: the host key of {clean(address.pattern, 300)} is not trusted yet: {shown}",
            do=f"compare it with `ssh-keygen -lf` on the host, then: kdconsole hosts trust {name}",
        )
    known = ", ".join(f"{fingerprint(key)} ({key.get_algorithm()})" for key in trusted)
    return HostRefusal(
        f"{name}: THE HOST KEY of {clean(address.pattern, 300)} HAS CHANGED: it presents {shown}, trusted is {known}",
        expected="the same key; somebody may be in between",
        do="ask whoever runs the host; only if the change is meant, take the old line out of the known_hosts file",
    )


async def presented_key(host: Host, environ: Mapping[str, str] = os.environ) -> asyncssh.SSHKey:
    """The key that a host presents now; nothing is sent that would need trust.

    Raises:
        TransportError: it cannot be reached, or presents none.
    """
    address = address_of(host, environ)
    config = ssh_config(environ) or None
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            key = await asyncssh.get_server_host_key(host.endpoint, port=address.port, config=config)
    except TimeoutError:
        raise TransportTimeout(f"{host.name}: {address.host}:{address.port}: no answer in time") from None
    except (OSError, asyncssh.Error) as error:
        raise TransportError(f"{host.name}: {address.host}:{address.port}: {clean(str(error), 300)}") from None
    if key is None:
        raise TransportError(f"{host.name}: presents no host key")
    return key


def trust(host: Host, key: asyncssh.SSHKey, environ: Mapping[str, str] = os.environ) -> Path:
    """Takes a key on for a host; returns the file that it was written to.

    Raises:
        HostRefusal: another key is trusted for the host already.
        ConfigError: the file cannot be written.
    """
    address = address_of(host, environ)
    before = trusted_keys(address, environ)
    path = own_file(environ)
    if key in before:
        return path
    if before:
        raise explain(host.name, address, key, before)
    line = f"{address.pattern} {key.export_public_key().decode().strip()}\n"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"{clean(str(path), 300)}: cannot be written: {error.strerror}") from None
    return path
