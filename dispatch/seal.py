"""The end of a run's evidence: the manifest completed, every file hashed, and the evidence id.

Weights that stayed on a host are hashed there, so that the id is the same before and after they are fetched. What is
written here is put beside the run on its host as well: another console that looks at the run finds the same evidence.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from dispatch.ended import completed, reopened
from dispatch.manifest import (
    CONFIG,
    EXIT,
    MANIFEST,
    SUMS,
    Manifest,
    decode,
    read_manifest,
    sha256_file,
    write_manifest,
)
from dispatch.names import check_names
from dispatch.places import Place, catch_up, collect
from dispatch.runs import RunDir
from dispatch.sums import MAX_BYTES, check_sums, files_of, is_passing, is_weight, parse_sums, sha256_told, write_sums
from dispatch.supervisor import open_regular, write_atomic
from dispatch.tool_client import HostToolError, ask, field
from dispatch.transport import MissingFile, Transport, TransportError
from engine.errors import RunError
from engine.text import clean

Say = Callable[[str], object]
TELL_SECONDS: Final = 5.0
"""Between two lines of progress."""
BATCH_BYTES: Final = 4 << 30
"""So much is hashed on a host by one request: what a lost connection repeats."""
LOCK_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Sealed:
    """A run's evidence, as it stands."""

    evidence_id: str
    """SHA-256 of SHA256SUMS."""
    problems: tuple[str, ...] = ()
    """What does not agree with the checksums any more; of new ones, what could not be listed."""
    absent: tuple[str, ...] = ()
    """Weights that are listed and not here."""
    new: bool = False
    """The checksums were made now."""


async def seal(run_dir: RunDir, place: Place, say: Say = lambda text: None) -> Sealed:
    """Completes dispatch.json and writes SHA256SUMS; where that was done before, holds the files against it.

    Weights are not read again then: `kdconsole verify` does that. Safe to repeat, and to be killed at any moment.

    Args:
        run_dir: of a run that has ended, or was lost.
        place: where it is; lets go of its copy of the stream.
        say: told what takes long.

    Raises:
        RunError: it still runs, or its directory cannot be read or written.
        TransportError: its host cannot be reached; it is not sealed then, and the next attach does it.
    """
    if not (run_dir.path / SUMS).exists():
        place.close()  # else who seals it now would wait for the copy of the stream, and we for who seals it
        async with _alone(run_dir.path):
            if not (run_dir.path / SUMS).exists():  # nobody else made them while we waited
                await catch_up(place, run_dir)
                await collect(place, run_dir)
                if not await _adopt(run_dir, place):
                    return await _make(run_dir, place, say)
    return await asyncio.to_thread(_verified, run_dir.path)


def reopen(run_dir: RunDir) -> None:
    """For another attempt of a run that was sealed: takes back what was said of its end.

    Raises:
        RunError: the directory cannot be written.
    """
    try:
        if run_dir.manifest.remote is not None:  # of a run of this machine the supervisor has put them aside
            for name in (SUMS, EXIT):
                (run_dir.path / name).unlink(missing_ok=True)
        write_manifest(run_dir.path, reopened(read_manifest(run_dir.path)))
    except OSError as error:
        raise RunError(f"{run_dir.path}: {error.strerror}", expected="a run directory that can be written") from None


@contextlib.asynccontextmanager
async def _alone(directory: Path) -> AsyncIterator[None]:
    """Waits until no other console is sealing the run; the lock goes with the process, however it ends."""
    try:  # of the files of a run the one that is never replaced
        descriptor = open_regular(directory / CONFIG, os.O_RDONLY)
    except OSError as error:
        raise RunError(f"{directory / CONFIG}: {error.strerror}", expected="a run directory") from None
    deadline = time.monotonic() + LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(f"{directory}: another console is sealing it", do="attach again later") from None
            await asyncio.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _verified(directory: Path) -> Sealed:
    checked = check_sums(directory, weights=False)
    return Sealed(checked.evidence_id, checked.problems, checked.absent)


