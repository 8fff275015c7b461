"""Kills real trainings with SIGKILL while they write checkpoints, and looks at what stands on disk then.

    python checkpoint_kills.py random DIR KILLS SEED     at random moments, one run going on through all of them
    python checkpoint_kills.py everywhere DIR            before each single call to the disk, in three situations

Children are forked after torch was loaded, which costs milliseconds instead of seconds. Prints a JSON object; a
checkpoint lost or broken ends it with a traceback.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).absolute().parents[2]))
sys.path.insert(0, str(Path(__file__).absolute().parents[1] / "engine"))

import torch
from checkpoint_rig import RUN, Rig
from faults import hold_in_a_write, is_being_written
from tally import Tally

from engine.checkpoint import Kind, committed, find_latest, verify
from engine.stream import Checkpoint, Event

WIDTH = 256
SPREAD_SECONDS = 0.12
DISK_CALLS = ("open", "mkdir", "write", "fsync", "rename", "replace", "unlink", "rmdir")


def fork(body: Callable[[], None]) -> int:
    """Runs `body` in a child that never returns from it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return child


def check(run_dir: Path, acknowledged: int) -> int:
    """Every checkpoint that can be seen is whole, and none that was reported is lost; returns the newest one's step."""
    newest = 0
    for path in committed(run_dir):
        newest = max(newest, verify(path, RUN).step)
    visible = {p.name for p in (run_dir / "checkpoints").iterdir() if not p.name.startswith(".")}
    assert visible - {"LATEST"} == {p.name for p in committed(run_dir)}, visible
    assert newest >= acknowledged, (newest, acknowledged)
    found = find_latest(run_dir, RUN, lambda message, level: sys.exit(f"passed over: {message}"))
    assert (found is None) == (newest == 0)
    return newest


def train_for_ever(run_dir: Path, pipe: int) -> None:
    """Steps and checkpoints, each reported through the pipe, until somebody ends it."""
    rig = Rig(run_dir, width=WIDTH)
    if find_latest(run_dir, RUN) is not None:
        rig.resume()

    def report(event: Event) -> None:
        assert isinstance(event, Checkpoint), event
        tell(event.step, committed=1)

    def tell(step: int, committed: int) -> None:
        os.write(pipe, (2 * step + committed).to_bytes(4, "little"))

    rig.checkpoints._emit = report
    tell(rig.step, committed=0)
    while True:
        rig.train(1)
        tell(rig.step, committed=0)
        kinds: list[Kind] = ["periodic", "best"] if rig.step % 4 == 0 else ["periodic"]
        rig.checkpoints.save(kinds, rig.state(), wait=rig.step % 2 == 0)


def at_random(
    root: Path,
    kills: int,
    seed: int,
    anywhere: Tally,
    writing: Tally,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """One run, killed and resumed `kills` times, held bit by bit against an undisturbed one.

    Every other kill, about, comes at a random moment, the rest at a random moment of a checkpoint's write: the child is
    held there first and looked at. What was half made when a kill came decides where it counts.
    """
    chance = random.Random(seed)
    run_dir = root / "run"
    run_dir.mkdir(parents=True)
    acknowledged = newest = 0
    for kill in range(kills):
        ours, theirs = os.pipe()
        child = fork(lambda: train_for_ever(run_dir, theirs))  # noqa: B023 - runs before the loop goes on
        os.close(theirs)
        ready, _, _ = select.select([ours], [], [], 60)
        assert ready, "the child never started"
        time.sleep(chance.uniform(0, SPREAD_SECONDS))
        if 2 * writing.times <= kill:
            assert hold_in_a_write(child, run_dir, chance), "it never wrote a checkpoint"
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it ended by itself"
        said = b""
        while more := os.read(ours, 4096):
            said += more
        os.close(ours)
        reported = [divmod(int.from_bytes(said[i : i + 4], "little"), 2) for i in range(0, len(said), 4)]
        acknowledged = max([acknowledged, *(step for step, is_committed in reported if is_committed)])
        tally = writing if is_being_written(run_dir) else anywhere
        with tally.counts():
            newest = check(run_dir, acknowledged)
        tally.cost(max(step for step, _ in reported) - newest)
        if kill % 20 == 19:
            tell(f"{kill + 1} of {kills} kills of forked trainings, step {newest}")
    resumed = Rig(run_dir, width=WIDTH, seed=1)
    resumed.resume()
    digest = resumed.digest()
    whole = Rig(root / "whole", width=WIDTH)
    whole.train(newest)
    if whole.digest() != digest:
        anywhere.survived = writing.survived = 0
        raise AssertionError(f"after {newest} steps the run that was killed is not the undisturbed one")


def die_before(call: int) -> None:
    """From here on, the process is killed right before its `call`-th call to the disk."""
    left = call

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **options: object) -> object:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return real(*args, **options)

        return wrapper

    for name in DISK_CALLS:
        setattr(os, name, counted(getattr(os, name)))


def everywhere(root: Path) -> dict[str, int]:
    """A new checkpoint that makes an old one go, a second kind for the newest, and one in place of a damaged one."""
    base = Rig(root / "base", keep_last=1)
    base.run_dir.mkdir()
    base.saved(1)
    base.saved(1)
    situations: dict[str, Callable[[Rig], None]] = {
        "new": lambda rig: rig.train(1),
        "second_kind": lambda rig: None,
        "replace_damaged": lambda rig: rig.train(1),
    }
    calls = {}
    for situation, act in situations.items():
        for call in range(1000):
            run_dir = root / "case"
            shutil.rmtree(run_dir, ignore_errors=True)
            shutil.copytree(base.run_dir, run_dir)
            if situation == "replace_damaged":
                damaged = run_dir / "checkpoints" / "ckpt-step-000003"
                shutil.copytree(run_dir / "checkpoints" / "ckpt-step-000002", damaged)

            def body(run_dir: Path = run_dir, act: Callable[[Rig], None] = act, call: int = call) -> None:
                rig = Rig(run_dir, keep_last=1)
                assert rig.resume().step == 2
                act(rig)
                die_before(call)
                rig.save("periodic", "final")

            _, status = os.waitpid(fork(body), 0)
            damaged = run_dir / "checkpoints" / "ckpt-step-000003"
            if situation == "replace_damaged" and find_latest(run_dir, RUN) != damaged:
                shutil.rmtree(damaged, ignore_errors=True)
            newest = check(run_dir, 2)
            again = Rig(run_dir, keep_last=1)
            assert not [name for name in again.names() if name.startswith(".")]
            again.resume()
            assert again.saved(1).name == f"ckpt-step-{newest + 1:06d}"
            if status == 0:
                calls[situation] = call
                break
            assert status == signal.SIGKILL, status
    return calls


def warm(root: Path) -> None:
    """What torch puts off until the first step, done once and not in every child."""
    torch.set_num_threads(1)  # threads of a pool would not be there in a forked child
    Rig(root / "warm").train(1)


def main() -> None:
    root = Path(sys.argv[2])
    warm(root)
    if sys.argv[1] == "everywhere":
        print(json.dumps(everywhere(root)))
        return
    anywhere, writing = Tally("at a random moment"), Tally("while a checkpoint is written")
    at_random(root, int(sys.argv[3]), int(sys.argv[4]), anywhere, writing)
    print(json.dumps([asdict(anywhere), asdict(writing)]))


if __name__ == "__main__":
    main()
