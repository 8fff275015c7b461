"""Real faults while checkpoints are written: SIGKILL, a full disk, a read-only one, one that lies."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_rig import RUN, Rig

from engine import checkpoint_writer, durable
from engine.checkpoint import committed, find_latest, verify
from engine.stream import Checkpoint, CheckpointFailed

KILLS = Path(__file__).with_name("checkpoint_kills.py")
DISK_MIB = 10
WIDTH = 256  # a checkpoint of about 0.9 MiB


def driver(*arguments: object) -> dict[str, int]:
    done = subprocess.run([sys.executable, KILLS, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, int] = json.loads(done.stdout)
    return result


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of a few MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(where)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def remount(where: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(where)], check=True)


def fill_up(where: Path, leave: int = 0) -> Path:
    ballast = where / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(where).free - leave)))
    return ballast


def steps_of(run_dir: Path) -> list[int]:
    """Steps of the checkpoints, every one of them verified."""
    return [verify(path, RUN).step for path in committed(run_dir)]


def test_twenty_kills_while_writing_lose_nothing_and_the_end_is_bitwise_the_same(tmp_path: Path) -> None:
    result = driver("random", tmp_path, 20, 0)
    assert result["kills"] == 20
    assert result["while_writing"] >= 5
    assert result["steps_lost_at_most"] <= 2, "one in the writer's hands, one in the making"


def test_a_kill_before_any_single_call_to_the_disk_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    calls = driver("everywhere", tmp_path)
    assert calls["new"] > 20
    assert calls["second_kind"] > 5
    assert calls["replace_damaged"] > 20


@pytest.mark.parametrize("foreseen", [True, False], ids=["foreseen", "met while writing"])
def test_a_full_disk_costs_the_oldest_that_is_not_the_best(
    disk: Path, monkeypatch: pytest.MonkeyPatch, foreseen: bool
) -> None:
    if not foreseen:
        monkeypatch.setattr(checkpoint_writer, "_MARGIN_BYTES", -(1 << 40))
    rig = Rig(disk, width=WIDTH, keep_last=100)
    rig.saved(1, "periodic", "best", heldout=1.0)
    for _ in range(14):
        rig.saved(1)
    steps = steps_of(disk)
    assert steps[0] == 15
    assert steps[-1] == 1
    assert 2 not in steps
    assert steps[:-1] == list(range(15, 15 - len(steps) + 1, -1)), "the oldest ones went"
    warnings = [message for level, message in rig.logs if level == "warning"]
    assert len(warnings) == 15 - len(steps)
    assert warnings[0].startswith("the disk is full: the checkpoint of step 2 was dropped")


def test_a_disk_that_cannot_be_made_room_on_costs_nothing_and_training_goes_on(disk: Path) -> None:
    rig = Rig(disk, width=WIDTH)
    rig.saved(1)
    rig.saved(1)
    ballast = fill_up(disk, leave=1 << 18)
    rig.train(1)
    event = rig.save("periodic")
    assert isinstance(event, CheckpointFailed)
    assert "bytes are free; expected" in event.error
    assert steps_of(disk) == [2, 1], "nothing was dropped in vain"
    assert (rig.logs[-1][0], rig.logs[-1][1].rsplit("; ", 1)[1]) == ("error", "the newest one is that of step 2")
    ballast.unlink()
    rig.saved(1)
    assert steps_of(disk)[0] == 4


def test_a_disk_that_is_really_full_leaves_no_half_checkpoint(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "_MARGIN_BYTES", -(1 << 40))
    rig = Rig(disk, width=WIDTH)
    good = rig.saved(1)
    fill_up(disk, leave=1 << 18)
    rig.train(1)
    event = rig.save("periodic")
    assert isinstance(event, CheckpointFailed)
    assert "No space left on device" in event.error
    assert rig.names() == {"LATEST", good.name}
    assert find_latest(disk, RUN) == good


def test_a_read_only_disk_is_told_and_survived(disk: Path) -> None:
    rig = Rig(disk, width=WIDTH)
    good = rig.saved(1)
    remount(disk, "ro")
    rig.train(1)
    event = rig.save("periodic")
    assert isinstance(event, CheckpointFailed)
    assert "Read-only file system" in event.error
    assert find_latest(disk, RUN) == good
    Rig(disk, width=WIDTH)
    remount(disk, "rw")
    assert isinstance(rig.save("periodic"), Checkpoint)


def test_a_file_size_limit_is_told_and_costs_no_other_checkpoint(tmp_path: Path) -> None:
    rig = Rig(tmp_path, width=WIDTH)
    rig.saved(1)
    good = rig.saved(1)
    before = rig.names()
    rig.train(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        event = rig.save("periodic")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(event, CheckpointFailed)
    assert "File too large" in event.error
    assert rig.names() == before
    assert find_latest(tmp_path, RUN) == good


def test_a_file_in_the_directorys_place_is_told_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    rig = Rig(tmp_path)
    rig.train(1)
    event = rig.save("periodic")
    assert isinstance(event, CheckpointFailed)
    assert "checkpoints: File exists" in event.error
    rig.train(1)
    assert (tmp_path / "checkpoints").read_text() == "mine"


def test_a_directory_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.saved(1)
    shutil.rmtree(tmp_path / "checkpoints")
    assert find_latest(tmp_path, RUN) is None
    rig.saved(1)
    assert steps_of(tmp_path) == [2]


def test_a_disk_that_stores_one_bit_wrong_is_caught_before_the_checkpoint_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, width=WIDTH)
    good = rig.saved(1)
    rig.train(1)
    real: Callable[[int, Any], int] = os.write

    def lying(descriptor: int, data: Any) -> int:
        wrong = bytearray(data)
        wrong[len(wrong) // 2] ^= len(wrong) > 100_000
        return real(descriptor, wrong)

    monkeypatch.setattr(os, "write", lying)
    event = rig.save("periodic")
    assert isinstance(event, CheckpointFailed)
    assert "model.safetensors: damaged: SHA-256" in event.error
    assert rig.names() == {"LATEST", good.name}
    assert (tmp_path / "checkpoints" / "LATEST").read_text().strip() == good.name


def test_a_thread_that_cannot_be_started_is_told_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    rig.train(1)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        event = rig.save("periodic")
    assert isinstance(event, CheckpointFailed)
    assert "can't start new thread" in event.error
    assert isinstance(rig.save("periodic"), Checkpoint)


def test_old_checkpoints_that_cannot_be_removed_do_not_fail_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, keep_last=1)
    old = rig.saved(1)

    def refuse(path: Path) -> None:
        if path.name.endswith(".removed") and path.exists():
            raise PermissionError(1, "Operation not permitted", str(path))
        durable.discard(path)

    monkeypatch.setattr(checkpoint_writer, "discard", refuse)
    new = rig.saved(1)
    assert find_latest(tmp_path, RUN) == new
    assert old.with_name(f".{old.name}.removed").exists(), "hidden, and removed at the next start"
    assert rig.logs[-1][0] == "warning"
    assert "Operation not permitted" in rig.logs[-1][1]