async def _make(run_dir: RunDir, place: Place, say: Say) -> Sealed:
    ended = _exit_bytes(run_dir.path)
    if ended is None and (state := (await place.status()).state) in ("running", "starting"):
        raise RunError(f"run {run_dir.id}: {state}", expected="one that has ended", do=f"kdconsole stop {run_dir.id}")
    manifest = await asyncio.to_thread(_completed, run_dir.path)
    if manifest.remote is not None:
        manifest = msgspec.structs.replace(manifest, ran_as=await _user(place))
    there: dict[str, str] = {}
    odd: list[str] = []
    if not place.local:
        there, odd = await _weights_there(place, say)
    try:
        with _writable(run_dir.path):
            await asyncio.to_thread(write_manifest, run_dir.path, manifest)
            here, strange = await _hashed(run_dir.path, there, say)
            if _exit_bytes(run_dir.path) == ended:
                evidence_id = await asyncio.to_thread(write_sums, run_dir.path, here | there)
    finally:
        if _exit_bytes(run_dir.path) != ended:  # started again meanwhile, which has renamed files under our hands
            (run_dir.path / SUMS).unlink(missing_ok=True)
            await asyncio.to_thread(write_manifest, run_dir.path, reopened(manifest))
            raise RunError(f"run {run_dir.id}: it was started again meanwhile", expected="a run that has ended")
    await _leave_there(run_dir.path, place, say)
    return Sealed(evidence_id, (*odd, *strange), tuple(name for name in there if name not in here), new=True)


def _completed(directory: Path) -> Manifest:
    return completed(directory, read_manifest(directory))


async def _hashed(directory: Path, there: dict[str, str], say: Say) -> tuple[dict[str, str], list[str]]:
    """Every file of the directory; of weights that were hashed on the host, the copies here are not read."""
    meter = _Meter(say)

    def work() -> tuple[dict[str, str], list[str]]:
        names, odd = files_of(directory)
        wanted = [name for name in names if name not in there]
        meter.total = sum((directory / name).lstat().st_size for name in wanted)
        return {name: sha256_told(directory / name, name, meter) for name in wanted}, odd

    try:
        return await asyncio.to_thread(work)
    finally:
        meter.over = True  # who does not want to wait any more is not held up by the thread


class _Over(Exception):
    """Nobody waits for the hashes any more."""


class _Meter:
    """Tells every few seconds how far the hashing is."""

    def __init__(self, say: Say) -> None:
        self.total, self.over = 0, False
        self._say, self._done, self._next = say, 0, time.monotonic() + TELL_SECONDS

    def __call__(self, name: str, count: int) -> None:
        if self.over:
            raise _Over
        self._done += count
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + TELL_SECONDS
            share = self._done / max(self.total, 1)
            self._say(f"hashing {clean(name, 120)}: {share:.0%} of {self.total / 1e6:,.0f} MB")


def _exit_bytes(directory: Path) -> bytes | None:
    try:
        return (directory / EXIT).read_bytes()
    except OSError:
        return None


@contextlib.contextmanager
def _writable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{directory}: cannot write the checksums: {error.strerror}", do="free some space, then attach to the run"
        ) from None


# On the host


async def _user(place: Place) -> str | None:
    """Name of the user that runs of that host run as."""
    done = await place.transport.run(["id", "-un"])
    return clean(done.stdout.decode(errors="replace").strip(), 100) or None if done.rc == 0 else None


async def _weights_there(place: Place, say: Say) -> tuple[dict[str, str], list[str]]:
    """Checkpoints and the model of a run on its host: hashes by name, and what is no file there."""
    transport = place.direct or place.transport
    told = _Throttled(say)
    listing = await ask(transport, "tree", root=place.run_dir, python=place.python, say=told)
    listed, left_out = check_names(listing, transport.host)
    sizes = {name: size for name, size in listed.items() if is_weight(name) and not is_passing(name)}
    odd = [
        f"{transport.host}: {each.name}: {each.reason}"
        for each in left_out
        if is_weight(each.name) and not is_passing(each.name)
    ]
    total = sum(sizes.values())
    if total > BATCH_BYTES // 16:
        say(f"{transport.host}: hashing {len(sizes):,} files of checkpoints and model, {total / 1e9:,.1f} GB")
    found: dict[str, str] = {}
    for batch in _batches(sizes):
        found |= await _hash_there(transport, place, batch, told)
    return found, odd


