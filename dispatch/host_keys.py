"""Host keys: believed only where known_hosts has them, shown as SHA-256 fingerprints, never taken on silently."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import asyncssh

from dispatch.hosts import Host
from dispatch.known_hosts import explain, fingerprint, own_file
from dispatch.ssh_link import presented_key
from dispatch.ssh_route import place_of
from dispatch.supervisor import open_regular
from engine.errors import ConfigError
from engine.text import clean

__all__ = ["fingerprint", "own_file", "presented_key", "trust", "trusted_keys"]


def trusted_keys(host: Host, environ: Mapping[str, str] = os.environ) -> tuple[asyncssh.SSHKey, ...]:
    """The keys that are believed for a host; revoked ones are not among them.

    Raises:
        TransportError: ssh_config cannot be read.
        ConfigError: a known_hosts file cannot be read.
    """
    known = place_of(host, environ).known
    return tuple(key for key in (*known.keys, *known.any_port) if key not in known.revoked)


def trust(host: Host, key: asyncssh.SSHKey, environ: Mapping[str, str] = os.environ) -> Path:
    """Takes a key on for a host; returns the file of the keys that were taken on so.

    Raises:
        HostRefusal: another key is trusted for the host already, or this one is revoked.
        TransportError: ssh_config cannot be read.
        ConfigError: the file cannot be read or written.
    """
    place = place_of(host, environ)
    address, known = place.address, place.known
    path = own_file(environ)
    if key in known.revoked or (known.keys and key not in known.keys):
        raise explain(host.name, address, key, known, f"kdconsole hosts trust {host.name}")
    if key in known.keys:
        return path
    line = f"{address.pattern} {key.export_public_key().decode().strip()}\n".encode()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
            file.write(b"\n" + line if torn else line)
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"{clean(str(path), 300)}: cannot be written: {error.strerror}") from None
    return path
