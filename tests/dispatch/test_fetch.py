"""What a run left on its host comes here whole, verified and once: over a real sshd, with checkpoints of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fetch_rig import ROOT, Afar, same, trained

from dispatch.adopt import adopt
from dispatch.fetch import Choice, Fetched, Which, chosen, fetch
from dispatch.getting import get_tree
from dispatch.manifest import SUMS
from dispatch.mirror import MirroredTransport
from dispatch.places import Reach
from dispatch.runs import RunDir
from dispatch.sums import check_sums
from dispatch.survey import HostCheckpoint
from engine import checkpoint
from engine.errors import RunError
from tests.engine.checkpoint_rig import RUN
from tests.ssh_proxy import Proxy
from tests.ssh_rig import MISSING, Rig, running_sshd

OLD, BEST, NEWEST = (f"ckpt-step-00000{step}" for step in (2, 4, 6))


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    if MISSING is not None and "CI" not in os.environ:
        pytest.skip(MISSING)
    with running_sshd(tmp_path_factory.mktemp("sshd") / "gx10") as rig:
        yield rig.trusted()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("weights") / "run")


@pytest.fixture
def afar(sshd: Rig, tmp_path: Path) -> Afar:
    return Afar.make(sshd, tmp_path)


def names(fetched: Fetched) -> list[str]:
    return [path.name for path in fetched.checkpoints]


def left(run_dir: RunDir) -> set[str]:
    """What stands among the checkpoints here."""
    root = run_dir.path / "checkpoints"
    return {path.name for path in root.iterdir()} if root.exists() else set()


def test_a_run_comes_whole_and_a_second_time_nothing_moves(afar: Afar, weights: Path) -> None:
    run_dir = afar.run(weights)
    first = afar.fetch(run_dir, Choice("all", model=True))
    assert names(first) == [NEWEST, BEST, OLD]
    assert (first.state, first.refused, first.notes) == ("ended", (), ())
    same(run_dir.path, afar.there(run_dir), "model")
    for name in (OLD, BEST, NEWEST):
        same(run_dir.path, afar.there(run_dir), f"checkpoints/{name}")
        assert checkpoint.verify(run_dir.path / "checkpoints" / name, RUN).files
    for name in ("events.jsonl", "launch.log", "supervisor.jsonl", "exit.json"):
        assert (run_dir.path / name).read_bytes() == (afar.there(run_dir) / name).read_bytes()
    assert first.moved >= sum(path.stat().st_size for path in (run_dir.path / "checkpoints").rglob("*.safetensors"))
    checked = check_sums(run_dir.path)
    assert checked.problems == ()
    seen = {path: path.stat().st_mtime_ns for path in run_dir.path.rglob("*")}
    second = afar.fetch(run_dir, Choice("all", model=True))
    assert (second.moved, names(second), second.model) == (0, [NEWEST, BEST, OLD], first.model)
    assert {path: path.stat().st_mtime_ns for path in run_dir.path.rglob("*")} == seen


@pytest.mark.parametrize(
    ("which", "there", "expected"),
    [
        (None, [NEWEST, BEST, OLD], [BEST]),
        (None, [NEWEST, OLD], [NEWEST]),
        ("best", [NEWEST, BEST, OLD], [BEST]),
        ("latest", [NEWEST, BEST, OLD], [NEWEST]),
        ("all", [NEWEST, BEST, OLD], [NEWEST, BEST, OLD]),
        ("none", [NEWEST, BEST, OLD], []),
        ("best", [], []),
    ],
)
def test_what_is_chosen(which: Which | None, there: list[str], expected: list[str]) -> None:
    found = tuple(
        HostCheckpoint(name=name, bytes=1, sha256="", kinds=("best",) if name == BEST else (), best_loss=1.0)
        for name in there
    )
    assert [each.name for each in chosen(found, Choice(which))] == expected


def test_without_a_best_one_nothing_is_taken_for_it() -> None:
    found = HostCheckpoint(name=NEWEST, bytes=1, sha256="", kinds=("final",), best_loss=1.0)
    with pytest.raises(RunError, match="no checkpoint there was saved as the best; take --checkpoints latest"):
        chosen((found,), Choice("best"))


def test_a_run_of_this_machine_is_here_already(afar: Afar, tmp_path: Path) -> None:
    from dispatch.runs import create_run
    from engine.config import load_config

    here = create_run(load_config(None, template="builtin"), evidence=tmp_path, contract_text="x")
    assert afar.fetch(here).here


def test_a_run_that_goes_on_is_fetched_as_far_as_it_is(afar: Afar, weights: Path) -> None:
    run_dir = afar.run(weights, state="running")
    there = afar.there(run_dir)
    os.rename(there / "checkpoints" / NEWEST, there / "checkpoints" / f".{NEWEST}.partial")
    with (there / "events.jsonl").open("ab") as file:
        file.write(b'{"torn')
    fetched = afar.fetch(run_dir, Choice("all"))
    assert names(fetched) == [BEST, OLD]
    assert left(run_dir) == {BEST, OLD}
    assert (run_dir.path / "events.jsonl").read_bytes() + b'{"torn' == (there / "events.jsonl").read_bytes()
    assert not (run_dir.path / "exit.json").exists()
    assert not (run_dir.path / SUMS).exists()
    # It goes on, and ends.
    os.rename(there / "checkpoints" / f".{NEWEST}.partial", there / "checkpoints" / NEWEST)
    afar.end(run_dir)
    assert names(afar.fetch(run_dir, Choice("latest"))) == [NEWEST]
    assert check_sums(run_dir.path).problems == ()


def test_while_another_console_follows_it_the_stream_is_left_to_that_one(afar: Afar, weights: Path) -> None:
    run_dir = afar.run(weights, state="running")

    async def scenario(reach: Reach) -> Fetched:
        with MirroredTransport(reach.transport(afar.name), str(afar.there(run_dir)), run_dir.path):
            return await fetch(reach, run_dir, Choice("latest"), lambda text: None)

    fetched = afar.use(scenario)
    assert names(fetched) == [NEWEST]
    assert "kept here by another console" in fetched.notes[0]


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def test_those_that_are_damaged_on_the_host_are_refused_by_name_and_not_kept(afar: Afar, weights: Path) -> None:
    run_dir = afar.run(weights, state="running")
    damaged = {NEWEST: checkpoint.MODEL, BEST: checkpoint.OPTIMIZER, OLD: checkpoint.MANIFEST}
    for name, file in damaged.items():
        flip(afar.there(run_dir) / "checkpoints" / name / file)
    fetched = afar.fetch(run_dir, Choice("all"))
    assert fetched.checkpoints == ()
    assert left(run_dir) == set()
    for (name, file), refused in zip(damaged.items(), fetched.refused, strict=True):
        assert refused.startswith(f"checkpoints/{name} on {afar.name}: {name}/{file}: damaged: "), refused


def test_one_that_is_not_as_it_was_sealed_is_refused(afar: Afar, weights: Path, tmp_path: Path) -> None:
    run_dir = afar.run(weights)
    afar.fetch(run_dir, Choice("none"))
    other = trained(tmp_path / "other")  # whole, of the same run and step, and another
    there = afar.there(run_dir) / "checkpoints" / BEST
    shutil.rmtree(there)
    shutil.copytree(other / "checkpoints" / BEST, there)
    fetched = afar.fetch(run_dir)
    assert fetched.checkpoints == ()
    assert "not as it was when the run was sealed" in fetched.refused[0]
    assert left(run_dir) == set()


def test_links_are_refused(afar: Afar, weights: Path, tmp_path: Path) -> None:
    run_dir = afar.run(weights, state="running")
    root = afar.there(run_dir) / "checkpoints"
    os.rename(root / NEWEST / checkpoint.MODEL, tmp_path / "elsewhere")
    (root / NEWEST / checkpoint.MODEL).symlink_to(tmp_path / "elsewhere")
    os.rename(root / OLD, tmp_path / OLD)
    (root / OLD).symlink_to(tmp_path / OLD)
    shutil.rmtree(root.parent / "model")
    (root.parent / "model").symlink_to(tmp_path / OLD)
    fetched = afar.fetch(run_dir, Choice("all", model=True))
    assert left(run_dir) == {BEST}
    assert len(fetched.refused) == 3
    assert any(f"{NEWEST} on" in each and f"{checkpoint.MODEL}: symbolic link" in each for each in fetched.refused)
    assert not (run_dir.path / "model").exists()


def test_a_copy_that_was_damaged_here_is_mended(afar: Afar, weights: Path) -> None:
    run_dir = afar.run(weights, state="running")
    afar.fetch(run_dir)
    flip(run_dir.path / "checkpoints" / BEST / checkpoint.OPTIMIZER)
    fetched = afar.fetch(run_dir)
    size = (run_dir.path / "checkpoints" / BEST / checkpoint.OPTIMIZER).stat().st_size
    assert (names(fetched), fetched.moved) == ([BEST], size)
    same(run_dir.path, afar.there(run_dir), f"checkpoints/{BEST}")


def test_a_model_of_ones_own_is_not_overwritten(afar: Afar, weights: Path) -> None:
    run_dir = afar.run(weights, state="running")
    (run_dir.path / "model").mkdir()
    (run_dir.path / "model" / "config.json").write_text("mine")
    with pytest.raises(RunError, match="is another model than the one on"):
        afar.fetch(run_dir, Choice("none", model=True))
    assert (run_dir.path / "model" / "config.json").read_text() == "mine"


def test_one_that_is_pruned_meanwhile_is_said_and_the_next_one_taken(
    afar: Afar, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = afar.run(weights, state="running")
    root = afar.there(run_dir) / "checkpoints"
    os.rename(root / NEWEST, root / f".{NEWEST}.partial")

    async def pruning(*given: object, **named: object) -> object:
        """The real one, but that the engine has saved another one just before, and removed this."""
        if (root / BEST).exists() and named["want"](checkpoint.MODEL):  # type: ignore[operator]
            os.rename(root / f".{NEWEST}.partial", root / NEWEST)
            shutil.rmtree(root / BEST)
        return await get_tree(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("dispatch.fetch.get_tree", pruning)
    said: list[str] = []
    fetched = afar.fetch(run_dir, Choice("latest"), said)
    assert names(fetched) == [NEWEST]
    assert fetched.notes == (f"{BEST} was pruned on {afar.name} before it was here",)
    assert said == list(fetched.notes)
    assert left(run_dir) == {NEWEST, "LATEST"}


def test_too_little_room_here_is_said_before_anything_comes(
    afar: Afar, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = afar.run(weights, state="running")
    monkeypatch.setattr("dispatch.fetch.MARGIN_BYTES", 1 << 60)
    with pytest.raises(RunError, match=r"bytes are free on this disk; expected 1,152,\d+.* for what is to come"):
        afar.fetch(run_dir)
    assert left(run_dir) == set()


def test_lost_connections_and_ctrl_c_in_the_middle_cost_nothing(sshd: Rig, tmp_path: Path) -> None:
    """The real command, whose connection is killed twice and which is interrupted then; another fetch goes on."""

    async def scenario() -> None:
        async with Proxy(sshd.port) as proxy:
            afar = Afar.make(sshd, tmp_path, proxy.port)
            run_dir = afar.run(trained(tmp_path / "large", 700), state="running")
            staging = run_dir.path / "checkpoints" / f".{BEST}.partial"
            whole = size(afar.there(run_dir) / "checkpoints" / BEST)
            proxy.rate = 8e6
            pipe = asyncio.subprocess.PIPE
            command = (sys.executable, "-m", "console", "fetch", str(run_dir.path))
            environ = {**sshd.environ, "PYTHONPATH": str(ROOT)}
            fetching = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, env=environ)
            for share in (0.2, 0.4, 0.6):
                while size(staging) < share * whole:
                    await asyncio.sleep(0.01)
                    assert fetching.returncode is None
                proxy.kill() if share < 0.6 else fetching.send_signal(signal.SIGINT)
            out, err = (each.decode() for each in await fetching.communicate())
            assert (fetching.returncode, out) == (130, "")
            assert err.count("trying again") >= 2, err
            assert f"what has come is kept: kdconsole fetch {run_dir.path} goes on from there" in err
            assert left(run_dir) == {staging.name}
            here = size(staging)
            proxy.rate = None
            async with Reach(sshd.environ) as reach:
                fetched = await fetch(reach, run_dir, Choice(), lambda text: None)
            assert fetched.moved == whole - here
            assert left(run_dir) == {BEST}
            same(run_dir.path, afar.there(run_dir), f"checkpoints/{BEST}")

    asyncio.run(scenario())


def size(directory: Path) -> int:
    total = 0
    for path in directory.iterdir() if directory.exists() else ():
        with contextlib.suppress(FileNotFoundError):  # one that came whole just now has another name
            total += path.stat().st_size
    return total


def test_one_that_was_broken_off_and_then_pruned_leaves_nothing(afar: Afar, weights: Path) -> None:
    run_dir = afar.run(weights, state="running")
    (run_dir.path / "checkpoints" / f".{OLD}.partial").mkdir(parents=True)
    shutil.rmtree(afar.there(run_dir) / "checkpoints" / OLD)
    afar.fetch(run_dir)
    assert left(run_dir) == {BEST}


def test_a_run_of_another_laptop_is_made_ones_own(afar: Afar, weights: Path, tmp_path: Path) -> None:
    theirs = afar.run(weights, state="running")
    there = afar.there(theirs)

    async def scenario(reach: Reach) -> tuple[RunDir, RunDir, Fetched]:
        ours = await adopt(reach, afar.name, theirs.id[:-3], tmp_path / "mine")
        again = await adopt(reach, afar.name, theirs.id, tmp_path / "mine")
        return ours, again, await fetch(reach, ours, Choice(), lambda text: None)

    ours, again, fetched = afar.use(scenario)
    assert (ours.run, ours.path.parent, ours) == (theirs.run, tmp_path / "mine", again)
    assert names(fetched) == [BEST]
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {theirs.id}
    same(ours.path, there, f"checkpoints/{BEST}")
    with pytest.raises(RunError, match="no such run there"):
        afar.use(lambda reach: adopt(reach, afar.name, "2020", tmp_path / "mine"))
    (there / "contract.yaml").write_text("other: 1")
    with pytest.raises(RunError, match=r"contract\.yaml is not the one"):
        afar.use(lambda reach: adopt(reach, afar.name, theirs.id, tmp_path / "third"))
    assert not any((tmp_path / "third").iterdir())


def test_a_run_that_is_gone_from_its_host_is_one_message(afar: Afar, weights: Path) -> None:
    run_dir = afar.run(weights)
    shutil.rmtree(afar.there(run_dir))
    with pytest.raises(RunError, match="no such run there; it may have been cleaned up"):
        afar.fetch(run_dir)


def test_a_run_that_another_console_resumed_is_brought_anew(afar: Afar, weights: Path) -> None:
    run_dir = afar.run(weights)
    afar.fetch(run_dir, Choice("none"))
    assert (run_dir.path / SUMS).exists()
    (afar.there(run_dir) / "exit.json").unlink()
    (afar.there(run_dir) / SUMS).unlink()
    afar.lock(run_dir)
    fetched = afar.fetch(run_dir, Choice("none"))
    assert "went on there" in fetched.notes[0]
    assert not (run_dir.path / SUMS).exists()
    assert not (run_dir.path / "exit.json").exists()
