"""What may go from a host and what must not: judged here, looked at again there, and gone as a whole."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dispatch_rig import Run, until
from fetch_rig import ROOT, Afar, trained

from dispatch import cleaning, host_runs, supervisor
from dispatch.cleaning import DAY, Plan, Rules
from dispatch.fetch import Choice
from dispatch.survey import MODULE, HostRun, Survey, survey
from dispatch.tool_client import source
from engine.errors import RunError
from tests.ssh_rig import MISSING, Rig, running_sshd

HASHES = [letter * 64 for letter in "abcdef"]


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


def ask(op: str, **arguments: object) -> dict[str, Any]:
    """One request to the tool as it travels, with the operations of runs beside it and nothing else of this project."""
    modules = [[MODULE, Path(host_runs.__file__).read_text()]]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", source()],
        input=json.dumps({"op": op, "modules": modules, **arguments}) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        check=False,
    )
    assert not done.stderr, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def seen(afar: Afar) -> Survey:
    return afar.use(lambda reach: survey(reach, afar.name))


def age(path: Path, days: float) -> None:
    """As if nobody had written there since."""
    then = time.time() - days * DAY
    for each in (path, *path.rglob("*")):
        os.utime(each, (then, then))


def planned(afar: Afar, **rules: Any) -> Plan:
    return cleaning.plan(seen(afar), afar.evidence, Rules(**rules))


def going(plan: Plan) -> list[str]:
    return [each.run.id for each in plan.going]


def why(plan: Plan, run: str) -> str:
    [told] = [each.why for each in plan.runs if each.run.id == run]
    return told


# What a host tells


def test_a_host_tells_of_every_run_and_of_what_else_takes_room(afar: Afar, weights: Path) -> None:
    ended, new = afar.run(weights), afar.run(state="new")
    running, lost = afar.run(weights, state="running"), afar.run(state="lost")
    other = afar.run()
    shutil.rmtree(other.path)
    (afar.base / "runs" / "junk").mkdir()
    (afar.base / "runs" / "link").symlink_to(afar.there(ended))
    used, unused = HASHES[:2]
    for name in (used, unused, f"{HASHES[2]}.damaged-12ab", f"{HASHES[3]}.part", "mine"):
        (afar.base / "store" / name).mkdir(parents=True)
        (afar.base / "store" / name / "file").write_bytes(b"x" * 100)
    with (afar.there(ended) / "config.yaml").open("a") as file:
        file.write(f"# {afar.base}/store/{used}\n")
    found = seen(afar)
    rows = {run.id: run for run in found.runs}
    states = {ended.id: "ended", new.id: "new", running.id: "running", lost.id: "lost", other.id: "ended"}
    assert {name: run.state for name, run in rows.items()} == {**states, "junk": "unknown"}
    row = rows[ended.id]
    there = afar.there(ended)
    assert (row.run, row.mode, row.step) == (ended.run, "train", 8)
    assert row.exit is not None
    assert row.exit.describe() == "exit code 0"
    assert row.bytes == sum(path.stat().st_size for path in there.rglob("*") if path.is_file())
    assert [each.name for each in row.checkpoints] == [f"ckpt-step-00000{step}" for step in (6, 4, 2)]
    assert [each.kinds for each in row.checkpoints] == [("final",), ("best", "periodic"), ("periodic",)]
    assert row.model_bytes == 70_002
    rest = {each.name: (each.what, each.used) for each in found.rest}
    assert rest == {
        f"store/{used}": ("unused", True),
        f"store/{unused}": ("unused", False),
        f"store/{HASHES[2]}.damaged-12ab": ("damaged", False),
        f"store/{HASHES[3]}.part": ("part", False),
    }


def test_a_host_that_nothing_was_put_on_has_nothing(afar: Afar) -> None:
    found = seen(afar)
    assert (found.runs, found.rest) == ((), ())
    assert found.free > 0


def test_text_from_the_host_is_cleaned(afar: Afar) -> None:
    run = afar.run()
    path = afar.there(run) / "dispatch.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "name": "\x1b[31mred\x07", "mode": "\u202etrain"}))
    [row] = seen(afar).runs
    assert "\x1b" not in str(row.label)
    assert "\u202e" not in str(row.mode)


def test_its_word_on_a_real_run_is_that_of_the_supervisor(run: Run) -> None:
    """From before the start to the end, and after both processes were killed."""

    def both() -> tuple[str, str]:
        return host_runs.state_of(str(run.path)), str(run.status()["state"])

    assert both() == ("new", "starting")
    run.start("import time; time.sleep(60)")
    assert both() == ("running", "running")
    assert "lock is held" in ask("remove", base=str(base_with(run)), name="runs/r", run=run.run)["error"]
    for process in (supervisor.read_start(run.path).supervisor, supervisor.read_start(run.path).trainer):
        assert process is not None
        os.kill(process["pid"], signal.SIGKILL)
    until(lambda: both() == ("lost", "lost"), "both to be gone")


def base_with(run: Run) -> Path:
    """A host's directory in which a run stands; the link is what `runs/r` resolves through."""
    base = run.path.parent / "base"
    (base / "runs").mkdir(parents=True)
    os.rename(run.path, base / "runs" / "r")
    run.path = base / "runs" / "r"
    return base


