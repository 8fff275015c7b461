"""How many GPUs a run is given: what its configuration says reaches the supervisor, by every way that starts a run."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from console import launch
from console.app import KdConsoleApp
from console.launch import Job
from console.settings import Settings
from dispatch import runs
from dispatch.places import Place
from dispatch.supervisor import LOCK_DIRECTORIES, read_start
from dispatch.transport import LocalTransport
from engine.config import RunConfig, load_config
from engine.errors import ConfigError, RunError
from tests.console_rig import ROOT, Desk, until, write_corpus

CONFIG = """\
teacher: builtin:teacher
student: builtin:student
data: {path: corpus.txt, heldout_windows: 4}
train: {steps: 40, batch: 2, sequence: 32, warmup_steps: 2, devices: 2, threads: 1}
smoke: {max_steps: 12}
"""
DEVICE = f"GPU-{uuid.uuid4()}"
REFUSED = "train.devices: 2: nvidia-smi knows 1 GPU"


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A machine with one GPU, of which nvidia-smi tells nothing but its UUID."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncase $1 in --query-gpu=index,uuid) echo 0, {DEVICE};; *) exit 9;; esac\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    desk = Desk(tmp_path)
    desk.write("config.yaml", CONFIG)
    write_corpus(desk.cwd / "corpus.txt")
    yield desk
    desk.clear()
    for directory in LOCK_DIRECTORIES:
        Path(directory, f"kdconsole-{DEVICE}.lock").unlink(missing_ok=True)


def test_a_run_on_more_devices_than_there_are_is_refused_before_it_starts(desk: Desk) -> None:
    outcome = desk.call("--headless", "smoke", "config.yaml")
    assert REFUSED in outcome.err, outcome.said
    assert not desk.run.stream.exists()


def test_a_dry_run_says_how_many_gpus_are_locked(desk: Desk) -> None:
    two, one = ["--gpu", "--devices", "2"], ["--gpu"]
    for more, options in ((), two), (("--set", "train.devices=1"), one), (("--devices", "1"), one):
        outcome = desk.call("smoke", "config.yaml", *more, "--dry-run", "--json")
        assert outcome.rc == 0, outcome.said
        [argv] = (each["argv"] for each in json.loads(outcome.out)["steps"] if each["step"] == "launch")
        assert argv[argv.index("run") + 1 : -1] == options


def test_the_screen_asks_for_as_many(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk.cwd)
    monkeypatch.setenv("HOME", str(desk.home))
    said: list[str] = []
    monkeypatch.setattr(KdConsoleApp, "say", lambda app, text, severity="information": said.append(text))

    async def go() -> None:
        app = KdConsoleApp([desk.evidence], Settings())
        async with app.run_test():
            app.start_run(Job(config_of(desk, "smoke"), desk.evidence))
            deadline = time.monotonic() + 60.0
            while not any(REFUSED in text for text in said):
                assert time.monotonic() < deadline, said
                await asyncio.sleep(0.02)

    asyncio.run(go())


def made(desk: Desk, config: RunConfig) -> tuple[runs.RunDir, Place]:
    run_dir = runs.create_run(config, evidence=desk.evidence, contract_text="falsifiers: []\n")
    return run_dir, Place(LocalTransport(), str(run_dir.path), command=(str(shutil.which("false")),))


def config_of(desk: Desk, mode: str) -> RunConfig:
    source = ["teacher.source=hidden"] if mode == "prepare" else []
    return load_config(desk.cwd / "config.yaml", sets=source, overrides={"mode": mode})


def test_another_attempt_wants_as_many(desk: Desk) -> None:
    run_dir, place = made(desk, config_of(desk, "train"))
    asyncio.run(place.launch(gpu=False))
    until((run_dir.path / "exit.json").exists, "its end")
    with pytest.raises(RunError, match=REFUSED):
        asyncio.run(launch.start_again(run_dir, (), place))


def test_another_attempt_can_be_given_another_number_which_its_configuration_does_not_keep(desk: Desk) -> None:
    run_dir, place = made(desk, config_of(desk, "train"))
    config, resume = run_dir.path / "config.yaml", run_dir.path / "resume.json"
    before = config.read_bytes()
    asyncio.run(place.launch(gpu=False))
    until((run_dir.path / "exit.json").exists, "its end")
    with pytest.raises(ConfigError, match=r"--devices: 3\b.*divisor of train.batch \(2\)") as refused:
        asyncio.run(launch.start_again(run_dir, (), place, devices=3))
    assert refused.value.exit_code == 2
    assert not resume.exists()
    asyncio.run(launch.start_again(run_dir, ("data",), place, devices=1))
    until((run_dir.path / "exit-1.json").exists, "the end of its first attempt, moved aside")
    assert read_start(run_dir.path).gpu == DEVICE
    assert json.loads(resume.read_bytes()) == {"allow_changed": ["data"], "devices": 1}
    until((run_dir.path / "exit.json").exists, "its end")
    with pytest.raises(RunError, match=REFUSED):  # as many as its configuration says, again
        asyncio.run(launch.start_again(run_dir, (), place))
    assert config.read_bytes() == before


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ('{"allow_changed": [], "devices": 3}', "resume.json: devices: 3: expected a divisor of train.batch (2)"),
        ('{"allow_changed": [], "devices": 0}', "resume.json: Expected `int` >= 1 - at `$.devices`"),
    ],
)
def test_the_engine_refuses_a_number_that_does_not_divide_the_batch(desk: Desk, written: str, reason: str) -> None:
    run_dir, _ = made(desk, config_of(desk, "train"))
    (run_dir.path / "resume.json").write_text(written)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "engine", str(run_dir.path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run_dir.path / "events.jsonl").exists()


def test_the_screen_has_no_such_option(desk: Desk) -> None:
    outcome = desk.call("train", "--resume", "x", "--devices", "2")
    assert outcome.rc == 2
    assert "--devices with --resume goes with --headless" in outcome.err


def test_a_preparation_wants_one(desk: Desk) -> None:
    config = config_of(desk, "prepare")
    run_dir, place = made(desk, config)
    asyncio.run(launch.start(place, config))
    until((run_dir.path / "exit.json").exists, "its end")
    assert read_start(run_dir.path).gpu == DEVICE
