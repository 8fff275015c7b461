"""Which texts of a directory are logs of a training, and which of several is the one to read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dispatch.legacy import LegacyLog
from dispatch.supervisor import open_regular
from engine.stream import Checkpoint, CheckpointFailed, End, Eval, Event, Projection, Step
from engine.text import clean

SNIFF_BYTES: Final = 64 * 1024
"""Of each of a file's two ends: what is looked at to tell what it is."""
NOTES: Final = frozenset((".md", ".markdown", ".rst", ".adoc"))
"""Endings of texts that people write: lines of a log in them are quoted."""
LOGS: Final = frozenset((".log", ".out", ".err"))
"""Endings of files that are logs even where no line of them is known."""
_NEVER: Final = frozenset(
    (
        *(".bin", ".safetensors", ".apr", ".gguf", ".pt", ".pth", ".onnx", ".npy", ".npz", ".parquet", ".arrow"),
        *(".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".ico"),
        *(".gz", ".xz", ".zst", ".bz2", ".zip", ".tar", ".tgz", ".whl", ".so", ".a", ".o", ".pyc"),
        *(".json", ".jsonl", ".yaml", ".yml", ".toml", ".lock", ".csv", ".html", ".css", ".js"),
        *(".py", ".rs", ".sh", ".c", ".h", ".cu", ".cpp", ".sha256"),
    )
)
_TRAINING: Final = (Step, Eval, Checkpoint, CheckpointFailed, Projection)
_TEXT_SHARE: Final = 0.05
"""Of a file's head: with more bytes than this that no text has, it is none."""
_NO_TEXT: Final = bytes(set(range(32)) - set(b"\t\n\r\x1b\f\b")) + b"\x7f"


@dataclass(frozen=True)
class Sniffed:
    """What the two ends of a text tell. `steps` is as far as they do; `status` as an `End` has it."""

    path: Path
    training: bool
    """Some line of it is one of a training."""
    status: str
    reason: str
    steps: int

    @property
    def order(self) -> tuple[bool, bool, int, str]:
        """The least of several is the log to read: one that came to its end, then the one with the most steps."""
        return not self.training, self.status != "COMPLETED", -self.steps, self.path.name

    @property
    def phrase(self) -> str:
        """What it is, in a few words."""
        steps = f"{self.steps:,} step{'' if self.steps == 1 else 's'}"
        if self.status == "COMPLETED":
            return f"complete, {steps}"
        if self.status == "LOST":
            return f"{steps}, without an end" if self.training else "no line of a training near its ends"
        # Numbers of lines are counted from where reading began, which near the end is nobody's line.
        what = self.reason.split(": ", 1)[-1] if self.reason.startswith("line ") else self.reason
        return f"{steps}, {self.status.lower()}: {clean(what, 120)}"


def may_be_text(name: str) -> bool:
    """A file whose name does not say that it is something else."""
    return not name.startswith(".") and Path(name).suffix.lower() not in _NEVER


def is_named_log(name: str) -> bool:
    """A file that its name says is a log."""
    return Path(name).suffix.lower() in LOGS or name.startswith("launch")


def sniff(path: Path) -> Sniffed | None:
    """What a file tells by its two ends; None where it is no text, is empty, or is no regular file that can be read."""
    try:
        descriptor = open_regular(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        size = os.fstat(descriptor).st_size
        head = os.pread(descriptor, SNIFF_BYTES, 0)
        tail = os.pread(descriptor, SNIFF_BYTES, max(len(head), (size - SNIFF_BYTES) & ~1))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    if not head:
        return None
    if size <= 2 * SNIFF_BYTES:
        return _sniffed(path, [_events(head + tail)], head)
    # What stands between is not read: the tail is a log of its own, which begins with its first whole line.
    mark = head[:2] if head[:2] in (b"\xff\xfe", b"\xfe\xff") else b""
    begin = tail.find(b"\n") + 1
    begin += begin % 2 if mark else 0  # of two bytes a character, and the newline may be the first of them
    return _sniffed(path, [_events(head), _events(mark + tail[begin:])], head)


def _events(data: bytes) -> list[Event]:
    log = LegacyLog()
    return log.feed(data) + log.finish()


def _sniffed(path: Path, parts: list[list[Event]], head: bytes) -> Sniffed | None:
    training = any(isinstance(event, _TRAINING) for events in parts for event in events)
    ends = [events[-1] for events in parts if isinstance(events[-1], End)]
    training = training or any(end.summary for end in ends)
    if not training and not _is_text(head):
        return None
    steps = max(end.steps for end in ends)
    return Sniffed(path, training, ends[-1].status, ends[-1].reason, steps)


def _is_text(head: bytes) -> bool:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    return len(head) - len(head.translate(None, _NO_TEXT)) <= _TEXT_SHARE * len(head)


def sorted_texts(found: Iterable[Path]) -> tuple[list[Sniffed], list[Path]]:
    """Logs, the one to read first, and notes: texts without a line of a training, and what people wrote."""
    logs: list[Sniffed] = []
    notes: list[Path] = []
    for path in found:
        suffix = path.suffix.lower()
        if suffix in NOTES:
            notes.append(path)
            continue
        text = sniff(path)
        if text is None:
            continue
        # A text that nobody calls a log is one by its lines alone; an error in it may be what a note is about.
        if text.training or is_named_log(path.name):
            logs.append(text)
        else:
            notes.append(path)
    return sorted(logs, key=lambda each: each.order), notes
