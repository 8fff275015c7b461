"""What this machine knows of a host, and the key that the host presents: the same for commands and the app."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.text import clean

if TYPE_CHECKING:
    from asyncssh import SSHKey

    from dispatch.hosts import Host, Hosts

# asyncssh takes a good part of a second to import: only what talks to hosts pays for it.


@dataclass(frozen=True)
class Offer:
    """The key that a host presents."""

    host: Host
    key: SSHKey
    shown: str
    """Its kind and its SHA-256 fingerprint."""
    address: str
    new: bool
    """No key is known for the host: somebody has to say whether this is the right one."""

    @property
    def fingerprint(self) -> str:
        """SHA-256, as `ssh-keygen -lf` shows it."""
        from dispatch.known_hosts import fingerprint

        return fingerprint(self.key)

    def trust(self) -> Path:
        """Takes the key on, for good; returns the file that says so.

        Raises:
            HostRefusal: another key is trusted for the host already, or this one is revoked.
            ConfigError: the file cannot be read or written.
        """
        from dispatch.host_keys import trust

        return trust(self.host, self.key)


async def offered_key(host: Host) -> Offer:
    """Asks a host for its key; nothing is sent to it, not even who wants in.

    Raises:
        TransportError: the host cannot be reached.
    """
    from dispatch.host_keys import presented_key
    from dispatch.known_hosts import described
    from dispatch.ssh_route import place_of

    key = await presented_key(host)
    place = await asyncio.to_thread(place_of, host)
    # A changed or revoked key is refused by `trust`: nobody is asked for a yes that would not count.
    new = key not in place.known.revoked and not place.known.keys
    return Offer(host, key, described(key), clean(place.address.pattern, 300), new)


def document(host: Host, hosts: Hosts) -> dict[str, Any]:
    """All that hosts.yaml, ssh_config and known_hosts say of a host.

    Raises:
        TransportError: ssh_config cannot be read.
        ConfigError: a known_hosts file cannot be read.
    """
    from dispatch.ssh_route import place_of

    place = place_of(host)
    keys = [key for key in (*place.known.keys, *place.known.any_port) if key not in place.known.revoked]
    return {
        "name": host.name,
        "file": str(hosts.path) if host.name in hosts.known else None,
        "address": clean(place.address.host, 300),
        "port": place.address.port,
        "over": clean(place.over, 300) or None,
        "user": clean(place.user, 300),
        "identity": None if host.identity is None else clean(str(host.identity), 300),
        "python": host.python,
        "run_dir": host.run_dir,
        "env": list(host.env),
        "gpu": host.gpu,
        "lane": hosts.lanes.index(host.name) + 1 if host.name in hosts.lanes else None,
        "host_keys": [key_document(key) for key in keys],
    }


def key_document(key: SSHKey) -> dict[str, str]:
    """A host key for programs."""
    return {"kind": key.get_algorithm(), "fingerprint": key.get_fingerprint("sha256")}


def where(found: Mapping[str, Any]) -> str:
    """Address and port of a host's document in one text."""
    address = f"[{found['address']}]" if ":" in found["address"] else found["address"]
    return f"{address}:{found['port']}"
