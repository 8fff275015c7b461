"""What comes before a run on another host, over a real sshd: the order of the checks, and a dry run that is dry."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from console import dry_run, launch
from console.launch import Job
from dispatch import runs
from dispatch.manifest import read_manifest
from dispatch.places import Reach
from engine.config import RunConfig, load_config, parse_config
from engine.errors import ConfigError, KdError, RunError
from tests.console.host_rig import Lab, listing, needs_sshd, running_lab
from tests.console_rig import ROOT, Outcome, until

pytestmark = needs_sshd


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture
def fresh(lab: Lab, tmp_path: Path) -> str:
    """The same host by another name, with nothing on it."""
    name = f"fresh-{abs(hash(tmp_path))}"
    lab.add(name, run_dir=str(tmp_path / "base"))
    return name


def training(lab: Lab, *sets: str) -> RunConfig:
    return load_config(lab.config, sets=sets, overrides={"mode": "train"})


def make(lab: Lab, job: Job, said: list[str] | None = None) -> runs.RunDir:
    async def go() -> runs.RunDir:
        async with Reach(lab.environ) as reach:
            return await launch.make(job, reach, (said if said is not None else []).append)

    return asyncio.run(go())


def command(lab: Lab, *arguments: str) -> Outcome:
    environ = {**lab.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "console", *arguments],
        cwd=lab.config.parent,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr, 0.0, lab.config.parent / "evidence")


# The order


def test_nothing_is_sent_before_all_of_it_is_allowed(lab: Lab, fresh: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    connections = lab.rig.log.count("Accepted publickey")
    for evidence in (tmp_path / "a file", tmp_path / "a file" / "below"):
        with pytest.raises(RunError, match=r"is a file; expected a directory .*--evidence DIR"):
            make(lab, Job(training(lab), evidence, host=fresh, no_gate="a test"))
    assert lab.rig.log.count("Accepted publickey") == connections
    with pytest.raises(ConfigError, match=f"no passed smoke for a training of 6,000 steps on {fresh}"):
        make(lab, Job(training(lab), tmp_path / "evidence", host=fresh))
    lab.add(f"{fresh}-broken", run_dir=str(tmp_path / "base"), python="/no/such/python")
    for force in (False, True):  # no force makes up for a Python that is not there
        with pytest.raises(ConfigError, match="no Python /no/such/python"):
            make(lab, Job(training(lab), tmp_path / "evidence", host=f"{fresh}-broken", force=force, no_gate="a test"))
    assert not (tmp_path / "base").exists()
    assert not (tmp_path / "evidence").exists()


def test_what_was_forced_stands_in_both_manifests(lab: Lab, tmp_path: Path) -> None:
    huge = training(lab, "train.batch=4096", "train.sequence=4096")
    job = Job(huge, tmp_path / "evidence", host="gx10", no_gate="a test")
    with pytest.raises(ConfigError, match="--force starts it all the same"):
        make(lab, job)
    said: list[str] = []
    run = make(lab, Job(huge, tmp_path / "evidence", host="gx10", no_gate="a test", force=True, name="forced"), said)
    assert run.manifest.overrides == ["room", "no-gate: a test"]
    assert any(line.startswith("gx10: memory: ") for line in said)
    remote = run.manifest.remote
    assert remote is not None
    there = Path(remote.run_dir)
    for name in ("dispatch.json", "config.yaml", "contract.yaml"):
        assert (there / name).read_bytes() == (run.path / name).read_bytes()
    assert remote.facts is not None
    assert remote.facts.hostname == socket.gethostname()
    [corpus] = parse_config((there / "config.yaml").read_text()).data.paths
    assert Path(corpus).read_bytes() == (lab.config.parent / "corpus.txt").read_bytes()
    assert corpus.startswith(f"{lab.base}/store/")


def test_what_was_changed_between_plan_and_sending_is_not_sent(lab: Lab, fresh: str, tmp_path: Path) -> None:
    from dispatch.remote import carry_out, plan_host

    text = tmp_path / "text.txt"
    text.write_text("one\n" * 1000)
    config = training(lab, f"data.path={text}")

    async def go() -> None:
        async with Reach(lab.environ) as reach:
            plan = await plan_host(reach, fresh, config, lambda line: None)
            assert not (tmp_path / "base").exists()
            assert [(item.what, item.missing_bytes) for item in plan.items[1:]] == [("data", 4000)]
            text.write_text("two\n" * 1000)
            await carry_out(reach, plan, lambda line: None)

    with pytest.raises(KdError, match="has SHA-256"):
        asyncio.run(go())
    assert not list((tmp_path / "base" / "store").glob("*/text.txt"))


# The dry run


def test_a_dry_run_changes_nothing_on_either_side(lab: Lab, fresh: str, tmp_path: Path) -> None:
    places = (tmp_path, lab.config.parent, lab.rig.home, lab.base)
    before = listing(*places)
    # A file so large that its hash is remembered elsewhere.
    teacher = str(ROOT / "engine" / "assets" / "teacher")
    smoke = command(lab, "smoke", "config.yaml", "--teacher", teacher, "--host", fresh, "--dry-run", "--json")
    assert smoke.rc == 0, smoke.said
    closed = command(lab, "--headless", "train", "config.yaml", "--host", fresh, "--dry-run", "--evidence", "runs")
    assert closed.rc == 2, closed.said
    assert listing(*places) == before
    told = json.loads(smoke.out)
    assert (told["schema"], told["host"], told["would_start"]) == ("kdconsole.dry-run/1", fresh, True)
    steps = [each["step"] for each in told["steps"]]
    assert steps == [
        "check",
        "connect",
        "look",
        "send",
        "send",
        "send",
        "make",
        "make",
        "launch",
        "train",
        "follow",
        "seal",
    ]
    engine, model, data = (each for each in told["steps"] if each["step"] == "send")
    assert engine["bytes"] == engine["missing_bytes"] > 1_000_000
    assert (model["what"], model["from"], model["to"]) == (
        "teacher",
        teacher,
        f"{tmp_path}/base/store/{model['sha256']}",
    )
    assert data["from"] == str(lab.config.parent / "corpus.txt")
    assert data["bytes"] == (lab.config.parent / "corpus.txt").stat().st_size
    assert data["to"] == f"{tmp_path}/base/store/{data['sha256']}/corpus.txt"
    assert "it would be REFUSED: no passed smoke" in closed.out
    assert f"make it: kdconsole --headless smoke config.yaml --host {fresh} --evidence runs" in closed.out


def test_a_dry_run_on_this_machine_changes_nothing_and_has_the_argv(tmp_path: Path, lab: Lab) -> None:
    before = listing(tmp_path, lab.config.parent, lab.rig.home)
    job = Job(training(lab, "train.steps=100"), tmp_path / "evidence", name="mine")

    async def go() -> dry_run.DryRun:
        async with Reach(lab.environ) as reach:
            return await dry_run.rehearse(job, reach, lambda line: None)

    dry = asyncio.run(go())
    assert listing(tmp_path, lab.config.parent, lab.rig.home) == before
    assert dry.refusals == ()
    steps = {each.name: each.values for each in dry.steps}
    path = f"{tmp_path}/evidence/RUN"
    assert steps["launch"]["argv"] == [sys.executable, "-P", "-m", "dispatch.supervisor", "run", "--gpu", path]
    assert steps["train"]["argv"] == [sys.executable, "-P", "-m", "engine", path]
    assert "room" in steps
    assert f"{sys.executable} -P -m engine {path}" in dry_run.text(dry)


def test_variables_are_named_and_their_values_stand_nowhere(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.add("passing", env=["SECRET_TOKEN", "NOT_SET"], gpu=0)
    environ = {**lab.environ, "SECRET_TOKEN": "hunter2"}

    async def go() -> dry_run.DryRun:
        async with Reach(environ) as reach:
            return await dry_run.rehearse(
                Job(training(lab, "train.steps=100"), tmp_path / "evidence", host="passing"), reach, lambda line: None
            )

    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    dry = asyncio.run(go())
    [train] = (each for each in dry.steps if each.name == "train")
    assert train.values["environment"] == sorted(
        ["CUDA_VISIBLE_DEVICES", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "SECRET_TOKEN"]
    )
    assert "hunter2" not in dry_run.text(dry) + json.dumps(dry_run.document(dry))
    made = make(lab, Job(training(lab, "train.steps=100"), tmp_path / "evidence", host="passing"))
    assert made.manifest.remote is not None
    assert made.manifest.remote.env == ()  # of this process's reach, which has no such variable


def test_the_argv_of_a_dry_run_are_those_of_the_run(lab: Lab, tmp_path: Path) -> None:
    job = Job(training(lab, "train.steps=3000"), tmp_path / "evidence", host="gx10")

    async def go() -> tuple[dry_run.DryRun, runs.RunDir, list[bytes]]:
        async with Reach(lab.environ) as reach:
            dry = await dry_run.rehearse(job, reach, lambda line: None)
            run = await launch.make(job, reach, lambda line: None)
            place = reach.place(run)
            await place.launch(gpu=launch.wants_gpu(job.config))
            status = await place.status()
            assert status.trainer is not None
            assert status.supervisor is not None
            found = [Path(f"/proc/{each.pid}/cmdline").read_bytes() for each in (status.supervisor, status.trainer)]
            await place.stop(grace=0.1, kill=True)
            return dry, run, found

    dry, run, (supervisor, trainer) = asyncio.run(go())
    steps = {each.name: each.values for each in dry.steps}
    assert run.manifest.remote is not None
    directory = run.manifest.remote.run_dir

    def argv(name: str) -> list[str]:
        given = steps[name]["argv"]
        assert isinstance(given, list)
        return [each.replace("RUN", run.id) if each.endswith("/RUN") else each for each in given]

    assert directory in argv("launch")
    assert argv("train") == [os.fsdecode(each) for each in trainer.split(b"\0")[:-1]]
    assert argv("launch") == [os.fsdecode(each) for each in supervisor.split(b"\0")[:-1]]
    assert read_manifest(Path(directory)).run == run.run
    until((Path(directory) / "exit.json").exists, "the end of the run")


def test_a_host_that_cannot_be_reached_is_code_3(lab: Lab, tmp_path: Path) -> None:
    lab.add("gone", port=1)
    before = listing(lab.config.parent, lab.rig.home)
    done = command(lab, "train", "config.yaml", "--host", "gone", "--dry-run", "--json")
    assert done.rc == 3, done.said
    assert json.loads(done.out)["exit_code"] == 3
    assert "gone" in done.err
    assert "Traceback" not in done.err
    assert listing(lab.config.parent, lab.rig.home) == before
