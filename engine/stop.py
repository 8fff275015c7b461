"""Stopping a run from outside: the flag that a signal sets and that every phase polls."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from engine.errors import ExitCode

SAME_REQUEST_SECONDS = 1.0
"""Signals closer together than this are one request: a host that shuts down tells trainer and supervisor at once, and
the supervisor passes it on."""


class StopNow(BaseException):
    """Leaves work that does not poll."""


class StopRequest:
    """A signal handler that remembers the first signal's name; a second request ends the process at once."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._asked = 0.0
        self._raises = False

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """While inside, the first signal raises `StopNow` wherever the main thread is; one that came before does here.

        For work that cannot poll and whose remains do not matter.
        """
        self._raises = True
        try:
            if self.signal is not None:
                raise StopNow
            yield
        finally:
            self._raises = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """What `signal.signal` takes."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._asked = signal.Signals(number).name, now
            if self._raises:
                raise StopNow
        elif now - self._asked >= SAME_REQUEST_SECONDS:
            os._exit(ExitCode.INTERRUPTED)