# What may go


def host_run(name: str, **fields: Any) -> HostRun:
    row: dict[str, Any] = {
        "id": name,
        "run": f"uuid-{name}",
        "label": None,
        "mode": "train",
        "by": "laptop",
        "created": 0.0,
        "state": "ended",
        "changed": 0.0,
        "bytes": 10,
        "events_bytes": 0,
        "checkpoints": (),
        "model_bytes": 0,
    }
    return HostRun(**{**row, **fields})


def host_of(*runs: HostRun, now: float = 100 * DAY) -> Survey:
    return Survey(host="h", base="/b", time=now, free=1, runs=runs, rest=())


@pytest.mark.parametrize("state", ["running", "starting", "unknown"])
def test_what_goes_on_or_is_unknown_stays_whatever_is_asked(tmp_path: Path, state: str) -> None:
    found = host_of(host_run("a", state=state), host_run("b"))
    plan = cleaning.plan(found, tmp_path, Rules(0.0, unfetched=True))
    assert going(plan) == ["b"]
    assert why(plan, "a") == f"is {state}"
    with pytest.raises(RunError, match=f"h: a: is {state}"):
        cleaning.plan(found, tmp_path, Rules(named=("a",)))


def test_age_and_number_decide(tmp_path: Path) -> None:
    found = host_of(*(host_run(f"r{days}", changed=(100 - days) * DAY) for days in (1, 8, 20, 40)))
    assert going(cleaning.plan(found, tmp_path, Rules(unfetched=True))) == ["r8", "r20", "r40"]
    assert going(cleaning.plan(found, tmp_path, Rules(30 * DAY, unfetched=True))) == ["r40"]
    assert going(cleaning.plan(found, tmp_path, Rules(0.0, keep=3, unfetched=True))) == ["r40"]
    assert going(cleaning.plan(found, tmp_path, Rules(named=("r2",)))) == ["r20"]
    with pytest.raises(RunError, match="h: run r: 4 runs begin so"):
        cleaning.plan(found, tmp_path, Rules(named=("r",)))


@pytest.mark.parametrize("state", ["lost", "new"])
def test_what_never_ended_goes_only_by_its_name(tmp_path: Path, state: str) -> None:
    found = host_of(host_run("a", state=state))
    assert going(cleaning.plan(found, tmp_path, Rules(0.0, unfetched=True))) == []
    assert going(cleaning.plan(found, tmp_path, Rules(named=("a",)))) == ["a"]


def test_what_was_not_fetched_stays_and_what_was_goes(afar: Afar, weights: Path) -> None:
    run, smoke = afar.run(weights), afar.run()
    assert going(planned(afar, older_than=0.0)) == []
    plan = planned(afar, older_than=0.0)
    assert "was not fetched: its stream is not here to its end" in why(plan, run.id)
    for each in (run, smoke):
        afar.fetch(each, Choice("none"))
    plan = planned(afar, older_than=0.0)
    assert going(plan) == [smoke.id]
    assert "its 3 checkpoints and its model are nowhere else" in why(plan, run.id)
    assert going(planned(afar, older_than=0.0, unfetched=True)) == [smoke.id, run.id]
    assert going(planned(afar, named=(run.id,))) == [run.id]
    afar.fetch(run)
    plan = planned(afar, older_than=0.0)
    assert set(going(plan)) == {run.id, smoke.id}
    assert why(plan, run.id) == "not here: ckpt-step-000006, ckpt-step-000002, model"
    path = run.path / "checkpoints" / "ckpt-step-000004" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)  # the copy here is no copy any more
    assert going(planned(afar, older_than=0.0)) == [smoke.id]
    shutil.rmtree(run.path)
    assert "may be nowhere else (it was made from" in why(planned(afar, older_than=0.0), run.id)


# Its removal


def test_what_was_planned_goes_and_the_room_is_told(afar: Afar, weights: Path) -> None:
    kept, gone = afar.run(weights), afar.run(weights)
    for name in (HASHES[0], f"{HASHES[1]}.part", f".removed-{'1' * 8}"):
        (afar.base / "store" / name).mkdir(parents=True)
        (afar.base / "store" / name / "file").write_bytes(b"x" * 100)
    os.chmod(afar.base / "store" / HASHES[0] / "file", 0o400)
    (afar.base / "store" / f"{HASHES[0]}.json").write_text("{}")
    assert [each.name for each in planned(afar).rest] == [f"store/.removed-{'1' * 8}"]
    age(afar.base / "store", 2)
    age(afar.there(gone), 30)
    plan = planned(afar, unfetched=True)
    assert going(plan) == [gone.id]
    said: list[str] = []
    cleaned = afar.use(lambda reach: cleaning.remove(reach, plan, said.append))
    assert cleaned.refused == ()
    assert cleaned.freed == plan.bytes == plan.going[0].run.bytes + 300
    assert os.listdir(afar.base / "runs") == [kept.id]
    assert os.listdir(afar.base / "store") == []
    assert len(said) == 4


