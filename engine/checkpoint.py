"""Checkpoints on disk: what one holds, how a whole one is told from a broken one, which one a run goes on from.

A checkpoint is a directory `checkpoints/ckpt-step-000500` of three files: `model.safetensors` (every parameter, and
nothing else, so that its SHA-256 is the digest of the weights), `optimizer.safetensors` (moments, step counters and the
model's buffers) and `manifest.json` (what the other two hold, and all the rest of the state). The manifest carries a
digest of itself, so that no bit of the three can change unnoticed. Needs no torch: the console reads these too.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.errors import ExitCode, KdError, ModelError
from engine.sniff import read_safetensors_header, say
from engine.text import clean

VERSION = 1
DIRECTORY = "checkpoints"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
MANIFEST = "manifest.json"
LATEST = "LATEST"
FILES = (MODEL, OPTIMIZER)
MANIFEST_CAP = 64 << 20
"""Most bytes of a manifest; one tensor takes about a hundred."""

Kind = Literal["periodic", "best", "interrupt", "final"]
_NAME = re.compile(r"ckpt-step-([0-9]{6,18})")
_OTHERS = "resume from another checkpoint"


class CheckpointError(KdError):
    """A checkpoint is missing, damaged, of another run, or does not fit the model."""

    exit_code = ExitCode.USAGE


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the manifest."""


class OrderState(_Part, frozen=True, kw_only=True):
    """Where in the data training stands; see `engine.data.Order`."""

    seed: int
    epoch: int
    position: int


class RandomState(_Part, frozen=True, kw_only=True):
    """The state of every generator; those of torch in base64."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[str, tuple[int, ...], int, int, float]
    torch: str
    device: str | None = None


class Best(_Part, frozen=True, kw_only=True):
    """The step with the lowest held-out loss so far."""

    step: int
    loss: float


class State(_Part, frozen=True, kw_only=True):
    """Everything that going on needs and that is not a tensor. A loss that is not finite is stored as None."""

    step: int
    tokens: int
    order: OrderState
    random: RandomState
    learned: bool
    """Whether a step with a learning rate above 0 was made: from then on the weights must not be the initial ones."""
    attempt: int = 1
    train_seconds: float = 0.0
    initial_loss: float | None = None
    final_loss: float | None = None
    heldout_initial: float | None = None
    heldout_final: float | None = None
    best: Best | None = None
    digests: dict[str, str] = {}
    """What must be the same on resume, such as config, teacher, tokenizer, data and `initial_weights`."""


class TensorRow(_Part, frozen=True, kw_only=True):
    """One tensor of a file, as safetensors spells its dtype."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


class FileRow(_Part, frozen=True, kw_only=True):
    """One file of a checkpoint."""

    bytes: int
    sha256: str
    tensors: dict[str, TensorRow]


class Manifest(_Part, frozen=True, kw_only=True):
    """What a checkpoint is and holds. `digest` is the SHA-256 of the manifest with an empty `digest`."""

    v: int = VERSION
    run: str
    step: int
    kinds: tuple[Kind, ...]
    """Why it was made; one step is written once, whatever number of reasons it has."""
    created: float
    files: dict[str, FileRow]
    state: State
    digest: str = ""

    @property
    def bytes(self) -> int:
        """Size of its tensor files."""
        return sum(row.bytes for row in self.files.values())

    @property
    def tensors(self) -> int:
        """Number of its tensors."""
        return sum(len(row.tensors) for row in self.files.values())


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as it stands in its file, digest included."""
    bare = msgspec.json.encode(msgspec.structs.replace(manifest, digest=""))
    return msgspec.json.encode(msgspec.structs.replace(manifest, digest=hashlib.sha256(bare).hexdigest())) + b"\n"


def directory_name(step: int) -> str:
    """Name of a step's checkpoint."""
    return f"ckpt-step-{step:06d}"


