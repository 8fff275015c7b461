"""A disk that fills up between two checkpoints is told of before the next one fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_rig import Rig

from engine import recorder as recorder_module
from engine.recorder import Recorder
from engine.space import SpaceWatch
from engine.stream import Checkpoint, CheckpointFailed, Log, Vitals, decode_line
from tests.streams import RUN, end_event, smoke_contract

WIDTH = 256  # a checkpoint of about 0.9 MiB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of a few MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(where)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def fill_up(where: Path, leave: int) -> Path:
    ballast = where / "ballast"
    ballast.write_bytes(bytes(max(0, shutil.disk_usage(where).free - leave)))
    return ballast


def watching(rig: Rig) -> SpaceWatch:
    return SpaceWatch(rig.checkpoints, lambda message, level: rig.logs.append((level, message)))


def free(where: Path) -> int:
    return shutil.disk_usage(where).free


def test_a_full_disk_is_told_once_until_there_was_room_again(disk: Path) -> None:
    rig = Rig(disk, width=WIDTH)
    watch = watching(rig)
    needed = rig.checkpoints.needed_bytes

    def looked() -> list[tuple[str, str]]:
        before = len(rig.logs)
        for _ in range(3):
            watch.look(free(disk), rig.step)
        return rig.logs[before:]

    assert looked() == []
    rig.saved(1)
    ballast = fill_up(disk, leave=1 << 18)
    [(level, message)] = looked()
    assert level == "warning"
    assert message == (
        f"{disk}/checkpoints: {free(disk):,} bytes are free and the next checkpoint needs {needed:,}: it will not be "
        "saved and training will go on; the newest one is that of step 1; free space on that disk"
    )
    assert isinstance(rig.save("final"), Checkpoint), "the very same step again takes no room"
    rig.train(1)
    assert isinstance(rig.save("periodic"), CheckpointFailed), "what was told is what happens"
    ballast.unlink()
    assert looked() == []
    fill_up(disk, leave=1 << 18)
    assert [level for level, _ in looked()] == ["warning"]


def test_where_older_ones_can_make_room_that_is_what_is_told_and_what_happens(disk: Path) -> None:
    rig = Rig(disk, width=WIDTH, keep_last=9)
    watch = watching(rig)
    for _ in range(3):
        rig.saved(1)
    fill_up(disk, leave=rig.checkpoints.needed_bytes - 4096)
    watch.look(free(disk), rig.step)
    assert "the oldest will be dropped to make room" in rig.logs[-1][1]
    rig.train(1)
    assert isinstance(rig.save("periodic"), Checkpoint)
    assert "the checkpoint of step 1 was dropped" in rig.logs[-1][1]


def test_a_disk_that_hovers_at_the_limit_is_told_once(tmp_path: Path) -> None:
    rig = Rig(tmp_path, width=WIDTH)
    watch, needed = watching(rig), rig.checkpoints.needed_bytes
    for bytes_free in (needed, needed - 1, needed, needed - 1, needed + needed // 20, needed - 1):
        watch.look(bytes_free, 0)
    assert len(rig.logs) == 1
    assert "it will not be saved and training will go on; there is none" in rig.logs[0][1]
    watch.look(2 * needed, 0)
    watch.look(needed - 1, 0)
    assert len(rig.logs) == 2


def test_while_a_checkpoint_is_written_the_room_that_it_takes_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, width=WIDTH)
    watch = watching(rig)
    seen: list[bool] = []

    def sync() -> None:  # called by the writer's thread, before the checkpoint gets its name
        seen.append(rig.checkpoints.writing)
        watch.look(0, rig.step)

    monkeypatch.setattr(rig.checkpoints, "_sync", sync)
    rig.saved(1)
    assert seen == [True]
    assert rig.logs == []
    watch.look(0, rig.step)
    assert len(rig.logs) == 1


def test_a_directory_that_cannot_be_read_is_told_of_all_the_same(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    (tmp_path / "checkpoints").write_text("mine")
    watching(rig).look(0, 0)
    assert "it will not be saved; free space" in rig.logs[-1][1]


def test_the_recorders_own_look_at_the_disk_brings_the_warning_into_the_stream(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "VITALS_SECONDS", 0.02)
    recorder = Recorder(disk / "events.jsonl", RUN, smoke_contract())
    rig = Rig(disk, width=WIDTH)
    watch = SpaceWatch(rig.checkpoints, recorder.log)

    def look(vitals: Vitals) -> None:
        assert vitals.disk_free_bytes is not None
        watch.look(vitals.disk_free_bytes, 0)

    def stream() -> list[object]:
        return [decode_line(line) for line in (disk / "events.jsonl").read_bytes().split(b"\n")[:-1]]

    def warnings() -> int:
        return sum(isinstance(e, Log) and "the next checkpoint needs" in e.message for e in stream())

    def until(count: int) -> None:
        deadline = time.monotonic() + 10
        while warnings() < count:
            assert time.monotonic() < deadline, "it did not come"

    def looks(count: int) -> None:
        goal = sum(isinstance(e, Vitals) for e in stream()) + count
        deadline = time.monotonic() + 10
        while sum(isinstance(e, Vitals) for e in stream()) < goal:
            assert time.monotonic() < deadline, "no look at the machine"

    recorder.on_vitals = look
    recorder.start_heartbeat(None, time.monotonic())
    looks(2)
    assert warnings() == 0
    ballast = fill_up(disk, leave=1 << 20)
    until(1)
    looks(3)
    assert warnings() == 1
    ballast.unlink()
    looks(3)
    fill_up(disk, leave=1 << 20)
    until(2)
    recorder.finish(end_event())
