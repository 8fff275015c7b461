"""Stopping a run from outside: the flag that a signal sets and that every phase polls."""

from __future__ import annotations

import os
import signal
from types import FrameType

from engine.errors import ExitCode


class StopRequest:
    """A signal handler that remembers the first signal's name; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """What `signal.signal` takes."""
        if self.signal is not None:
            os._exit(ExitCode.INTERRUPTED)
        self.signal = signal.Signals(number).name
