"""The files of a publication: which of an exported model are taken, and their copy that is whole or not there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.durable import discard, partial_of, sync_directory, write_new
from engine.errors import ModelError, RunError
from engine.formats import INDEX_FILE, SINGLE_FILE
from engine.publish_card import MARK
from engine.text import clean

CARD, LICENCE = "README.md", "LICENSE"
_NAMED: Final = (
    *("config.json", "generation_config.json", SINGLE_FILE, INDEX_FILE),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "merges.txt"),
)
_SHARD: Final = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_PIECE: Final = 1 << 20
_CARD_CAP: Final = 1 << 20
Poll = Callable[[], object]


@dataclass(frozen=True)
class File:
    """One file that is published."""

    name: str
    bytes: int
    sha256: str


def is_published(name: str) -> bool:
    """Whether a file of an exported model belongs to what is published; its README is replaced by the card."""
    return name in _NAMED or _SHARD.fullmatch(name) is not None


def is_layout(name: str) -> bool:
    """Whether a file may stand in a directory that this command made."""
    return is_published(name) or name in (CARD, LICENCE)


def choose(listed: Mapping[str, str], model: Path) -> tuple[list[File], list[str]]:
    """The files of a run's model that are published, and the names of those that are left out.

    Args:
        listed: SHA-256 by name below `model/`, as the run's checksums have them.
        model: the directory.

    Raises:
        ModelError: weights, config or tokenizer are missing, or a file cannot be read.
    """
    taken = sorted(name for name in listed if is_published(name))
    left = sorted(name for name in listed if not is_published(name) and name != CARD)
    weights = [name for name in taken if name.endswith(".safetensors")]
    for name, there in (("config.json", "config.json" in taken), (SINGLE_FILE, bool(weights))):
        if not there:
            raise ModelError(f"{clean(str(model), 300)}: {name} is missing", expected="a model that was exported")
    if "tokenizer.json" not in taken:
        raise ModelError(
            f"{clean(str(model), 300)}: tokenizer.json is missing, and nobody could use the model without it",
            do="train with data.tokenizer, or from a student that has one",
        )
    try:
        return [File(name, os.lstat(model / name).st_size, listed[name]) for name in taken], left
    except OSError as error:
        raise ModelError(f"{clean(str(error.filename), 300)}: {error.strerror}") from None


def made(texts: Mapping[str, str]) -> list[File]:
    """What is written for a publication itself, the card and the licence, as files."""
    rows = ((name, text.encode()) for name, text in texts.items())
    return [File(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in rows]


def stage(
    directory: Path, model: Path, files: Sequence[File], texts: Mapping[str, str], poll: Poll = lambda: None
) -> None:
    """Copies what is published into a new directory, down to the disk, each byte held against its checksum.

    Args:
        directory: is made; whatever stood there is removed first.
        model: where the run's files are.
        files: all of them, those of `texts` included.
        texts: what is written rather than copied, by name.
        poll: called often; may raise to stop.

    Raises:
        ModelError: a file is not what the run's checksums say.
        RunError: the directory cannot be written.
    """
    try:
        discard(directory)
        directory.mkdir(mode=0o755)
        for file in files:
            data = texts.get(file.name)
            digest = _copy(model / file.name, directory / file.name, poll) if data is None else None
            if data is not None:
                digest = write_new(directory / file.name, [data.encode()])
            if digest != file.sha256:
                raise ModelError(
                    f"model/{file.name}: SHA-256 {digest} while it was copied",
                    expected=f"{file.sha256}, as the run's checksums say",
                    do="find out what changes it, then publish again",
                )
            os.chmod(directory / file.name, 0o644)
        sync_directory(directory)
    except OSError as error:
        raise cannot_write(error, directory) from None


def cannot_write(error: OSError, directory: Path) -> RunError:
    """What is told where the disk does not take a publication's files."""
    where = clean(str(error.filename or directory), 300)
    return RunError(
        f"{where}: {error.strerror or error}", expected="a directory with room for the model", do="make room, try again"
    )


def _copy(source: Path, target: Path, poll: Poll) -> str:
    # The bytes that were hashed are the bytes that are written: nobody can change the file in between.
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as opened:

        def pieces() -> Iterator[bytes]:
            while piece := opened.read(_PIECE):
                poll()
                yield piece

        return write_new(target, pieces())


def require_room(directory: Path, needed: int, times: int) -> None:
    """Refuses a publication for which the disk has no room.

    Args:
        directory: on that disk.
        needed: bytes of the publication.
        times: how often it stands there at once.

    Raises:
        RunError: there is too little.
    """
    free = shutil.disk_usage(directory).free
    if free < needed * times:
        often = "once" if times == 1 else f"{times} times"
        raise RunError(
            f"{clean(str(directory), 300)}: {free / 1e6:,.1f} MB free",
            expected=f"{needed * times / 1e6:,.1f} MB: the model stands there {often}",
            do="make room there",
        )


def require_ours(target: Path, force: bool) -> None:
    """Refuses to put a publication where something else stands.

    Args:
        target: the directory that is to be made.
        force: an earlier publication may be replaced; nothing else ever is.

    Raises:
        RunError: it is no directory, holds what no publication does, or holds one and may not be replaced.
    """
    shown = clean(str(target), 300)
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise RunError(f"--to {shown}: no directory", expected="a directory that is empty or not there")
    try:
        names = sorted(os.listdir(target))
    except OSError as error:
        raise RunError(f"--to {shown}: {error.strerror}") from None
    if not names:
        return
    foreign = next((name for name in names if not is_layout(name) or not (target / name).is_file()), None)
    if foreign is None and not _is_marked(target / CARD):
        foreign = CARD
    if foreign is not None:
        raise RunError(
            f"--to {shown}: holds {clean(foreign, 100)}, which is of no publication",
            expected="a directory that is empty, not there, or an earlier publication",
            do="choose another one",
        )
    if not force:
        raise RunError(
            f"--to {shown}: holds a publication already", do="choose another one, or replace it with --force"
        )


def _is_marked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(_CARD_CAP)
    except OSError:
        return False


def put_in_place(staged: Path, target: Path) -> None:
    """Gives a staged directory its name, at once; an earlier publication there is removed after it.

    Raises:
        RunError: it cannot be done; what stood there stands there still.
    """
    retired = target.with_name(f".{target.name}.old")
    try:
        discard(retired)
        try:
            if target.exists():
                os.rename(target, retired)
            os.rename(staged, target)
        except BaseException:  # Ctrl-C between the two must not leave nothing there
            with contextlib.suppress(OSError):
                os.rename(retired, target)
            raise
        sync_directory(target.parent)
        discard(retired)
    except OSError as error:
        raise cannot_write(error, target) from None


def staging_of(target: Path) -> Path:
    """Where a directory is made before it gets its name."""
    return partial_of(target)
