"""The checksums of a run directory, every one computed anew."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from console.verify.claims import Claim, differs, same, untold
from dispatch.manifest import FIRST_FILES, SUMS, Manifest
from dispatch.sums import FileCheck, Progress, form_problem, is_weight, parse_sums, recompute, sums_bytes
from engine.checkpoint import DIRECTORY as CHECKPOINTS
from engine.errors import RunError
from engine.text import clean

PART = "files"


@dataclass(frozen=True)
class Files:
    """What became of the checksums."""

    claims: tuple[Claim, ...]
    evidence_id: str | None
    """SHA-256 of SHA256SUMS; None where there is none."""
    hashes: Mapping[str, str]
    """SHA-256 by name, of every file that was read."""


def verify_files(directory: Path, manifest: Manifest | None, given_id: str | None, progress: Progress) -> Files:
    """Holds every file against SHA256SUMS, and that against the evidence id that was given.

    Args:
        directory: of a run that is over.
        manifest: its own; None where it cannot be read.
        given_id: evidence id, or its beginning.
        progress: told how far it is.
    """
    if not os.path.lexists(directory / SUMS):
        return Files(tuple(_without_sums(directory, given_id)), None, {})
    try:
        if (directory / SUMS).is_symlink():
            raise RunError(f"{SUMS}: a symbolic link")
        raw = sums_bytes(directory)
        sums = parse_sums(raw, SUMS)
        checks = recompute(directory, sums, progress)
        form = form_problem(raw)
    except RunError as error:
        return Files((differs(PART, SUMS, "the checksums of this directory", "cannot be read", str(error)),), None, {})
    claims = [_of_id(given_id, sums.evidence_id)] if given_id else []
    claims += [differs(PART, SUMS, "one line a file", "not so", problem) for problem in sums.broken]
    if form and not sums.broken:
        claims.append(differs(PART, SUMS, "the form that it is written in", "another one", form))
    unlisted = [name for name in FIRST_FILES if name not in sums.files and not os.path.lexists(directory / name)]
    claims += [differs(PART, name, "stands in every run", "missing", f"and not listed in {SUMS}") for name in unlisted]
    claims += _of_files(directory, manifest, checks)
    hashes = {check.name: check.found for check in checks if check.found is not None}
    return Files(tuple(claims), sums.evidence_id, hashes)


def not_plain(directory: Path, names: Iterable[str]) -> list[str]:
    """Those of these names under which something stands that is no regular file: nothing may be read there."""
    odd = []
    for name in names:
        try:
            if not stat.S_ISREG(os.lstat(directory / name).st_mode):
                odd.append(name)
        except OSError:
            continue
    return odd


def _without_sums(directory: Path, given_id: str | None) -> Iterator[Claim]:
    why = f"there is no {SUMS}: it was never sealed, or the list was taken away; no file can be told from a changed one"
    yield untold(PART, SUMS, "a hash of every file", why, essential=True)
    if given_id:
        yield differs(PART, "evidence id", given_id, "none", f"there is no {SUMS}")
    for name in FIRST_FILES:
        if not os.path.lexists(directory / name):
            yield differs(PART, name, "stands in every run", "missing")


def _of_id(given: str, found: str) -> Claim:
    if found.startswith(given):
        return same(PART, "evidence id", given, found)
    return differs(PART, "evidence id", given, found, "the checksums are not those that this id was made of")


def _of_files(directory: Path, manifest: Manifest | None, checks: list[FileCheck]) -> Iterator[Claim]:
    where = "not fetched" if manifest is not None and manifest.remote is not None else "not here"
    for check in checks:
        shown = clean(check.name, 200)
        if check.problem == "missing" and is_weight(check.name):
            if _absent(directory, check.name):
                yield untold(PART, shown, check.stated, f"absent: {where}")
            else:
                why = f"{shown}: missing, and other files of {_unit(check.name)}/ are here"
                yield differs(PART, shown, check.stated, "missing", why)
        elif check.problem is None:
            yield same(PART, shown, check.stated, check.found)
        else:
            recomputed = check.found if check.problem == "changed" else check.problem
            why = "" if recomputed == check.problem else check.problem
            yield differs(PART, shown, check.stated or "not listed", recomputed, why)


def _unit(name: str) -> str:
    """What of a run's weights is here or not here as a whole: one checkpoint, or a model."""
    first, _, rest = name.partition("/")
    return f"{first}/{rest.partition('/')[0]}" if first == CHECKPOINTS and "/" in rest else first


def _absent(directory: Path, name: str) -> bool:
    unit = directory / _unit(name)
    try:
        return not unit.is_symlink() and not (unit.is_dir() and any(unit.iterdir()))
    except (OSError, ValueError):
        return True
