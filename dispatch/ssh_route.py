"""The way to a host: what hosts.yaml and the user's ssh_config say of it, and of the hosts that it goes over.

Everything here reads files, and a `Match exec` of ssh_config runs a command: call it in a thread.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import asyncssh

from dispatch.hosts import Host, home_dir
from dispatch.known_hosts import Address, Known, known_hosts_files, known_of, read_known_hosts
from dispatch.transport import HostRefusal, TransportError
from engine.text import clean

MAX_HOPS: Final = 8
_JUMP: Final = re.compile(
    r"(?:ssh://)?(?:(?P<user>[^@\s]+)@)?(?P<host>\[[^\]\s]+\]|[^:@\s\[\]]+)(?::(?P<port>\d{1,5}))?/?"
)
_DEFAULT_KEYS: Final = ("id_ed25519", "id_ecdsa", "id_rsa")


@dataclass(frozen=True, slots=True)
class Keys:
    """What proves who we are: keys of files, and those of the agent, which is asked to sign and for nothing else."""

    pairs: tuple[asyncssh.SSHKeyPair, ...] = ()
    agent_path: str = ""
    """The agent's socket; empty: none."""
    agent_only: tuple[bytes, ...] | None = None
    """Public keys that the agent may be asked for; None: all it has."""
    tried: str = ""
    """In words, for messages."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One connection of the way, the last of them to the host itself."""

    name: str
    """How ssh_config is asked for it."""
    user: str
    address: Address
    keys: Keys = field(repr=False)
    known_hosts: asyncssh.SSHKnownHosts = field(repr=False)
    config: tuple[Path, ...]
    trust: str
    """The command that makes its host key trusted."""

    @property
    def known(self) -> Known:
        """What is known of where it goes."""
        return known_of(self.known_hosts, self.address)


