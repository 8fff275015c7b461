"""Files that the operator asked for, beside what is there and never over it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path


def write_new(directory: Path, stem: str, contents: Mapping[str, str | bytes]) -> list[Path]:
    """Writes `stem` with each suffix; all get the same number where one of the names is taken.

    Raises:
        OSError: one could not be written; none of them is left.
    """
    for number in itertools.count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        paths = [directory / f"{name}{suffix}" for suffix in contents]
        if not any(path.exists() for path in paths):
            break
    written: list[Path] = []
    try:
        for path, content in zip(paths, contents.values(), strict=True):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            written.append(path)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
    except OSError:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written
