"""Files between here and a host: resumed where they stopped, hashed, on the disk before they get their name.

A file that is not whole stands as NAME.part; all of it is contents in order, so its length is how far it is. An
attempt goes on from there when both sides have the same SHA-256 over those bytes, and begins anew when they have not:
the source was changed. What is in flight is bounded by the SSH window, whatever the file's size.

`dispatch.getting` fetches, `dispatch.putting` sends; here is what both need.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

from dispatch.tool_client import Say
from dispatch.transport import HostRefusal, TransportError
from engine.errors import RunError
from engine.text import clean

BATCH: Final = 1 << 20
PROGRESS_SECONDS: Final = 0.1
RATE_SECONDS: Final = 5.0
PATIENCE_SECONDS: Final = 600.0
MAX_SIZE: Final = 1 << 53
_T = TypeVar("_T")


class TransferError(RunError):
    """A transfer that another attempt alone will not save: wrong contents, a full disk, no permission."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a transfer is."""

    done: int
    """Bytes that are there, those of earlier attempts included."""
    total: int
    rate: float
    """Bytes per second lately; 0 while it is not known."""
    eta: float | None
    """Seconds to the end, None while that is not known."""

    def describe(self) -> str:
        """One line: `43% of 988.1 MB, 101.2 MB/s, 0:05:31 to go`."""
        left = "" if self.eta is None else f", {timedelta(seconds=round(self.eta))} to go"
        share = self.done / max(self.total, 1)
        return f"{share:.0%} of {self.total / 1e6:,.1f} MB, {self.rate / 1e6:,.1f} MB/s{left}"


Tell = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Transferred:
    """A file that is whole where it should be."""

    size: int
    sha256: str
    resumed: int
    """Bytes that were there already: all of them, when nothing had to be done."""


class Meter:
    """Turns bytes into progress, told at most every PROGRESS_SECONDS, and at the end."""

    def __init__(self, total: int, tell: Tell | None) -> None:
        self._total = total
        self._tell = tell
        self._marks: list[tuple[float, int]] = []
        self._told = 0.0

    def at(self, done: int) -> None:
        """So many bytes are there."""
        now = time.monotonic()
        if self._tell is None or (now - self._told < PROGRESS_SECONDS and done < self._total):
            return
        self._told = now
        if self._marks and done < self._marks[-1][1]:
            self._marks.clear()
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[1][0] > RATE_SECONDS:
            del self._marks[0]
        (then, before), seconds = self._marks[0], now - self._marks[0][0]
        rate = (done - before) / seconds if seconds > 0 and then < now else 0.0
        left = self._total - done
        eta = 0.0 if left == 0 else (left / rate if rate > 0 else None)
        self._tell(Progress(done, self._total, rate, eta))


async def resuming(attempt: Callable[[], Awaitable[_T]], *, say: Say | None = None) -> _T:
    """Repeats an attempt while connections get lost, until one comes to its end.

    Args:
        attempt: goes on where the one before stopped.
        say: hears of each loss.

    Raises:
        TransportError: no attempt got anywhere for PATIENCE_SECONDS, or the host lets us in no more.
        TransferError: what another attempt does not mend.
    """
    failures, since = 0, time.monotonic()
    while True:
        started = time.monotonic()
        try:
            return await attempt()
        except HostRefusal:
            raise
        except TransportError as error:
            now = time.monotonic()
            if now - started > RATE_SECONDS:
                failures, since = 0, now
            if now - since > PATIENCE_SECONDS:
                raise
            pause = min(5.0, 0.1 * 2**failures) * random.uniform(0.5, 1.5)
            failures = min(failures + 1, 10)
            if say is not None:
                say(f"{error}; trying again")
            await asyncio.sleep(pause)


def digest_of(descriptor: int, limit: int = MAX_SIZE) -> tuple[Any, int]:
    """A SHA-256 over a file's first bytes, to be gone on with, and their number."""
    digest, done = hashlib.sha256(), 0
    os.lseek(descriptor, 0, os.SEEK_SET)
    while done < limit and (data := os.read(descriptor, min(BATCH, limit - done))):
        digest.update(data)
        done += len(data)
    return digest, done


@contextlib.contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """Errors of this machine's disk, each one clear message."""
    try:
        yield
    except OSError as error:
        raise TransferError(
            f"{clean(str(path), 300)}: {error.strerror or error}", do="what has arrived is kept and gone on with"
        ) from None


def split(remote: str) -> tuple[str, str]:
    """A file of the host as directory and name; both as the tool there takes them."""
    root, _, name = remote.rpartition("/")
    if not name or not remote.startswith(("/", "~/")):
        raise TransferError(f"{clean(remote, 300)}: no file on a host", expected="a path that begins with / or ~/")
    return ("~/." if root == "~" else root or "/"), name
