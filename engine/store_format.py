"""What a stored teacher is on the disk: its key, its manifest, its files and their sizes. Needs no torch.

A store is a directory `<cache>/<key>/` of safetensors files: `head.safetensors` (weight of the teacher's head),
`heldout-00000.safetensors` … (hidden states of the held-out windows, so that evaluation is exact for both kinds) and
`train-00000.safetensors` … (what a training step needs of each window). `manifest.json` names them all with size and
SHA-256, carries a digest of itself, and comes last: a directory that has one is whole. Until then the same thing
stands in `partial.json`, replaced after every file, so that storing goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from engine.config import Teacher
from engine.durable import replace
from engine.errors import KdError
from engine.text import clean

VERSION = 1
MANIFEST, PARTIAL = "manifest.json", "partial.json"
HEAD = "head.safetensors"
MANIFEST_CAP = 256 << 20
PREPARE = "kdconsole prepare CONFIG"

Kind = Literal["hidden", "topk"]
Part = Literal["head", "heldout", "train"]
_SHOWN_DIGITS = 12
_WHAT = {
    "teacher": "the teacher's weights",
    "teacher_config": "the teacher's config.json",
    "precision": "train.precision",
    "tokenizer": "the tokenizer",
    "data": "the corpus",
    "sequence": "train.sequence",
    "heldout": "held-out windows",
    "kind": "teacher.source",
    "top_k": "teacher.top_k",
    "temperature": "distill.temperature",
    "vocabulary": "the student's vocabulary",
}
"""How messages name what a key is made of."""


class StoreError(KdError):
    """A stored teacher is missing, of another run, damaged, or lacks what a run needs."""


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides what is stored. The last three are None for hidden states, which serve any of them."""

    kind: Kind
    teacher: str
    """SHA-256 over the weight files."""
    teacher_config: str
    precision: str
    tokenizer: str
    """SHA-256 of tokenizer.json; empty where token shards need none."""
    data: str
    """SHA-256 over the tokens."""
    sequence: int
    heldout: int
    top_k: int | None = None
    temperature: float | None = None
    vocabulary: int | None = None

    @property
    def digest(self) -> str:
        """SHA-256 in hex over all of it."""
        return hashlib.sha256(b"kdconsole-teacher-1\n" + msgspec.json.encode(self, order="sorted")).hexdigest()

    def differences(self, stored: Key) -> list[str]:
        """What is another there than here, by name and with both values."""
        found = []
        for name, what in _WHAT.items():
            here, there = getattr(self, name), getattr(stored, name)
            if here != there:
                found.append(f"{what} ({_shown(there)} there, {_shown(here)} here)")
        return found


class FileRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a store."""

    name: str
    part: Part
    bytes: int
    sha256: str
    windows: int = 0


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a store is and holds. `digest` is the SHA-256 of the manifest with an empty `digest`."""

    v: int = VERSION
    key: Key
    created: float
    teacher: str
    """What the configuration called the model."""
    vocab: int
    """Rows of its head."""
    width: int
    """Of its hidden states."""
    parameters: str
    """SHA-256 over names and shapes of its parameters; see `layout_digest`."""
    wanted: int
    """Training windows that were asked for."""
    measures: dict[str, float] = {}
    """What was measured when it was made, by name."""
    files: list[FileRow] = []
    digest: str = ""

    @property
    def windows(self) -> int:
        """Training windows that it holds."""
        return sum(row.windows for row in self.files if row.part == "train")

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(row.bytes for row in self.files)


@dataclass(frozen=True)
class Sizes:
    """Bytes that a store takes."""

    token: int
    """Of one token of the training part."""
    window: int
    """Of one window of the training part."""
    heldout: int
    """Of the held-out part."""
    head: int
    windows: int

    @property
    def total(self) -> int:
        """Of everything."""
        return self.window * self.windows + self.heldout + self.head


def sizes(
    kind: Kind,
    *,
    sequence: int,
    windows: int,
    heldout: int,
    width: int,
    rows: int,
    wide: int,
    top_k: int = 0,
    vocabulary: int = 0,
) -> Sizes:
    """What is to be stored, in bytes.

    Args:
        kind: what is kept of a training window.
        sequence: tokens a window.
        windows: training windows.
        heldout: held-out windows.
        width: of the teacher's hidden states.
        rows: of the teacher's head.
        wide: bytes of one number of the head and the held-out part: 2 in mixed precision, 4 in float32.
        top_k: logits a token; for topk.
        vocabulary: of the student; for topk.
    """
    token = 2 * width if kind == "hidden" else top_k * (2 + id_bytes(vocabulary)) + 4
    return Sizes(
        token=token,
        window=token * sequence + 8,
        heldout=heldout * sequence * width * wide,
        head=rows * width * wide,
        windows=windows,
    )


def id_bytes(vocabulary: int) -> int:
    """Bytes in which a token id is stored."""
    return 2 if vocabulary <= 1 << 16 else 4


def kept_logits(top_k: int, vocabulary: int) -> int:
    """How many logits a token are stored: the rest of the vocabulary must not be empty."""
    return max(1, min(top_k, vocabulary - 1))


