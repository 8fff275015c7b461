"""Real faults while checkpoints are written: SIGKILL, a full disk, a read-only one, one that lies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import checkpoint_rig
import pytest
from checkpoint_damage import DAMAGES, DISK_MIB, TROUBLES, WIDTH, cost_of, damaged, possible, troubled
from checkpoint_rig import RUN, Rig
from faults import can_mount, fill_up, remount, small_disk

from engine import checkpoint_writer, durable
from engine.checkpoint import committed, find_latest, verify
from engine.errors import ExitCode
from engine.stream import Checkpoint, CheckpointFailed
from tests.nursery import Nursery

pytestmark = pytest.mark.usefixtures("one_thread")
STUCK = """
import os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from checkpoint_rig import Rig
from engine import stop

stop.SAME_REQUEST_SECONDS = 0.0
request = stop.StopRequest()
signal.signal(signal.SIGTERM, request)

def hang():
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    while request.signal is None:
        time.sleep(0.01)
    print(request.signal, flush=True)
    while True:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        time.sleep(0.01)

rig = Rig(Path(sys.argv[2]))
rig.checkpoints._sync = hang
rig.train(1)
rig.save("interrupt")
"""
HERE = Path(__file__).parent


def each(kinds: Mapping[str, Mapping[str, object]]) -> pytest.MarkDecorator:
    """Gives a test every one of them, by its kind and its name."""
    pairs = [(kind, name) for kind, names in kinds.items() for name in names]
    return pytest.mark.parametrize(("kind", "name"), pairs, ids=[f"{kind} - {name}" for kind, name in pairs])


def driver(nursery: Nursery, root: Path, what: str, *arguments: object) -> Any:
    """What `checkpoint_kills.py` prints; it works in `root`, and kills what it forks itself."""
    log = root.with_suffix(".log")
    search = f"import sys; sys.path.insert(0, {str(HERE)!r})"
    killer = nursery.fork("checkpoint_kills", what, str(root), *map(str, arguments), cwd=HERE, log=log, prepare=search)
    assert killer.wait() == 0, log.read_text()[-3000:]
    return json.loads(log.read_text().splitlines()[-1])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of a few MiB."""
    if not can_mount():
        pytest.skip("mounting a tmpfs needs root")
    with small_disk(tmp_path / "disk", DISK_MIB) as where:
        yield where


def steps_of(run_dir: Path) -> list[int]:
    """Steps of the checkpoints, every one of them verified."""
    return [verify(path, RUN).step for path in committed(run_dir)]


def test_twenty_kills_lose_nothing_and_the_end_is_bitwise_the_same(tmp_path: Path, nursery: Nursery) -> None:
    anywhere, writing = driver(nursery, tmp_path, "random", 20, 0)
    assert anywhere["times"] + writing["times"] == 20
    assert writing["times"] >= 10, "half of them while a checkpoint is written"
    assert (anywhere["survived"], writing["survived"]) == (anywhere["times"], writing["times"])
    assert max(anywhere["lost"], writing["lost"]) <= 2, "one in the writer's hands, one in the making"


@each(DAMAGES)
def test_a_damaged_newest_checkpoint_costs_its_own_steps_and_the_end_is_bitwise_the_same(
    tmp_path: Path, kind: str, name: str
) -> None:
    assert damaged(tmp_path, DAMAGES[kind][name], cost_of(kind)) == cost_of(kind)


@each(TROUBLES)
def test_a_disk_in_trouble_costs_what_it_did_not_take_and_the_end_is_bitwise_the_same(
    tmp_path: Path, kind: str, name: str
) -> None:
    if not possible(kind):
        pytest.skip("this user cannot make it here")
    assert troubled(tmp_path, TROUBLES[kind][name]) == 1


def test_a_kill_before_any_single_call_to_the_disk_leaves_a_whole_checkpoint(tmp_path: Path, nursery: Nursery) -> None:
    calls = driver(nursery, tmp_path, "everywhere")
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


def test_a_second_signal_ends_a_wait_for_a_disk_that_hangs_whatever_thread_it_is_given_to(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(Path(checkpoint_rig.__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (ExitCode.INTERRUPTED, "SIGTERM\n"), done.stderr


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
