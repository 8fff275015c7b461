"""Which files a corpus is made of, and about how many tokens they are; without reading one."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from engine.config import Data
from engine.errors import DataError
from engine.text import clean

BUILTIN = "builtin:stdlib"
SHARD_SUFFIX = ".bin"
TEXT_BYTES_A_TOKEN = 3
"""Of text and source code, on the low side: tokenizers of 32,000 entries and more make 3 to 4.5 of it."""

_STDLIB_LEFT_OUT = frozenset(
    ("site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "ensurepip", "pydoc_data")
)


def find_files(paths: Sequence[str], glob: str) -> list[tuple[str, Path]]:
    """Every file that the paths stand for, each once, as (name that decides its part, path)."""
    found: dict[Path, tuple[str, Path]] = {}
    for given in paths:
        path = Path(given)
        try:
            inside = stdlib_sources() if given == BUILTIN else _inside(path, glob)
            for name, file in inside:
                # A file that two paths lead to would stand in both parts, under two names.
                found.setdefault(file.resolve(), (name, file))
        except (OSError, ValueError, NotImplementedError) as error:
            reason = clean(getattr(error, "strerror", None) or str(error), 200)
            raise DataError(f"data.path: {name_of(path)} with data.glob {clean(glob, 200)!r}: {reason}") from None
    return list(found.values())


def _inside(path: Path, glob: str) -> list[tuple[str, Path]]:
    if path.is_dir():
        inside = sorted(p for p in path.glob(glob) if p.is_file())
        inside = inside or sorted(p for p in path.rglob(f"*{SHARD_SUFFIX}") if p.is_file())
        if not inside:
            os.listdir(path)  # globbing passes over what it may not read; this says so
            wanted = clean(glob, 200)
            raise DataError(
                f"data.path: {name_of(path)} holds no file that matches {wanted!r} and no {SHARD_SUFFIX} shard",
                expected="text files or token shards",
                do="set data.glob, for example '**/*.py'",
            )
        return [(p.relative_to(path).as_posix(), p) for p in inside]
    if path.is_file():
        return [(path.name, path)]
    if path.exists():
        raise DataError(f"data.path: {name_of(path)}: a device, pipe or socket", expected="a file or a directory")
    raise DataError(f"data.path: {name_of(path)}: no such file or directory", do="check the path")


def stdlib_sources() -> list[tuple[str, Path]]:
    """The running Python's own standard library, its tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [(name, root / name) for name in names if not _STDLIB_LEFT_OUT.intersection(name.split("/"))]


def about_tokens(data: Data) -> int:
    """About how many tokens a corpus has, by the size of its files; rather too many than too few.

    Raises:
        DataError: a path is not there, or holds nothing that could be a corpus.
    """
    tokens = 0
    for _, file in find_files(data.paths, data.glob):
        try:
            size = file.stat().st_size
        except OSError as error:
            raise DataError(f"{name_of(file)}: cannot be read: {error.strerror}", do="check its permissions") from None
        tokens += tokens_in(size, shard=file.suffix == SHARD_SUFFIX)
    limit = data.limit_bytes
    return tokens if limit is None else min(tokens, tokens_in(limit, shard=False))


def tokens_in(size: int, *, shard: bool) -> int:
    """About how many tokens a file of so many bytes has."""
    return size // (4 if shard else TEXT_BYTES_A_TOKEN)


def name_of(path: Path) -> str:
    """A path as a message shows it."""
    return clean(str(path), 300)
