"""Run directories and the operations on them through the local transport."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dispatch_rig import Run

from dispatch import manifest, runs
from dispatch.follower import Follower
from dispatch.runs import RunDir
from dispatch.supervisor import write_atomic
from dispatch.transport import LocalTransport
from engine.config import RunConfig, fingerprint, gate_fingerprint, load_config, to_yaml
from engine.errors import RunError

WRITER = """
import json, os, signal, sys, time
run = json.load(open('dispatch.json'))['run']
def emit(seq, message):
    fields = dict(event='log', v=1, run=run, seq=seq, t=time.time(), level='info', message=message)
    with open('events.jsonl', 'a') as file:
        file.write(json.dumps(fields) + chr(10))
def stop(*_):
    emit(1, 'stopping')
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
emit(0, 'here')
time.sleep(600)
"""


@pytest.fixture
def config() -> RunConfig:
    return load_config(None, template="builtin")


@pytest.fixture
def made(tmp_path: Path, config: RunConfig) -> RunDir:
    return runs.create_run(config, evidence=tmp_path / "evidence", contract_text="falsifiers: []\n", name="first try")


def test_a_new_run_directory_is_private_and_says_what_will_run(made: RunDir, config: RunConfig) -> None:
    assert made.path.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in made.path.iterdir()} == dict.fromkeys(
        ["config.yaml", "contract.yaml", "dispatch.json"], 0o600
    )
    assert (made.path / "config.yaml").read_text() == to_yaml(config)
    assert (made.path / "contract.yaml").read_text() == "falsifiers: []\n"
    read = manifest.read_manifest(made.path)
    assert read == made.manifest
    assert (read.id, read.name, read.mode) == (made.path.name, "first try", config.mode)
    assert (read.config_fingerprint, read.gate_fingerprint) == (fingerprint(config), gate_fingerprint(config))
    assert read.versions["msgspec"]
    assert read.created.endswith("Z")


def test_no_environment_variable_reaches_the_manifest(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hush-hush-hush")
    made = runs.create_run(config, evidence=tmp_path, contract_text="")
    assert not any(b"hush-hush-hush" in path.read_bytes() for path in made.path.iterdir())


@pytest.mark.parametrize("evidence", ["file", "file/below"])
def test_evidence_that_is_a_file_is_refused_by_name(tmp_path: Path, config: RunConfig, evidence: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file.*expected a directory.*; choose one with --evidence"):
        runs.create_run(config, evidence=tmp_path / evidence, contract_text="")


def test_a_run_is_launched_followed_and_stopped(made: RunDir) -> None:
    here = LocalTransport()
    command = [sys.executable, "-I", "-S", "-c", WRITER]

    async def scenario() -> None:
        launch = await runs.launch(here, made.path, command=command)
        assert (launch.result, launch.state, launch.run) == ("started", "running", made.run)
        assert (await runs.launch(here, made.path, command=command)).result == "already_running"
        batches = Follower(here, made.path, made.run).batches(0.01)
        first = await anext(batches)
        assert (await runs.status(here, made.path)).trainer == launch.trainer
        stop = await runs.stop(here, made.path, grace=30)
        assert (stop.result, stop.killed) == ("stopped", False)
        assert stop.exit is not None
        assert stop.exit.exit_code == 130
        rest = [batch async for batch in batches]
        assert [event.seq for batch in (first, *rest) for event in batch.events] == [0, 1]
        assert rest[-1].ended == stop.exit

    asyncio.run(scenario())


def test_a_trainer_that_cannot_be_started_is_a_run_error(made: RunDir) -> None:
    with pytest.raises(RunError, match="cannot start /no/such/python: No such file"):
        asyncio.run(runs.launch(LocalTransport(), made.path, command=["/no/such/python"]))
    with pytest.raises(RunError, match="cannot start /no/such/python"):
        asyncio.run(runs.launch(LocalTransport(), made.path, command=["/no/such/python"]))


def test_the_supervisor_runs_as_a_copied_file_without_this_package(run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.py"
    copy.write_bytes(Path(runs.__file__).with_name("supervisor.py").read_bytes())
    argv = [sys.executable, "-I", "-S", str(copy), "run", str(run.path), "--", "true"]
    subprocess.run(argv, check=True, capture_output=True, env={"PATH": os.environ["PATH"]})
    assert run.exit()["exit_code"] == 0


def test_runs_are_found_newest_first_among_junk(tmp_path: Path, config: RunConfig) -> None:
    made = [runs.create_run(config, evidence=tmp_path, contract_text="") for _ in range(3)]
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "dispatch.json")
    for name, text in {"broken": "{", "old": '{"ticket": "PMAT-1", "steps": "500"}', "list": "[]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "dispatch.json").write_text(text)
    assert [each.id for each in runs.find_runs(tmp_path)] == [each.id for each in reversed(made)]
    assert runs.find_runs(tmp_path / "missing") == []


def test_a_run_is_meant_by_id_unique_beginning_or_path(tmp_path: Path, config: RunConfig) -> None:
    one, two = (runs.create_run(config, evidence=tmp_path, contract_text="") for _ in range(2))
    shared = next(one.id[:size] for size in range(len(one.id), 0, -1) if two.id.startswith(one.id[:size]))
    unique = one.id[: len(shared) + 1]
    assert runs.resolve_run(tmp_path, one.id) == one
    assert runs.resolve_run(tmp_path, unique) == one
    assert runs.resolve_run(tmp_path / "elsewhere", str(two.path)) == two
    with pytest.raises(RunError, match=f"2 runs begin so: .*{two.id}"):
        runs.resolve_run(tmp_path, shared)
    with pytest.raises(RunError, match="no such run"):
        runs.resolve_run(tmp_path, "1999")
    with pytest.raises(RunError, match="no such run"):
        runs.resolve_run(tmp_path, "")
    with pytest.raises(RunError, match="no such directory"):
        runs.resolve_run(tmp_path, str(tmp_path / "nowhere"))


def test_an_exit_record_says_in_words_how_it_ended() -> None:
    def record(**fields: object) -> manifest.ExitRecord:
        base = {"v": 1, "run": "r", "exit_code": None, "signal": None, "started": 0.0, "ended": 1.0, "seconds": 1.0}
        return manifest.decode(manifest.ExitRecord, json.dumps({**base, **fields}).encode(), "exit.json")

    assert record(exit_code=3).describe() == "exit code 3"
    assert record(signal=9).describe() == "killed by SIGKILL"
    assert record(signal=250).describe() == "killed by signal 250"
    assert record(error="cannot start\x1b[31m").describe() == "cannot start\\x1b[31m"


def test_an_atomic_write_replaces_the_whole_file_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "exit.json"
    write_atomic(target, b"one")
    before = target.stat().st_ino
    write_atomic(target, b"two")
    assert target.read_bytes() == b"two"
    assert target.stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]
    assert target.stat().st_mode & 0o777 == 0o600
