"""What a run needs on a host, put there once: the engine, models and data by their contents.

Everything stands below BASE, the host's run directory: `engine/HASH` and `store/HASH`. A directory named by a hash
holds files of exactly that content and is never changed; it is made as HASH.part and renamed when whole.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dispatch.bundle import ROOT, engine_bundle, tree_hash
from dispatch.host_tool import PART
from dispatch.hosts import NAME
from dispatch.local_hashes import LocalHashes
from dispatch.names import problem
from dispatch.putting import Source, put_tree
from dispatch.streams import resolve
from dispatch.tool_client import HostToolError, Say, ask, field
from dispatch.transfer import Tell, resuming
from dispatch.transport import MissingFile, Transport
from engine.apr import COMPANIONS
from engine.errors import ConfigError, ModelError
from engine.sniff import Format, identify
from engine.text import clean

MAX_RECORD_BYTES: Final = 64 << 20

_HOST_PATH: Final = re.compile(rf"({NAME}):((?:/|~/).*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Staged:
    """Something that is on the host now."""

    path: str
    """There, absolute."""
    sha256: str
    """Of names and contents."""
    size: int
    """In bytes."""
    present: int
    """Bytes of it that were there already."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Something of this machine that is to be on a host: where, by its contents, and what it is made of."""

    place: str
    """The directory there, named by its contents' SHA-256."""
    path: str
    """What stands for it there: the directory, or the one file in it."""
    sha256: str
    sources: tuple[Source, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(each.size for each in self.sources)


def wanted_engine(base: str, root: Path = ROOT) -> Wanted:
    """The engine of this installation, for BASE/engine/HASH.

    Args:
        base: the host's run directory.
        root: what holds the packages, for another installation than this one.
    """
    bundle = engine_bundle(root)
    sources = [Source(bundle.root / name, name, *entry) for name, entry in bundle.files.items()]
    place = f"{base}/engine/{bundle.sha256}"
    return Wanted(place, place, bundle.sha256, tuple(sources))


def wanted_files(base: str, path: str | Path, hashes: LocalHashes | None = None) -> Wanted:
    """A model or data of this machine, a file or a directory, for BASE/store/HASH; reads what is not remembered.

    Hidden files are left out, and symbolic links to files are taken for the files, as in a cache of models. With an APR
    file goes what belongs to it of its directory: its tokenizer.

    Args:
        base: the host's run directory.
        path: here.
        hashes: of files here.

    Raises:
        ConfigError: there is no such thing, or it cannot be read or sent.
    """
    local = Path(os.path.abspath(os.path.expanduser(path)))
    files = local_files(local, hashes or LocalHashes())
    sha256 = tree_hash({name: entry for name, (_, entry) in files.items()})
    sources = [Source(where, name, *entry) for name, (where, entry) in files.items()]
    place = f"{base}/store/{sha256}"
    return Wanted(place, place if local.is_dir() else f"{place}/{local.name}", sha256, tuple(sources))


async def bytes_there(transport: Transport, wanted: Wanted, *, python: str | None = None) -> int:
    """How much of something is on the host already, by names, sizes and what is on record; changes nothing there.

    What is counted is compared with what is here when it is sent. A host whose Python does not answer tells nothing: 0.

    Raises:
        TransportError: the host cannot be reached.
    """
    parent, name = os.path.split(wanted.place)
    try:
        names = await transport.list(parent)
    except MissingFile:
        return 0
    try:
        if name in names and (found := await _found(transport, wanted.place, python)) is not None:
            try:
                record = json.loads(await transport.read(f"{wanted.place}.json", 0, MAX_RECORD_BYTES))
            except (MissingFile, ValueError, RecursionError):
                record = None
            known = record if isinstance(record, dict) else {}
            if all(_as_recorded(each, found.get(each.name), known.get(each.name)) for each in wanted.sources):
                return wanted.size
        if f"{name}{PART}" in names and (found := await _found(transport, wanted.place + PART, python)) is not None:
            return sum(_so_far(each, found) for each in wanted.sources)
    except HostToolError:
        pass
    return 0


async def _found(transport: Transport, root: str, python: str | None) -> dict[str, tuple[int, int]] | None:
    """Size and modification time in ns of the files below a directory, by name."""
    answer = await ask(transport, "tree", python=python, root=root)
    try:
        return {str(name): (int(size), int(mtime)) for name, size, mtime in field(answer, "files", list)}
    except (TypeError, ValueError):
        return None


def _as_recorded(source: Source, found: tuple[int, int] | None, record: object) -> bool:
    match record:
        case [int(size), int(mtime), _, _, str(sha256)]:
            return (size, mtime) == found and (size, sha256) == (source.size, source.sha256)
    return False


def _so_far(source: Source, found: Mapping[str, tuple[int, int]]) -> int:
    size, _ = found.get(source.name, (0, 0))
    if size == source.size:
        return size
    size, _ = found.get(source.name + PART, (0, 0))
    return size if size <= source.size else 0


async def stage_engine(
    transport: Transport,
    base: str,
    *,
    progress: Tell | None = None,
    say: Say | None = None,
    python: str | None = None,
    root: Path = ROOT,
) -> Staged:
    """Puts the engine of this installation at BASE/engine/HASH, unless it is there.

    Args:
        transport: reaches the host.
        base: the host's run directory.
        progress: hears how far it is.
        say: hears what takes long, and of lost connections.
        python: the host's Python; by its settings without it.
        root: what holds the packages, for another installation than this one.

    Raises:
        TransferError, HostToolError, TransportError: see `dispatch.transfer.put`.
    """
    wanted = await asyncio.to_thread(wanted_engine, base, root)
    return await send_wanted(transport, wanted, progress=progress, say=say, python=python)


async def stage(
    transport: Transport,
    base: str,
    path: str | Path,
    *,
    progress: Tell | None = None,
    say: Say | None = None,
    python: str | None = None,
    hashes: LocalHashes | None = None,
) -> Staged:
    """Puts a model or data, a file or a directory of this machine, at BASE/store/HASH, unless it is there.

    See `wanted_files` and `send_wanted`.

    Raises:
        ConfigError: there is no such thing.
        TransferError, HostToolError, TransportError: see `dispatch.transfer.put`.
    """
    wanted = await asyncio.to_thread(wanted_files, base, path, hashes)
    return await send_wanted(transport, wanted, progress=progress, say=say, python=python)


def is_named(path: str) -> bool:
    """`host:/path` and `host:~/path` name what is on that host already."""
    return _HOST_PATH.fullmatch(path) is not None


async def path_named(transport: Transport, named: str) -> str:
    """The absolute path on the host that `host:/path` or `host:~/path` names, whether or not there is something.

    Raises:
        ConfigError: it is on another host.
        TransportError: the host cannot be reached.
    """
    match = _HOST_PATH.fullmatch(named)
    assert match is not None
    host, path = match[1], match[2]
    if host != transport.host:
        raise ConfigError(
            f"{clean(host, 100)}:{clean(path, 300)}: is on {clean(host, 100)}, but the run goes to {transport.host}",
            expected=f"{transport.host}:/path, or a path on this machine",
        )
    return await resolve(transport, path)


async def find_named(transport: Transport, named: str) -> str:
    """As `path_named`, of what must be there.

    Raises:
        ConfigError: it is on another host, or not there.
        TransportError: the host cannot be reached.
    """
    there = await path_named(transport, named)
    if await transport.stat(there) is None:
        raise ConfigError(f"{clean(named, 400)}: no such file or directory there")
    return there


def local_files(path: Path, hashes: LocalHashes) -> dict[str, tuple[Path, tuple[int, str]]]:
    """The files of a directory, or the one file (of an APR file those beside it that belong to it too): by name, where
    each is, and its size and SHA-256.

    Raises:
        ConfigError: there is none, one cannot be read, or has a name that no host would be given.
    """
    shown = clean(str(path), 300)
    found: dict[str, Path] = {}
    if path.is_dir():
        for directory, below, names in os.walk(path, onerror=_raise):
            below[:] = sorted(each for each in below if not each.startswith(".") and each != "__pycache__")
            for name in sorted(names):
                each = Path(directory, name)
                if not name.startswith("."):
                    found[each.relative_to(path).as_posix()] = each
    elif path.exists():
        found[path.name] = path
        if _is_apr(path):
            found |= {name: path.with_name(name) for name in COMPANIONS if path.with_name(name).is_file()}
    else:
        raise ConfigError(f"{shown}: no such file or directory")
    files = {}
    for name, each in found.items():
        if not each.is_file():
            raise ConfigError(f"{clean(str(each), 300)}: is no file", expected="files and directories")
        wrong = problem(name)
        if wrong is not None:
            raise ConfigError(f"{clean(str(each), 300)}: {wrong}", do="rename it")
        try:
            files[name] = (each, hashes.sha256(each))
        except OSError as error:
            raise ConfigError(f"{clean(str(each), 300)}: cannot be read: {error.strerror}") from None
    if not files:
        raise ConfigError(f"{shown}: is empty")
    hashes.save()
    return files


def _is_apr(path: Path) -> bool:
    try:
        return identify(path) is Format.APR
    except ModelError:
        return False  # what it is instead, and why it cannot be read, is told where it is hashed


def _raise(error: OSError) -> None:
    raise ConfigError(f"{clean(str(error.filename), 300)}: cannot be read: {error.strerror}") from None


async def send_wanted(
    transport: Transport,
    wanted: Wanted,
    *,
    progress: Tell | None = None,
    say: Say | None = None,
    python: str | None = None,
) -> Staged:
    """Puts something at its place on the host, unless it is there; what arrived of it before is not sent again.

    Args:
        transport: reaches the host.
        wanted: what, from `wanted_engine` or `wanted_files`; files that were changed since are refused.
        progress: hears how far it is.
        say: hears what takes long, and of lost connections.
        python: the host's Python; by its settings without it.

    Raises:
        TransferError, HostToolError, TransportError: see `dispatch.transfer.put`.
    """

    async def attempt() -> int:
        part = wanted.place + PART
        return await put_tree(transport, wanted.sources, part, wanted.place, progress=progress, say=say, python=python)

    present = await resuming(attempt, say=say)
    return Staged(await resolve(transport, wanted.path), wanted.sha256, wanted.size, present)