def _batches(sizes: dict[str, int]) -> Iterator[list[str]]:
    batch: list[str] = []
    room = BATCH_BYTES
    for name, size in sorted(sizes.items()):
        if batch and size > room:
            yield batch
            batch, room = [], BATCH_BYTES
        batch.append(name)
        room -= size
    if batch:
        yield batch


async def _hash_there(
    transport: Transport, place: Place, names: Sequence[str], say: Callable[[str], None]
) -> dict[str, str]:
    paths = [f"{place.run_dir}/{name}" for name in names]
    rows = field(await ask(transport, "hash", paths=paths, python=place.python, say=say), "files", list)
    found: dict[str, str] = {}
    for name, path, row in zip(names, paths, rows, strict=False):
        digest = row.get("sha256") if isinstance(row, dict) and row.get("path") == path else None
        if not isinstance(digest, str):
            reason = row.get("error") if isinstance(row, dict) else None
            raise HostToolError(f"{transport.host}: {name}: cannot be hashed: {clean(str(reason), 300)}")
        found[name] = digest
    if len(found) != len(names):
        raise HostToolError(f"{transport.host}: hashed other files than it was asked for")
    return found


class _Throttled:
    """Passes on a line every few seconds."""

    def __init__(self, say: Say) -> None:
        self._say, self._next = say, time.monotonic() + TELL_SECONDS

    def __call__(self, text: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + TELL_SECONDS
            self._say(text)


async def _leave_there(directory: Path, place: Place, say: Say) -> None:
    """Puts manifest and checksums beside the run on its host, the checksums last; never over those of another console.

    Where that fails it is told, and the run is sealed all the same.
    """
    if place.local:
        return
    from dispatch.putting import put

    transport = place.direct or place.transport
    try:
        if await transport.stat(f"{place.run_dir}/{SUMS}") is not None:
            return
        for name in (MANIFEST, SUMS):
            await put(transport, directory / name, f"{place.run_dir}/{name}", python=place.python)
    except (TransportError, RunError) as error:
        say(f"warning: manifest and checksums are here and not on the host: {error}")


async def _adopt(run_dir: RunDir, place: Place) -> bool:
    """Takes over manifest and checksums that another console made of this run, and left on its host."""
    if place.local:
        return False
    try:
        raw = await place.transport.read(f"{place.run_dir}/{SUMS}", 0, MAX_BYTES + 1)
        text = await place.transport.read(f"{place.run_dir}/{MANIFEST}", 0, MAX_BYTES + 1)
        manifest = decode(Manifest, text, f"{place.transport.host}: {MANIFEST}")
        listed = parse_sums(raw, f"{place.transport.host}: {SUMS}")
    except (MissingFile, RunError):
        return False
    ours, theirs = run_dir.manifest.remote, manifest.remote
    # Another console may know the host by another name, and its manifest would lead nowhere here.
    same = manifest.run == run_dir.run and ours is not None and theirs is not None and theirs.host == ours.host
    if not same or manifest.outcome is None or listed.broken:
        return False
    if not await asyncio.to_thread(_agrees, run_dir.path, listed.files, text):
        return False
    with _writable(run_dir.path):
        write_atomic(run_dir.path / MANIFEST, text)
        write_atomic(run_dir.path / SUMS, raw)
    return True


def _agrees(directory: Path, listed: Mapping[str, str], manifest: bytes) -> bool:
    """Whether the small files here are those of a list, with that manifest in the place of ours."""
    names, _ = files_of(directory)
    if listed.get(MANIFEST) != hashlib.sha256(manifest).hexdigest():
        return False
    ours = [name for name in names if name != MANIFEST and not is_weight(name)]
    wanted = {name for name in listed if name != MANIFEST and not is_weight(name)}
    return set(ours) == wanted and all(sha256_file(directory / name) == listed[name] for name in ours)
