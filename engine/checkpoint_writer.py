"""Writes checkpoints while training goes on: commit, read back, retention, and what to do when the disk is full.

A checkpoint is made in a hidden sibling and read back there; only then it gets its name. Whatever instant the process
is killed at, a directory named `ckpt-step-…` is whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from engine.checkpoint import (
    DIRECTORY,
    LATEST,
    MANIFEST,
    MODEL,
    CheckpointError,
    FileRow,
    Kind,
    Manifest,
    State,
    TensorRow,
    committed,
    directory_name,
    encode_manifest,
    read_manifest,
    verify,
)
from engine.durable import discard, partial_of, replace, sync_directory, write_new
from engine.errors import KdError
from engine.retention import droppable, retained
from engine.stream import Checkpoint, CheckpointFailed, Event
from engine.text import clean

INITIAL_WEIGHTS = "initial_weights"
"""Key of `State.digests`: `model.safetensors` of the untrained student would have this SHA-256."""

_CHUNK_BYTES = 8 << 20
_MARGIN_BYTES = 4 << 20
_JOIN_SECONDS = 0.2
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LEFTOVER = re.compile(r"\.ckpt-step-[0-9]{6,18}\.(partial|removed)")


@dataclass(frozen=True)
class Image:
    """A safetensors file as it stands in memory."""

    header: bytes
    data: memoryview
    tensors: dict[str, TensorRow]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + len(self.data)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The file in pieces, large enough that hashing and writing leave the interpreter to the training thread."""
        yield self.header
        for begin in range(0, len(self.data), _CHUNK_BYTES):
            yield self.data[begin : begin + _CHUNK_BYTES]

    def sha256(self) -> str:
        """Digest of the file."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()


class Source(Protocol):
    """Where the tensors come from; `engine.snapshot.Snapshot` is one."""

    files: dict[str, Image]

    def fill(self) -> None:
        """Copies the present state into `files`."""


@dataclass
class _Job:
    state: State
    kinds: tuple[Kind, ...]
    started: float
    wait: bool
    waited: float = 0.0

    @property
    def kind(self) -> str:
        return "+".join(self.kinds)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class Checkpoints:
    """The checkpoints of one run, written by one thread, one at a time. No method raises for what a disk does.

    Args:
        run_dir: of the run; unfinished checkpoints that a killed process left there are removed.
        run: its uuid.
        source: the snapshot that is written.
        emit: takes the events `checkpoint` and `checkpoint_failed`, from the writer's thread too.
        sync: returns when the stream is on disk, or raises OSError; called before a checkpoint becomes visible, so
            that none stands ahead of its history.
        log: takes message and level.
        keep_last: periodic checkpoints to keep; the newest checkpoint, the best, and the newest interrupt and final
            ones are kept besides.
    """

    def __init__(
        self,
        run_dir: Path,
        run: str,
        source: Source,
        *,
        emit: Callable[[Event], None],
        sync: Callable[[], None],
        log: Callable[[str, str], None],
        keep_last: int,
    ) -> None:
        self._run_dir, self._root, self._run, self._source = run_dir, run_dir / DIRECTORY, run, source
        self._emit, self._sync, self._log, self._keep_last = emit, sync, log, keep_last
        self._thread: threading.Thread | None = None
        self.last_error: str | None = None
        """Why the newest request failed; None when it is committed (or still being written: `drain` first)."""
        try:
            self._remove_leftovers()
        except (OSError, CheckpointError) as error:
            self._log(f"unfinished checkpoints could not be removed: {_reason(error)}", "warning")

    @property
    def root(self) -> Path:
        """The directory that they stand in."""
        return self._root

    @property
    def writing(self) -> bool:
        """Whether one is being written, or what it replaces removed."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    @property
    def needed_bytes(self) -> int:
        """What must be free for the next one, a margin included."""
        return sum(image.nbytes for image in self._source.files.values()) + _MARGIN_BYTES

    def fate(self, free: int, step: int) -> str:
        """What becomes of the next one where fewer than `needed_bytes` are free, in words.

        Args:
            free: bytes.
            step: the last one made.

        Raises:
            CheckpointError: the directory cannot be read.
        """
        if self.needed_bytes <= free + sum(loss.bytes for loss in droppable(self._manifests(step))):
            return "the oldest will be dropped to make room"
        return f"it will not be saved and training will go on; {self._newest(step)}"

    def save(self, kinds: Kind | Sequence[Kind], state: State, wait: bool = False) -> float:
        """Saves the present state; training may go on as soon as this returns.

        Args:
            kinds: why: one reason, or several for one and the same step, which is then written once.
            state: of this moment.
            wait: return only when it is committed or has failed.

        Returns:
            Seconds that training waited: for a write still in progress, for the copy, and for all of it if `wait`.
        """
        reasons: Sequence[Kind] = [kinds] if isinstance(kinds, str) else kinds
        job = _Job(state, tuple(dict.fromkeys(reasons)), time.monotonic(), wait)
        self.drain()
        self.last_error = None
        try:
            self._source.fill()
            # Not a daemon: where the interpreter ends without `drain`, a checkpoint in progress is still finished.
            self._thread = threading.Thread(target=self._write, args=(job,), name="checkpoint")
            job.waited = job.seconds
            self._thread.start()
        except Exception as error:  # noqa: BLE001 - a checkpoint that fails must not end the training it protects
            self._thread = None
            self._fail(job, error)
        if wait:
            self.drain()
        return job.seconds

    def drain(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not None:
            while self._thread.is_alive():  # in turns: without an end it would not hear of another thread's signal
                self._thread.join(_JOIN_SECONDS)
            self._thread = None

    def _write(self, job: _Job) -> None:
        """The writer's thread: one checkpoint from snapshot to retention."""
        try:
            manifest = self._commit_or_make_room(job)
        except Exception as error:  # noqa: BLE001 - as in `save`
            self._fail(job, error)
            return
        seconds = job.seconds
        self._emit(
            Checkpoint(
                step=manifest.step,
                kind=job.kind,
                path=f"{DIRECTORY}/{directory_name(manifest.step)}",
                bytes=manifest.bytes,
                tensors=manifest.tensors,
                sha256=manifest.files[MODEL].sha256,
                seconds=seconds,
                waited_seconds=seconds if job.wait else job.waited,
            )
        )
        try:
            self._prune(job.state.step)
        except (OSError, CheckpointError) as error:
            self._log(f"old checkpoints could not be removed: {_reason(error)}", "warning")

    def _fail(self, job: _Job, error: Exception) -> None:
        self.last_error = _reason(error)
        self._emit(CheckpointFailed(step=job.state.step, kind=job.kind, error=self.last_error, seconds=job.seconds))
        try:
            kept = self._newest(job.state.step)
        except CheckpointError:  # the directory cannot be read either
            kept = "whether there is one cannot be told"
        self._log(f"checkpoint of step {job.state.step} not saved: {self.last_error}; {kept}", "error")

    def _newest(self, step: int) -> str:
        good = next(iter(self._manifests(step)), None)
        return f"the newest one is that of step {good.step}" if good else "there is none"

    def _commit_or_make_room(self, job: _Job) -> Manifest:
        try:
            return self._commit(job)
        except OSError as error:
            # A file size limit is no full disk: nothing that could be removed would help.
            if error.errno not in _FULL or not self._drop_oldest(job.state.step):
                raise
        return self._commit(job)

    def _commit(self, job: _Job) -> Manifest:
        self._root.mkdir(mode=0o700, exist_ok=True)
        target = self._root / directory_name(job.state.step)
        manifest = self._add_kinds(target, job) or self._create(target, job)
        replace(self._root / LATEST, f"{target.name}\n".encode())
        return manifest

    def _create(self, target: Path, job: _Job) -> Manifest:
        """Writes, reads back, and only then gives the checkpoint its name."""
        images = self._source.files
        self._make_room(self.needed_bytes, job.state.step)
        temporary = partial_of(target)
        discard(temporary)
        try:
            os.mkdir(temporary, 0o700)
            rows = {name: _write_image(temporary / name, image) for name, image in images.items()}
            manifest = Manifest(
                run=self._run,
                step=job.state.step,
                kinds=job.kinds,
                created=time.time(),
                files=rows,
                state=job.state,
            )
            write_new(temporary / MANIFEST, [encode_manifest(manifest)])
            sync_directory(temporary)
            manifest = verify(temporary, self._run)
            self._judge(manifest, rows)
            self._sync()
            if os.path.lexists(target):
                # Of this step, and not what is in memory: what an earlier attempt left there and could not use.
                self._remove(target)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(self._root)
        return manifest

    def _judge(self, manifest: Manifest, written: Mapping[str, FileRow]) -> None:
        """Refuses a checkpoint that is whole on disk but not what training was to leave there."""
        if manifest.files != written:
            raise CheckpointError("the manifest reads back otherwise than it was written")
        state = manifest.state
        if state.learned and manifest.files[MODEL].sha256 == state.digests.get(INITIAL_WEIGHTS):
            raise CheckpointError(
                f"after {state.step} steps the weights are still the initial ones",
                expected="weights that training has changed",
                do="check that the trained model is the one that is saved",
            )

    def _add_kinds(self, target: Path, job: _Job) -> Manifest | None:
        """Where these very tensors stand there already, only the manifest is replaced; None where they do not."""
        try:
            found = verify(target, self._run)
        except CheckpointError:
            return None
        if any(image.sha256() != found.files[name].sha256 for name, image in self._source.files.items()):
            return None
        kinds = tuple(dict.fromkeys((*found.kinds, *job.kinds)))
        manifest = msgspec.structs.replace(found, kinds=kinds, state=job.state)
        self._judge(manifest, found.files)
        self._sync()
        replace(target / MANIFEST, encode_manifest(manifest))
        return verify(target, self._run)

    def _make_room(self, needed: int, step: int) -> None:
        """Drops what may go until `needed` bytes are free, but nothing at all where that would not be enough."""
        free = shutil.disk_usage(self._root).free
        losses = droppable(self._manifests(step))
        if free < needed <= free + sum(loss.bytes for loss in losses):
            for loss in losses:
                self._drop(loss)
                free = shutil.disk_usage(self._root).free
                if free >= needed:
                    break
        if free < needed:
            raise CheckpointError(
                f"{clean(str(self._root), 300)}: {free:,} bytes are free",
                expected=f"{needed:,} for this checkpoint",
                do="free space on that disk; the next one will be tried again",
            )

    def _drop_oldest(self, step: int) -> bool:
        loss = next(iter(droppable(self._manifests(step))), None)
        if loss is not None:
            self._drop(loss)
        return loss is not None

    def _drop(self, manifest: Manifest) -> None:
        self._remove(self._root / directory_name(manifest.step))
        self._log(
            f"the disk is full: the checkpoint of step {manifest.step} was dropped to make room for a newer one "
            f"({manifest.bytes:,} bytes); free space, or keep fewer",
            "warning",
        )

    def _prune(self, step: int) -> None:
        manifests = self._manifests(step)
        kept = {manifest.step for manifest in retained(manifests, self._keep_last)}
        for manifest in manifests:
            if manifest.step not in kept:
                self._remove(self._root / directory_name(manifest.step))

    def _remove(self, path: Path) -> None:
        """Hides a checkpoint first: half removed it would look like a damaged one."""
        hidden = self._root / f".{path.name}.removed"
        discard(hidden)
        os.rename(path, hidden)
        discard(hidden)

    def _manifests(self, step: int) -> list[Manifest]:
        """Of the run's checkpoints up to a step, newest first.

        What is damaged, or another run's, is not ours to remove. What lies ahead of training is what a resume could not
        use: counted, it would stand in the place of those that can be used.
        """
        found = []
        for path in committed(self._run_dir):
            with contextlib.suppress(CheckpointError):
                found.append(read_manifest(path, self._run))
        return [manifest for manifest in found if manifest.step <= step]

    def _remove_leftovers(self) -> None:
        if not self._root.is_dir():
            return
        removed = 0
        for path in sorted(self._root.iterdir()):
            if _LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
                removed += 1
        for partial in [partial_of(self._root / LATEST)] + [partial_of(p / MANIFEST) for p in committed(self._run_dir)]:
            partial.unlink(missing_ok=True)
        if removed:
            self._log(f"removed {removed} unfinished checkpoint{'s' * (removed > 1)} of a killed process", "info")


def _write_image(path: Path, image: Image) -> FileRow:
    return FileRow(bytes=image.nbytes, sha256=write_new(path, image.chunks()), tensors=image.tensors)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return clean(f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 500)
    return clean(str(error) if isinstance(error, KdError) else f"{type(error).__name__}: {error}", 1000)
