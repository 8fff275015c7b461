"""Brings what a run left on its host here: the small files, then checkpoints and the model, each verified.

A checkpoint comes into a hidden sibling of its place and gets its name when every byte of it was read back and held
against its manifest, and against the run's SHA256SUMS where they list it. What was broken off goes on from there.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Literal

from dispatch.fetch_small import bring_small
from dispatch.getting import FetchedTree, get_tree
from dispatch.manifest import SUMS, sha256_file
from dispatch.places import Reach
from dispatch.runs import RunDir
from dispatch.sums import read_sums
from dispatch.supervisor import write_atomic
from dispatch.survey import HostCheckpoint, HostRun, look
from dispatch.tool_client import HostToolError, Say, ask
from dispatch.transfer import Meter, Progress, Tell, resuming
from dispatch.transport import MissingFile, Transport
from engine import checkpoint
from engine.durable import discard, partial_of, sync_directory
from engine.errors import RunError
from engine.text import clean

Which = Literal["best", "latest", "all", "none"]
ROUNDS: Final = 5
"""So often the list of checkpoints is asked for again because one of them was pruned meanwhile."""
POINTER_BYTES: Final = 4096
MARGIN_BYTES: Final = 16 << 20
MODEL: Final = "model"


@dataclass(frozen=True, slots=True)
class Choice:
    """What of a run's weights is wanted here."""

    checkpoints: Which | None = None
    """None: the best if one was saved as best, else the latest."""
    model: bool = False


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a fetch left here."""

    run_dir: RunDir
    here: bool
    """It is a run of this machine: there was nothing to fetch."""
    state: str
    """Of the run on its host: running, ended, …; empty with `here`."""
    moved: int
    """Bytes that were brought now; 0 when everything was here."""
    checkpoints: tuple[Path, ...]
    """Of what was chosen, those that are here and were verified now; newest first."""
    model: Path | None
    """The model, if it was wanted and is here and was verified now."""
    refused: tuple[str, ...]
    """What was wanted and is damaged, a link or none; nothing of it is kept here."""
    notes: tuple[str, ...]
    """What else one might not expect: pruned there meanwhile, no model there, …"""


class _Pruned(Exception):
    """A checkpoint is not on the host any more."""


class _Damaged(Exception):
    """It is on the host, and not what it should be; the text says why."""


@dataclass
class _Work:
    """One fetch while it goes on."""

    transport: Transport
    remote: str
    python: str
    run_dir: RunDir
    say: Say
    sums: Mapping[str, str]
    meter: Meter
    moved: int
    before: int = 0
    """Bytes of what is done already, of those that the meter counts."""
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    async def tree(self, name: str, local: Path, want: Callable[[str], bool], counts: bool = True) -> FetchedTree:
        """Fetches a directory of the run, through lost connections."""
        tell = self._tell if counts else None
        tree = await resuming(
            lambda: get_tree(
                self.transport, f"{self.remote}/{name}", local, want=want, progress=tell, python=self.python
            ),
            say=self.say,
        )
        self.moved += sum(each.size - each.resumed for each in tree.files.values())
        return tree

    def _tell(self, progress: Progress) -> None:
        self.meter.at(self.before + progress.done)


async def fetch(
    reach: Reach,
    run_dir: RunDir,
    choice: Choice,
    say: Say,
    progress: Tell | None = None,
) -> Fetched:
    """Fetches a run. Safe to repeat and to break off: it goes on where it stopped; a second time it moves nothing.

    A run that goes on can be fetched: what it has committed so far.

    Args:
        reach: the ways to the hosts.
        run_dir: the run's directory here.
        choice: what of its weights is wanted.
        say: told what takes long, and of lost connections.
        progress: hears how far checkpoints and model are, all together.

    Raises:
        TransportError: the host cannot be reached.
        RunError: it has no such run, or no best checkpoint; the disk here is too small, or cannot be written.
    """
    remote = run_dir.manifest.remote
    if remote is None:
        return Fetched(run_dir, True, "", 0, (), None, (), ())
    transport = reach.transport(remote.host)
    there = await look(transport, remote.run_dir, remote.python)
    if there.run != run_dir.run:
        raise RunError(f"{remote.host}: {remote.run_dir}: is another run there", expected=f"run {run_dir.run}")
    wanted = chosen(there.checkpoints, choice)
    small = await bring_small(reach, run_dir, there, say)
    sums = await asyncio.to_thread(_listed, run_dir.path)
    missing = await asyncio.to_thread(_missing, run_dir.path, wanted, there.model_bytes if choice.model else 0)
    meter = Meter(missing, progress)
    work = _Work(transport, remote.run_dir, remote.python, run_dir, say, sums, meter, small.moved)
    work.notes.extend(small.notes)
    here = await _checkpoints(work, there, choice)
    await _latest(work, here)
    model = await _model(work, there) if choice.model else None
    return Fetched(
        run_dir, False, there.state, work.moved, here, model, tuple(work.refused), tuple(dict.fromkeys(work.notes))
    )


def chosen(there: Sequence[HostCheckpoint], choice: Choice) -> list[HostCheckpoint]:
    """Which of a run's checkpoints a choice means.

    Args:
        there: on the host, newest first.
        choice: what is wanted.

    Raises:
        RunError: the best is wanted and there is none.
    """
    found = list(there)
    bests = [each for each in found if "best" in each.kinds and each.best_loss is not None]
    best = min(bests, key=lambda each: each.best_loss or 0.0, default=None)  # of equal ones the newest
    match choice.checkpoints:
        case "none":
            return []
        case "all":
            return found
        case "best" if best is None and found:
            raise RunError("no checkpoint there was saved as the best", do="take --checkpoints latest")
        case "latest":
            return found[:1]
    return [best] if best else found[:1]


def _listed(path: Path) -> Mapping[str, str]:
    return read_sums(path).files if (path / SUMS).is_file() else {}


def _missing(path: Path, wanted: list[HostCheckpoint], model: int) -> int:
    """Bytes of what is not here under its name, after a look at the disk.

    Raises:
        RunError: it has no room for them.
    """
    root = path / checkpoint.DIRECTORY
    places = [(root / each.name, each.bytes) for each in wanted] + ([(path / MODEL, model)] if model else [])
    absent = [(place, size) for place, size in places if not place.is_dir()]
    needed = sum(size - _size(partial_of(place)) for place, size in absent)
    free = shutil.disk_usage(path).free
    if absent and needed + MARGIN_BYTES > free:
        raise RunError(
            f"{clean(str(path), 300)}: {free:,} bytes are free on this disk",
            expected=f"{needed + MARGIN_BYTES:,} for what is to come",
            do="free some, or fetch less: --checkpoints best, latest or none",
        )
    return sum(size for _, size in absent)


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file()) if path.is_dir() else 0


# Checkpoints


async def _latest(work: _Work, here: Sequence[Path]) -> None:
    """Brings the pointer to the newest checkpoint, where that is here: one that leads nowhere would be damage."""
    name = f"{checkpoint.DIRECTORY}/{checkpoint.LATEST}"
    try:
        data = await work.transport.read(f"{work.remote}/{name}", 0, POINTER_BYTES)
    except MissingFile:
        return
    path = work.run_dir.path / name
    if data.decode(errors="replace").strip() in {each.name for each in here} and not _same(path, data):
        try:
            await asyncio.to_thread(write_atomic, path, data)
        except OSError as error:
            raise RunError(f"{clean(str(path), 300)}: {error.strerror}", expected="room to keep it") from None
        work.moved += len(data)


def _same(path: Path, data: bytes) -> bool:
    return path.is_file() and not path.is_symlink() and path.read_bytes() == data


async def _checkpoints(work: _Work, there: HostRun, choice: Choice) -> tuple[Path, ...]:
    """Brings those that are wanted; where one was pruned meanwhile, the list is looked at anew."""
    done: dict[str, Path] = {}
    tried: set[str] = set()
    for _ in range(ROUNDS):
        pruned = False
        for each in chosen(there.checkpoints, choice):
            if each.name in tried:
                continue
            try:
                done[each.name] = await _checkpoint(work, each)
            except _Pruned:
                pruned = True
                work.notes.append(f"{each.name} was pruned on {work.transport.host} before it was here")
                work.say(work.notes[-1])
            except _Damaged as error:
                work.refused.append(f"{checkpoint.DIRECTORY}/{each.name} on {work.transport.host}: {error}")
            tried.add(each.name)
        if not pruned:
            break
        there = await look(work.transport, work.remote, work.python)
    if choice.checkpoints != "none":
        links = [name for name in there.others if name != MODEL]
        work.refused.extend(f"{name} on {work.transport.host}: no directory of its own, but a link" for name in links)
        if not there.checkpoints and not links:
            work.notes.append("no checkpoint was committed there" + (" yet" if there.state == "running" else ""))
    await asyncio.to_thread(_clear, work.run_dir.path, {each.name for each in there.checkpoints})
    return tuple(done[name] for name in sorted(done, key=_step, reverse=True))


def _step(name: str) -> int:
    return checkpoint.step_of(name) or 0


def _clear(path: Path, there: set[str]) -> None:
    """Removes what came of checkpoints that will never be whole: they are gone from the host."""
    for each in (path / checkpoint.DIRECTORY).glob(".ckpt-step-*.partial"):
        if each.name[1:].removesuffix(".partial") not in there:
            discard(each)


async def _checkpoint(work: _Work, wanted: HostCheckpoint) -> Path:
    """Brings one checkpoint, verified.

    Raises:
        _Pruned, _Damaged: and nothing of it is left here.
    """
    local = work.run_dir.path / checkpoint.DIRECTORY / wanted.name
    staging, name = partial_of(local), f"{checkpoint.DIRECTORY}/{wanted.name}"
    if await asyncio.to_thread(_is_here, work, local, wanted):
        return local
    counts = not local.is_dir()
    if not counts:  # another manifest, or damaged here: what is right of it is not sent again
        await asyncio.to_thread(discard, staging)
        await asyncio.to_thread(os.rename, local, staging)
    try:
        tree = await work.tree(name, staging, (checkpoint.MANIFEST, *checkpoint.FILES).__contains__, counts)
        await asyncio.to_thread(_verify, work, staging, name, wanted, tree)
    except HostToolError:
        now = await look(work.transport, work.remote, work.python)
        if any(each.name == wanted.name for each in now.checkpoints):
            raise
        await asyncio.to_thread(discard, staging)
        raise _Pruned from None
    except (checkpoint.CheckpointError, _Damaged) as error:
        await asyncio.to_thread(discard, staging)
        told = str(error).replace(str(staging), wanted.name)
        raise _Damaged(f"{told}; nothing of it was kept here") from None
    await asyncio.to_thread(_name, staging, local)
    if counts:
        work.before += wanted.bytes
    work.meter.at(work.before)
    return local


def _is_here(work: _Work, local: Path, wanted: HostCheckpoint) -> bool:
    """The same checkpoint stands here, and every byte of it is as its manifest says."""
    try:
        if sha256_file(local / checkpoint.MANIFEST) != wanted.sha256:
            return False
        _agree(
            work, f"{checkpoint.DIRECTORY}/{wanted.name}", _hashes(local, checkpoint.verify(local, work.run_dir.run))
        )
    except (OSError, checkpoint.CheckpointError, _Damaged):
        return False
    return True


def _verify(work: _Work, staging: Path, name: str, wanted: HostCheckpoint, tree: FetchedTree) -> None:
    odd = [f"{each.name}: {each.reason}" for each in tree.left_out if each.name in checkpoint.FILES]
    if odd:
        raise _Damaged("; ".join(odd))
    manifest = checkpoint.verify(staging, work.run_dir.run)
    if manifest.step != wanted.step:
        raise _Damaged("its manifest is that of another step")
    _agree(work, name, _hashes(staging, manifest))


def _hashes(path: Path, manifest: checkpoint.Manifest) -> dict[str, str]:
    """SHA-256 of a verified checkpoint's files."""
    rows = {name: row.sha256 for name, row in manifest.files.items()}
    return {**rows, checkpoint.MANIFEST: sha256_file(path / checkpoint.MANIFEST)}


