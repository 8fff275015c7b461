"""Faults to the files and the disk of a small real training, each followed by a resume to the undisturbed end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from unittest.mock import patch

from checkpoint_rig import RUN, Rig
from faults import can_make_read_only, can_mount, file_size_limit, fill_up, flip, read_only, small_disk

from engine import checkpoint_writer
from engine.checkpoint import DIRECTORY, FILES, LATEST, MANIFEST, find_latest, verify
from engine.stream import CheckpointFailed

WIDTH = 256  # a checkpoint of about 0.9 MiB
DISK_MIB = 10
END = 6
"""Steps of the whole training."""

Damage = Callable[[Path], None]
"""Done to the newest checkpoint's directory."""
Trouble = tuple[Callable[[Path], contextlib.AbstractContextManager[object]], str]
"""While inside the first, the run directory is in it; the second is in what is said of it."""


def truncate(left: Callable[[int], int], path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: left(len(raw))])


def point(content: str, newest: Path) -> None:
    (newest.parent / LATEST).write_text(content)


def on(name: str, damage: Damage) -> Damage:
    return lambda newest: damage(newest / name)


EVERY_FILE = (*FILES, MANIFEST)
PLACES = {"first byte": 0.0, "middle": 0.5, "last byte": 1.0}
CUTS: dict[str, Callable[[int], int]] = {
    "nothing": lambda n: 0,
    "half": lambda n: n // 2,
    "all but one": lambda n: n - 1,
}
LATEST_NOWHERE = "a LATEST that points nowhere"
DAMAGES: Mapping[str, Mapping[str, Damage]] = {
    "one flipped bit": {
        f"{name}, {place}": on(name, partial(flip, at=at)) for name in EVERY_FILE for place, at in PLACES.items()
    },
    "a truncated file": {
        f"{name}, {cut} left": on(name, partial(truncate, left)) for name in EVERY_FILE for cut, left in CUTS.items()
    },
    "a missing manifest": {MANIFEST: on(MANIFEST, Path.unlink)},
    "missing weights or moments": {name: on(name, Path.unlink) for name in FILES},
    LATEST_NOWHERE: {
        "a missing step": partial(point, "ckpt-step-000777\n"),
        "another directory": partial(point, "../../etc\n"),
        "nothing": partial(point, ""),
        "noise": partial(point, "\x1b[2J\x00"),
    },
}


def cost_of(kind: str) -> int:
    """Whole checkpoints that a kind of damage to the newest makes useless."""
    return 0 if kind == LATEST_NOWHERE else 1


@contextlib.contextmanager
def full_unforeseen(run_dir: Path) -> Iterator[None]:
    """A disk that fills up after the look at its free space: the write itself meets it."""
    with patch.object(checkpoint_writer, "_MARGIN_BYTES", -(1 << 40)), full(run_dir):
        yield


@contextlib.contextmanager
def full(run_dir: Path) -> Iterator[None]:
    ballast = fill_up(run_dir, leave=1 << 18)
    try:
        yield
    finally:
        ballast.unlink()


READ_ONLY = "Read-only file system" if os.geteuid() == 0 else "Permission denied"
TROUBLES: Mapping[str, Mapping[str, Trouble]] = {
    "a full disk": {
        "foreseen": (full, "bytes are free; expected"),
        "met while writing": (full_unforeseen, "No space left on device"),
    },
    "a file size limit": {"in the weights": (lambda run_dir: file_size_limit(100_000), "File too large")},
    "a read-only directory": {
        "of the run": (read_only, READ_ONLY),
        "of its checkpoints": (lambda run_dir: read_only(run_dir / DIRECTORY), READ_ONLY),
    },
}
_POSSIBLE: Mapping[str, Callable[[], bool]] = {"a full disk": can_mount, "a read-only directory": can_make_read_only}


def possible(kind: str) -> bool:
    """Whether this user can make such trouble here; a file size limit is what is left of a full disk without root."""
    return _POSSIBLE.get(kind, lambda: True)()


def damaged(root: Path, damage: Damage, cost: int) -> int:
    """Damages the newest of four checkpoints and trains on from what is left.

    Args:
        root: a directory of its own.
        damage: to the newest.
        cost: whole checkpoints that it makes useless.

    Returns:
        The steps that had to be made again.
    """
    run_dir = root / "run"
    run_dir.mkdir(parents=True)
    rig = Rig(run_dir, width=WIDTH, keep_last=4)
    saved = [rig.saved(1) for _ in range(4)]
    damage(saved[-1])
    told: list[tuple[str, str]] = []
    assert find_latest(run_dir, RUN, lambda *line: told.append(line)) == saved[-1 - cost]
    assert [level for _, level in told] == ["warning"], told
    return 4 - _ends_undisturbed(root, run_dir)


def troubled(root: Path, trouble: Trouble) -> int:
    """Trains and saves on a disk in trouble, and goes on when the trouble is over; as `damaged`."""
    run_dir = root / "run"
    run_dir.mkdir(parents=True)
    within, words = trouble
    with small_disk(run_dir, DISK_MIB) if can_mount() else contextlib.nullcontext():
        rig = Rig(run_dir, width=WIDTH)
        good = rig.saved(2)
        before = rig.names()
        with within(run_dir):
            rig.train(1)
            event = rig.save("periodic")
            assert isinstance(event, CheckpointFailed), event
            assert words in event.error, event.error
            assert rig.logs[-1][0] == "error", rig.logs
            assert rig.names() == before, "half a checkpoint stayed"
            assert find_latest(run_dir, RUN) == good
            Rig(run_dir, width=WIDTH, seed=5).resume()
        return 3 - _ends_undisturbed(root, run_dir)


def _ends_undisturbed(root: Path, run_dir: Path) -> int:
    """Resumes as a new process would, trains to the end and compares; returns the step that it went on from."""
    again = Rig(run_dir, width=WIDTH, seed=7)
    step = again.resume().step
    verify(again.saved(END - step), RUN)
    whole = Rig(root / "whole", width=WIDTH)
    whole.train(END)
    assert again.digest() == whole.digest(), "not the undisturbed training"
    return step