def step_of(name: str) -> int | None:
    """The step that a directory's name speaks of; None for any other name, a temporary's included."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def committed(run_dir: Path) -> list[Path]:
    """The run's checkpoint directories, newest first; none of them is verified here.

    Raises:
        CheckpointError: `checkpoints` is no directory, or cannot be read.
    """
    root = run_dir / DIRECTORY
    found: list[tuple[int, Path]] = []
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                step = step_of(entry.name)
                if step is not None and entry.is_dir(follow_symlinks=False):
                    found.append((step, root / entry.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(root, error) from None
    return [path for _, path in sorted(found, reverse=True)]


def find_latest(run_dir: Path, run: str | None = None, log: Callable[[str, str], None] | None = None) -> Path | None:
    """The newest checkpoint that verifies; None where there has never been one.

    `LATEST` is a convenience for people and tools and is not believed: a crash between a checkpoint's rename and the
    pointer's leaves it one behind, and a pointer to nowhere must not hide what is there.

    Args:
        run_dir: of the run.
        run: its uuid; checkpoints of another run are passed over.
        log: told, as message and level, about everything that was passed over.

    Raises:
        CheckpointError: there are checkpoints, or a `LATEST`, but none verifies; starting anew would lose them.
    """
    problems: list[str] = []
    pointer = run_dir / DIRECTORY / LATEST
    if os.path.lexists(pointer):
        try:
            _pointed(pointer)
        except CheckpointError as error:
            problems.append(str(error))
    for path in committed(run_dir):
        try:
            verify(path, run)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            if log is not None:
                log(f"{problem}; {path.name} is taken", "warning")
        return path
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{say(run_dir / DIRECTORY)}: no checkpoint can be used{more}: {problems[-1]}",
            expected="at least one whole checkpoint",
            do="restore the directory from a copy, or start a new run",
        )
    return None


def _pointed(pointer: Path) -> None:
    """Checks that `LATEST` names a directory that is there."""
    name = clean(_read(pointer, 256).decode("utf-8", "replace").strip(), 100)
    if step_of(name) is None or not pointer.with_name(name).is_dir():
        raise CheckpointError(f"{say(pointer)}: points to {name!r}, which is no checkpoint here")


def read_manifest(path: Path, run: str | None = None) -> Manifest:
    """The manifest of a checkpoint, itself checked; the files that it speaks of are not.

    Raises:
        CheckpointError: no directory, no manifest, a damaged one, or one of another run or step.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError as error:
        raise _unreadable(path, error) from None
    if not stat.S_ISDIR(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a directory"
        raise CheckpointError(f"{say(path)}: {kind}", expected="a checkpoint directory")
    file = path / MANIFEST
    raw = _read(file, MANIFEST_CAP)
    try:
        version = msgspec.json.decode(raw, type=dict[str, Any]).get("v")
        if version != VERSION:
            shown = clean(repr(version), 40)
            raise CheckpointError(f"{say(file)}: format version {shown}", expected=str(VERSION), do=_OTHERS)
        manifest = msgspec.json.decode(raw, type=Manifest)
        whole = encode_manifest(manifest) == raw
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        reason = clean(str(error), 200)
        raise CheckpointError(f"{say(file)}: damaged: {reason}", expected="a whole manifest", do=_OTHERS) from None
    if not whole:
        raise CheckpointError(f"{say(file)}: damaged: its digest is not that of its content", do=_OTHERS)
    if run is not None and manifest.run != run:
        raise CheckpointError(f"{say(file)}: of run {say(manifest.run)}", expected=f"run {run}")
    named = step_of(path.name)
    if manifest.state.step != manifest.step or named not in (None, manifest.step):
        raise CheckpointError(f"{say(file)}: of step {manifest.step}", expected="the step of its directory's name")
    if set(manifest.files) != set(FILES):
        raise CheckpointError(
            f"{say(file)}: names the files {say(sorted(manifest.files))}", expected=" and ".join(FILES), do=_OTHERS
        )
    return manifest


def verify(path: Path, run: str | None = None) -> Manifest:
    """Reads a checkpoint back, every byte of it, and holds it against its manifest.

    Args:
        path: the checkpoint's directory.
        run: uuid of the run that it must be of; None takes any.

    Raises:
        CheckpointError: what is wrong with which file: missing, a link, shortened, changed, or other tensors than said.
    """
    manifest = read_manifest(path, run)
    for name, row in manifest.files.items():
        _check_file(path / name, row)
    return manifest


def _check_file(path: Path, row: FileRow) -> None:
    size = _regular_size(path)
    if size != row.bytes:
        raise CheckpointError(f"{say(path)}: {size:,} bytes", expected=f"{row.bytes:,} by its manifest", do=_OTHERS)
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None
    if found != row.sha256:
        raise CheckpointError(f"{say(path)}: damaged: SHA-256 {found}", expected=row.sha256, do=_OTHERS)
    try:
        header = read_safetensors_header(path)
    except ModelError as error:
        raise CheckpointError(str(error)) from None
    stored = {
        name: TensorRow(dtype=entry.dtype, shape=entry.shape, bytes=entry.end - entry.begin)
        for name, entry in header.items()
    }
    if stored != row.tensors:
        name = min(name for name in stored.keys() | row.tensors.keys() if stored.get(name) != row.tensors.get(name))
        shown = [_shown(table.get(name)) for table in (stored, row.tensors)]
        raise CheckpointError(f"{say(path)}: tensor {say(name)}: {shown[0]}", expected=f"{shown[1]} by its manifest")


def _shown(row: TensorRow | None) -> str:
    return "missing" if row is None else f"{row.dtype} of shape {list(row.shape)}, {row.bytes:,} bytes"


def _regular_size(path: Path) -> int:
    """Size of a file that is neither a link, which could lead anywhere, nor a pipe, which could block for ever."""
    try:
        status = os.lstat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
        raise CheckpointError(f"{say(path)}: {kind}", expected="a file", do=_OTHERS)
    return status.st_size


def _read(path: Path, cap: int) -> bytes:
    size = _regular_size(path)
    if size > cap:
        raise CheckpointError(f"{say(path)}: {size:,} bytes", expected=f"at most {cap:,}")
    try:
        with path.open("rb") as file:
            return file.read(cap)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{say(path)}: missing", expected="a whole checkpoint", do=_OTHERS)
    return CheckpointError(f"{say(path)}: cannot be read: {error.strerror or type(error).__name__}", do=_OTHERS)