def cache_directory(teacher: Teacher, environ: Mapping[str, str] = os.environ) -> Path:
    """Where stores live: `teacher.cache`, or `kdconsole/teacher` below the user's cache directory."""
    if teacher.cache is not None:
        return Path(teacher.cache)
    # By hand: a host that trains has what the engine needs and nothing else.
    base = environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "kdconsole" / "teacher"


def store_directory(cache: Path, key: Key) -> Path:
    """Where the store of a key lives."""
    return cache / key.digest[:32]


def files_digest(paths: Sequence[Path]) -> str:
    """SHA-256 over the SHA-256 of each file.

    Raises:
        OSError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def layout_digest(shapes: Mapping[str, Sequence[int]]) -> str:
    """SHA-256 over the names and shapes of parameters: two models of one layout have the same."""
    text = "\n".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(path: Path, manifest: Manifest) -> Manifest:
    """Puts a manifest in place of the one before, down to the disk; returns it with its digest.

    Raises:
        OSError: the disk does not take it.
    """
    manifest = msgspec.structs.replace(manifest, digest="")
    manifest = msgspec.structs.replace(manifest, digest=_digest(manifest))
    replace(path, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    return manifest


def read_manifest(path: Path) -> Manifest | None:
    """A manifest; None where there is none.

    Raises:
        StoreError: it cannot be read, or is damaged.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MANIFEST_CAP)
        manifest = msgspec.json.decode(content, type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(f"{_name(path)}: cannot be read: {error.strerror}", do="check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, clean(str(error), 200)) from None
    if manifest.v != VERSION:
        raise StoreError(f"{_name(path)}: version {manifest.v}", expected=f"version {VERSION}", do=f"run {PREPARE}")
    if _digest(msgspec.structs.replace(manifest, digest="")) != manifest.digest:
        raise _damaged(path, "it is not as it was written")
    return manifest


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Holds the files against the manifest by their sizes.

    Raises:
        StoreError: the first that is missing or of another size.
    """
    for row in manifest.files:
        path = directory / row.name
        try:
            found = f"{path.stat().st_size:,} bytes"
        except OSError as error:
            found = error.strerror or "cannot be read"
        if found != f"{row.bytes:,} bytes":
            raise _damaged(path, f"{found}, not {row.bytes:,} bytes")


def verify(directory: Path, manifest: Manifest) -> Iterator[int]:
    """Reads every file whole and holds it against its SHA-256; gives the bytes read, piece by piece.

    Raises:
        StoreError: the first that is not as it was written.
    """
    check_sizes(directory, manifest)
    for row in manifest.files:
        digest = hashlib.sha256()
        try:
            with (directory / row.name).open("rb") as file:
                while piece := file.read(8 << 20):
                    digest.update(piece)
                    yield len(piece)
        except OSError as error:
            raise _damaged(directory / row.name, error.strerror or "cannot be read") from None
        if digest.hexdigest() != row.sha256:
            raise _damaged(directory / row.name, "its SHA-256 is another than when it was written")


def find(cache: Path, key: Key) -> tuple[Path, Manifest]:
    """The whole store of a key, its files held against their sizes.

    Raises:
        StoreError: there is none, and what there is instead; or it is damaged.
    """
    directory = store_directory(cache, key)
    manifest = read_manifest(directory / MANIFEST)
    if manifest is None:
        raise _missing(cache, directory, key)
    if manifest.key != key:
        raise _damaged(directory / MANIFEST, "it is of another key than its directory")
    check_sizes(directory, manifest)
    return directory, manifest


def _missing(cache: Path, directory: Path, key: Key) -> StoreError:
    partial = read_manifest(directory / PARTIAL)
    if partial is not None:
        return StoreError(
            f"{_name(directory)}: the stored teacher is not whole: {partial.windows:,} of {partial.wanted:,} windows",
            do=f"run {PREPARE} again; it goes on from there",
        )
    others = []
    for path in sorted(cache.glob(f"*/{MANIFEST}")) if cache.is_dir() else []:
        try:
            if (found := read_manifest(path)) is not None:
                others.append((key.differences(found.key), path.parent))
        except StoreError:
            continue
    if not others:
        return StoreError(
            f"{_name(cache)}: no stored teacher", expected=f"one of source {key.kind}", do=f"run {PREPARE}"
        )
    differences, path = min(others, key=lambda other: len(other[0]))
    return StoreError(
        f"{_name(cache)}: no stored teacher for this run; {path.name[:_SHOWN_DIGITS]}… comes nearest and differs in "
        + ", ".join(differences),
        do=f"put that back, or run {PREPARE}",
    )


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{_name(path)}: damaged: {why}", do=f"remove {_name(path.parent)} and run {PREPARE}")


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(msgspec.json.encode(manifest, order="sorted")).hexdigest()


def _shown(value: object) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:_SHOWN_DIGITS]}…"
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value or "none")
    )


def _name(path: Path) -> str:
    return clean(str(path), 300)