def test_the_command_asks_for_a_typed_yes(afar: Afar) -> None:
    run = afar.run()

    def typed(answer: bytes) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        command = (sys.executable, "-m", "console", "clean", "--host", afar.name, "--older-than", "0", "--unfetched")
        environ = {**afar.rig.environ, "PYTHONPATH": str(ROOT), "KDCONSOLE_EVIDENCE": str(afar.evidence)}
        os.write(ours, answer)  # waits there until it is asked for
        try:
            done = subprocess.run(
                command, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, env=environ, timeout=60, check=False
            )
        finally:
            os.close(theirs)
            os.close(ours)
        return done.returncode, done.stdout.decode()

    code, out = typed(b"y\n")
    assert code == 0
    assert "1 to be removed" in out
    assert "freed" not in out
    assert afar.there(run).is_dir()
    code, out = typed(b"yes\n")
    assert code == 0
    assert f"{afar.name}: removed 1, freed " in out
    assert not afar.there(run).exists()


def test_the_host_looks_again_before_anything_goes(afar: Afar, weights: Path) -> None:
    run, other = afar.run(weights), afar.run()
    (afar.base / "engine" / HASHES[0]).mkdir(parents=True)
    age(afar.base, 30)
    plan = planned(afar, unfetched=True)
    assert set(going(plan)) == {run.id, other.id}
    # Meanwhile one is resumed, one is replaced, and a new run uses the engine.
    afar.lock(run)
    path = afar.there(other) / "dispatch.json"
    path.write_text(path.read_text().replace(other.run, "another"))
    (afar.there(run) / "config.yaml").write_text(f"engine: {HASHES[0]}")
    cleaned = afar.use(lambda reach: cleaning.remove(reach, plan, lambda text: None))
    assert (cleaned.removed, cleaned.freed) == ((), 0)
    assert [each.rpartition(": ")[2] for each in cleaned.refused] == [
        "is another run than the one that was listed",
        "its lock is held",
        "a run uses it",
    ]
    assert set(os.listdir(afar.base / "runs")) == {run.id, other.id}
    assert os.listdir(afar.base / "engine") == [HASHES[0]]


def test_what_is_being_sent_stays(tmp_path: Path) -> None:
    part = tmp_path / "store" / f"{HASHES[0]}.part"
    part.mkdir(parents=True)
    held = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert ask("runs", base=str(tmp_path))["rest"][0]["busy"] is True
        assert "is being sent" in ask("remove", base=str(tmp_path), name=f"store/{part.name}")["error"]
    finally:
        os.close(held)
    assert ask("runs", base=str(tmp_path))["rest"][0]["busy"] is False
    assert "bytes" in ask("remove", base=str(tmp_path), name=f"store/{part.name}")


def test_what_was_compared_just_now_counts_as_used_just_now(tmp_path: Path) -> None:
    """A run that is being made has found its model there, and its own directory is not there yet."""
    place = tmp_path / "store" / HASHES[0]
    place.mkdir(parents=True)
    (place / "file").write_bytes(b"x")
    wanted = [["file", 1, hashlib.sha256(b"x").hexdigest()]]
    asked = {"root": f"{place}.part", "place": str(place), "files": wanted}
    assert ask("place", **asked)["present"]
    os.utime(f"{place}.json", (0, 0))
    old = Path(f"{place}.json").stat().st_mtime
    assert ask("runs", base=str(tmp_path))["rest"][0]["seen"] == old
    assert ask("place", **asked)["present"]
    [rest] = ask("runs", base=str(tmp_path))["rest"]
    assert time.time() - rest["seen"] < 60


def test_a_run_is_removed_whole_and_nothing_outside(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r-1"
    (run / "model").mkdir(parents=True)
    (run / "model" / "weights").write_bytes(b"x" * 1000)
    (run / "dispatch.json").write_text('{"run": "u"}')
    (tmp_path / "outside").write_text("x")
    (run / "link").symlink_to(tmp_path)
    assert ask("remove", base=str(tmp_path), name="runs/r-1", run="u")["bytes"] >= 1000
    assert not list((tmp_path / "runs").iterdir())
    assert (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("runs/..", "runs/.", "runs/", "runs/a/b", "../x", "runs/-x", "runs/.hidden", "runs/link", "runs/file"),
        *("runs/missing", "store/mine", "store/..", f"store/{HASHES[0]}", "venv", "keep", "keep/me", "", None),
    ],
)
def test_nothing_else_is_removed(tmp_path: Path, name: object) -> None:
    for directory in ("keep", "runs/.hidden", "store/mine", "venv"):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "dispatch.json").write_text('{"run": "u"}')
    (tmp_path / "runs" / "file").write_text("x")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "keep")
    (tmp_path / "store" / HASHES[0]).symlink_to(tmp_path / "keep")
    before = sorted(tmp_path.rglob("*"))
    assert ask("remove", base=str(tmp_path), name=name, run="u")["error"]
    assert sorted(tmp_path.rglob("*")) == before
