"""The real `kdconsole` on a real pseudo-terminal: keys go in, bytes come out, a terminal emulator reads them."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyte

from tests.console_rig import ROOT

SECONDS = 60.0


def _take_terminal() -> None:
    """Makes it the session's own, so that the kernel tells the process when it goes away; one system call, no more."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A terminal with `kdconsole` in its foreground.

    Args:
        arguments: of the command.
        cwd: where it is called.
        home: its HOME.
        size: columns and rows.
        variables: more of its environment.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        home: Path,
        size: tuple[int, int] = (120, 40),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._emulator = pyte.Screen(*size)
        self._stream = pyte.ByteStream(self._emulator)
        self.raw = b""
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        keep = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "console", *arguments],
            cwd=cwd,
            env={
                "LANG": "C.UTF-8",
                **keep,
                "HOME": str(home),
                "PYTHONPATH": str(ROOT),
                "TERM": "xterm-256color",
                "COLORTERM": "truecolor",
                **(variables or {}),
            },
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,  # noqa: PLW1509
        )
        os.close(slave)
        self._master = master

    @property
    def shown(self) -> str:
        """What stands on the terminal now."""
        return "\n".join(line.rstrip() for line in self._emulator.display)

    @property
    def title(self) -> str:
        """What its window is called."""
        return str(self._emulator.title)

    def press(self, *keys: str) -> None:
        """Sends each of these as typed."""
        for key in keys:
            os.write(self._master, key.encode())

    def until(self, *texts: str, gone: str | None = None, seconds: float = SECONDS) -> str:
        """Waits until all of these stand on the terminal, and `gone` does not; returns what is shown then."""
        deadline = time.monotonic() + seconds
        while not all(text in self.shown for text in texts) or (gone is not None and gone in self.shown):
            assert time.monotonic() < deadline, f"waited {seconds} s in vain for {texts}, gone {gone!r}\n{self.shown}"
            if not self._read(0.1) and self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode} before {texts}\n{self.shown}")
        return self.shown

    def still(self, quiet: float = 0.15) -> None:
        """Reads until nothing has come for a moment; what waits for a thing that is not seen needs no more."""
        deadline = time.monotonic() + SECONDS
        while self._read(quiet):
            assert time.monotonic() < deadline, f"it never rests\n{self.shown}"

    def _read(self, wait: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], wait)
        if not ready:
            return False
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # the other side is closed
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)

    def wait(self, seconds: float = SECONDS) -> int:
        """Reads to the end; returns the exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"still running\n{self.shown}"
            self._read(0.1)
        while self._read(0.05):
            pass
        return self.process.returncode

    def hang_up(self) -> None:
        """The terminal goes away, as when its window is closed."""
        os.close(self._master)
        self._master = -1

    def close(self) -> None:
        """Ends what is left."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        if self._master >= 0:
            os.close(self._master)