def _agree(work: _Work, directory: str, hashes: Mapping[str, str]) -> None:
    """Holds a directory's files against the run's SHA256SUMS, as far as they list them."""
    for name, found in hashes.items():
        if work.sums.get(f"{directory}/{name}", found) != found:
            raise _Damaged(f"{name} is not as it was when the run was sealed: {SUMS} has another hash")


def _name(staging: Path, local: Path) -> None:
    sync_directory(staging)
    os.rename(staging, local)
    sync_directory(local.parent)


# The model


async def _model(work: _Work, there: HostRun) -> Path | None:
    """Brings `model/`; None where there is none that can be taken."""
    local, host = work.run_dir.path / MODEL, work.transport.host
    staging = partial_of(local)
    if MODEL in there.others:
        work.refused.append(f"{MODEL} on {host}: no directory of its own, but a link")
        return None
    if not there.model_bytes:
        work.notes.append(f"no model on {host}: a training writes it at its end; kdconsole export makes one here")
        return None
    if local.is_dir():
        if await _same_model(work, local):
            return local
        raise RunError(
            f"{clean(str(local), 300)}: is another model than the one on {host}", do="move it away and fetch again"
        )
    tree = await work.tree(MODEL, staging, lambda _: True)
    try:
        if tree.left_out:
            raise _Damaged("; ".join(f"{each.name}: {each.reason}" for each in tree.left_out))
        await asyncio.to_thread(_only, staging, set(tree.files))
        _agree(work, MODEL, {name: each.sha256 for name, each in tree.files.items()})
    except _Damaged as error:
        await asyncio.to_thread(discard, staging)
        work.refused.append(f"{MODEL} on {host}: {error}; nothing of it was kept here")
        return None
    await asyncio.to_thread(_name, staging, local)
    return local


def _only(directory: Path, names: set[str]) -> None:
    """Removes what an earlier attempt brought and what is not there any more."""
    for path in directory.rglob("*"):
        if path.is_file() and str(path.relative_to(directory)) not in names:
            path.unlink()


async def _same_model(work: _Work, local: Path) -> bool:
    """Every file of the model here has the hash of the one there, and there are no others."""
    files = await asyncio.to_thread(lambda: {str(p.relative_to(local)): p for p in local.rglob("*") if p.is_file()})
    found = await asyncio.to_thread(lambda: {name: sha256_file(path) for name, path in files.items()})
    listed = {name.removeprefix(f"{MODEL}/"): sha for name, sha in work.sums.items() if name.startswith(f"{MODEL}/")}
    if listed:
        return found == listed
    root = f"{work.remote}/{MODEL}"
    tree = await ask(work.transport, "tree", root=root, python=work.python)
    names = [str(each[0]) for each in tree["files"]]
    if set(names) != set(found):
        return False
    ask_hashes = partial(ask, work.transport, "hash", python=work.python)
    told = await ask_hashes(paths=[f"{root}/{name}" for name in names])
    return {name: each.get("sha256") for name, each in zip(names, told["files"], strict=True)} == found
