"""SHA256SUMS: every file of an ended run's directory with its hash, in sha256sum's own format.

The hash of that file is the run's evidence id. Weights (`checkpoints/`, `model/`) are listed wherever they are: on the
host that made them, or here. Everything else has to be here.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from dispatch import names
from dispatch.manifest import FIRST_FILES, SMALL_FILES, SUMS, VERSION, read_manifest
from dispatch.supervisor import open_regular, read_regular, write_atomic
from engine.errors import RunError
from engine.text import clean

WEIGHTS: Final = ("checkpoints", "model", "model.rejected")
"""Directories that may have stayed on the host."""
ALL_FILES_VERSION: Final = 2
"""From this manifest version on every file is listed; before it those of SMALL_FILES."""
MAX_BYTES: Final = 16 << 20
MAX_FILES: Final = 100_000
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_PASSING = re.compile(r"\..*\.(tmp|partial|removed)|\.lock|\.model\.reference\.safetensors|.*\.part")
"""Names of what is being written, or was when its process was killed, and of locks."""
_NO_FILE = "not a regular file of this directory"
_PIECE = 1 << 20

Progress = Callable[[str, int], object]
"""Told the name that is being read and how many bytes were read since the last time."""


@dataclass(frozen=True, slots=True)
class Sums:
    """The contents of a SHA256SUMS."""

    files: Mapping[str, str]
    """SHA-256 by name."""
    broken: tuple[str, ...]
    """What is wrong with the list itself."""
    evidence_id: str
    """SHA-256 of the file."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A directory held against its SHA256SUMS."""

    evidence_id: str
    problems: tuple[str, ...]
    """One line for each file that is missing, changed, not listed or not allowed."""
    absent: tuple[str, ...]
    """Listed weights that are not here, which is no problem: they stayed on the host, or were not fetched."""


@dataclass(frozen=True, slots=True)
class FileCheck:
    """One file of a directory, listed or not, held against the list."""

    name: str
    """As it is listed, or as it stands there: not cleaned."""
    stated: str | None
    """SHA-256 by the list; None where it is not listed."""
    found: str | None
    """SHA-256 of what is there; None where it was not read."""
    problem: str | None
    """What is wrong: `changed`, `missing`, `not listed in SHA256SUMS` and the like; None where nothing is."""


def is_weight(name: str) -> bool:
    """Whether a file of a run may be left on the host that made it."""
    return name.partition("/")[0] in WEIGHTS


def is_passing(name: str) -> bool:
    """Whether a name is that of a temporary file or a lock, or below a temporary directory."""
    return any(_PASSING.fullmatch(part) for part in name.split("/"))


def files_of(directory: Path) -> tuple[list[str], list[str]]:
    """What stands in a run's directory: the names to be listed, and one line for each thing that cannot be.

    Raises:
        RunError: there are too many files, or a directory cannot be read.
    """
    found: list[str] = []
    odd: list[str] = []

    def walk(path: Path, prefix: str) -> None:
        with os.scandir(path) as entries:
            for entry in entries:
                name = prefix + entry.name
                if name == SUMS or is_passing(entry.name):
                    continue
                if len(found) + len(odd) >= MAX_FILES:
                    raise RunError(f"{directory}: more than {MAX_FILES:,} files", expected="a run directory")
                mode = entry.stat(follow_symlinks=False).st_mode
                if (problem := names.problem(name)) is not None:
                    odd.append(f"{clean(name, 200)}: {problem}")
                elif stat.S_ISREG(mode):
                    found.append(name)
                elif stat.S_ISDIR(mode):
                    walk(Path(entry.path), name + "/")
                else:
                    odd.append(f"{name}: {_NO_FILE}")

    try:
        walk(directory, "")
    except OSError as error:
        raise RunError(f"{error.filename or directory}: {error.strerror}", expected="a directory of ours") from None
    return sorted(found), sorted(odd)


def text_of(files: Mapping[str, str]) -> bytes:
    """The list: first what every run has, then the rest by name, so that the same files make the same bytes."""
    order = {name: number for number, name in enumerate(SMALL_FILES)}
    listed = sorted(files, key=lambda name: (order.get(name, len(order)), name))
    return "".join(f"{files[name]}  {name}\n" for name in listed).encode()


def write_sums(directory: Path, files: Mapping[str, str]) -> str:
    """Writes SHA256SUMS at once and durably; returns its SHA-256, the evidence id.

    Raises:
        OSError: it cannot be written.
    """
    text = text_of(files)
    write_atomic(directory / SUMS, text)
    return hashlib.sha256(text).hexdigest()


def form_problem(raw: bytes) -> str | None:
    """Where a SHA256SUMS is not written as `write_sums` writes the same hashes, such as a line moved or doubled."""
    sums = parse_sums(raw, SUMS)
    lines, wanted = raw.split(b"\n"), text_of(sums.files).split(b"\n")
    if sums.broken or lines == wanted:
        return sums.broken[0] if sums.broken else None
    both = zip(lines, wanted, strict=False)
    number = next((at for at, (line, other) in enumerate(both, 1) if line != other), min(len(lines), len(wanted)))
    return f"{SUMS}: line {number} is not as it was written: moved, doubled, or in another form"


