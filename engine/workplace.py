"""The directory in which something is made before it gets its name; two that make the same cannot meet in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from engine.durable import discard, partial_of
from engine.errors import ModelError
from engine.sniff import say


@contextlib.contextmanager
def workplace(target: Path, what: str) -> Iterator[Path]:
    """An empty hidden sibling of `target` that one work has for itself; gone afterwards, unless it got its name.

    Args:
        target: what is to be made.
        what: the work, as a message names it: `import`.

    Raises:
        ModelError: the same work goes on for the same target.
    """
    partial = partial_of(target)
    with contextlib.suppress(FileExistsError):
        partial.mkdir(mode=0o700)
    held = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(held), os.stat(partial))
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise ModelError(f"{say(target)}: another {what} into it is going on", do="wait for it")
        try:
            for left in partial.iterdir():
                discard(left)
            yield partial
        finally:
            discard(partial)
    finally:
        os.close(held)
