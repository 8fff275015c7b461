"""The files beside a run's stream, read so that whatever lies there breaks nothing and nothing is waited for."""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path

import msgspec

from dispatch.manifest import CONFIG, CONTRACT, EXIT, MANIFEST, ExitRecord, Manifest, decode
from dispatch.manifest import RunState as HostState
from dispatch.supervisor import Refused
from dispatch.supervisor import status as supervisor_status
from engine.errors import RunError
from engine.falsifiers import Contract, parse_contract
from engine.text import clean
from engine.yaml_io import parse_yaml

SMALL_BYTES = 1 << 20


def read_small(path: Path, limit: int = SMALL_BYTES) -> bytes | None:
    """A small regular file's bytes; None where there is none. Never waits, never follows a link.

    Raises:
        RunError: something else is there, or it is larger than `limit` bytes, or it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
                raise RunError(f"{path.name}: no regular file of at most {limit:,} bytes")
            return os.pread(descriptor, limit, 0)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path.name}: {error.strerror}") from None


def read_manifest(path: Path) -> Manifest:
    """The manifest of a run directory, its texts cleaned for a terminal.

    Raises:
        RunError: missing, too large, or not a manifest.
    """
    raw = read_small(path / MANIFEST)
    if raw is None:
        raise RunError(f"no {MANIFEST}", expected="a run directory")
    return decode(Manifest, raw, MANIFEST)


def read_exit(path: Path) -> ExitRecord | None:
    """How the trainer ended; None while that is not on record.

    Raises:
        RunError: what is there is no exit record.
    """
    raw = read_small(path / EXIT)
    if raw is None:
        return None
    return decode(ExitRecord, raw, EXIT)


def read_contract(path: Path) -> Contract:
    """What a run is judged by.

    Raises:
        RunError, ConfigError: missing, or no contract.
    """
    raw = read_small(path / CONTRACT)
    if raw is None:
        raise RunError(f"no {CONTRACT}")
    try:
        return _parsed_contract(raw.decode())
    except UnicodeDecodeError:
        raise RunError(f"{CONTRACT}: not UTF-8") from None


@lru_cache(maxsize=64)
def _parsed_contract(text: str) -> Contract:
    # A thousand runs share a handful of contracts, and reading YAML takes longer than reading a short stream.
    return parse_contract(text, CONTRACT)


def read_config(path: Path) -> dict[str, object]:
    """The resolved configuration of a run, as full key paths and plain values; texts are cleaned.

    Raises:
        RunError, ConfigError: it cannot be read.
    """
    raw = read_small(path / CONFIG)
    if raw is None:
        raise RunError(f"no {CONFIG}")
    try:
        return dict(_parsed_config(raw.decode()))
    except UnicodeDecodeError:
        raise RunError(f"{CONFIG}: not UTF-8") from None


@lru_cache(maxsize=64)
def _parsed_config(text: str) -> tuple[tuple[str, object], ...]:
    return tuple(_flat("", parse_yaml(text, CONFIG)))  # many runs share one, as they do contracts


def _flat(prefix: str, value: object) -> list[tuple[str, object]]:
    if isinstance(value, dict):
        parts = (_flat(f"{prefix}.{clean(str(key), 100)}".lstrip("."), inner) for key, inner in value.items())
        return [pair for part in parts for pair in part]
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return [(prefix, clean(value, 500) if isinstance(value, str) else value)]


def host_state(path: Path) -> HostState:
    """What this machine knows of a run, as the supervisor's `status` tells it; no process is started for it on Linux.

    Raises:
        RunError: its records cannot be read.
    """
    try:
        state: HostState = msgspec.convert(supervisor_status(path)["state"], HostState)
    except (Refused, OSError) as error:
        raise RunError(f"supervisor.jsonl: {clean(str(error), 200)}") from None
    return state