def way_to(host: Host, environ: Mapping[str, str] = os.environ) -> list[Hop]:
    """The connections to make, each over the one before.

    Raises:
        TransportError: ssh_config cannot be read.
        HostRefusal: the key that hosts.yaml names cannot be used.
        ConfigError: a known_hosts file cannot be read.
    """
    options = _options(host.endpoint, host.user, host.port, environ)
    last = _hop(host.endpoint, options, environ, host.identity, f"kdconsole hosts trust {host.name}")
    return [*_before(last, options, environ, MAX_HOPS), last]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a name leads, and what is known of it; nothing was sent to find out."""

    address: Address
    user: str
    over: str
    """The ProxyJump of ssh_config; empty: none."""
    known: Known


def place_of(host: Host, environ: Mapping[str, str] = os.environ) -> Place:
    """Where a host is, and what is known of it.

    Raises:
        TransportError: ssh_config cannot be read.
        ConfigError: a known_hosts file cannot be read.
    """
    options = _options(host.endpoint, host.user, host.port, environ)
    address = _address(options)
    over = options.tunnel if isinstance(options.tunnel, str) else ""
    return Place(address, options.username, over, known_of(read_known_hosts(_files(options, environ)), address))


def _config_files(environ: Mapping[str, str]) -> tuple[Path, ...]:
    path = home_dir(environ) / ".ssh" / "config"
    return (path,) if path.is_file() else ()


def _options(
    name: str, user: str | None, port: int | None, environ: Mapping[str, str]
) -> asyncssh.SSHClientConnectionOptions:
    """What ssh_config says of a name; no key is loaded."""
    given = {**({} if user is None else {"username": user}), **({} if port is None else {"port": port})}
    try:
        return asyncssh.SSHClientConnectionOptions(
            host=name,
            config=_config_files(environ) or None,
            client_keys=None,
            x509_trusted_certs=None,
            **given,
        )
    except (asyncssh.Error, OSError, ValueError) as error:
        raise TransportError(f"ssh_config: {clean(str(error), 300)}", do="correct it") from None


def _address(options: asyncssh.SSHClientConnectionOptions) -> Address:
    return Address(options.host, options.port, options.host_key_alias or "")


def _files(options: asyncssh.SSHClientConnectionOptions, environ: Mapping[str, str]) -> list[Path]:
    named = options.config.get("UserKnownHostsFile", ())
    return known_hosts_files(environ, [str(name) for name in named] if isinstance(named, list | tuple) else ())


def _hop(
    name: str,
    options: asyncssh.SSHClientConnectionOptions,
    environ: Mapping[str, str],
    identity: Path | None,
    trust: str,
) -> Hop:
    return Hop(
        name,
        options.username,
        _address(options),
        _keys(options, identity, environ),
        read_known_hosts(_files(options, environ)),
        _config_files(environ),
        trust,
    )


# ProxyJump


def _before(hop: Hop, options: asyncssh.SSHClientConnectionOptions, environ: Mapping[str, str], left: int) -> list[Hop]:
    """The hops before this one. The first may have such of its own in ssh_config, as with ssh."""
    if not isinstance(options.tunnel, str) or not options.tunnel:
        return []
    if not left:
        raise TransportError(f"ssh_config: ProxyJump of {clean(hop.name, 200)} goes round in circles", do="correct it")
    hops: list[Hop] = []
    for text in options.tunnel.split(","):
        found = _JUMP.fullmatch(text.strip())
        if found is None:
            raise TransportError(f"ssh_config: ProxyJump {clean(text, 200)}: no host", do="correct it")
        name, port = found["host"].strip("[]"), int(found["port"]) if found["port"] else None
        over = _options(name, found["user"], port, environ)
        if _address(over) == hop.address:
            continue  # `ProxyJump` below `Host *` holds for the jump host too, which is not reached over itself
        trust = f"ssh -p {over.port} {clean(name, 200)}" if port else f"kdconsole hosts trust {clean(name, 200)}"
        new = _hop(name, over, environ, None, trust)
        hops.extend([new] if hops else [*_before(new, over, environ, left - 1), new])
    return hops


# Keys


def _keys(options: asyncssh.SSHClientConnectionOptions, identity: Path | None, environ: Mapping[str, str]) -> Keys:
    agent = options.config.get("IdentityAgent", "SSH_AUTH_SOCK")
    path = environ.get("SSH_AUTH_SOCK", "") if agent == "SSH_AUTH_SOCK" else _expanded(str(agent or ""), environ)
    if identity is not None:
        pair, public = _load(identity), _public(identity)
        shown = f"the key {clean(str(identity), 300)}"
        if pair is None and public is None:
            reason = "cannot be read as a private key" if identity.exists() else "no such file"
            raise HostRefusal(f"{shown}: {reason}", do="correct `identity` in hosts.yaml")
        # Only this one, also of an agent that has many: a host closes the connection after a few that it does not know.
        if pair is None:
            shown += ", which has a passphrase, through the agent (`ssh-add` puts it there)"
        return Keys(pair or (), path if public else "", (public,) if public else None, shown)
    named = options.config.get("IdentityFile", ())
    names = [_expanded(str(name), environ) for name in named] if isinstance(named, list | tuple) else []
    files = [Path(name) for name in names] or [home_dir(environ) / ".ssh" / name for name in _DEFAULT_KEYS]
    pairs = tuple(pair for file in files for pair in _load(file) or ())
    if not options.config.get("IdentitiesOnly"):
        return Keys(pairs, path, None, "the keys of agent and ssh_config")
    only = tuple(filter(None, map(_public, files)))
    return Keys(pairs, path if only else "", only or None, "the keys of ssh_config")


def _expanded(name: str, environ: Mapping[str, str]) -> str:
    if name.startswith("$") and environ.get(name.strip("${}")):
        return environ[name.strip("${}")]
    return str(home_dir(environ) / name[2:]) if name.startswith("~/") else os.path.expanduser(name)


def _load(file: Path) -> tuple[asyncssh.SSHKeyPair, ...] | None:
    """The key of a file, with its certificate if there is one; None without a key that can be used as it is."""
    try:
        return tuple(asyncssh.load_keypairs([str(file)])) or None
    except (OSError, ValueError, asyncssh.KeyImportError, asyncssh.KeyEncryptionError):
        return None


def _public(file: Path) -> bytes | None:
    """The public half of a key, by which the agent knows it; it can be read without the passphrase."""
    with contextlib.suppress(OSError, ValueError, asyncssh.KeyImportError):
        return asyncssh.read_public_key(f"{file}.pub").public_data
    with contextlib.suppress(OSError, ValueError, struct.error, binascii.Error):
        lines = file.read_bytes()[: 1 << 20].split(b"\n")
        data = base64.b64decode(b"".join(line.strip() for line in lines if line and not line.startswith(b"-----")))
        if data.startswith(b"openssh-key-v1\0"):
            at = 15
            for _ in range(3):  # cipher, key derivation, its options
                at += 4 + struct.unpack_from(">I", data, at)[0]
            (length,) = struct.unpack_from(">I", data, at + 4)
            return data[at + 8 : at + 8 + length] or None
    with contextlib.suppress(OSError, ValueError, asyncssh.KeyImportError, asyncssh.KeyEncryptionError):
        return asyncssh.read_private_key(str(file)).public_data
    return None