def parse_sums(raw: bytes, source: str) -> Sums:
    """The contents of a SHA256SUMS, which may come from elsewhere: names are not trusted.

    Raises:
        RunError: it is not UTF-8.
    """
    try:
        lines = raw.decode().removesuffix("\n").split("\n") if raw else []
    except UnicodeDecodeError:
        raise RunError(f"{source}: not UTF-8", expected="the checksums of an ended run") from None
    files: dict[str, str] = {}
    broken = []
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            broken.append(f"{SUMS}: line {number} is not a checksum")
            continue
        name = str(PurePosixPath(match[2]))
        if files.setdefault(name, match[1]) != match[1]:
            broken.append(f"{clean(name, 200)}: listed twice, with two hashes")
    return Sums(files, tuple(broken), hashlib.sha256(raw).hexdigest())


def read_sums(directory: Path) -> Sums:
    """The SHA256SUMS of a directory.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    return parse_sums(sums_bytes(directory), str(directory / SUMS))


def sums_bytes(directory: Path) -> bytes:
    """The SHA256SUMS of a directory as it stands.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    path = directory / SUMS
    try:
        return read_regular(path, MAX_BYTES)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}", expected="the checksums of an ended run") from None


def check_sums(directory: Path, *, weights: bool = True, progress: Progress = lambda name, count: None) -> Checked:
    """Holds a directory against its SHA256SUMS.

    Every file that the list should have has to be in it: one that was emptied or shortened proves nothing.

    Args:
        directory: of an ended run.
        weights: read checkpoints and models too; without it only their names are looked at.
        progress: told how far it is.

    Raises:
        RunError: there is no SHA256SUMS, or it cannot be read.
    """
    sums = read_sums(directory)
    problems = list(sums.broken)
    absent = []
    for name, wanted in sums.files.items():
        weight = is_weight(name)
        found = _difference(directory, name, None if weight and not weights else wanted, progress)
        if found == "missing" and weight:
            absent.append(clean(name, 200))
        elif found is not None:
            problems.append(f"{clean(name, 200)}: {found}")
    for name in FIRST_FILES:
        if name not in sums.files and not os.path.lexists(directory / name):
            problems.append(f"{name}: missing, and not listed in {SUMS}")
    return Checked(sums.evidence_id, (*problems, *_unlisted(directory, sums)), tuple(absent))


def recompute(directory: Path, sums: Sums, progress: Progress = lambda name, count: None) -> list[FileCheck]:
    """Every file of a directory with its hash computed anew, weights too: first the listed ones, then the others.

    Args:
        directory: of an ended run.
        sums: its list.
        progress: told how far it is.

    Raises:
        RunError: the directory cannot be read.
    """
    checks = []
    for name, stated in sums.files.items():
        found, problem = _look(directory, name, progress)
        problem = "changed" if problem is None and found != stated else problem
        checks.append(FileCheck(name, stated, found, problem))
    for line in _unlisted(directory, sums):
        name, _, problem = line.rpartition(": ")
        checks.append(FileCheck(name, None, None, problem))
    return checks


def verify_sums(directory: Path) -> tuple[str, ...]:
    """The problems that `check_sums` finds."""
    return check_sums(directory).problems


def _unlisted(directory: Path, sums: Sums) -> list[str]:
    """What stands there and should be in the list."""
    if _version(directory) < ALL_FILES_VERSION:
        here = [name for name in SMALL_FILES if os.path.lexists(directory / name)]
        odd: list[str] = []
    else:
        here, odd = files_of(directory)
    told = [f"{name}: not listed in {SUMS}" for name in here if name not in sums.files]
    return [*told, *(each for each in odd if each.rpartition(": ")[0] not in sums.files)]


def _version(directory: Path) -> int:
    """Of the manifest; the newest where it cannot be read, for that is the strictest."""
    try:
        return read_manifest(directory).v
    except RunError:
        return VERSION


def _difference(directory: Path, name: str, wanted: str | None, progress: Progress) -> str | None:
    """What is wrong with one file of the list.

    Args:
        directory: of the run.
        name: as listed.
        wanted: its hash; None looks only whether it is there.
        progress: told how far it is.
    """
    found, problem = _look(directory, name, None if wanted is None else progress)
    return "changed" if problem is None and found != wanted else problem


def _look(directory: Path, name: str, progress: Progress | None) -> tuple[str | None, str | None]:
    """A listed file's hash, or why there is none. The list may come from elsewhere: nothing is read outside.

    Without `progress` it is not read, and the hash is None.
    """
    file = directory / name
    try:
        if Path(name).is_absolute() or ".." in Path(name).parts or file.is_symlink():
            return None, _NO_FILE
        if not file.exists():
            return None, "missing"
        if not file.is_file() or not file.resolve().is_relative_to(directory.resolve()):
            return None, _NO_FILE
        return None if progress is None else sha256_told(file, name, progress), None
    except (OSError, ValueError) as error:  # a NUL in the name, a name that is too long, no permission
        return None, f"cannot be read: {clean(str(getattr(error, 'strerror', None) or error), 100)}"


def sha256_told(path: Path, name: str, progress: Progress) -> str:
    """SHA-256 of a regular file, with progress.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb", buffering=0) as file:
        while data := file.read(_PIECE):
            digest.update(data)
            progress(name, len(data))
    return digest.hexdigest()
