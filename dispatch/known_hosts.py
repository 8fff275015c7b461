"""What the known_hosts files say of a host: the keys that are believed, and those that are revoked."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncssh

from dispatch.hosts import config_dir, home_dir
from dispatch.transport import HostRefusal
from engine.errors import ConfigError
from engine.text import clean

SSH_PORT: Final = 22
MAX_BYTES: Final = 16 << 20
"""Largest known_hosts file that is read."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a connection goes, after ssh_config had its say."""

    host: str
    port: int
    alias: str = ""
    """HostKeyAlias of ssh_config: known_hosts has it by this name, whatever the port."""

    @property
    def name(self) -> str:
        """The name that known_hosts knows it by, without a port."""
        return (self.alias or self.host).lower()

    @property
    def pattern(self) -> str:
        """How a line of known_hosts names it."""
        return self.name if self.alias or self.port == SSH_PORT else f"[{self.name}]:{self.port}"


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one address."""

    keys: tuple[asyncssh.SSHKey, ...] = ()
    """Trusted for exactly this name and port."""
    any_port: tuple[asyncssh.SSHKey, ...] = ()
    """Trusted for the name alone, where none is for the port: believed, but another key is no change."""
    authorities: tuple[asyncssh.SSHKey, ...] = ()
    """Whoever they certify is believed."""
    revoked: tuple[asyncssh.SSHKey, ...] = ()


def own_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Where `kdconsole hosts trust` writes."""
    return config_dir(environ) / "known_hosts"


def known_hosts_files(environ: Mapping[str, str] = os.environ, named: Iterable[str] = ()) -> list[Path]:
    """The files whose keys are believed: the user's, the system's and our own.

    Args:
        environ: says where they are.
        named: the UserKnownHostsFile of ssh_config, in place of `~/.ssh/known_hosts`.
    """
    home = home_dir(environ)
    users = [Path(name.replace("~", str(home), 1) if name.startswith("~/") else name) for name in named]
    return [*(users or [home / ".ssh" / "known_hosts"]), Path("/etc/ssh/ssh_known_hosts"), own_file(environ)]


def read_known_hosts(files: Iterable[Path]) -> asyncssh.SSHKnownHosts:
    """The lines of these files, as far as they are there; those that say nothing to us are passed over, as ssh does.

    Raises:
        ConfigError: one of them cannot be read.
    """
    known = asyncssh.SSHKnownHosts()
    for path in files:
        for line in _read(path).splitlines():
            with contextlib.suppress(ValueError):
                known.load(_normal(line))
    return known


def _read(path: Path) -> str:
    name = clean(str(path), 300)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return ""  # `UserKnownHostsFile /dev/null` is a way to know nobody
        if found.st_size > MAX_BYTES:
            raise ConfigError(f"{name}: larger than {MAX_BYTES >> 20} MiB", expected="a known_hosts file")
        return path.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None


def _normal(line: str) -> str:
    """The line with names in lower case and without empty ones, which would stand for every host."""
    words = line.split(None, 2)
    at = 1 if line.lstrip().startswith("@") else 0
    if len(words) <= at or words[at].startswith(("|", "#")):
        return line
    words[at] = ",".join(filter(None, words[at].lower().split(",")))
    return " ".join(words)


def known_of(known: asyncssh.SSHKnownHosts, address: Address) -> Known:
    """What is known of an address. Only its name counts: a key trusted for the IP address behind it says nothing."""
    keys, authorities, revoked = known.match(address.pattern, "", None)[:3]
    if address.pattern == address.name:
        return Known(tuple(keys), (), tuple(authorities), tuple(revoked))
    plain = known.match(address.name, "", None)
    none = not keys and not authorities
    return Known(
        tuple(keys),
        tuple(plain[0]) if none else (),
        tuple(plain[1] if none else authorities),
        (*revoked, *plain[2]),
    )


def fingerprint(key: asyncssh.SSHKey) -> str:
    """How a key is compared by eye, as `ssh-keygen -l` shows it: `SHA256:…`."""
    return key.get_fingerprint("sha256")


def described(key: asyncssh.SSHKey) -> str:
    """Fingerprint and kind of a key."""
    return f"{fingerprint(key)} ({key.get_algorithm()})"


def explain(who: str, address: Address, presented: asyncssh.SSHKey, known: Known, trust: str) -> HostRefusal:
    """Why a host was not talked to: a key that is revoked, another one than is trusted, or one that nobody trusts yet.

    Args:
        who: how the message begins.
        address: where the key was presented.
        presented: the key.
        known: what is known of the address.
        trust: the command that would trust it.
    """
    shown, pattern = described(presented), clean(address.pattern, 300)
    if presented in known.revoked:
        return HostRefusal(
            f"{who}: THE HOST KEY of {pattern} IS REVOKED in a known_hosts file: {shown}",
            do="ask whoever runs the host",
        )
    if known.keys:
        trusted = ", ".join(map(described, known.keys))
        return HostRefusal(
            f"{who}: THE HOST KEY of {pattern} HAS CHANGED: it presents {shown}, trusted is {trusted}",
            expected="the same key; somebody may be in between",
            do="ask whoever runs the host; only if the change is meant, take the old line out of the known_hosts file",
        )
    return HostRefusal(
        f"{who}: the host key of {pattern} is not trusted yet: {shown}",
        do=f"compare it with `ssh-keygen -lf` on the host, then: {trust}",
    )
