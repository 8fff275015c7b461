"""What a model is known by: the names and SHA-256 of the files of its directory, or of its one file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dispatch.local_hashes import LocalHashes
from dispatch.staging import local_files

MODEL: Final = "model"
"""Directory of a run's exported model."""


def model_files(path: Path) -> dict[str, str]:
    """SHA-256 by name of everything that a model of this machine is made of; hidden files are none of it.

    Large files that nobody has touched since are not read again; see `LocalHashes`.

    Raises:
        ConfigError: there is nothing, or it cannot be read.
    """
    return {name: sha256 for name, (_, (_, sha256)) in local_files(path, LocalHashes()).items()}


def listed_model(files: Mapping[str, str]) -> dict[str, str]:
    """The same of a run's exported model, by the contents of its SHA256SUMS; empty where it lists none."""
    return {name.removeprefix(f"{MODEL}/"): sha256 for name, sha256 in files.items() if name.startswith(f"{MODEL}/")}


def model_digest(files: Mapping[str, str]) -> str:
    """One SHA-256 in hex for a whole model: that of its files' list as sha256sum writes it, sorted by name."""
    return hashlib.sha256("".join(f"{files[name]}  {name}\n" for name in sorted(files)).encode()).hexdigest()
