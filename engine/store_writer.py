"""Writes a stored teacher, a file at a time, so that whatever instant it ends at, what is whole is kept and found."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engine.durable import discard, partial_of, sync_directory, write_new
from engine.store_format import (
    HEAD,
    MANIFEST,
    PARTIAL,
    FileRow,
    Manifest,
    Part,
    StoreError,
    check_sizes,
    read_manifest,
    verify,
    write_manifest,
)
from engine.text import clean


class StoreWriter:
    """One store in the making; goes on from what is there of the same key. Close it: it holds a lock.

    Args:
        directory: of the store; made if missing.
        begun: what the manifest is to say, without files.
        shard_bytes: about the size of one file.

    Raises:
        StoreError: another process writes there, or what stands there is damaged.
        OSError: the disk does not take it.
    """

    def __init__(self, directory: Path, begun: Manifest, shard_bytes: int) -> None:
        self.directory, self._shard_bytes = directory, shard_bytes
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(
                    f"{clean(str(directory), 300)}: another process stores this teacher", do="wait for its end"
                ) from None
            found = read_manifest(directory / PARTIAL) or read_manifest(directory / MANIFEST)
            self._manifest = begun
            if found is not None and found.key == begun.key:
                self._manifest = msgspec.structs.replace(begun, files=found.files)
                check_sizes(directory, found)
            self._discard_unknown()
            self.have = self._windows()
        except BaseException:
            os.close(self._lock)
            raise
        self._waiting: dict[str, list[Tensor]] = {}
        self._part: Part = "train"

    @property
    def bytes(self) -> int:
        """Of what is whole."""
        return self._manifest.bytes

    def windows(self, part: Part) -> int:
        """How many windows of a part are whole."""
        return sum(row.windows for row in self._manifest.files if row.part == part)

    @property
    def has_head(self) -> bool:
        """Whether the head is there."""
        return any(row.part == "head" for row in self._manifest.files)

    def put_head(self, head: Tensor) -> None:
        """Stores the weight of the teacher's head, shape [vocabulary, width]."""
        self._commit("head", HEAD, {"head": head.detach().cpu().contiguous()}, 0)

    def add(self, part: Part, tensors: Mapping[str, Tensor]) -> None:
        """Takes windows of a part, and commits a file when there are enough of them.

        Args:
            part: heldout or train; `flush` before another one begins.
            tensors: by name, CPU, the first dimension being windows; those of the training part with their indices as
                `windows`.
        """
        self._part = part
        for name, tensor in tensors.items():
            self._waiting.setdefault(name, []).append(tensor)
        if sum(t.nbytes for each in self._waiting.values() for t in each) >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Commits what was taken and is not whole yet, as a file of its own."""
        if not self._waiting:
            return
        whole = {name: torch.cat(parts) for name, parts in self._waiting.items()}
        self._waiting = {}
        number = sum(row.part == self._part for row in self._manifest.files)
        windows = len(next(iter(whole.values())))
        if self._part == "train":
            self.have |= set(whole["windows"].tolist())
        self._commit(self._part, f"{self._part}-{number:05}.safetensors", whole, windows)

    def finish(self, measures: Mapping[str, float]) -> Manifest:
        """Names the store whole: from now on runs find it."""
        manifest = msgspec.structs.replace(self._manifest, measures=dict(measures), created=time.time())
        self._manifest = write_manifest(self.directory / MANIFEST, manifest)
        discard(self.directory / PARTIAL)
        return self._manifest

    def verify(self, poll: Callable[[int], None]) -> None:
        """Reads every file back and holds it against its SHA-256.

        Args:
            poll: told the bytes read so far, often; may raise to stop.

        Raises:
            StoreError: the first that is not as it was written.
        """
        done = 0
        for size in verify(self.directory, self._manifest):
            done += size
            poll(done)

    @property
    def manifest(self) -> Manifest:
        """As it stands."""
        return self._manifest

    def close(self) -> None:
        """Gives the lock back; what was taken and not flushed is lost."""
        os.close(self._lock)

    def _commit(self, part: Part, name: str, tensors: dict[str, Tensor], windows: int) -> None:
        content = save(tensors)
        path = self.directory / name
        partial = partial_of(path)
        discard(partial)
        try:
            digest = write_new(partial, [content])
            os.rename(partial, path)
            sync_directory(self.directory)
        except OSError as error:
            discard(partial)
            raise StoreError(
                f"{clean(str(path), 300)}: {error.strerror}; {self._manifest.windows:,} of "
                f"{self._manifest.wanted:,} windows are stored",
                do="free space on that disk and run it again; it goes on from there",
            ) from None
        row = FileRow(name=name, part=part, bytes=len(content), sha256=digest, windows=windows)
        # After the file: one that the list does not name is removed by who goes on, and never read.
        self._manifest = write_manifest(
            self.directory / PARTIAL, msgspec.structs.replace(self._manifest, files=[*self._manifest.files, row])
        )

    def _windows(self) -> set[int]:
        found: set[int] = set()
        for row in self._manifest.files:
            if row.part == "train":
                try:
                    with safe_open(str(self.directory / row.name), framework="np") as file:
                        found |= set(np.asarray(file.get_tensor("windows")).tolist())
                except (SafetensorError, OSError) as error:
                    path = clean(str(self.directory / row.name), 300)
                    raise StoreError(
                        f"{path}: damaged: {clean(str(error), 200)}", do=f"remove {clean(str(self.directory), 300)}"
                    ) from None
        return found

    def _discard_unknown(self) -> None:
        known = {row.name for row in self._manifest.files} | {MANIFEST, PARTIAL}
        for path in self.directory.iterdir():
            if path.name not in known and path.name.lstrip(".").startswith(("head", "heldout-", "train-")):
                discard(path)
