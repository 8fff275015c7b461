"""Appends events to a run's stream, whatever the disk does: no torn line in the middle, no gap, no end of training."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import ClassVar

import msgspec

from engine.errors import StreamError
from engine.stream import MAX_LINE_BYTES, VERSION, Event, Heartbeat, Vitals, encode


class StreamWriter:
    """Appends events to one file, each with one `write`, under one lock.

    A line that the disk takes only in part is cut back, kept and tried again with the next event, so that a full disk
    never leaves a torn line in the middle and never ends training.

    Args:
        path: the stream; made with mode 0600 if missing, continued (torn tail cut, `seq` going on) if there.
        run: uuid of the run.

    Raises:
        OSError: the file cannot be opened.
        StreamError: it is of another run, or no stream; it is left as it was.
    """

    max_backlog: ClassVar[int] = 10_000
    """Events kept in memory while the disk is full; beyond it heartbeats and vitals, and they alone, are left out."""

    def __init__(self, path: Path, run: str) -> None:
        self._lock = threading.RLock()
        self._run = run
        # From here on a clock that cannot jump: how long something took can be told from the stamps of an attempt.
        self._epoch = time.time() - time.monotonic()
        self._backlog: deque[bytes] = deque()
        self._torn_at: int | None = None
        self.failed_writes = 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._seq = _cut_torn_tail(self._fd, run) + 1
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def pending(self) -> int:
        """Events that the disk has not taken yet."""
        return len(self._backlog)

    def emit(self, event: Event) -> Event:
        """Stamps the event with version, run, seq and time, appends it, and returns it as stamped.

        Whatever the disk does, this returns; a heartbeat or vitals left out come back as they were, with seq -1.
        """
        with self._lock:
            if self._fd < 0:
                raise ValueError("emit on a closed stream")
            if len(self._backlog) >= self.max_backlog and isinstance(event, Heartbeat | Vitals):
                self._flush()
                return event
            now = self._epoch + time.monotonic()
            stamped = msgspec.structs.replace(event, v=VERSION, run=self._run, seq=self._seq, t=now)
            self._backlog.append(encode(stamped))
            self._seq += 1
            self._flush()
            return stamped

    def sync(self) -> None:
        """Flushes what is pending and waits until the disk has it.

        Raises:
            OSError: the disk still refuses lines, or cannot say that it has them.
        """
        with self._lock:
            self._flush()
            if self._backlog:
                raise OSError(f"{len(self._backlog)} events of the stream could not be written")
            os.fsync(self._fd)

    def close(self) -> None:
        """Syncs and closes; closing again does nothing.

        Raises:
            OSError: as `sync`; the file is closed all the same.
        """
        with self._lock:
            if self._fd < 0:
                return
            try:
                self.sync()
            finally:
                os.close(self._fd)
                self._fd = -1

    def _flush(self) -> None:
        while self._backlog:
            try:
                self._cut_back()
                before = os.fstat(self._fd).st_size
                if os.write(self._fd, self._backlog[0]) != len(self._backlog[0]):
                    self._torn_at = before
                    raise OSError(errno.ENOSPC, "a short write")
            except OSError:
                self.failed_writes += 1
                break
            self._backlog.popleft()
        # At once, so that no reader meets half a line for long; where that fails, before the next write.
        with contextlib.suppress(OSError):
            self._cut_back()

    def _cut_back(self) -> None:
        if self._torn_at is not None:
            os.ftruncate(self._fd, self._torn_at)
            self._torn_at = None


def _cut_torn_tail(fd: int, run: str) -> int:
    """Cuts an unfinished last line off and returns the last whole line's seq, -1 for an empty stream."""
    size = os.fstat(fd).st_size
    tail_start = max(0, size - 2 * MAX_LINE_BYTES)
    tail = os.pread(fd, size - tail_start, tail_start)
    end = tail.rfind(b"\n") + 1
    seq = -1
    if end:
        seq = _seq_of(tail[tail.rfind(b"\n", 0, end - 1) + 1 : end], run)
    elif tail_start > 0:
        raise StreamError("stream: its last 128 KiB hold no line end", expected="JSON Lines")
    if end != len(tail):
        os.ftruncate(fd, tail_start + end)
    return seq


def _seq_of(line: bytes, run: str) -> int:
    try:
        head = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        head = None
    seq = head.get("seq") if isinstance(head, dict) and head.get("run") == run else None
    if not isinstance(seq, int) or isinstance(seq, bool) or seq < 0:
        raise StreamError(f"stream: its last line is not of run {run}", expected="one run a directory")
    return seq
