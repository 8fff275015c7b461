"""The engine as it travels: the same files make the same hash, whatever machine and time they stand on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
"""What holds the packages of this installation."""
ALONE: Final = ("dispatch/supervisor.py",)
"""Files beside the engine that a host needs; each stands alone."""


def tree_hash(files: Mapping[str, tuple[int, str]]) -> str:
    """The name of a directory by its contents.

    Args:
        files: size and SHA-256 by name below the directory.
    """
    rows = [[name, *files[name]] for name in sorted(files)]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Bundle:
    """The files that a host needs to run the engine."""

    root: Path
    files: Mapping[str, tuple[int, str]]
    """Size and SHA-256 by name."""
    sha256: str
    """Of names and contents; the name of its directory on a host."""


def engine_bundle(root: Path = ROOT) -> Bundle:
    """The engine of this installation, with its assets and the supervisor.

    Left out is what Python and editors make beside the sources, so that running the engine does not change it.
    """
    names = [
        path.relative_to(root).as_posix()
        for path in (root / "engine").rglob("*")
        if path.is_file() and not _is_made(path.relative_to(root))
    ]
    files = {}
    for name in sorted([*names, *ALONE]):
        data = (root / name).read_bytes()
        files[name] = (len(data), hashlib.sha256(data).hexdigest())
    return Bundle(root, files, tree_hash(files))


def _is_made(path: Path) -> bool:
    return path.name.startswith(".") or path.suffix in (".pyc", ".pyo", ".swp", ".orig")
